"""The metrics against independent computations, and the honesty of their floors and intervals."""

import math
from itertools import islice

import numpy as np
import ot
import pytest
import scipy.linalg
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import f as f_law
from scipy.stats import norm
from sklearn.naive_bayes import GaussianNB

from scoresde_cli.datasets.base import Sampled, SampledMixture, Units
from scoresde_cli.datasets.heavy import StudentT
from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.metrics import mmd, prdc, tails
from scoresde_cli.metrics.base import PAIRS, RESAMPLES, chance, compare, halves, interval
from scoresde_cli.metrics.c2st import C2ST
from scoresde_cli.metrics.classifier import Classifier
from scoresde_cli.metrics.columns import Columns
from scoresde_cli.metrics.energy import EnergyDistance, energy_distance
from scoresde_cli.metrics.frechet import FrechetPCA, frechet
from scoresde_cli.metrics.inception import FID, KID, to_bytes
from scoresde_cli.metrics.mmd import MMD, squared_mmd
from scoresde_cli.metrics.mode_weights import ModeWeights, responsibilities
from scoresde_cli.metrics.prdc import PRDC
from scoresde_cli.metrics.radial_tails import LEVELS as tail_levels
from scoresde_cli.metrics.radial_tails import RadialTails
from scoresde_cli.metrics.radial_tails import quantile as radial_quantile
from scoresde_cli.metrics.score_error import bootstrap_mean, score_error
from scoresde_cli.metrics.sliced_wasserstein import SlicedWasserstein, sliced_wasserstein
from scoresde_cli.metrics.tails import Tails, hill
from scoresde_cli.metrics.wasserstein import Wasserstein
from scoresde_cli.metrics.whitened import WhitenedSlicedWasserstein
from scoresde_cli.networks.model import ScoreModel, Zero, fit_gaussian
from scoresde_cli.networks.parameterisation import Residual
from scoresde_cli.rng import generator, normal, uniform
from scoresde_cli.sdes.vp import VP
from tests.laws import correlated_gaussian, three_modes

F64 = torch.float64


def gauss(n, seed, d=2):
    return normal((n, d), generator(seed, "m"), F64)


def z_score(values, exact):
    return abs(np.mean(values) - exact) / (np.std(values) / math.sqrt(len(values)))


class Normal(Sampled):
    """Standard normal columns, by default two; images where the shape is an image's."""

    def __init__(self, shape=(2,), n=1000):
        self.kind = "image" if len(shape) == 3 else "points"
        super().__init__(shape, n, 0)

    def draw(self, n, source):
        return normal((n, *self.shape), source, F64)


class Pictures(Normal):
    """Grey images of 4 x 4 correlated pixels, mostly in [-1, 1]."""

    def __init__(self):
        super().__init__((1, 4, 4))

    def draw(self, n, source):
        z = super().draw(n, source)
        return 0.27 * (z + 0.5 * z.roll(1, 3))


class Blobs(Normal):
    """Images of 4 x 4 noisy pixels, dark, grey or light. Distorted (below), the dark ones come to lie between dark and grey."""

    patterns = torch.tensor([-0.36, 0.07, 0.6], dtype=F64)[:, None, None, None].expand(3, 1, 4, 4)

    def __init__(self):
        super().__init__((1, 4, 4))
        self.known = {name: self.classes_of(x) for name, x in self.splits.items()}, ["dark", "grey", "light"]

    def classes_of(self, x):
        return (x.flatten(1).double().mean(1, keepdim=True) - self.patterns[:, 0, 0, 0]).abs().argmin(1)

    def draw(self, n, source):
        k = torch.bucketize(uniform((n,), source, F64), torch.tensor([0.7, 0.85], dtype=F64))
        return self.patterns[k] + 0.5 * super().draw(n, source)


class Tiny(torch.nn.Module):
    """Six fixed features of an image."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * normal((6, 3, 3, 3), generator(0, "tiny")))
        self.seen = 0

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        self.seen += len(x)
        return torch.tanh(torch.nn.functional.conv2d(x.to(self.weight) / 64 - 2, self.weight)).flatten(2).mean(2)


FLAT, PICTURES, BLOBS, TINY = SampledMixture(three_modes(), 1000, 0), Pictures(), Blobs(), Tiny()


def test_sliced_wasserstein_agrees_with_pot():
    x, y = gauss(300, 0, 3), 1.5 * gauss(300, 1, 3) + 0.3
    theta = normal((3, 64), generator(0, "slices"), F64)
    theta = theta / theta.norm(dim=0)
    theirs = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=theta.numpy(), p=2)
    assert sliced_wasserstein(x, y) == pytest.approx(float(theirs), rel=1e-10)


def test_sliced_wasserstein_of_a_shift_is_the_shift_over_root_d():
    """W2 of a shift by s along theta is |s . theta|; the mean of its square over the sphere is |s|^2 / d."""
    x, shift = gauss(100, 0, 4), torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=F64)
    assert sliced_wasserstein(x, x + shift, slices=20_000) == pytest.approx(float(shift.norm()) / 2, rel=0.02)


def test_energy_distance_is_unbiased_and_agrees_with_one_dimension():
    """In one dimension 2 int (F - G)^2: for N(0,1) and N(1,1) it is known by quadrature."""
    from scipy.integrate import quad

    exact = 2 * quad(lambda u: (norm.cdf(u) - norm.cdf(u - 1)) ** 2, -12, 12)[0]
    values = [energy_distance(gauss(200, 2 * i, 1), gauss(200, 2 * i + 1, 1) + 1) for i in range(200)]
    assert z_score(values, exact) < 4
    null = [energy_distance(gauss(200, 2 * i, 1), gauss(200, 2 * i + 1, 1)) for i in range(200)]
    assert z_score(null, 0) < 4


def drawn_rows(m, seed):
    """The rows of each bootstrap copy of both samples."""
    for i in range(RESAMPLES):
        source = generator(seed, "bootstrap", i)
        yield tuple(torch.randint(m, (m,), generator=source) for _ in range(2))


@pytest.mark.parametrize(
    "metric", [EnergyDistance(FLAT), MMD(FLAT), Wasserstein(FLAT), ModeWeights(FLAT)], ids=lambda m: type(m).__name__
)
def test_bootstrap_copies_by_weights_are_those_of_the_copies(metric):
    x, y = gauss(60, 0), gauss(60, 1) + 0.2
    by_weights = [next(iter(copy.values())) for copy in metric.copies(x, y, 5)]
    by_hand = [next(iter(metric.measure(x[a], y[b]).values())) for a, b in drawn_rows(60, 5)]
    assert by_weights == pytest.approx(by_hand, rel=1e-7, abs=1e-9)


def test_wasserstein_is_the_best_matching():
    """Equal masses: an optimal coupling is a permutation (Birkhoff), found by another algorithm."""
    x, y = gauss(70, 0, 3), 1.5 * gauss(70, 1, 3) + 0.3
    cost = torch.cdist(x, y).square().numpy()
    exact = math.sqrt(cost[linear_sum_assignment(cost)].mean())
    assert Wasserstein(Normal((3,))).measure(x, y)["wasserstein"] == pytest.approx(exact, rel=1e-9)


def test_wasserstein_between_gaussians_is_the_closed_form():
    """A symmetric positive map is optimal (Brenier), also between the samples; moments fitted exactly, the two agree."""
    x = gauss(300, 0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov(correction=0)), (x - x.mean(0)).T, upper=False).T
    root, shift = torch.tensor([[1.5, 0.4], [0.4, 0.7]], dtype=F64), torch.tensor([0.3, -1.0], dtype=F64)
    # N(0, I) against N(shift, root^2): |shift|^2 + tr(I + root^2 - 2 root).
    exact = math.sqrt(float(shift.square().sum() + (root - torch.eye(2, dtype=F64)).square().sum()))
    assert Wasserstein(FLAT).measure(x, x @ root + shift)["wasserstein"] == pytest.approx(exact, rel=1e-9)


def test_mmd_is_unbiased_between_gaussians():
    """E exp(-|Z|^2 / 2h^2) for Z ~ N(m, s^2 I_d) is (1 + s^2/h^2)^(-d/2) exp(-|m|^2 / 2(h^2 + s^2))."""
    width, scale, shift = 1.7, 1.4, torch.tensor([0.5, -0.3], dtype=F64)

    def mean_kernel(variance, square):
        widths = [width / 2**j for j in range(mmd.WIDTHS)]
        return np.mean([h**2 / (h**2 + variance) * math.exp(-square / (2 * (h**2 + variance))) for h in widths])

    exact = (
        mean_kernel(2, 0) + mean_kernel(2 * scale**2, 0) - 2 * mean_kernel(1 + scale**2, float(shift.square().sum()))
    )
    pairs = [(gauss(80, 2 * i), gauss(80, 2 * i + 1)) for i in range(200)]
    assert z_score([squared_mmd(x, scale * y + shift, width) for x, y in pairs], exact) < 4
    assert z_score([squared_mmd(x, y, width) for x, y in pairs], 0) < 4


def test_the_bandwidth_is_the_median_distance_of_training_rows_whatever_the_samples():
    """The distance of two standard normal points in the plane has the median 2 sqrt(log 2)."""
    metric = MMD(Normal())
    assert metric.width == pytest.approx(2 * math.sqrt(math.log(2)), rel=0.05)  # about 4 sd at 1000 rows
    assert metric.protocol()["bandwidths"][:2] == [metric.width, metric.width / 2]


def test_the_classifier_comes_close_to_the_best_one_and_never_beats_it():
    """N(0, I) against N(2a, I): the best accuracy is Phi(|a|)."""
    x, y = gauss(1000, 0).float(), gauss(1000, 1).float() + torch.tensor([2.0, 0.0])
    found = C2ST(FLAT).measure(x, y)["c2st"]
    best, se = norm.cdf(1), math.sqrt(norm.cdf(1) * norm.cdf(-1) / 2000)
    assert best - 0.03 - 4 * se < found < best + 4 * se


def test_the_classifier_sees_what_no_single_column_shows():
    """N(0, I) against unit normals of correlation 1/2 in neighbouring pairs of 12 columns."""
    x, y = gauss(600, 0, 12).float(), gauss(600, 1, 12).float()
    x[:, 1::2] = 0.5 * x[:, ::2] + math.sqrt(0.75) * x[:, 1::2]
    metric, chance_sd = C2ST(Normal((12,))), math.sqrt(0.25 / 1200)
    assert metric.measure(x, y)["c2st"] > 0.5 + 6 * chance_sd
    # Cross-fitted accuracies of fresh data have up to 1.5 times the variance of independent marks.
    assert abs(metric.measure(gauss(600, 2, 12).float(), y)["c2st"] - 0.5) < 4 * 1.25 * chance_sd


def test_the_classifiers_copies_are_halves_refitted():
    x, y = gauss(40, 0), 1.5 * gauss(40, 1)
    metric = C2ST(FLAT, GaussianNB())
    by_hand = [metric.measure(a, b) for a, b in halves(x, y, 3)]
    assert list(metric.copies(x, y, 3)) == by_hand
    assert metric.protocol()["classifier"] == "GaussianNB()"


def test_prdc_agrees_with_its_definition_by_sklearns_neighbours():
    from sklearn.neighbors import NearestNeighbors

    x, y = 1.3 * gauss(90, 0).numpy() + 0.4, gauss(90, 1).numpy()
    radius = {
        name: NearestNeighbors(n_neighbors=prdc.K).fit(z).kneighbors()[0][:, -1] for name, z in (("x", x), ("y", y))
    }  # fmt: skip
    precision = np.mean([any(math.dist(a, b) <= r for b, r in zip(y, radius["y"], strict=True)) for a in x])
    recall = np.mean([any(math.dist(a, b) <= r for a, r in zip(x, radius["x"], strict=True)) for b in y])
    held = [[math.dist(a, b) <= r for a in x] for b, r in zip(y, radius["y"], strict=True)]
    exact = {
        "precision": precision, "recall": recall, "density": np.sum(held) / (prdc.K * 90),
        "coverage": np.mean([any(row) for row in held]),
    }  # fmt: skip
    assert PRDC(FLAT).measure(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(exact, rel=1e-12)


def test_density_and_coverage_of_fresh_data_are_the_closed_forms():
    """Naeem et al.: E density = 1; coverage misses a ball with E (1 - B)^m, its mass B ~ Beta(K, m - K)."""
    from scipy.special import betaln

    m, k = 60, prdc.K
    found = [PRDC(FLAT).measure(gauss(m, 2 * i), gauss(m, 2 * i + 1)) for i in range(200)]
    assert z_score([f["density"] for f in found], 1) < 4
    assert z_score([f["coverage"] for f in found], 1 - math.exp(betaln(k, 2 * m - k) - betaln(k, m - k))) < 4


def test_prdc_of_equal_far_and_collapsed_samples():
    y, metric = gauss(80, 0), PRDC(FLAT)
    # Each ball of K neighbours and its centre holds K + 1 rows.
    assert metric.measure(y, y) == {"precision": 1, "recall": 1, "density": (prdc.K + 1) / prdc.K, "coverage": 1}
    assert set(metric.measure(y + 100, y).values()) == {0}
    collapsed = metric.measure(y[:1].repeat(80, 1), y)
    assert collapsed["precision"] == 1
    assert collapsed["recall"] <= 1 / 80
    assert collapsed["coverage"] < 0.3


def test_responsibilities_are_the_posterior_of_torch_distributions():
    from torch.distributions import MultivariateNormal

    law, x = three_modes(), gauss(50, 0)
    cov = law.bases @ torch.diag_embed(law.lam) @ law.bases.mT
    joint = law.weights.log() + MultivariateNormal(law.means, cov).log_prob(x[:, None])
    torch.testing.assert_close(responsibilities(law, x), (joint - joint.logsumexp(1, keepdim=True)).exp())


def test_mean_responsibilities_are_the_weights_however_much_the_modes_overlap():
    law = Mixture(torch.tensor([0.7, 0.3]), torch.tensor([[0.0], [0.5]]), torch.tensor([[1.0], [0.05]]))
    r = responsibilities(law, law.sample(20_000, generator(0, "x")))
    assert z_score(r[:, 0].numpy(), 0.7) < 4
    counts = (r[:, 0] > 0.5).double()
    assert z_score(counts.numpy(), 0.7) > 10  # counts by the likeliest mode are biased here


def test_mode_weight_error_of_wrong_weights_is_their_total_variation():
    data, wrong = SampledMixture(three_modes(), 1000, 0), three_modes()
    data.law.lam, wrong.lam = 1e-3 * data.law.lam, 1e-3 * wrong.lam  # far apart
    wrong.weights = torch.tensor([0.3, 0.3, 0.4], dtype=F64)
    x = wrong.sample(20_000, generator(0, "x"))
    metric, se = ModeWeights(data), math.sqrt(0.4 * 0.6 / 20_000)
    assert metric.measure(x, x)["mode_weight_error"] == pytest.approx(0.2, abs=4 * se)
    assert metric.detail(x, x)["mode_weight_error"]["samples"] == pytest.approx([0.3, 0.3, 0.4], abs=4 * se)


def table(rows, names=None, scale=None, resolution=None):
    """A data set with the given training rows (n, d) in model coordinates."""
    data = Normal((rows.shape[1],), n=10)
    data.columns, data.splits = names, {"train": rows}
    ones = torch.ones(rows.shape[1], dtype=F64)
    data.units = Units(data.shape, 0 * ones, ones if scale is None else scale, resolution=resolution)
    return data


def test_column_distances_and_correlations_agree_with_scipy_and_numpy():
    from scipy.stats import wasserstein_distance

    x, y, train = gauss(200, 0, 3) * 1.2, gauss(200, 1, 3), gauss(500, 2, 3) * 2
    x[:, 2] += 0.5 * x[:, 0]
    metric = Columns(table(train, names=["a", "b", "c"]))
    sd = train.std(0, correction=0).tolist()
    exact = [wasserstein_distance(u, v) / s for u, v, s in zip(x.T, y.T, sd, strict=True)]
    found, detail = metric.measure(x, y), metric.detail(x, y)
    assert list(detail["column_wasserstein"].values()) == pytest.approx(exact, rel=1e-9)
    assert found["column_wasserstein"] == pytest.approx(max(exact), rel=1e-9)
    errors = np.abs(np.corrcoef(x.T) - np.corrcoef(y.T))
    assert found["correlation_error"] == pytest.approx(errors.max(), rel=1e-9)
    assert detail["correlation_error"]["columns"] == ["a", "c"]


def test_columns_are_compared_in_the_users_units_on_the_users_grid():
    """x = u / 10, a grid of 1: what is rounded away is no error; a shift of one sd is 1, whatever the unit."""
    train, scale = gauss(2000, 0, 2), torch.tensor([10.0, 10.0], dtype=F64)
    metric = Columns(table(train, scale=scale, resolution=torch.tensor([1.0, 0.0], dtype=F64)))
    x = (train * 10).round() / 10
    assert metric.measure(x + torch.tensor([0.04, 0.0], dtype=F64), x)["column_wasserstein"] == 0
    shifted = metric.measure(x, x + torch.tensor([0.0, float(train[:, 1].std(correction=0))], dtype=F64))
    assert shifted["column_wasserstein"] == pytest.approx(1, rel=1e-9)
    assert list(metric.detail(x, x)["column_wasserstein"]) == ["x0", "x1"]


def test_a_constant_column_has_no_correlation_and_one_column_has_none():
    x = gauss(100, 0, 3)
    y = x.clone()
    y[:, 1] = 0.1
    found = Columns(table(y)).measure(x, y)
    assert found["correlation_error"] == pytest.approx(float(x.T.corrcoef()[1, [0, 2]].abs().max()), rel=1e-9)
    assert found["column_wasserstein"] == pytest.approx(float((x[:, 1] - 0.1).abs().mean()), rel=1e-9)  # sd taken as 1
    assert list(Columns(Normal((1,))).measure(x[:, :1], y[:, :1])) == ["column_wasserstein"]


def pareto(n, alpha, seed):
    """P(R > r) = r^(-alpha) for r > 1."""
    return uniform((n,), generator(seed, "pareto"), F64) ** (-1 / alpha)


@pytest.mark.parametrize("alpha", [1.5, 4.0])
def test_hill_of_an_exact_pareto_is_unbiased_with_its_known_variance(alpha):
    """The k log-excesses of a Pareto over its (k+1)-th largest are exponential of mean 1/alpha (Renyi)."""
    values, k = [hill(pareto(400, alpha, i)) for i in range(300)], 20
    assert z_score(values, 1 / alpha) < 4
    assert np.std(values) == pytest.approx(1 / (alpha * math.sqrt(k)), rel=0.2)  # 4 sd of a variance of 300
    assert hill(7 * pareto(400, alpha, 0)) == pytest.approx(values[0], rel=1e-9)


def test_hill_error_between_student_t_and_normal_is_the_closed_form():
    """In the plane P(R > r) is 1 / (1 + r^2/2) for t with 2 degrees of freedom and exp(-r^2/2) for the normal law.

    With P(R > r_0) = 1/20 the expected log-excess int_{r_0} 20 P(R > r) / r dr is 10 log(20/19) and 10 E_1(log 20).
    """
    from scipy.special import exp1

    y, z = gauss(10_000, 0), gauss(10_000, 1)
    heavy = z / (-uniform((10_000, 1), generator(0, "chi"), F64).log()).sqrt()  # -log U is chi^2_2 / 2
    h, g = 10 * math.log(20 / 19), 10 * exp1(math.log(20))
    metric, se = Tails(Normal()), math.hypot(h, g) / math.sqrt(500)  # 500 rows in the tail
    assert metric.measure(heavy, y)["hill_error"] == pytest.approx(h - g, abs=4 * se)
    detail = metric.detail(heavy, y)["hill_error"]
    assert 1 / detail["alpha_samples"] == pytest.approx(h, abs=4 * se)
    assert 1 / detail["alpha_data"] == pytest.approx(g, abs=4 * se)


def test_tail_quantile_error_of_a_shift_is_the_shift_in_sd():
    x, train = gauss(2000, 0, 3), gauss(500, 1, 3)
    shift = torch.tensor([0.1, -0.5, 0.2], dtype=F64)
    metric = Tails(table(train))
    exact = (shift.abs() / train.std(0, correction=0)).max()
    assert metric.measure(x + shift, x)["tail_quantile_error"] == pytest.approx(float(exact), rel=1e-9)
    assert metric.detail(x + shift, x)["tail_quantile_error"]["column"] == "x1"


def test_radial_tails_of_a_stretched_sample_are_off_by_the_stretch():
    """x = 1.3 y about the median: each quantile is 30 percent too far, and the tail index is the same."""
    y = normal((100_000, 2), generator(0, "radial"), F64)
    median = y.median(0).values
    found = RadialTails(Normal()).measure(median + 1.3 * (y - median), y)
    assert set(found) == set(RadialTails.quantities)
    for name in tail_levels:
        assert found[name] == pytest.approx(0.3, rel=1e-9)
    assert found["tail_index_error"] < 1e-9
    assert set(RadialTails(Normal()).measure(y[:2000], y[:2000])) == {"radial_q99_error", "tail_index_error"}
    radius = y.norm(dim=1)
    for q in (0.99, 0.9999):
        assert float(radial_quantile(radius, q)) == pytest.approx(float(np.quantile(radius.numpy(), q)), rel=1e-12)


def test_radial_tails_tell_student_from_student_with_an_interval():
    """nu = 3 against nu = 6: index error 1 but for Hill's own bias (below half of it), quantiles by scipy's F law of R^2 / d."""
    laws = [StudentT(nu=nu, n=100, seed=1) for nu in (3.0, 6.0)]
    x, y = (law.fresh(20_000, generator(0, "rows")) for law in laws)

    def pair(i):
        return tuple(laws[1].fresh(20_000, generator(j, "pair", i)) for j in range(2))

    entries = compare([RadialTails(Normal())], x, y, pair, 0)
    assert set(entries) == set(RadialTails.quantities) - {"radial_q9999_error"}
    exact = math.sqrt(f_law.isf(0.01, 2, 3) / f_law.isf(0.01, 2, 6)) - 1
    assert entries["radial_q99_error"]["value"] == pytest.approx(exact, abs=0.12)  # 4 standard errors
    low, high = entries["radial_q99_error"]["ci"]
    assert low < exact < high
    assert entries["tail_index_error"]["detail"]["signed"] < -0.25


def test_only_levels_with_ten_rows_beyond_are_compared():
    assert [tails.levels(m) for m in (999, 1000, 9999, 10_000)] == [[], [0.01, 0.99], [0.01, 0.99], list(tails.LEVELS)]
    x = gauss(400, 0)
    assert list(Tails(Normal()).measure(x, x)) == ["hill_error"]
    assert Tails(Normal()).measure(x[:100], x[:100]) == {}


def test_frechet_is_dowson_and_landaus_closed_form():
    """By scipy's matrix square root; and for y = A x + b, A symmetric positive, |shift of the mean|^2 + tr (A-I) C (A-I)."""
    x, y = gauss(200, 0, 4) @ gauss(4, 1, 4), gauss(200, 2, 4) + 0.3
    c, d = np.cov(x.T), np.cov(y.T)
    exact = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert frechet(x, y) == pytest.approx(exact, rel=1e-9)
    root = torch.diag(torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=F64)) + 0.1
    moved, excess = x @ root + 1, root - torch.eye(4, dtype=F64)
    exact = float((x.mean(0) - moved.mean(0)).square().sum()) + float((excess @ torch.from_numpy(c) @ excess).trace())
    assert frechet(x, moved) == pytest.approx(exact, rel=1e-9)


def test_frechet_bears_fewer_rows_than_dimensions_and_rotations():
    x, y = gauss(20, 0, 30), 1.5 * gauss(20, 1, 30) + 0.2
    c, d = np.cov(x.T), np.cov(y.T)
    joint = np.sqrt(np.abs(np.linalg.eigvals(c @ d))).sum()  # noise of 1e-8 each where an eigenvalue is zero
    exact = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(c + d) - 2 * joint
    assert frechet(x, y) == pytest.approx(exact, abs=1e-5)
    turn = torch.linalg.qr(gauss(30, 2, 30))[0]
    assert frechet(x @ turn, y @ turn) == pytest.approx(frechet(x, y), rel=1e-9)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_pca_is_the_frechet_distance_in_the_leading_directions():
    data = Normal((1, 6, 7))
    data.splits["train"] = (data.splits["train"].flatten(1) @ gauss(42, 5, 42).float()).reshape(-1, 1, 6, 7)
    train = data.splits["train"].double().flatten(1)
    basis = torch.linalg.svd(train - train.mean(0), full_matrices=False).Vh[:32].T  # by another factorisation
    x, y = train[:300], 1.1 * train[300:600]
    found = FrechetPCA(data).measure(x.reshape(-1, 1, 6, 7), y.reshape(-1, 1, 6, 7))["frechet_pca"]
    assert found == pytest.approx(frechet(x @ basis, y @ basis), rel=1e-6)
    assert FrechetPCA(data).protocol()["components"] == 32
    assert FrechetPCA(Normal((1, 2, 3))).protocol()["components"] == 6


def images(seed, n=120):
    return PICTURES.fresh(n, generator(seed, "images"))


def test_the_classifiers_agree_on_clear_images_and_count_the_classes():
    judge, k = Classifier(BLOBS), torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    clear, held_out = BLOBS.patterns[k].float(), BLOBS.patterns[torch.tensor([0, 1, 2, 2])].float()
    found = judge.measure(clear, held_out)
    assert found["classifier_agreement"] == 1.0
    assert found["class_balance"] == pytest.approx(0.5 * (0.25 + 0.05 + 0.3))
    of_classes = BLOBS.patterns[:3, None].float().repeat_interleave(100, 1)
    entry = judge.label_accuracy(of_classes, 0)
    assert entry["value"] == 1.0
    assert entry["detail"]["samples"] == [1.0, 1.0, 1.0]
    of_classes[:, :50] = of_classes[:, :50].roll(1, 0)
    wrong = judge.label_accuracy(of_classes, 0)
    assert wrong["value"] == 0.5
    # Classes share their noise: a hundred observations of standard deviation 1/2, and not three hundred.
    assert wrong["ci"][1] - wrong["ci"][0] == pytest.approx(2 * 1.96 * 0.05, rel=0.2)  # the quantiles of 200 copies
    real = (judge.seen(BLOBS.splits["test"])[:, 0] == BLOBS.known[0]["test"]).double().mean()
    assert entry["floor"] == float(real) > 0.9


def test_images_become_bytes_as_torchmetrics_wants_them():
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).reshape(5, 1, 1, 1)
    assert to_bytes(x)[:, :, 0, 0].tolist() == [[v] * 3 for v in (0, 0, 128, 255, 255)]
    assert to_bytes(torch.zeros(2, 3, 4, 4)).shape == (2, 3, 4, 4)


def test_fid_is_torchmetrics_own_and_the_closed_form_of_the_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, y = images(0), 0.8 * images(1) + 0.1
    theirs = FrechetInceptionDistance(feature=Tiny(), input_img_size=(3, 4, 4)).set_dtype(F64)
    theirs.update(to_bytes(y), real=True)
    theirs.update(to_bytes(x), real=False)
    found = FID(PICTURES, TINY).measure(x, y)["fid"]
    assert found == pytest.approx(float(theirs.compute()), rel=1e-5)  # they return the features' float32
    f, g = (TINY(to_bytes(z)).detach().double().numpy() for z in (x, y))
    c, d = np.cov(f.T), np.cov(g.T)
    exact = np.square(f.mean(0) - g.mean(0)).sum() + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert found == pytest.approx(exact, rel=1e-7)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kid_is_torchmetrics_own():
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = images(0), 0.8 * images(1) + 0.1
    theirs = KernelInceptionDistance(feature=Tiny(), subsets=1, subset_size=len(x))
    theirs.update(to_bytes(y), real=True)
    theirs.update(to_bytes(x), real=False)
    assert KID(PICTURES, TINY).measure(x, y)["kid"] == pytest.approx(float(theirs.compute()[0]), abs=1e-6)  # float32


def test_no_image_passes_the_network_twice():
    tiny, x, y = Tiny(), images(0), images(1)
    fid, kid = FID(PICTURES, tiny), KID(PICTURES, tiny)
    for metric in (fid, kid):
        metric.measure(x, y)
        metric.measure(y.flip(0), x)
        list(metric.copies(x, y, 0))
    assert tiny.seen == len(x) + len(y)
    assert fid.protocol() == {"features": "tests.test_metrics.Tiny"}


def test_inception_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    for metric in (FID, KID):
        with pytest.raises(ScoreSDEError, match=r"pip install 'scoresde\[images\]'"):
            metric(PICTURES)


# Rows at which thousands of evaluations are affordable; a quick classifier in place of the judges' vote.
CHECKED = [
    (SlicedWasserstein(FLAT), 100), (WhitenedSlicedWasserstein(FLAT), 100), (EnergyDistance(FLAT), 100),
    (Wasserstein(FLAT), 60), (MMD(FLAT), 100),
    (C2ST(FLAT, GaussianNB()), 60), (PRDC(FLAT), 100), (ModeWeights(FLAT), 100), (Columns(FLAT), 100),
    (Tails(FLAT), 1000), (FrechetPCA(PICTURES), 100), (Classifier(BLOBS), 200),
    (FID(PICTURES, TINY), 50), (KID(PICTURES, TINY), 50),
]  # fmt: skip
WITH_TIES = {"precision", "recall", "coverage", "c2st", "classifier_agreement", "class_balance"}
every_metric = pytest.mark.parametrize(
    ("metric", "m"), [pytest.param(*case, id=type(case[0]).__name__) for case in CHECKED]
)


def fresh(metric, m, *index):
    return metric.data.fresh(m, generator(0, "fresh", *index))


def distorted(metric, m, *index):
    """Samples wrong in place, scale and correlation; for the tails, with heavier ones."""
    z = fresh(metric, m, "distorted", *index).flatten(1)
    if isinstance(metric, Tails):
        z = z * uniform((m, 1), generator(0, "heavy", *index)).clamp_min(1e-6) ** -0.25
    return (1.2 * z + 0.5 * z.roll(1, 1) + 0.6).reshape(-1, *metric.data.shape)


@every_metric
def test_compare_gives_each_number_with_interval_floor_and_protocol(metric, m):
    x, y = fresh(metric, m, "x"), fresh(metric, m, "y")

    def pair(i):
        return fresh(metric, m, "pair", 2 * i), fresh(metric, m, "pair", 2 * i + 1)

    found, far = compare([metric], x, y, pair, 0), compare([metric], distorted(metric, m), y, pair, 0)
    assert set(found) == set(metric.quantities) == set(metric.measure(x, y))
    assert metric.measure(x, y) == metric.measure(x.clone(), y.clone())
    for name, entry in found.items():
        sign = 1 if metric.quantities[name].better == "lower" else -1
        assert entry["ci"][0] <= entry["value"] <= entry["ci"][1]
        assert entry["unit"] == metric.quantities[name].unit
        assert entry["protocol"].items() >= {"n": m, "floor_pairs": PAIRS, "interval": metric.interval}.items()
        spread = sign * (entry["floor_high"] - entry["floor"])
        assert spread >= 0
        assert sign * (entry["value"] - entry["floor"]) < 2 * spread
        assert sign * (far[name]["value"] - entry["floor"]) > 2 * spread
        assert far[name]["ci"][0] <= far[name]["value"] <= far[name]["ci"][1]
        least, most = metric.quantities[name].limits  # no accuracy above one, no distance below zero
        assert all(least <= end <= most for one in (entry, far[name]) for end in one["ci"])
        assert metric.detail(x, y).get(name) == entry.get("detail")


def tolerance(repeats):
    """Four binomial standard deviations of a count that has probability 0.95."""
    return 4 * math.sqrt(repeats * 0.95 * 0.05)


@every_metric
def test_fresh_data_is_on_the_good_side_of_floor_high_as_often_as_it_should(metric, m):
    """In 95 of 100 repeats; in all 100 once in 170 times, unless the number has ties."""
    repeats = 40 if isinstance(metric, C2ST | Classifier) else 100
    good = dict.fromkeys(metric.quantities, 0)
    for i in range(repeats):
        pairs = [[fresh(metric, m, "floor", i, j, side) for side in "ab"] for j in range(PAIRS + 1)]
        first, *others = [metric.measure(a, b) for a, b in pairs]
        for name, quantity in metric.quantities.items():
            high = chance([numbers[name] for numbers in others], quantity.better)[1]
            good[name] += first[name] <= high if quantity.better == "lower" else first[name] >= high
    assert all(count >= 0.95 * repeats - tolerance(repeats) for count in good.values()), good
    assert all(count < repeats for name, count in good.items() if name not in WITH_TIES), good


@every_metric
def test_intervals_cover_the_expected_number(metric, m):
    """Off the floor, the interval holds the mean number at that sample size in 95 of 100 repeats."""
    repeats = 25 if isinstance(metric, C2ST) else 50
    values, intervals = [], []
    for i in range(repeats):
        x, y = distorted(metric, m, i), fresh(metric, m, "cover", i)
        values.append(metric.measure(x, y))
        copies = list(metric.copies(x, y, i))
        assert len(copies) == RESAMPLES
        intervals.append({name: interval(values[-1][name], [copy[name] for copy in copies]) for name in values[-1]})
    for name in metric.quantities:
        mean = np.mean([numbers[name] for numbers in values])
        covered = sum(found[name][0] <= mean <= found[name][1] for found in intervals)
        assert covered >= 0.95 * repeats - tolerance(repeats), (name, covered)


@pytest.mark.parametrize("what", ["collapsed", "far", "huge", "four rows"])
@every_metric
def test_degenerate_samples_have_finite_numbers(metric, m, what):
    if isinstance(metric, SlicedWasserstein | EnergyDistance) and what == "huge":
        pytest.skip("they compute in the samples' own float32")
    metric = C2ST(FLAT) if isinstance(metric, C2ST) else metric
    x, y = fresh(metric, m, "x"), fresh(metric, m, "y")
    wrong = {"collapsed": x[:1].expand_as(x), "far": x + 1e6, "huge": torch.where(x > 0.3, 1e30 * x, x), "four rows": x}
    x, y = (z[: 4 if what == "four rows" else m] for z in (wrong[what], y))
    for numbers in (metric.measure(x, y), *islice(metric.copies(x, y, 0), 5)):
        assert all(math.isfinite(value) for value in numbers.values())


def test_metrics_know_the_data_they_mean_nothing_on():
    flat, picture = Normal(), Blobs()
    one_mode = SampledMixture(correlated_gaussian(), 100, 0)
    fits = {
        metric: [metric.unfit(data) is None for data in (FLAT, one_mode, flat, picture)]
        for metric in (Wasserstein, C2ST, ModeWeights, Columns, Tails, FrechetPCA, Classifier, FID, KID)
    }  # fmt: skip
    yes, no = True, False
    assert fits == {
        Wasserstein: [yes] * 4, C2ST: [yes] * 4, ModeWeights: [yes, no, no, no], Columns: [yes, yes, yes, no],
        Tails: [yes, yes, yes, no], FrechetPCA: [no, no, no, yes], Classifier: [no, no, no, yes], FID: [no, no, no, yes],
        KID: [no, no, no, yes],
    }  # fmt: skip
    assert "known classes" in Classifier.unfit(PICTURES)
    picture.shape = (2, 4, 4)
    assert "2 channels" in FID.unfit(picture)


def test_score_error_of_the_exact_score_is_zero_and_of_the_gaussian_is_right():
    sde, law = VP(), three_modes()
    oracle, x0 = Oracle(law, sde), law.sample(20_000, generator(0, "x"))
    assert score_error(oracle, oracle, sde, x0, 1e-3, 0)["value"] == 0
    gaussian = ScoreModel(Zero(), sde, Residual("isotropic"), fit_gaussian(x0, "isotropic")).double()
    found = score_error(gaussian, oracle, sde, x0, 1e-3, 0)
    # Independently: plain Monte Carlo over uniform times.
    source = generator(7, "independent")
    t = 1e-3 + 0.999 * torch.rand(20_000, generator=source, dtype=torch.float64)
    x = sde.kernel().sample(x0, t, source).x_t
    errors = (gaussian(x, t) - oracle.score(x, t)).square().sum(1) * sde.sigma(t) ** 2
    se = float(errors.std()) / math.sqrt(20_000)
    assert abs(found["value"] - float(errors.mean())) < 4 * math.sqrt(2) * se
    assert found["ci"][0] < found["value"] < found["ci"][1]
    assert found["ci"][1] - found["ci"][0] == pytest.approx(2 * 1.96 * se, rel=0.25)


def test_bootstrap_interval_of_a_mean_agrees_with_the_normal_one():
    values = np.random.default_rng(0).exponential(1, 5000)
    low, high = bootstrap_mean(values, 0)
    half = 1.96 * values.std() / math.sqrt(5000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.12)  # 1000 resamples: a quantile's own noise
    assert low < values.mean() < high
