"""Labels: the score given a label, the score without, and guidance between and beyond."""

import numpy as np
import pytest
import torch

from scoresde_cli.datasets.digits import Digits
from scoresde_cli.datasets.mixtures import GMM, EightGaussians
from scoresde_cli.datasets.table import Table
from scoresde_cli.divergence import finite_difference, score_and_projections
from scoresde_cli.errors import Unreadable
from scoresde_cli.identity import randomise
from scoresde_cli.networks.embedding import NoiseEmbedding
from scoresde_cli.networks.energy_mlp import EnergyMLP
from scoresde_cli.networks.mlp import MLP
from scoresde_cli.networks.model import ScoreModel, fit_gaussian
from scoresde_cli.networks.parameterisation import Residual
from scoresde_cli.networks.resmlp import ResMLP
from scoresde_cli.rng import generator, normal
from scoresde_cli.runs import load_run
from scoresde_cli.samplers.steering import Guided
from scoresde_cli.sdes.vp import VP

F64 = torch.float64


def model_of(make):
    x = normal((200, 2), generator(0, "data"), F64)
    network = randomise(make((2,), 16, 2, classes=3), 0)
    return ScoreModel(network, VP(), Residual(), fit_gaussian(x, "isotropic")).double()


@pytest.mark.parametrize("make", [MLP, ResMLP, EnergyMLP])
def test_every_network_takes_labels_on_every_route(make):
    model, x, t = model_of(make), normal((6, 2), generator(1, "x"), F64), torch.rand(6, dtype=F64) * 0.9 + 0.05
    labels = torch.tensor([0, 1, 2, -1, 0, 1])
    given = model.labelled(labels)
    for i in range(6):  # a row of a batch has its own label, and no other
        alone = model.labelled(labels[i : i + 1]).score(x[i : i + 1], t[i : i + 1])
        assert torch.allclose(given.score(x, t)[i : i + 1], alone, rtol=1e-12)
    assert torch.equal(given.score(x, t)[3], model.score(x, t)[3])  # -1 is no label
    assert (given.score(x, t)[:3] - model.score(x, t)[:3]).abs().max() > 1e-3
    v = normal((2, 6, 2), generator(2, "v"), F64)
    exact = score_and_projections(given, x, t, v)[1]
    _, differences = finite_difference(given, x, t, v, torch.full((6,), 1e-5, dtype=F64))
    assert torch.allclose((v * differences).sum(2), exact, atol=1e-6)  # O(h^2) and rounding over h
    assert model.labels is None  # a view of its own


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_guidance_is_linear_between_the_score_without_and_with_the_label(weight):
    model, x, t = model_of(MLP), normal((6, 2), generator(1, "x"), F64), torch.full((6,), 0.3, dtype=F64)
    free, given = model.score(x, t), model.labelled(torch.tensor([2])).score(x, t)
    guided = Guided(model, 2, weight)
    assert torch.allclose(guided.score(x, t), free + weight * (given - free), rtol=1e-12)
    assert guided.evaluations == 2


def test_the_labels_of_a_mixture_are_its_components():
    data = EightGaussians(labels=True, n=500)
    for name, x in data.splits.items():
        nearest = torch.cdist(x.double(), data.law.means).argmin(1)
        assert torch.equal(nearest, data.labels[name])  # eight components, ten standard deviations apart
    assert torch.equal(data.splits["train"], EightGaussians(n=500).splits["train"])  # labels change no draw
    assert GMM(labels=True, modes=3, n=100).classes == ["0", "1", "2"]


def test_the_labels_of_digits_stand_beside_their_images():
    from sklearn.datasets import load_digits

    data, loaded = Digits(labels=True), load_digits()
    table = {image.tobytes(): label for image, label in zip(loaded.images, loaded.target, strict=True)}
    for name, x in data.splits.items():
        images = data.units.to_user(x).numpy()
        assert all(table[image[0].tobytes()] == label for image, label in zip(images, data.labels[name], strict=True))


def test_a_column_of_words_labels_a_table(tmp_path):
    rows = [f"{i},{'red' if i % 3 else 'white'},{i % 7}" for i in range(60)]
    (tmp_path / "t.csv").write_text("a,colour,b\n" + "\n".join(rows) + "\n")
    data = Table(str(tmp_path / "t.csv"), labels="colour")
    assert (data.classes, data.columns, data.shape) == (["red", "white"], ["a", "b"], (2,))
    for name, x in data.splits.items():
        a = data.units.to_user(x)[:, 0].round()
        assert torch.equal(data.labels[name], (a % 3 == 0).long())
    numbered = Table(str(tmp_path / "t.csv"), labels="b", columns=["a"])
    assert numbered.classes == [str(k) for k in range(7)]
    with pytest.raises(Unreadable, match="distinct values"):
        Table(str(tmp_path / "t.csv"), labels="a", columns=["b"])


def test_a_label_is_as_loud_as_the_level_and_as_before_in_an_older_checkpoint():
    """Each feature of the code has mean square 1 over the labels; weights that come without a scale were learnt with ones."""
    embedding = NoiseEmbedding(classes=5)
    c = torch.stack([torch.zeros(6), torch.arange(-1.0, 5.0)], 1)
    codes = embedding(c)[:, -5:]
    assert torch.allclose(codes[1:].square().mean(0), torch.ones(5))
    assert (codes[0] == 0).all()
    old = {name: x for name, x in embedding.state_dict().items() if name != "label_scale"}
    embedding.load_state_dict(old)
    assert torch.equal(embedding(c)[1:, -5:], torch.eye(5))


def test_a_trained_run_draws_the_class_that_is_asked_for(cli, tmp_path):
    """Eight Gaussians at 1.4 (cos, sin)(k pi / 4): samples given label 2 stand near (0, 1.4), without a label around zero."""
    quick = [
        "loss=dsm",
        "steps=600",
        "data.labels=true",
        "label_dropout=0.3",
        "data.n=5000",
        "eval.n=100",
        "eval.figures=false",
    ]
    code, _, err = cli(
        "train", "dir=r", "network.width=64", "optimizer.lr=5e-3", "ema=0.99", "tracker.mode=disabled", *quick
    )
    assert code == 0, err
    assert cli("sample", "run=r", "n=500", "label=2", "out=two.npz")[0] == 0
    two = np.load("two.npz")["x"]
    # Half the distance to the next component, 0.54, at the median: a wrong label is 1.07 away and more.
    assert np.median(np.linalg.norm(two - [0.0, 1.4], axis=1)) < 0.54
    run = load_run("r")
    assert run.parts.data.classes == [str(k) for k in range(8)]
    assert np.allclose(run.sample(500, label=2), two, atol=1e-6)
    free = run.sample(500)
    assert np.linalg.norm(free.mean(0)) < 0.5
    code, _, err = cli("sample", "run=r", "label=8")
    assert code == 2
    assert "expected one of 0, 1" in err


def test_a_network_that_takes_no_labels_is_refused(cli, tmp_path):
    (tmp_path / "labelless.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self, shape):\n        super().__init__()\n"
        "        self.last = torch.nn.Linear(2, 2)\n\n    def forward(self, x, c):\n        return self.last(x)\n"
    )
    code, _, err = cli(
        "train",
        "network._target_=labelless.Net",
        "~network.width",
        "~network.depth",
        "~network.activation",
        "data.labels=true",
    )
    assert code == 2
    assert "takes no labels" in err


def test_training_hides_the_share_of_labels_that_it_says(monkeypatch):
    from scoresde_cli.compose import compose
    from scoresde_cli.training import loop
    from tests.test_evaluation import config

    parts = compose(
        config(data__labels="true", data__n=500, label_dropout=0.3, batch_size=2000, network__width=8, loss="dsm")
    )
    plan, seen = parts.plan(), []
    whole = ScoreModel.labelled
    monkeypatch.setattr(ScoreModel, "labelled", lambda self, labels: seen.append(labels) or whole(self, labels))
    loop.train_step(plan, loop.start(plan), 1e-3)
    (labels,) = seen
    hidden = (labels == -1).float().mean()
    assert abs(float(hidden) - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    source = generator(0, "train", 0)
    rows = torch.randint(500, (2000,), generator=source)  # the rows of the step, whose labels they are
    assert torch.equal(labels[labels >= 0], parts.data.labels["train"][rows][labels >= 0])


def test_labels_that_are_numbers_keep_their_names(tmp_path):
    rows = np.random.default_rng(0).normal(size=(60, 2))
    np.save(tmp_path / "t.npy", np.column_stack([rows, 1_000_001 + np.arange(60) % 2]))
    assert Table(str(tmp_path / "t.npy"), labels="x2").classes == ["1000001", "1000002"]
    np.save(tmp_path / "t.npy", np.column_stack([rows, 0.5 * (1 + np.arange(60) % 2)]))
    assert Table(str(tmp_path / "t.npy"), labels="x2").classes == ["0.5", "1"]
