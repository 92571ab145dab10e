"""Where samples of a trained jump diffusion go astray: the learnt velocity in part, the exact one elsewhere: docs/jumps.md.

By time, the error of the learnt velocity where little flux is (at most twice the rest of the velocity that is not drift) and
where there is more, relative to the exact one. Then samples by fields that are learnt at some times, or in one of these places, and
exact elsewhere: the share further than 4 standard deviations from every mode, and the spread of the others.

usage: .venv/bin/python scripts/experiments/bridges.py RUN [--n 2048]      (a run of sde=jump_diffusion data=eight_gaussians)
       about 2 minutes on one core
"""

import argparse
from collections.abc import Callable, Set

import torch
from torch import Tensor

from scoresde_cli import load_run
from scoresde_cli.fields import FieldModel
from scoresde_cli.rng import generator
from scoresde_cli.samplers.heun_ode import HeunODE

Where = Callable[[Tensor, Tensor, Tensor], Tensor]  # (t, flux, rest) -> (B,), true where the learnt field is taken


def large(a: Tensor, b: Tensor) -> Tensor:
    return a.norm(dim=1) > 2 * b.norm(dim=1)


class Mixed(FieldModel):
    """The learnt velocity where `learnt` says so, and the exact one elsewhere."""

    def __init__(self, model: FieldModel, exact: FieldModel, learnt: Where) -> None:
        self.model, self.exact, self.learnt = model, exact, learnt
        self.sde, self.provides = model.sde, exact.provides

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return self.exact.score(x, t)

    def fields(self, x: Tensor, t: Tensor, names: Set[str]) -> dict[str, Tensor]:
        exact = self.exact.fields(x, t, names | {"score", "flux"})
        if "velocity" in names:
            rest = exact["velocity"] - exact["flux"] - self.sde.drift(x, t)
            here = self.learnt(t, exact["flux"], rest)[:, None]
            exact["velocity"] = torch.where(here, self.model.fields(x, t, {"velocity"})["velocity"], exact["velocity"])
        return {name: exact[name] for name in names}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=2048)
    given = parser.parse_args()
    run = load_run(given.run)
    model, data = run.model, run.dataset()
    sde, law = model.sde, data.law
    exact, x0 = data.oracle(sde), data.fresh(given.n, generator(0, "data")).float()
    print("t        share with flux   relative error: little flux   much flux")
    for now in (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.4):
        t = torch.full((given.n,), now)
        x = sde.kernel().sample(x0, t, generator(1, "noise")).x_t
        true = exact.fields(x, t, {"velocity", "flux"})
        much = large(true["flux"], true["velocity"] - true["flux"] - sde.drift(x, t))
        gap, size = (v.square().sum(1) for v in (model.velocity(x, t) - true["velocity"], true["velocity"]))
        little, more = (float((gap[i].mean() / size[i].mean()).sqrt()) for i in (~much, much))
        print(f"{now:<8g} {float(much.float().mean()):<17.3f} {little:<28.2f} {more:.2f}")
    scale = law.lam[0, 0].sqrt()
    ways: dict[str, Where] = {"nowhere": lambda t, f, r: t < 0, "everywhere": lambda t, f, r: t > 0}
    for low, high in ((0, 0.01), (0.01, 0.03), (0.03, 0.1), (0.1, 2)):
        ways[f"t in {low:g}, {high:g}"] = lambda t, f, r, low=low, high=high: (t >= low) & (t < high)  # type: ignore[misc]
    ways |= {"little flux": lambda t, f, r: ~large(f, r), "much flux": lambda t, f, r: large(f, r)}
    print("learnt           beyond 4 sd   spread of the others / sd")
    for name, where in ways.items():
        x = HeunODE(steps=40, t_min=1e-3).sample(Mixed(model, exact, where), sde, (2,), given.n, 0).x
        far = torch.cdist(x, law.means.float()).min(1).values / scale
        inside = far[far < 4].square().mean().div(2).sqrt()
        print(f"{name:<16} {float((far >= 4).float().mean()):<13.4f} {float(inside):.3f}", flush=True)


if __name__ == "__main__":
    main()
