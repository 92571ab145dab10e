"""Contract of every forward process with a kernel: the kernel solves the SDE, the reversal undoes it."""

import math

import pytest
import torch

from scoresde_cli.datasets.oracle import Oracle
from scoresde_cli.rng import generator, normal
from scoresde_cli.sdes.base import SDE, Jumps
from scoresde_cli.sdes.operators import Scalar
from scoresde_cli.sdes.vp import VP
from tests.laws import SDES, correlated_gaussian, name, three_modes

each = pytest.mark.parametrize("sde", SDES, ids=name)


@each
def test_kernel_solves_the_moment_equations(sde):
    """alpha' = -a alpha and (sigma^2)' = -2 a sigma^2 + g^2, with alpha(0) = 1 and sigma(0) = 0, to rounding."""
    t = torch.linspace(1e-3, sde.T, 200, dtype=torch.float64, requires_grad=True)
    alpha, var = sde.alpha(t), sde.sigma(t).square()
    (slope,) = torch.autograd.grad(alpha.sum() + 0 * t.sum(), t, retain_graph=True)
    assert torch.allclose(slope, -sde.a(t) * alpha, rtol=1e-9, atol=1e-12)
    (rate,) = torch.autograd.grad(var.sum(), t)
    assert torch.allclose(rate, -2 * sde.a(t) * var + sde.g(t).square(), rtol=1e-8, atol=1e-12)
    zero = torch.zeros(1, dtype=torch.float64)
    assert sde.alpha(zero) == 1
    assert sde.sigma(zero) == 0


@each
def test_kernel_is_accurate_at_small_times_in_single_precision(sde):
    t = torch.tensor([1e-5, 1e-4, 1e-3])
    assert torch.allclose(sde.sigma(t).double(), sde.sigma(t.double()), rtol=1e-5)


@each
def test_simulation_agrees_with_the_kernel(sde):
    """Mean and variance of Euler-Maruyama against the kernel: its bias is O(1/steps), the rest is Monte Carlo."""
    n, t = 20_000, torch.full((20_000,), 0.4 * sde.T, dtype=torch.float64)
    x0 = torch.tensor([[1.0, -0.5]], dtype=torch.float64).expand(n, 2)
    x = sde.simulate(x0, t, 200, generator(0, "simulate"))
    alpha, sigma = float(sde.alpha(t[:1])), float(sde.sigma(t[:1]))
    z = (x.mean(0) - alpha * x0[0]) / (sigma / math.sqrt(n))
    bias = 3.0 * 0.4 / 200 / (sigma / math.sqrt(n))  # |error of the mean| < 3 h
    assert (z.abs() < 4 + bias).all()
    # The relative standard error of a variance is sqrt(2/n) = 1 percent; VE's noise grows by 9 percent a step at most.
    assert (x.var(0) / sigma**2 - 1).abs().max() < 0.06


@each
def test_prior_has_the_variance_of_the_kernel_at_T(sde):
    x = sde.sample_prior((50_000, 2), generator(0, "prior"), torch.float64)
    sigma = sde.sigma(torch.tensor([sde.T], dtype=torch.float64))
    assert (x.var(0) / sigma**2 - 1).abs().max() < 4 * math.sqrt(2 / 50_000)


@each
def test_targets_are_consistent(sde):
    """score = -eps/sigma, and Tweedie's x0 from the target score is x_0 itself."""
    x0 = normal((8, 3), generator(0, "x0"), torch.float64)
    t = torch.linspace(0.05, 0.9, 8, dtype=torch.float64)
    noised = sde.kernel().sample(x0, t, generator(1, "x0"))
    found = sde.kernel().targets(x0, noised, t, {"eps", "score", "x0"})
    sigma, alpha = sde.sigma(t)[:, None], sde.alpha(t)[:, None]
    assert torch.allclose(found["score"], -found["eps"] / sigma)
    assert torch.allclose((noised.x_t + sigma**2 * found["score"]) / alpha, x0)


@each
@pytest.mark.parametrize("law", [correlated_gaussian, three_modes])
def test_probability_flow_carries_the_density(sde, law):
    """Liouville's equation d log p/dt + velocity . score + div velocity = 0 for the exact score, at random points."""
    oracle = Oracle(law(), sde)
    x = normal((16, 2), generator(0, "liouville"), torch.float64).requires_grad_()
    t = torch.linspace(0.05, 0.95, 16, dtype=torch.float64).requires_grad_()
    (dlog,) = torch.autograd.grad(oracle.log_prob(x, t).sum(), t)
    v = oracle.fields(x, t, {"velocity"})["velocity"]
    div = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    residual = dlog + (v * oracle.score(x, t)).sum(1) + div
    assert residual.abs().max() < 1e-9 * (1 + dlog.abs().max())


@each
def test_reverse_drift_is_anderson(sde):
    """f - Sigma score: twice the velocity minus the drift, when Sigma does not depend on x."""
    x, t = normal((4, 2), generator(0, "anderson"), torch.float64), torch.full((4,), 0.5, dtype=torch.float64)
    s = Oracle(three_modes(), sde).score(x, t)
    assert torch.allclose(sde.reverse_drift(x, t, s), 2 * sde.velocity(x, t, s) - sde.drift(x, t))


class JumpDiffusion(SDE):
    """dx = -x dt + 0.5 dW + Gaussian jumps of variance 0.3 at rate 4: no kernel, moments known."""

    jumps = Jumps(
        rate=lambda t: torch.full_like(t, 4.0),
        sample=lambda n, shape, t, g: math.sqrt(0.3) * normal((n, *shape), g, torch.float64),
    )

    def drift(self, x, t):
        return -x

    def diffusion(self, t, x=None):
        return Scalar(torch.full_like(t, 0.5))

    def sample_prior(self, shape, generator, dtype=torch.float32):
        raise NotImplementedError


def test_simulation_of_jumps_has_the_right_moments():
    """Variance (g^2 + lambda E A^2)/2 (1 - e^{-2t}) for the linear drift (Campbell's theorem)."""
    n = 40_000
    x = JumpDiffusion().simulate(
        torch.ones(n, 1, dtype=torch.float64), torch.ones(n, dtype=torch.float64), 200, generator(0, "j")
    )
    expected = (0.25 + 4 * 0.3) / 2 * (1 - math.exp(-2))
    assert abs(float(x.mean()) - math.exp(-1)) < 4 * math.sqrt(expected / n) + 2 / 200
    assert abs(float(x.var()) / expected - 1) < 0.04  # 4 standard errors of a variance with this kurtosis, and the bias


def test_a_process_without_kernel_perturbs_by_simulation():
    noised = JumpDiffusion().perturb(
        torch.ones(5, 2, dtype=torch.float64), torch.full((5,), 0.3).double(), generator(0, "p")
    )
    assert noised.x_t.shape == (5, 2)
    assert noised.eps is None


def test_vp_with_constant_beta_is_an_ornstein_uhlenbeck_process():
    sde, t = VP(2.0, 2.0), torch.tensor([0.3], dtype=torch.float64)
    assert sde.alpha(t) == pytest.approx(math.exp(-0.3), rel=1e-12)
    assert sde.sigma(t) ** 2 == pytest.approx(1 - math.exp(-0.6), rel=1e-12)
