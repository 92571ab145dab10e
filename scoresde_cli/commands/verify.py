"""`scoresde verify`: the identity of implicit and sliced score matching, shown as numbers."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.table import Table

from scoresde_cli import configs, identity
from scoresde_cli.checks import check_call
from scoresde_cli.compose import build, locate
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.networks.dual import PIECEWISE_LINEAR
from scoresde_cli.projections import check_law
from scoresde_cli.tracking import console


@dataclass(frozen=True)
class Keys:
    """The keys of `verify`."""

    d: Annotated[int, Field(ge=2, le=256)]
    n_proj: PositiveInt
    draws: Annotated[int, Field(ge=1000, le=10_000_000)]
    seed: NonNegativeInt


def task(config: DictConfig) -> int:
    keys: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    network, law = keys.pop("network"), keys.pop("projection", None)
    check_call(Keys, keys, "")
    d, n = keys["d"], keys["n_proj"]
    if network.get("activation") in PIECEWISE_LINEAR:
        raise ScoreSDEError(
            f"network.activation={network['activation']}: piecewise linear, so the gradient of tr J is silently wrong; "
            "take silu, gelu or tanh"
        )
    field = identity.randomise(build(network, "network", shape=(d,)), keys["seed"])
    if law is not None:
        laws = {locate(law["_target_"], "projection").__name__: build(law, "projection")}
    else:
        nodes = {
            o: configs.load(configs.conf_dir() / "projection" / f"{o}.yaml") for o in configs.options("projection")
        }
        laws = {name: build(node, "projection") for name, node in nodes.items()}
    console.note(
        f"L_ISM = E[ |S|^2 + 2 tr J ] = E[ (v^T S)^2 + 2 v^T J v ] = E L_SSM for any law with E[v v^T] = I "
        f"(half of it in the convention 1/2 |S|^2 + tr J)\n{type(field).__name__.lower()} in float64, d = {d}, "
        f"{n} directions, {keys['draws']} draws, seed {keys['seed']}"
    )
    failed = []
    for name, one in laws.items():
        for dtype in (torch.float32, torch.float64):  # training draws in one, these checks in the other
            check_law(one, (d,), n, identity.POINTS, dtype, name)
        lines = identity.checks(field, one, d, n, keys["draws"], keys["seed"])
        show(name, lines)
        failed += [f"{name}: {line.name}" for line in lines if not line.good]
    if failed:
        raise ScoreSDEError(f"the identity does not hold: {'; '.join(failed)}")
    console.note("the identity holds for every law above")
    return 0


def show(name: str, lines: list[identity.Check]) -> None:
    grid = Table(title=name, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("", "measured", "expected", "z", ""):
        grid.add_column(column, justify="left" if not column else "right")
    for line in lines:
        grid.add_row(
            line.name, f"{line.measured:.6g}", "" if line.expected is None else f"{line.expected:.6g}",
            "" if line.z is None else f"{line.z:+.2f}", "ok" if line.good else "WRONG",
        )  # fmt: skip
    console.out.print(grid)
