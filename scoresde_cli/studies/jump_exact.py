"""The ways back under jumps with fields that are known, right and wrong; nothing is trained."""

from collections.abc import Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde_cli.datasets.jump_oracle import JumpOracle
from scoresde_cli.datasets.oracle import Mixture
from scoresde_cli.metrics.base import PAIRS, chance
from scoresde_cli.metrics.sliced_wasserstein import sliced_wasserstein
from scoresde_cli.rng import generator
from scoresde_cli.samplers.base import Sampler, Walk
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.samplers.scale_path import ScalePath
from scoresde_cli.samplers.true_reversal import TrueReversal
from scoresde_cli.sdes.base import SDE

EXACT, IGNORED, MATCHED = "exact", "flux left out", "diffusion of equal variance"


class Mistaken(JumpOracle):
    """The exact score with another flux: `matched` times that of a diffusion of equal variance, -lambda E w / 2 score."""

    matched = 0.0

    def fields(self, x: Tensor, t: Tensor, names: Set[str]) -> dict[str, Tensor]:
        found = super().fields(x, t, (names - {"velocity", "flux"}) | {"score"})
        push = self.sde.scales(t.double(), x[0].numel())["flux"].push.to(x.dtype)
        flux = -self.matched * push.reshape(-1, *[1] * (x.ndim - 1)) * found["score"]
        found |= {"flux": flux, "velocity": self.sde.velocity(x, t, found["score"], flux)}
        return {name: found[name] for name in names}


class Matched(Mistaken):
    matched = 1.0


class CountedReversal(TrueReversal):
    """Counts its jumps."""

    jumps, paths = 0, 0

    def walk_down(self, walk: Walk, times: Tensor, shape: tuple[int, ...], *args: Any) -> Tensor:
        x = super().walk_down(walk, times, shape, *args)
        self.jumps, self.paths = self.jumps + (walk.memory or 0), self.paths + shape[0]
        return x


def ways_back(
    law: Mixture, sde: SDE, n: int, steps: int, seed: int, candidates: int = 128
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(a row for each sampler and field, the floor): sliced Wasserstein distances of n samples to as many fresh ones."""
    d = law.means.shape[1]
    true = law.sample(n, generator(seed, "true")).float()

    def fresh(i: int) -> float:
        a, b = (law.sample(n, generator(seed, "floor", i, side)).float() for side in (0, 1))
        return sliced_wasserstein(a, b)

    low, high = chance([fresh(i) for i in range(PAIRS)], "lower")
    settings: dict[str, Any] = {"steps": steps, "rho": 4.0, "t_min": 1e-5, "denoise": False}
    ode, noisy = HeunODE(**settings), EulerMaruyama(**settings)
    reversal = CountedReversal(candidates=candidates, **settings)
    runs: list[tuple[str, Sampler, type[JumpOracle], str]] = [
        ("flow", ode, JumpOracle, EXACT), ("SDE", noisy, JumpOracle, EXACT), ("true reversal", reversal, JumpOracle, EXACT),
        ("scale path", ScalePath(**settings), JumpOracle, EXACT), ("flow", ode, Mistaken, IGNORED),
        ("SDE", noisy, Mistaken, IGNORED), ("flow", ode, Matched, MATCHED), ("SDE", noisy, Matched, MATCHED),
    ]  # fmt: skip
    rows = []
    for way, sampler, oracle, field in runs:
        x = sampler.sample(oracle(law, sde), sde, (d,), n, seed, dtype=torch.float64).x.float()
        value = sliced_wasserstein(x, true) if bool(x.isfinite().all()) else float("inf")
        rows.append({"way": way, "field": field, "value": value})
    rows[2]["jumps"] = reversal.jumps / reversal.paths
    end = torch.full((1,), sde.T, dtype=torch.float64)
    assert sde.jumps is not None
    times = np.linspace(0, sde.T, 201)
    rates = sde.jumps.rate(torch.as_tensor(times)).numpy() * np.ones_like(times)
    return rows, {"floor": low, "floor_high": high, "expected_jumps": float(np.trapezoid(rates, times)), "T": float(end)}
