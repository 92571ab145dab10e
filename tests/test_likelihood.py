"""log p by the probability-flow ODE against closed forms."""

import math

import pytest
import torch

from scoresde_cli.datasets.oracle import Oracle
from scoresde_cli.likelihood import log_prob
from scoresde_cli.sdes.base import LinearSDE
from scoresde_cli.sdes.subvp import SubVP
from scoresde_cli.sdes.ve import VE
from scoresde_cli.sdes.vp import VP
from tests.laws import MIXTURES, name


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(0.01, 50.0)], ids=name)
@pytest.mark.parametrize("law", MIXTURES.values(), ids=MIXTURES)
def test_log_density_of_the_exact_score_is_the_exact_one(sde: LinearSDE, law):
    """At most 1e-3 nats a dimension off at t_min, with the prior in place of p_T and 60 steps."""
    centred, t_min = law(), 1e-3
    # A mean of the data shifts p_T off the prior by alpha(T) of it: that part of the error is the process's, not the solver's.
    centred.means = centred.means - centred.weights @ centred.means
    oracle = Oracle(centred, sde)
    x = centred.sample(100, torch.Generator().manual_seed(0))
    found = log_prob(oracle, sde, x, t_min, 60)
    exact = oracle.log_prob(x, torch.full((100,), t_min))
    assert float((found - exact).abs().max()) < 2e-3


def test_the_density_of_a_zero_step_flow_is_the_prior():
    """With data that is the prior of a stationary process the flow stands still: log N(x; 0, I)."""
    sde = VP()
    from scoresde_cli.datasets.oracle import Mixture

    oracle = Oracle(Mixture(torch.ones(1), torch.zeros(1, 3), torch.ones(1, 3)), sde)
    x = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = -0.5 * x.square().sum(1) - 1.5 * math.log(2 * math.pi)
    assert torch.allclose(log_prob(oracle, sde, x, 1e-3, 10), exact, atol=1e-3)
