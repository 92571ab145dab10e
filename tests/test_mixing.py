"""The control variate of dsm_cv: no bias with weights that are estimated, variance below both, and the same after a cut."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from scoresde_cli.errors import Unreadable
from scoresde_cli.identity import randomise
from scoresde_cli.losses.dsm import DSM
from scoresde_cli.losses.dsm_cv import DSMCV, LEAST, MOST, THIN, ByLevel
from scoresde_cli.losses.ism import ISM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.projections import Rademacher
from scoresde_cli.rng import generator, normal
from scoresde_cli.training import loop, mixing
from scoresde_cli.training.mixing import BINS, Mixer, log_ratio, moments
from scoresde_cli.training.state import Checkpoint, checkpoints
from scoresde_cli.training.variance import Batch
from tests.conftest import NO_FIGURES, SMALL
from tests.test_training import KILLER, losses, same, weights
from tests.test_tuning import parts_of


def plan_of(d=2, *arguments, spread=True) -> loop.Plan:
    """dsm_cv on a mixture, float64; with `spread`, every weight of the network is drawn, so that none is zero."""
    parts = parts_of(
        "data=gmm", f"data.d={d}", "loss=dsm_cv", "precision=fp64", "network.width=16", "network.depth=2", *arguments
    )
    if spread:
        randomise(parts.model.network, 0)
    return parts.plan()


def drawn(plan: loop.Plan, samples: int, *source: int | str) -> Batch:
    return Batch.draw(replace(plan, field=plan.model, batch_size=samples), *source)


class Chunky(nn.Module):
    """A user's network that knows labels, has a weight that is not trained, and no dual pass of its own."""

    classes = 3

    def __init__(self, shape):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(shape[0] + 2, 8), nn.Tanh(), nn.Linear(8, shape[0]))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x, c):
        return self.net(torch.cat([x, c], 1)) * self.frozen


@pytest.mark.parametrize("n_proj", [1, 3])
def test_the_moments_are_those_of_gradients_one_by_one(n_proj, monkeypatch):
    plan = plan_of(3, f"n_proj={n_proj}", "data.labels=true", "data.modes=3")
    monkeypatch.setattr(mixing, "BYTES", 10_000)  # a few samples at a time
    for network in (plan.model.network, Chunky((3,)).double()):
        plan.model.network = network
        batch = drawn(plan, 6, "one by one")
        v = plan.loss.frame(batch.field, batch.noised.x_t, batch.t, 6, generator(0, "v"))
        found = moments(batch, v)
        chosen = [p for p in network.parameters() if p.requires_grad]
        for i in range(6):
            field = batch.field.labelled(batch.field.labels[i : i + 1])
            x, t = batch.noised.x_t[i : i + 1].requires_grad_(), batch.t[i : i + 1]
            score = field.score(x, t)
            target = plan.sde.kernel().targets(batch.x0, batch.noised, batch.t, {"score"})["score"][i]
            pushed = [
                torch.autograd.grad(score, x, w[None], create_graph=True)[0] @ w for w in v[:, i]
            ]  # v^T J, then v
            scale, square = plan.sde.sigma(t[0]).square(), score.square().sum()
            dsm = scale * (square - 2 * (score @ target).sum())
            ssm = scale * (square + 2 * torch.stack(pushed).mean())
            g, delta = (
                torch.cat([
                    torch.zeros_like(p).flatten() if e is None else e.flatten()
                    for p, e in zip(chosen, torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True), strict=True)
                ])
                for value in (dsm, ssm - dsm)
            )  # fmt: skip
            expected = torch.stack([torch.stack([g @ g, g @ delta]), torch.stack([g @ delta, delta @ delta])])
            assert torch.allclose(found[i], expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def gradients(plan, make, batches, size=64):
    """(batches, P) of the loss that `make` gives for each batch, on the same batches for every loss."""
    found = []
    for i in range(batches):
        batch = drawn(plan, size, "bias", i)
        found.append(batch.gradient(make(i), "a"))
    return torch.stack(found)


def mean_square_z(excess):
    """Of the components, one in expectation where the mean is zero."""
    n = len(excess)
    return float((n * excess.mean(0).square() / excess.var(0).clamp_min(1e-30)).mean())


def test_the_gradient_has_no_bias_with_fixed_and_with_estimated_weights():
    """Against ISM on the same batches. 'anew': w is estimated before each batch, from few samples, so that it varies wildly."""
    plan = plan_of(2)
    mixer = Mixer(plan.loss, plan.sde)

    def anew(i):
        row = mixer.measure(plan, i, 32)
        w = mixing.optimum([row])
        return plan.loss.weighing(
            *(ByLevel(mixer.nodes, torch.tensor(each)) for each in (w, mixing.allocation([row], w, 1)))
        )

    once = anew(10_000)
    ism = gradients(plan, lambda i: ISM(), 120)
    ways = normal((16, ism.shape[1]), generator(0, "ways"), torch.float64)
    rival = {
        "fixed": lambda i: DSMCV(Rademacher(), 1, 0.3),
        "once": lambda i: once,
        "anew": anew,
        "mostly ssm": lambda i: DSMCV(Rademacher(), 1, 30.0),
    }
    for name, make in rival.items():
        excess = gradients(plan, make, 120) - ism
        along = excess @ ways.T
        z = math.sqrt(120) * along.mean(0) / along.std(0)
        # 16 directions in weight space, 120 batches: |t| of 119 degrees of freedom above 4.2 once in 1000 for the largest.
        assert float(z.abs().max()) < 4.2, name
        # About 60 independent components: 2 is four standard errors above the 1 of no bias.
        assert mean_square_z(excess) < 2, name


@pytest.mark.parametrize("n_proj", [1, 2])  # 2: the exact trace
def test_a_batch_in_parts_has_the_estimates_of_a_whole_one(n_proj):
    plan = plan_of(2, f"n_proj={n_proj}")
    mixer = Mixer(plan.loss, plan.sde)
    assert mixer.measure(replace(plan, accumulate=4), 0, 32) == mixer.measure(plan, 0, 32)


def test_weights_that_see_their_own_batch_would_be_biased():
    """What the design rules out shows: the best w for each batch's own gradients, ten samples of one time."""
    plan = plan_of(2)
    excess = []
    for i in range(300):
        batch = Batch.draw(replace(plan, field=plan.model, batch_size=10), "leak", i, at=0.05)
        dsm, ssm = batch.gradient(DSM(), "a"), batch.gradient(SSMVR(Rademacher(), 1), "a")
        delta = ssm - dsm
        w = -(dsm @ delta) / (delta @ delta)
        excess.append(w * delta)  # of mean zero for a w of other batches
    excess = torch.stack(excess)
    assert mean_square_z(excess) > 2


@pytest.mark.parametrize("d", [2, 16])
@pytest.mark.parametrize("spread", [True, False], ids=["spread", "untrained"])
def test_the_variance_is_below_both_at_every_level(d, spread):
    """Of eight estimates, pooled: at every level at most 1.05 of the lesser of DSM's and SSM-VR's, and well below it somewhere."""
    plan = plan_of(d, "n_proj=1", spread=spread)
    if not spread:
        with torch.no_grad():  # the last layer is zero, and delta with it, but for its own gradient
            plan.model.network.last.weight.normal_(std=1e-3, generator=torch.Generator().manual_seed(0))
    mixer = Mixer(plan.loss, plan.sde)
    w = mixing.optimum([mixer.measure(plan, step, 128) for step in range(8)])
    loss = plan.loss.weighing(ByLevel(mixer.nodes, torch.tensor(w, dtype=torch.float64)))
    batch = drawn(plan, 256 * BINS, "truth")
    m = moments(batch, loss.frame(batch.field, batch.noised.x_t, batch.t, len(batch.t), generator(0, "v")))
    mixed = loss.table(plan.sde, batch.t)(batch.t)
    g, cross, square = m[:, 0, 0], m[:, 0, 1], m[:, 1, 1]
    found, dsm, ssm = (
        values.reshape(BINS, -1).mean(1)
        for values in (g + 2 * mixed * cross + mixed.square() * square, g, g + 2 * cross + square)
    )
    ratio = found / torch.minimum(dsm, ssm)
    # 256 samples a level give |g|^2 to some percent, but the three share their samples.
    assert float(ratio.max()) < 1.05
    assert float(ratio.min()) < (1.0 if spread else 0.85)
    assert not bool(((mixed > 0) & (mixed < LEAST) | (mixed > MOST) & (mixed < 1)).any())


def test_weights_are_linear_between_their_nodes_and_constant_beyond():
    nodes = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    w = ByLevel(nodes, torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64))
    at = torch.tensor([-5.0, -2.0, -1.0, 0.0, 0.25, 1.0, 9.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 1.0, 0.7, 0.4, 0.3, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(w(at.exp()), expected, atol=1e-12)


def test_the_levels_hold_as_many_of_the_training_times_each():
    plan = plan_of(2)
    mixer = Mixer(plan.loss, plan.sde)
    t = DSM().noise(plan.sde, torch.zeros(1600, 2, dtype=torch.float64), generator(5, "t"))[0]
    counts = torch.searchsorted(mixer.edges, log_ratio(plan.sde, t), right=True).bincount(minlength=BINS)
    assert int((counts - 100).abs().max()) <= 2  # the times are stratified


def test_times_are_drawn_where_noise_is_left_and_directions_are_cheap():
    """Two halves of the levels: w = 1 with noise 1 a sample that costs three, w = 0 with noise 9 that costs one.

    (a/q + 9 b/q') (3 a q + b q'), a = b = 1/2, is least at q'/q = sqrt(9 * 3); and no level is left out.
    """
    half = torch.ones(BINS // 2, dtype=torch.float64)

    def levels(noise):
        row = {
            "cross": torch.cat([half, 0 * half]), "square": torch.cat([half, half]),
            "plain": torch.cat([half + noise, 9 * half]),
        }  # fmt: skip
        return mixing.allocation([{name: each.tolist() for name, each in row.items()}], row["cross"].tolist(), 2)

    often = levels(1.0)
    assert often[-1] / often[0] == pytest.approx(math.sqrt(27), rel=1e-9)
    assert levels(1e-9)[0] == 1 / THIN


@pytest.mark.parametrize("estimated", [False, True], ids=["fixed", "estimated"])
def test_times_that_are_drawn_less_often_are_weighted_for_it(estimated):
    plan, loss = plan_of(2), DSMCV(Rademacher(), 1, 0.5)
    if estimated:
        nodes = Mixer(plan.loss, plan.sde).nodes
        loss = loss.weighing(
            ByLevel(nodes, torch.zeros(BINS)), ByLevel(nodes, 1.0 + 0.75 * torch.sin(torch.arange(BINS)))
        )
    x0, sums, law, sparse, plain = torch.zeros(128, 2, dtype=torch.float64), [], [], [], []
    for i in range(400):
        t, noised = loss.noise(plan.sde, x0, generator(i, "thin"))
        f = torch.stack([torch.ones_like(t), t, t.log(), (t < 0.01).double()])
        sums.append((f * noised.aux["weight"]).mean(1))
        every = DSM().noise(plan.sde, x0, generator(i, "thin"))[0]
        law.append(torch.stack([torch.ones_like(t), every, every.log(), (every < 0.01).double()]).mean(1))
        one = loss.table(plan.sde, t)(t) == 1
        sparse.append(float(one.double().mean()))
        plain.append(float((loss.table(plan.sde, every)(every) == 1).double().mean()))
    sums, law = torch.stack(sums), torch.stack(law)
    error = ((sums.var(0) + law.var(0)) / 400).sqrt().clamp_min(1e-12)
    assert float(((sums.mean(0) - law.mean(0)) / error)[1:].abs().max()) < 4
    assert float((sums[:, 0] - 1).abs().max()) < 0.03  # one of 128 more or less, of weight 3 (4 where estimated)
    share = sum(plain) / 400
    if estimated:
        assert share == 0
        assert float(error[1]) > 1e-4  # the times are other ones
        return
    assert sum(sparse) / 400 == pytest.approx(share / 4 / (1 - 0.75 * share), rel=0.05)


def test_every_step_has_only_the_directions_that_it_needs():
    plan, counted = plan_of(2, "batch_size=256"), []
    loss = DSMCV(Rademacher(), 1, 0.2)

    class Watched:
        def __getattr__(self, name):
            return getattr(plan.model, name)

        def forward_projections(self, x, t, v, exact=False):
            counted.append(v.shape[1])
            return plan.model.forward_projections(x, t, v, exact)

    x0 = plan.train[:256]
    t, noised = loss.noise(plan.sde, x0, generator(0, "t"))
    loss.weighted(Watched(), plan.sde, x0, noised, t, generator(0, "v"))
    assert counted == [int((loss.table(plan.sde, t)(t) > 0).sum())]
    assert 30 < counted[0] < 100
    # A w that is zero in between costs no direction there.
    nodes = log_ratio(plan.sde, torch.tensor([1e-3, 0.02, 0.1, 0.5], dtype=torch.float64))
    gap = loss.weighing(ByLevel(nodes, torch.tensor([0.6, 0.0, 0.6, 0.0])))
    t, noised = gap.noise(plan.sde, x0, generator(0, "t"))
    gap.weighted(Watched(), plan.sde, x0, noised, t, generator(0, "v"))
    w = gap.table(plan.sde, t)(t)
    assert counted[1] == int((w > 0).sum()) < int((t <= t[w > 0].max()).sum()) - 20
    # And in whatever order the times come, the loss of each sample is the same function of it.
    exact = DSMCV(Rademacher(), 2, 0.2)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    mixed = type(noised)(
        noised.x_t[order], noised.mean[order], type(noised.factor)(noised.factor.c[order]), noised.eps[order],
        {"weight": noised.aux["weight"][order]},
    )  # fmt: skip
    one = exact.weighted(plan.model, plan.sde, x0, noised, t, generator(0, "v"))
    other = exact.weighted(plan.model, plan.sde, x0[order], mixed, t[order], generator(0, "v"))
    assert torch.allclose(one[order], other, rtol=1e-10, atol=1e-10)


RUN = [
    "train", "data=gmm", "data.d=4", "loss=dsm_cv", "n_proj=1", "network.width=16", "network.depth=1", *SMALL, *NO_FIGURES,
    "steps=230", "checkpoint.every=50",
]  # fmt: skip


def test_a_cut_run_has_the_same_weights_bit_for_bit(tmp_path, cli):
    """Cut between the estimates of steps 100 and 200; `rerun` of it gives the same numbers once more."""
    code, out, err = cli(*RUN, "dir=whole", "compile=true")
    assert code == 0, err
    assert "weigh the same at sigma/alpha" in out
    assert "compile=true has no effect with loss=dsm_cv" in out
    arguments = ["scoresde_cli.training.loop", "train_step", "130", *RUN, f"dir={tmp_path / 'cut'}"]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    code, _, err = cli("train", "resume=cut")
    assert code == 0, err
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert same(weights(whole)[0], weights(cut)[0])
    assert losses(whole) == losses(cut)
    found, again = (json.loads((run / "summary.json").read_text())["threshold"] for run in (whole, cut))
    assert found == again
    assert [row["step"] for row in found["curve"]] == [0, 100, 200]
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["threshold"] for row in rows if row["step"] == 150] == [found["curve"][1]["threshold"]]
    code, out, err = cli("rerun", "whole", "dir=third")
    assert code == 0, err
    assert "differs" not in out


def test_damaged_weights_are_refused(tmp_path, cli):
    assert cli(*RUN[:-2], "steps=20", "dir=run")[0] == 0
    newest = checkpoints(tmp_path / "run/checkpoints")[-1]
    facts = json.loads((newest / "checkpoint.json").read_text())
    for wrong in ({"w": "all"}, {"cross": None}, {"step": -1}, {"more": 1}):
        (newest / "checkpoint.json").write_text(json.dumps({**facts, "choices": [{**facts["choices"][0], **wrong}]}))
        with pytest.raises(Unreadable):
            Checkpoint.read(newest)
