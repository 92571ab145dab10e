"""Contract of every sampler: its order of convergence, the law it ends in, independence of the number of samples."""

import itertools
import math

import pytest
import torch

from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.rng import generator
from scoresde_cli.samplers.base import block_rows
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.euler_ode import EulerODE
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.sdes.ve import VE
from scoresde_cli.sdes.vp import VP
from tests.laws import name, three_modes

# sampler, order on an ODE (None for the SDE), evaluations a step
SAMPLERS = [(EulerODE, 1, 1), (HeunODE, 2, 2), (EulerMaruyama, None, 1)]


def gaussian_oracle(sde) -> Oracle:
    """N(0, diag(0.25, 2.0)): the flow map of the probability-flow ODE is linear, x_s = sqrt(v_s / v_t) x_t."""
    return Oracle(Mixture(torch.ones(1), torch.zeros(1, 2), torch.tensor([[0.25, 2.0]])), sde)


@pytest.mark.parametrize(
    ("make", "order", "nfe"), [s for s in SAMPLERS if s[1]], ids=lambda v: name(v) if isinstance(v, type) else None
)
def test_order_of_convergence_on_the_exact_flow(make, order, nfe):
    """The error at t_min against the closed-form flow map falls like steps^-order. Two-sided: measured within 0.15."""
    sde = VP(1.0, 6.0)
    oracle, errors, counts = gaussian_oracle(sde), [], (80, 160, 320)
    lam, t_min = torch.tensor([0.25, 2.0], dtype=torch.float64), 0.05
    for steps in counts:
        sampler = make(steps, 1.0, False, t_min)
        found = sampler.sample(oracle, sde, (2,), 64, 0, dtype=torch.float64)
        start = sde.sample_prior((block_rows(2), 2), generator(0, "sample", 0), torch.float64)[:64]

        def var(t):
            t = torch.tensor([t], dtype=torch.float64)
            return sde.alpha(t) ** 2 * lam + sde.sigma(t) ** 2

        exact = start * (var(t_min) / var(1.0)).sqrt()
        errors.append(float((found.x - exact).abs().mean()))
        assert found.nfe == nfe * steps
    for a, b in itertools.pairwise(errors):
        # The next term of the error expansion is 1/steps smaller: below 0.15 in the exponent at 80 steps.
        assert math.log2(a / b) == pytest.approx(order, abs=0.15)


def test_euler_maruyama_converges_weakly_at_order_one():
    """The variance of the linear reverse SDE obeys its own recursion; its error halves when the steps double."""
    sde, lam, t_min = VP(1.0, 6.0), torch.tensor([0.25, 2.0], dtype=torch.float64), 0.05
    oracle, bias = gaussian_oracle(sde), []
    for steps in (40, 80, 160):
        sampler = EulerMaruyama(steps, 1.0, False, t_min)
        # One step is x <- A x + b z: read A and b off the step itself, and push the variance through.
        var = sde.sigma(torch.tensor([1.0], dtype=torch.float64)).square().expand(2)
        times = sampler.grid(1.0)
        for t, s in itertools.pairwise(times):
            x = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
            out = sampler.step(
                lambda x, t, n: oracle.fields(x, t, {n})[n], sde, x, t.expand(2), s.expand(2), generator(0, "em")
            )
            noise = out[1]
            z = torch.randn(2, 2, generator=generator(0, "em"), dtype=torch.float64)
            slope = out[0] - noise / z[1] * z[0]
            var = slope.square() * var + (noise / z[1]).square()
        t = torch.tensor([t_min], dtype=torch.float64)
        # The prior is off the true p_T by a known factor; compare with the exact reverse SDE from this prior instead.
        bias.append(var - (sde.alpha(t) ** 2 * lam + sde.sigma(t) ** 2))
    first, second = bias[0] - bias[1], bias[1] - bias[2]
    assert torch.allclose(torch.log2(first / second), torch.ones(2, dtype=torch.float64), atol=0.2)


@pytest.mark.parametrize(("make", "order", "nfe"), SAMPLERS, ids=lambda v: name(v) if isinstance(v, type) else None)
@pytest.mark.parametrize("sde", [VP(), VE(0.01, 20.0)], ids=name)
def test_every_sampler_reaches_the_law_with_the_exact_score(sde, make, order, nfe):
    """Mean and second moments of 4096 samples against the mixture's, at fine steps: z-scores below 4.5 (5 of them)."""
    law, n = three_modes(), 4096
    # Euler's bias is of order 1/steps, and VE's noise wants even steps of t.
    x = (
        make(1500 if order == 1 else 400, 2.0 if isinstance(sde, VP) else 1.0, True, 1e-3)
        .sample(Oracle(law, sde), sde, (2,), n, 1, dtype=torch.float64)
        .x
    )
    true = law.sample(400_000, generator(5, "true"))

    def features(y):
        return torch.stack([y[:, 0], y[:, 1], y[:, 0] ** 2, y[:, 1] ** 2, y[:, 0] * y[:, 1]], 1)

    a, b = features(x), features(true)
    z = (a.mean(0) - b.mean(0)) / (b.std(0) * math.sqrt(1 / n + 1 / len(true)))
    # VE starts from N(0, sigma_max^2) instead of p_T: a bias of mean/sigma_max^2, here below 0.3 standard errors.
    assert z.abs().max() < 4.5


@pytest.mark.parametrize(("make", "order", "nfe"), SAMPLERS, ids=lambda v: name(v) if isinstance(v, type) else None)
def test_sample_i_does_not_depend_on_how_many_are_drawn(make, order, nfe):
    sde = VP()
    oracle = Oracle(three_modes(), sde)

    def draw(n):
        return make(5).sample(oracle, sde, (2,), n, 3).x

    rows = block_rows(2)
    many = draw(rows + 30)
    assert torch.equal(draw(7), many[:7])
    assert torch.equal(draw(rows + 1), many[: rows + 1])
    assert not torch.equal(many[:30], many[rows:])


def test_the_grid_ends_at_t_min_and_is_finer_there():
    grid = HeunODE(10, 2.0, True, 1e-3).grid(1.0)
    assert grid[0] == 1
    assert grid[-1] == pytest.approx(1e-3, rel=1e-12)
    steps = grid[:-1] - grid[1:]
    assert (steps[1:] < steps[:-1]).all()
    assert torch.allclose(HeunODE(10, 1.0).grid(1.0).diff(), torch.full((10,), -0.0999, dtype=torch.float64))
