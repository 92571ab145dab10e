"""What a run says of itself: intervals that cover, and a verdict that is neither kind nor unfair."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from scoresde_cli import configs, divergence, figures
from scoresde_cli.compose import compose
from scoresde_cli.datasets.digits import Digits
from scoresde_cli.datasets.idx import IDX
from scoresde_cli.datasets.mixtures import EightGaussians
from scoresde_cli.datasets.planar import Moons
from scoresde_cli.datasets.table import Table
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.evaluation import (
    METRICS,
    QUICK,
    evaluate,
    fresh_pairs,
    in_words,
    losses,
    overfitted,
    pick_metrics,
    unlike,
    verdict,
)
from scoresde_cli.identity import randomise
from scoresde_cli.likelihood import Flow
from scoresde_cli.metrics.nll import nll
from scoresde_cli.networks.flow_model import gaussian_model
from scoresde_cli.networks.model import ScoreModel, fit_gaussian
from scoresde_cli.networks.parameterisation import Residual
from scoresde_cli.networks.unet import UNet
from scoresde_cli.projections import Coordinate, Rademacher
from scoresde_cli.rng import generator
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.sdes.vp import VP
from tests.pictures import idx_bytes, write_idx


def config(**changes):
    """The resolved default config of `train`, with options of groups and keys changed."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(configs.conf_dir()), version_base="1.3"):
        overrides = [f"{k.replace('__', '.')}={v}" for k, v in changes.items()]
        return OmegaConf.to_container(hydra_compose("train", overrides=overrides), resolve=True)


def entry(value, low, high, floor_high=None):
    return {"value": value, "ci": [low, high], "floor": None, "floor_high": floor_high}


def summary(gain=(0.2, 0.1, 0.3), error=(0.01, 0.008, 0.012), distance=(0.05, 0.04, 0.06)):
    return {
        "loss_gain": entry(*gain), "loss": entry(-1.2, -1.3, -1.1), "loss_baseline": entry(-1.0, -1.1, -0.9),
        "score_error": entry(*error, 0.0), "score_error_baseline": entry(0.15, 0.14, 0.16),
        "sliced_wasserstein": entry(*distance, 0.055), "sliced_wasserstein_baseline": entry(0.3, 0.3, 0.3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"gain": (0.01, -0.02, 0.04)}, "held-out loss"),
        ({"error": (0.16, 0.15, 0.17)}, "score_error 0.16 against 0.15"),
        ({"distance": (0.4, 0.35, 0.5)}, "sliced_wasserstein 0.4 against 0.3"),
        ({"error": (0.1, 0.09, 0.11)}, "hardly learnt"),
    ],
)
def test_the_verdict_names_what_did_not_beat_the_baseline(changes, says):
    found = verdict(summary(**changes))
    assert (found is None) if says is None else says in found
    if says and "hardly" not in says:
        assert found.startswith("did not beat its baseline")


def test_the_verdict_says_which_gaussian_the_baseline_is():
    for n, says in ((150, "mean and mean variance"), (200, "mean and covariance")):  # of 16 columns
        baseline = compose(config(data="gmm", data__d=16, data__n=n)).baseline
        assert says in verdict(summary(gain=(0.01, -0.02, 0.04)), in_words(baseline))


def test_overfitting_is_said_only_where_the_loss_turned():
    assert overfitted(best=-4.0, best_step=1000, last=-3.9, step=5000, passes=900) is None
    assert overfitted(best=-4.0, best_step=5000, last=-4.0, step=5000, passes=900) is None
    assert overfitted(best=-4.0, best_step=1000, last=-2.0, step=5000, passes=15) is None
    assert "step 1000" in overfitted(best=-4.0, best_step=1000, last=-2.0, step=5000, passes=900)


def test_the_interval_of_the_loss_is_for_rows_however_often_each_is_noised():
    """Fresh test sets of 100 rows: the interval of the gain covers the gain on 20,000 rows in about 95 percent of cases."""
    parts = compose(config(data="gmm", data__n=2000, data__std=0.2))
    # A model that is right at every t, so that the gain is large and its spread is the data's.
    parts.data.splits["test"] = parts.data.fresh(20_000, torch.Generator().manual_seed(99))

    class Exact(ScoreModel):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.sde, self.truth = parts.sde, parts.data.oracle(parts.sde)

        def forward(self, x, t):
            return self.truth.score(x, t)

        def forward_dual(self, x, t, v):
            from scoresde_cli import divergence

            return divergence.dual(self.truth, x, t, v)

        def forward_trace(self, x, t):
            from scoresde_cli import divergence

            return divergence.weighted_trace(self.truth, x, t, None)

    model = Exact()
    target = losses(parts, model, False, 0, 0)["loss_gain"]["value"]
    covered, values, widths = 0, [], []
    for i in range(40):
        parts.data.splits["test"] = parts.data.fresh(100, torch.Generator().manual_seed(i))
        found = losses(parts, model, False, 0, i)["loss_gain"]
        low, high = found["ci"]
        covered += low <= target <= high
        values.append(found["value"])
        widths.append(high - low)
    # 40 repeats at 93 to 95 percent (a percentile bootstrap of 100 rows is a little short): four binomial deviations.
    assert covered >= 40 * 0.93 - 4 * math.sqrt(40 * 0.93 * 0.07)
    # And no wider than it need be: 40 repeats know the spread of the values within 11 percent, three of them.
    assert np.mean(widths) / (2 * 1.96 * np.std(values)) == pytest.approx(1.0, abs=0.35)


def test_a_right_model_of_mixture_data_gets_a_good_report():
    """The exact score in place of a network: samples at the floor, no score error, a gain, no complaint."""
    parts = compose(config(data__n=5000))
    exact_in_place_of_the_network(parts)
    result = evaluate(parts, parts.model, parts.sampler, 3000, metrics=QUICK, seed=1, averaged=False, step=0)
    found, samples, held = result.summary, result.samples, result.reference
    assert found["score_error"]["value"] < 1e-10  # single precision against double
    assert found["loss_gain"]["ci"][0] > 0
    distance = found["sliced_wasserstein"]
    assert distance["value"] < 1.5 * distance["floor_high"]
    assert verdict(found) is None
    assert samples.nfe == 41
    assert len(held) == 3000
    assert np.isfinite(distance["ci"]).all()


def exact_in_place_of_the_network(parts):
    truth = parts.data.oracle(parts.sde)
    parts.model.forward = truth.score
    parts.model.forward_trace = lambda x, t: divergence.weighted_trace(truth, x, t, None)
    return parts


def test_the_likelihood_of_the_exact_score_is_the_entropy_and_its_gap_is_nothing():
    parts = exact_in_place_of_the_network(compose(config(data__n=5000)))
    result = evaluate(
        parts, parts.model, parts.sampler, 100, metrics=["nll"], seed=1, averaged=False, step=0, nll_rows=300
    )
    found = result.summary
    assert result.samples is None  # nothing was drawn that nothing needs
    assert found["nll"]["unit"] == "nats"
    # Entropy of eight separated Gaussians: log 8 + log(2 pi e 0.01); 300 rows know it within their own interval.
    entropy = math.log(8) + math.log(2 * math.pi * math.e * 0.01)
    assert found["nll"]["ci"][0] < entropy < found["nll"]["ci"][1]
    # At t_min the law is wider than the data by sigma^2 = 1e-4 against 1e-2: KL = d/2 (r - 1 - log r) = 5e-5, and 1e-3 a dimension.
    assert abs(found["nll_gap"]["value"]) < 2e-3
    assert found["nll_baseline"]["value"] > found["nll"]["value"] + 2


def test_the_likelihood_of_images_is_in_bits_of_their_levels():
    """For a Gaussian model of the dequantised digits the number can be written down: nats in user units over 64 log 2."""
    parts = compose(config(data="digits", data__dequantise="true", network__width=8))
    # The untrained network is zero: the model is the Gaussian with the data's moments, at every t.
    result = evaluate(
        parts, parts.model, parts.sampler, 20, metrics=["nll"], seed=0, averaged=False, step=0, nll_rows=50
    )
    found = result.summary
    assert found["nll"]["unit"] == "bits/dim"
    x = parts.data.splits["test"][:50]
    nats = -parts.baseline.gaussian.log_prob(x) + 64 * math.log(8)  # one model unit is eight levels
    assert found["nll_baseline"]["value"] == pytest.approx(float(nats.mean()) / (64 * math.log(2)), rel=1e-6)
    # A level is one of 17: log2 17 = 4.1 bits would be no model at all. t_min blurs the narrowest directions a little.
    assert found["nll"]["value"] == pytest.approx(found["nll_baseline"]["value"], abs=0.05)
    assert found["nll"]["value"] < 4.1


def test_a_model_that_does_not_look_at_labels_is_right_once_in_as_many_as_there_are():
    """An untrained network draws the same images for every label, so each is right for exactly one of the ten."""
    parts = compose(config(data="digits", data__labels="true", network__width=8))
    found = evaluate(
        parts, parts.model, parts.sampler, 80, metrics=["classifier"], seed=0, averaged=False, step=0, nll_rows=50
    )
    assert found.of_classes.shape == (10, 8, 1, 8, 8)
    assert torch.equal(found.of_classes[0], found.of_classes[9])
    entry = found.summary["label_accuracy"]
    assert entry["protocol"]["values"] == "whole levels"
    assert entry["value"] == pytest.approx(0.1)
    assert entry["floor"] > 0.95  # on real digits
    assert found.summary["classifier_agreement"]["value"] < found.summary["classifier_agreement"]["floor_high"]


def test_a_picture_of_filled_gaps_puts_each_sample_beside_what_it_was_given(tmp_path):
    data = Digits()
    given = data.units.to_user(data.splits["test"][:2]).numpy()
    given[:, :, 4:] = np.nan
    u = np.stack([np.full((1, 8, 8), level) for level in (0.0, 16.0, 4.0, 12.0)])  # samples 0 and 2 are of row 0
    picture = plt.imread(figures.inpainting(data, u, given, tmp_path / "p.png"))[2::4, 2::4, 0]  # four points a pixel
    for row in range(2):
        tiles = [picture[9 * row + 1 : 9 * row + 9, 9 * k + 1 : 9 * k + 9] for k in range(3)]
        assert np.allclose(tiles[0][:4], given[row, 0, :4] / 16, atol=1 / 128)  # eight bits
        assert np.allclose(tiles[0][4:], 0.5, atol=1 / 128)
        assert np.allclose(tiles[1], (0.0, 1.0)[row], atol=1 / 128)
        assert np.allclose(tiles[2], (0.25, 0.75)[row], atol=1 / 128)
    many = data.units.to_user(data.splits["test"][:40]).numpy()
    few = figures.inpainting(
        data, many[:30], many, tmp_path / "few.png"
    )  # more given than drawn: the first 24, each once
    assert plt.imread(few).shape[:2] == (4 * 24 * 9, 4 * 2 * 9)


def test_a_marginal_shows_that_samples_are_outside_of_its_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "finish", lambda figure, path: figure)
    b = np.random.default_rng(0).normal(size=(1000, 3))
    a = np.concatenate([b[:600], b[600:] + 100.0])
    figure = figures.marginals(a, b, ["a", "b", "c"], "", tmp_path / "p.png")
    for panel in figure.axes[:3]:
        x, y = panel.patches[-1].get_xy().T  # the outline of the samples
        assert abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2 == pytest.approx(0.6, abs=0.01)  # its area
    plt.close(figure)


def test_what_is_measured_fits_the_data():
    assert set(pick_metrics(None, EightGaussians(n=100))) == set(METRICS) - {"frechet_pca", "classifier", "fid", "kid"}
    assert not {"score_error", "mode_weights"} & set(pick_metrics(None, Moons(n=100)))
    assert "frechet_pca" in pick_metrics(None, Digits())
    for asked, says in ((["nil"], "did you mean 'nll'"), (["score_error"], "not known"), (["frechet_pca"], "image")):
        with pytest.raises(ScoreSDEError, match=says):
            pick_metrics(asked, Moons(n=100))


def test_unlike_protocols_are_told_by_their_first_difference():
    one = {"unit": "nats", "protocol": {"n": 100, "step": 5}}
    assert unlike([one, {"unit": "nats", "protocol": {"n": 100, "step": 9}}]) is None
    assert unlike([one, {"unit": "nats", "protocol": {"n": 50, "step": 5}}]) == "n 100 against 50"
    assert unlike([one, {"unit": "bits/dim", "protocol": {"n": 100}}]) == "unit nats against bits/dim"
    assert unlike([one, one, {"unit": "nats", "protocol": {"n": 100, "nfe": 3}}]) == "nfe None against 3"


def test_units_and_levels_enter_the_likelihood(tmp_path):
    """An untrained model of whitened data is a Gaussian: its density in the user's units is that of the data's moments."""
    source = torch.Generator().manual_seed(0)
    rows = (
        torch.randn(400, 2, generator=source, dtype=torch.float64) @ torch.tensor([[3.0, 1.0], [0.0, 0.2]]).double() + 5
    )
    np.save(tmp_path / "t.npy", rows.numpy())
    parts = compose(config(data="table", data__path=tmp_path / "t.npy", data__scaling="whiten", network__width=8))
    x = parts.data.splits["test"]
    found = nll(parts.model.double(), parts.baseline.double(), parts.data, x.double(), 1e-3, Flow(), 0)["nll"]["value"]
    u, train = (parts.data.units.to_user(parts.data.splits[name]) for name in ("test", "train"))
    law = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T, correction=0))
    # What t_min adds to the variance, 1e-4 of it, changes the density by less than 1e-3.
    assert found == pytest.approx(-float(law.log_prob(u).mean()), abs=1e-3)


def test_coarser_levels_take_fewer_bits():
    """Levels twice as wide: one bit a dimension less for the same density."""
    parts = compose(config(data="digits", data__dequantise="true", network__width=8))
    x = parts.data.splits["test"][:5]
    one, two = (nll(parts.model, parts.baseline, parts.data, x, 1e-3, Flow(steps=5), 0)["nll"] for _ in range(2))
    assert one["value"] == two["value"]
    assert one["protocol"]["n"] == 5
    parts.data.quantum = 2.0 * parts.data.quantum
    wide = nll(parts.model, parts.baseline, parts.data, x, 1e-3, Flow(steps=5), 0)["nll"]["value"]
    assert wide == pytest.approx(one["value"] - 1.0, abs=1e-9)


def images_of(folder, size, **network):
    """IDX images of size x size pixels with their noise, a small U-Net that is not zero on them, and the Gaussian baseline."""
    data = IDX(str(write_idx(folder, height=size, width=size)), dequantise=True)
    gaussian = fit_gaussian(data.splits["train"], "isotropic")
    model = ScoreModel(
        randomise(UNet(data.shape, channels=4, multipliers=[1, 2]), 0), VP(), Residual(), gaussian
    ).float()
    return data, model, gaussian_model(VP(), gaussian).float()


def test_a_change_of_scale_moves_the_bits_of_28_x_28_pixels_by_its_jacobian_alone(tmp_path):
    """Values three times as large: log2 3 bits a dimension more for the density, none for levels three times as wide."""
    data, model, baseline = images_of(tmp_path, 28)

    def found():
        return nll(model, baseline, data, data.splits["test"][:3], 1e-3, Flow(steps=3), 0)["nll"]

    one = found()
    assert one["protocol"]["divergence"].startswith(
        "Rademacher, 1 directions"
    )  # 784 unit directions would be the exact trace
    assert one["detail"]["standard_error_of_the_directions"] > 0
    assert one["ci"][0] < one["value"] < one["ci"][1]
    data.units = replace(data.units, scale=3.0 * data.units.scale, shift=3.0 * data.units.shift)
    assert found()["value"] == pytest.approx(one["value"] + math.log2(3.0), abs=1e-9)
    data.quantum = 3.0 * data.quantum
    assert found()["value"] == pytest.approx(one["value"], abs=1e-9)


def test_random_directions_give_the_likelihood_that_the_exact_trace_gives(tmp_path):
    data, model, baseline = images_of(tmp_path, 12)
    x = data.splits["test"][:4]
    exact = nll(model, baseline, data, x, 1e-3, Flow(steps=3, projection=Coordinate(), n_proj=144, repeats=1), 0)["nll"]
    drawn = nll(model, baseline, data, x, 1e-3, Flow(steps=3, projection=Rademacher(), repeats=40), 0)["nll"]
    error = drawn["detail"]["standard_error_of_the_directions"]
    assert abs(drawn["value"] - exact["value"]) < 4 * error
    assert error < 0.2 * abs(exact["value"])  # so that the line above can fail


class OfData(HeunODE):
    """The test rows themselves, each pixel off by less than half a level, and beyond where it is black or white."""

    def sample(self, model, sde, shape, n, seed, **of):
        found = super().sample(model, sde, shape, n, seed, **of)
        x = self.rows[:n]
        off = torch.sign(x) * (x.abs() == 1) + 0.9 / 16 * (2 * torch.rand(x.shape, generator=generator(0, "off")) - 1)
        return replace(found, x=x + off)


def test_images_are_compared_as_the_levels_that_a_file_holds():
    """What differs from held-out images by the rounding to levels alone is no worse than they are: every distance is zero."""
    parts = compose(config(data="digits", network__width=8))
    sampler = OfData(steps=1)
    sampler.rows = parts.data.splits["test"]
    found = evaluate(
        parts,
        parts.model,
        sampler,
        100,
        metrics=["sliced_wasserstein", "frechet_pca", "c2st"],
        seed=0,
        averaged=False,
        step=0,
    ).summary
    assert found["sliced_wasserstein"]["value"] == 0
    assert found["frechet_pca"]["value"] < 1e-9
    assert found["c2st"]["value"] <= 0.5  # each row has its like on the other side
    of_samples = [entry for name, entry in found.items() if "loss" not in name]
    assert all(entry["protocol"]["values"] == "whole levels" for entry in of_samples)


def test_pairs_of_finite_data_are_disjoint_and_keep_equal_rows_on_one_side(tmp_path):
    values = np.repeat(np.random.default_rng(0).normal(size=(60, 2)), 4, axis=0)
    np.save(tmp_path / "t.npy", values)
    data = Table(str(tmp_path / "t.npy"))
    first = None
    for i in range(5):
        a, b = fresh_pairs(data, 100, 0)(i)
        assert (len(a), len(b)) == (100, 100)
        assert not {tuple(r) for r in a.tolist()} & {tuple(r) for r in b.tolist()}
        assert first is None or not torch.equal(a, first)
        first = a


@pytest.mark.parametrize("dequantise", [False, True])
def test_a_floor_of_images_is_of_whole_levels_and_has_no_image_on_both_sides(tmp_path, dequantise):
    """Thirty images, eight times each; noise of less than a level does not hide which are the same."""
    u = np.random.default_rng(0).integers(0, 256, (30, 4, 4)).repeat(8, 0)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(u.astype(np.uint8)))
    data = IDX(str(tmp_path), dequantise=dequantise)
    for i in range(5):
        a, b = fresh_pairs(data, 60, 0)(i)
        for side in (a, b):
            levels = data.units.to_user(side, rounded=False)
            assert float((levels - levels.round()).abs().max()) < 1e-4  # float32 of 255 levels
        assert not {tuple(r) for r in a.flatten(1).tolist()} & {tuple(r) for r in b.flatten(1).tolist()}


def test_runs_of_unlike_processes_or_times_are_unlike_and_of_unlike_losses_are_not():
    """The held-out loss is the same yardstick whatever the training loss was, where process and times are the same."""
    quick = {"data__n": 500, "network__width": 8}
    entries = {}
    for name, changes in {
        "ssm": {"loss": "ssm", "n_proj": 1}, "vr": {"loss": "ssm_vr"}, "ve": {"sde": "ve"}, "beta": {"sde__beta_max": 10},
        "uniform": {"times": "uniform"}, "late": {"t_min": 0.1},
    }.items():  # fmt: skip
        parts = compose(config(**quick, **changes))
        found = evaluate(parts, parts.model, parts.sampler, 50, metrics=["loss"], seed=0, averaged=False, step=0)
        entries[name] = found.summary["loss"]
    assert unlike([entries["ssm"], entries["vr"]]) is None
    for name in ("ve", "beta", "uniform", "late"):
        assert unlike([entries["vr"], entries[name]]) is not None, name
