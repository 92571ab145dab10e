"""`scoresde doctor`: is this installation sound, and what does this machine have?"""

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from scoresde_cli import __version__, configs, slurm
from scoresde_cli.errors import ScoreSDEError, one_line


def main(arguments: list[str]) -> int:
    if arguments:
        raise ScoreSDEError(f"doctor takes no arguments, got {' '.join(arguments)}")
    checks: list[tuple[str, Callable[[], str]]] = [
        ("scoresde", lambda: f"{__version__}, conf in {configs.conf_dir()}"), ("packages", packages), ("devices", devices),
        ("configs", every_config), ("a training step", one_step), ("this folder", folder), ("W&B", credentials),
        ("Slurm", slurm.examine), ("shared folder", slurm.shared_folder),
        ("compiler", lambda: shutil.which("c++") or shutil.which("g++") or "none found (only torch.compile would need one)"),
    ]  # fmt: skip
    bad = 0
    for name, check in checks:
        try:
            print(f"ok    {name}: {check()}")
        except Exception as problem:  # a doctor reports whatever is wrong, and goes on
            bad += 1
            print(f"WRONG {name}: {type(problem).__name__}: {one_line(problem)[:300]}")
    print("all is well" if not bad else f"{bad} of {len(checks)} checks failed")
    return 0 if not bad else 2


def packages() -> str:
    from scoresde_cli.provenance import versions

    return ", ".join(f"{name} {number}" for name, number in versions().items())


def devices() -> str:
    import torch

    names = [f"cpu ({torch.get_num_threads()} threads of {os.cpu_count()} cores)"]
    names += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return ", ".join(names)


def every_config() -> str:
    """Compose every option of every group by Hydra."""
    from hydra import compose, initialize_config_dir

    count = 0
    with initialize_config_dir(str(configs.conf_dir()), version_base="1.3"):
        for group in configs.groups("train"):
            for option in configs.options(group):
                compose("train", overrides=[f"{group}={option}"])
                count += 1
        for command in configs.COMMANDS:
            compose(command)
    return f"{count} options of {len(configs.groups('train'))} groups compose"


def one_step() -> str:
    """The sliced loss and its gradient at one batch, in the default setting."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from scoresde_cli.compose import compose
    from scoresde_cli.rng import generator

    with initialize_config_dir(str(configs.conf_dir()), version_base="1.3"):
        config = OmegaConf.to_container(hydra_compose("train", overrides=["data.n=500", "loss=ssm"]), resolve=True)
    parts = compose(config)  # type: ignore[arg-type]
    x0 = parts.data.splits["train"].to(parts.device)
    loss = parts.loss(parts.model, parts.sde, x0, generator(0, "doctor", device=parts.device)).mean()
    loss.backward()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ScoreSDEError(f"the loss is {value}")
    return f"loss {value:.4f} on {parts.device}"


def folder() -> str:
    with tempfile.TemporaryFile(dir="."):
        pass
    return f"{Path.cwd()} can be written to, {shutil.disk_usage('.').free / 1e9:.0f} GB free"


def credentials() -> str:
    from scoresde_cli.tracking.wandb import has_credentials

    here = "credentials found, mode auto is online" if has_credentials() else "no credentials, mode auto is offline"
    return f"{here}; offline in jobs of Slurm, whose nodes seldom have a network (then: wandb sync DIR/*/wandb/offline-run-*)"
