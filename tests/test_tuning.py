"""What the machine decides: chosen within its bounds, kept in the config, and never at the price of the run."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from scoresde_cli import configs, tuning
from scoresde_cli.compose import compose
from scoresde_cli.fields import FieldModel
from scoresde_cli.networks.model import ScoreModel
from scoresde_cli.rng import generator
from scoresde_cli.training import loop
from scoresde_cli.training.compiled import Compiled
from tests.conftest import NO_FIGURES, SMALL
from tests.test_networks import NETWORKS

TINY = [
    "steps=30",
    "data.n=300",
    "eval.n=100",
    "tracker.mode=disabled",
    "device=cpu",
    "checkpoint.every=15",
    *NO_FIGURES,
]


def parts_of(*overrides, n=400):
    from hydra import compose as by_hydra
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(configs.conf_dir()), version_base="1.3"):
        config = by_hydra("train", overrides=[*([f"data.n={n}"] if n else []), "device=cpu", *overrides])
    return compose(OmegaConf.to_container(config, resolve=True))


@pytest.mark.parametrize("network", ["mlp", "resmlp", "energy_mlp"])
def test_the_chunk_keeps_the_tangents_within_their_memory(network, monkeypatch):
    parts = parts_of("data=gmm", "data.d=64", "loss=ism", f"network={network}", "batch_size=32")
    assert tuning.pick_chunk(parts) == 64
    x = tuning.batch(parts)
    t = torch.full((len(x),), 0.5)
    limit = tuning.bytes_of(parts.field, x, t, 10)
    monkeypatch.setattr(tuning, "MOST_BYTES", limit)
    chunk = tuning.pick_chunk(parts)
    assert 1 <= chunk < 64
    assert (
        tuning.bytes_of(parts.field, x, t, chunk) <= 1.1 * limit
    )  # 10 percent: the primal, of the same size as a tangent
    monkeypatch.setattr(tuning, "MOST_BYTES", 1)
    assert tuning.pick_chunk(parts) == 1


def test_the_step_of_a_batch_in_parts_is_the_mean_gradient_of_the_parts(monkeypatch):
    """The parts are drawn one after the other from the step's own generator."""
    plan = parts_of("loss=dsm", "batch_size=60", "accumulate=3").plan()
    state, found = loop.start(plan), []
    monkeypatch.setattr(
        plan.optimizer,
        "apply",
        lambda optimizer, rate: found.append([p.grad.clone() for p in plan.model.network.parameters()]),
    )
    torch.nn.init.normal_(plan.model.network.last.weight, generator=generator(0, "w"))
    value = loop.train_step(plan, state, 1e-3)
    assert state.samples == 60
    plan.model.zero_grad()
    source = generator(plan.seed, "train", 0)
    losses = []
    for _ in range(3):
        field, x0 = loop.draw_batch(plan, source)
        assert len(x0) == 20
        losses.append(plan.loss(field, plan.sde, x0, source).mean())
    (sum(losses) / 3).backward()
    assert torch.allclose(value, sum(losses) / 3, rtol=1e-5)
    for a, p in zip(found[0], plan.model.network.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-4, atol=1e-6 * float(p.grad.abs().max()))


def test_a_long_run_says_beforehand_what_it_takes(monkeypatch, capsys):
    parts = parts_of("loss=dsm", "steps=1000", "compile=false")
    tuning.say_how_long(parts, parts.field, 0)
    assert "s a step" not in capsys.readouterr().out
    monkeypatch.setattr(tuning, "seconds_of", lambda parts, fields, repeats: [0.6])
    tuning.say_how_long(parts, parts.field, 0)
    assert "about 0.6 s a step, 10 minutes for 1000 steps; memory" in " ".join(capsys.readouterr().out.split())


def test_the_work_of_a_network_on_images_counts_every_pixel():
    """A convolution serves all pixels: two operations for each weight and pixel at least, at the coarsest of three levels."""
    unet, mlp = (parts_of("data=digits", f"network={name}", n=None) for name in ("unet", "mlp"))
    weights = sum(p.numel() for p in unet.model.parameters())
    assert tuning.work(unet) > 2 * weights * 4
    assert tuning.work(mlp) == 2 * sum(p.numel() for p in mlp.model.parameters())


def test_a_loss_without_directions_has_no_chunk():
    assert tuning.pick_chunk(parts_of("loss=dsm")) is None


def test_memory_is_that_of_the_machine_or_less():
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < tuning.available_memory(torch.device("cpu")) <= physical


def test_a_chunked_run_learns_the_same(tmp_path, cli):
    """Chunks change the order of sums only: float64, 30 steps."""
    common = ["train", "data=gmm", "data.d=6", "loss=ism", "precision=fp64", *TINY]
    for chunk in ("auto", "2"):
        code, _, err = cli(*common, f"divergence.chunk={chunk}", f"dir=chunk-{chunk}")
        assert code == 0, err
        config = yaml.safe_load((tmp_path / f"chunk-{chunk}" / "config.yaml").read_text())
        assert config["divergence"]["chunk"] == (6 if chunk == "auto" else 2)
    a, b = (
        json.loads((tmp_path / f"chunk-{c}" / "summary.json").read_text())["score_error"]["value"]
        for c in ("auto", "2")
    )
    assert a == pytest.approx(b, rel=1e-9)


def test_trial_steps_leave_no_trace():
    parts = parts_of("loss=ssm")
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    state = torch.random.get_rng_state()
    with tuning.undisturbed(parts):
        tuning.step(parts, parts.field)
        torch.rand(3)
        parts.model.mean += 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.model.state_dict().items())
    assert all(p.grad is None for p in parts.model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


class Sleepy:
    """Stands for a compiled field: the same numbers, after a while."""

    def __init__(self, field):
        self.field = field

    def __getattr__(self, name):
        return getattr(self.field, name)


def test_auto_compiles_long_runs_only_and_keeps_what_is_faster(monkeypatch, capsys):
    made = []

    def stand_in(field):
        made.append(field)
        return Sleepy(field)

    monkeypatch.setattr("scoresde_cli.training.compiled.Compiled", stand_in)
    short = parts_of("steps=100")
    assert tuning.pick_field(short, short.field, 0) is short.field
    long = parts_of("steps=10000000")
    assert tuning.pick_field(long, long.field, 9_999_990) is long.field  # ten steps are left
    bounded = parts_of("steps=10000000", "max_seconds=5")
    assert tuning.pick_field(bounded, bounded.field, 0) is bounded.field
    assert made == []
    for seconds, kept in (([2.0, 1.0], True), ([1.0, 2.0], False)):
        monkeypatch.setattr(tuning, "seconds_of", lambda p, fields, n=3, s=seconds: s if len(fields) == 2 else [1.0])
        found = tuning.pick_field(long, long.field, 0)
        assert isinstance(found, Sleepy) == kept
        assert ("going on without" in capsys.readouterr().out) != kept


@pytest.mark.parametrize("lost", [None, "network.first.weight"])
def test_a_compiled_step_with_another_gradient_is_not_taken(lost, monkeypatch, capsys):
    class Deaf(FieldModel):
        """The same numbers; the gradient of one weight does not come back."""

        def __init__(self, model):
            self.model, self.sde, self.provides = model, model.sde, model.provides

        def score(self, x, t):
            named = {name: p.detach() for name, p in self.model.named_parameters() if name == lost}
            return torch.func.functional_call(self.model, named, (x, t))

    monkeypatch.setattr("scoresde_cli.training.compiled.Compiled", Deaf)
    parts = parts_of("loss=dsm", "compile=true")
    before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
    assert lost is None or lost in before
    field = tuning.settle(parts, {})[0].field
    assert isinstance(field, ScoreModel if lost else Deaf)
    assert (f"has another gradient (of {lost}, by 1 of its size)" in capsys.readouterr().err) == (lost is not None)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in parts.model.named_parameters())


def test_where_nothing_compiles_the_run_goes_on_with_one_line(tmp_path):
    environment = {
        **os.environ,
        "CXX": "/nonexistent",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "scoresde_cli", "train", "compile=true", "dir=run", *TINY],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "compile" in line]
    assert len(lines) == 1
    assert "not possible with this network on this machine, going on without" in lines[0]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["compile"] is False


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_compiled_doors_give_the_same_numbers_and_gradients(low):
    """float32: sums in another order; bfloat16: 8 bits a product, averaged over many."""
    parts = parts_of(
        "network.width=16", "network.depth=1", "data=gmm", "data.d=4", f"precision={'bf16' if low else 'fp32'}"
    )
    torch.nn.init.normal_(parts.model.network.last.weight, std=0.2)
    weights, x = list(parts.model.network.parameters()), tuning.batch(parts)
    t = torch.linspace(0.05, 0.9, len(x))
    v = torch.randn((2, *x.shape), generator=generator(0, "v"))
    compiled = Compiled(parts.field)

    def of(field):
        score, projected = field.forward_projections(x, t, v)
        value = score.square().sum(1) + 2 * projected.mean(0)
        value = (value if low else value + field.forward_trace(x, t)[1]).mean()
        return value.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])

    (value, gradient), (expected, direction) = of(compiled), of(parts.field)
    tolerance = 2e-2 if low else 1e-4
    assert float(value) == pytest.approx(float(expected), rel=tolerance)
    assert float((gradient - direction).norm() / direction.norm()) < tolerance


def test_a_compiled_run_is_kept_resumed_and_says_so(tmp_path, cli):
    common = [a for a in TINY if not a.startswith("steps")]
    code, out, err = cli(
        "train", "compile=true", "loss=dsm", "network.width=16", "network.depth=1", "steps=15", "dir=run", *common
    )
    assert code == 0, err
    assert "compiled in" in out
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["compile"] is True
    assert json.loads((tmp_path / "run/summary.json").read_text())["train_seconds"]["protocol"]["compiled"] is True
    code, out, err = cli("train", "resume=run", "steps=30")
    assert code == 0, err
    assert "compiled in" in out
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["compile"] is True


@pytest.mark.parametrize("network", ["mlp", "resmlp", "energy_mlp"])
def test_bf16_lowers_the_training_only(network, tmp_path, cli):
    """Weights, moments and everything measured stay float32; the loss of a batch is right to the rounding of its products."""
    code, _, err = cli("train", "precision=bf16", f"network={network}", "loss=ssm", "dir=run", *SMALL, *NO_FIGURES)
    assert code == 0, err
    from safetensors.torch import load_file

    newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    assert {w.dtype for w in load_file(newest / "model.safetensors").values()} == {torch.float32}
    low, full = parts_of("precision=bf16", f"network={network}"), parts_of("precision=fp32", f"network={network}")
    for parts in (low, full):
        for p in parts.model.network.parameters():
            torch.nn.init.normal_(p, std=0.3, generator=generator(0, "weights"))
    x0 = tuning.batch(low)
    a, b = (p.loss(p.field, p.sde, x0, generator(0, "b")).detach() for p in (low, full))
    assert not torch.equal(a, b)
    assert float((a - b).norm() / b.norm()) < 0.05
    assert torch.equal(
        low.model.score(x0, torch.full((len(x0),), 0.5)), full.model.score(x0, torch.full((len(x0),), 0.5))
    )


def test_a_network_of_the_users_trains_in_bf16():
    """torch.func under autocast."""
    parts = parts_of("precision=bf16", "loss=ssm")
    parts.field.network = NETWORKS["plain"]((2,))
    parts.loss(parts.field, parts.sde, tuning.batch(parts), generator(0, "u")).mean().backward()
    assert all(p.grad.isfinite().all() and p.dtype == torch.float32 for p in parts.field.network.parameters())


def test_the_benchmarks_run(tmp_path):
    script = configs.conf_dir().parent / "scripts/experiments/bench.py"
    done = subprocess.run(
        [sys.executable, str(script), "--small", "--threads", "1", "--json", "rows.json", "trace"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows][:2] == ["d reverse passes", "unit tangents"]
    assert all(row["ratio"] > 0 for row in rows)


class WithStatistics(torch.nn.Module):
    """A user's network that keeps statistics beside its weights, and draws from the global generator."""

    def __init__(self, shape):
        super().__init__()
        d = torch.Size(shape).numel()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(d + 1, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.SiLU(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(16, d),
        )

    def forward(self, x, c):
        return self.net(torch.cat([x.flatten(1), c[:, None]], 1)).reshape(x.shape)


def test_the_average_keeps_the_statistics_of_the_network():
    from scoresde_cli.training import loop

    parts = parts_of("loss=dsm", "batch_size=64")
    parts.model.network = WithStatistics((2,))
    state = loop.start(parts.plan())
    for _ in range(5):
        loop.train_step(parts.plan(), state, 1e-3)
    found, kept = dict(state.model.network.named_buffers()), dict(state.average.network.named_buffers())
    assert float(found["net.1.running_var"].sub(1).abs().max()) > 0.01
    assert all(torch.equal(found[name], kept[name]) for name in found)


def test_a_network_that_draws_is_repeated_step_by_step():
    """Dropout draws from the global generator, which each step seeds: the same weights again."""
    from scoresde_cli.training import loop

    ends = []
    for _ in range(2):
        parts = parts_of("loss=dsm", "batch_size=64")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts.model.network = WithStatistics((2,))
        state = loop.start(parts.plan())
        for _ in range(3):
            torch.rand(5)  # whatever else happens in the process
            loop.train_step(parts.plan(), state, 1e-3)
        ends.append(torch.cat([p.detach().flatten() for p in state.model.network.parameters()]))
    assert torch.equal(*ends)


def test_dropout_is_one_network_for_all_chunks():
    """The gradient of the chunks, recomputed, is that of the draws of the forward pass: chunks of one and of all agree."""
    from scoresde_cli import divergence

    network = torch.nn.Sequential(
        torch.nn.Linear(4, 16), torch.nn.Dropout(0.3), torch.nn.Tanh(), torch.nn.Linear(16, 4)
    ).double()
    x = torch.randn(8, 4, generator=generator(0, "x"), dtype=torch.float64)
    v = torch.randn(3, 8, 4, generator=generator(0, "v"), dtype=torch.float64)

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, y, t):
            return self.network(y)

    found = []
    for chunk in (3, 2, 1):
        torch.manual_seed(1)
        out, jvp = divergence.dual(Field(), x, x[:, 0], v, chunk)
        value = out.square().sum() + (v * jvp).sum(2).square().sum()
        found.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(value, list(network.parameters()), allow_unused=True)])
        )
    assert torch.allclose(found[1], found[2], rtol=1e-12)
    assert torch.allclose(found[0], found[2], rtol=1e-12)


class Broken(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.net = torch.nn.Linear(17, 2)

    def forward(self, x, c):
        return self.net(x)


class Weightless(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()

    def forward(self, x, c):
        return -x


@pytest.mark.parametrize(
    ("network", "loss", "says"),
    [
        ("Broken", "ssm", "a training step of Broken with loss=ssm fails on a batch of (256, 2)"),
        ("Weightless", "dsm", "network Weightless has no weights to train"),
        ("WithStatistics", "fd_ssm", "BatchNorm1d: it mixes the samples of a batch"),
    ],
)
def test_a_network_that_cannot_train_is_refused_before_the_run_begins(network, loss, says, tmp_path, cli):
    code, _, err = cli("train", f"network._target_=tests.test_tuning.{network}", "~network.width", "~network.depth",
                       "~network.activation", f"loss={loss}", "dir=run", *TINY)  # fmt: skip
    assert code == 2, err
    assert says in err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_compiling_is_left_out_where_directions_come_in_chunks(capsys):
    parts = parts_of("data=gmm", "data.d=6", "loss=ism", "compile=true")
    parts.field.chunk = 2
    assert tuning.pick_field(parts, parts.field, 0) is parts.field
    assert "no effect with 2 of 6 directions" in capsys.readouterr().out
