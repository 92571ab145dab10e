"""Nothing in the hot path is tied to the CPU or waits for the device.

A stand-in for a device that this machine lacks: `meta` tensors have no values, so that whatever would read one back
raises, and so does a mixture of them with tensors on the CPU.
"""

import pytest
import torch

from scoresde_cli.losses.dsm import DSM
from scoresde_cli.losses.fd_ssm import FDSSM
from scoresde_cli.losses.ism import ISM
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.networks.energy_mlp import EnergyMLP
from scoresde_cli.networks.mlp import MLP
from scoresde_cli.networks.model import Gaussian, ScoreModel
from scoresde_cli.networks.parameterisation import Residual
from scoresde_cli.networks.resmlp import ResMLP
from scoresde_cli.projections import Rademacher
from scoresde_cli.samplers import base
from scoresde_cli.samplers.dpm_solver_pp import DPMSolverPP
from scoresde_cli.samplers.edm_stochastic import EDMStochastic
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.samplers.predictor_corrector import PredictorCorrector
from scoresde_cli.sdes.vp import VP
from scoresde_cli.training import loop
from scoresde_cli.training.optimizer import Adam
from tests.laws import PROJECTIONS, name

LOSSES = [
    *(SSMVR(law, 2) for law in PROJECTIONS), SSM(Rademacher(), 2), ISM(), FDSSM(Rademacher(), 1), DSM(),
    SSMVR(Rademacher(), 2, weighting="g2"),
]  # fmt: skip
over_losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda x: f"{name(x)}-{name(getattr(x, 'projection', x))}")


def source_on(device: torch.device) -> torch.Generator:
    """A generator that says it is the device's."""

    class Elsewhere(torch.Generator):
        @property
        def device(self):
            return device

    return Elsewhere()


def plan_on(device, loss, network=MLP):
    """A plan whose tensors were made on the device."""
    with device:
        gaussian = Gaussian(torch.zeros(5), torch.ones(5), torch.eye(5))
        model, x = ScoreModel(network((5,), 16, 2), VP(), Residual("full"), gaussian), torch.empty(400, 5)
    return loop.Plan(model, model, VP(), loss, Adam(), x, x, model, 0, 10, None, 64, 0.99, 50, 100)


@over_losses
def test_a_training_step_reads_nothing_back(loss, monkeypatch):
    device = torch.device("meta")
    monkeypatch.setattr(loop, "generator", lambda *a, **k: source_on(device))
    for network in (MLP, ResMLP, EnergyMLP):
        plan = plan_on(device, loss, network)
        state = loop.start(plan)
        state.loss_sum += loop.train_step(plan, state, 0.1)
        assert state.loss_sum.device == device


class Reading(DSM):
    def value(self, *args):
        value = super().value(*args)
        return value / float(value.mean())


class Mixing(DSM):
    def value(self, *args):
        value = super().value(*args)
        return value * torch.ones(len(value))


@pytest.mark.parametrize("loss", [Reading(), Mixing()], ids=name)
def test_the_stand_in_notices(loss, monkeypatch):
    device = torch.device("meta")
    monkeypatch.setattr(loop, "generator", lambda *a, **k: source_on(device))
    plan = plan_on(device, loss)
    with pytest.raises((RuntimeError, NotImplementedError)):
        loop.train_step(plan, loop.start(plan), 0.1)


@pytest.mark.parametrize(
    "make", [HeunODE, EulerMaruyama, DPMSolverPP, EDMStochastic, PredictorCorrector], ids=lambda m: m.__name__
)
def test_sampling_reads_nothing_back(make, monkeypatch):
    device = torch.device("meta")
    monkeypatch.setattr(base, "generator", lambda *a, **k: source_on(device))
    plan = plan_on(device, DSM())
    assert make(steps=3).sample(plan.model, plan.sde, (5,), 300, 0, device=device).x.device == device
