"""Speed and memory, side by side in one run: what each area takes against a reference, as ratios.

Contenders of a table take turns, so that a busy machine slows all of them alike; a ratio is taken turn by turn, and its
median is given with its quartiles. The areas:

    step     a whole training step of loss=ssm (draws, loss, gradient, clipping, Adam) against the published algorithm, which
             copies the batch n_proj times and differentiates twice in reverse (Song et al., UAI 2019), and against the bare
             matrix products of 1 + n_proj passes, forward and backward
    image    training steps of the small U-Net at 28 x 28: dsm, ssm_vr and dsm_cv, and ssm_vr against double reverse mode
    trace    loss=ism and its gradient against one reverse pass a dimension
    loop     what `scoresde train` does in a step (averaging, logging, W&B offline, validation, checkpoints) against the bare step
    sample   the sampling loop: blocks, one large batch, compiled
    noise    sampling with correlated noise in 4096 dimensions against isotropic noise
    startup  the command line against `import torch`
    memory   peak memory of a step above what stood before it, against the published algorithm

usage: scripts/bench [AREA ...] [--threads N] [--repeats N] [--seconds S] [--json FILE] [--small]
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["WANDB_MODE"] = "offline"

import torch

from scoresde_cli.fields import FieldModel
from scoresde_cli.identity import randomise
from scoresde_cli.losses.dsm import DSM
from scoresde_cli.losses.dsm_cv import DSMCV
from scoresde_cli.losses.ism import ISM
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.networks.mlp import MLP
from scoresde_cli.networks.model import Gaussian, ScoreModel, Zero, fit_gaussian
from scoresde_cli.networks.parameterisation import Residual
from scoresde_cli.networks.unet import UNet
from scoresde_cli.projections import Rademacher
from scoresde_cli.rng import generator, normal
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.correlated import Correlated
from scoresde_cli.sdes.vp import VP
from scoresde_cli.training import loop
from scoresde_cli.training.compiled import Compiled
from scoresde_cli.training.optimizer import Adam

Contenders = dict[str, Callable[[], object]]
CASES = ((2, 128, 512), (64, 512, 256), (784, 1024, 128))
DIRECTIONS = (1, 4, 16)


@dataclass
class Row:
    """One contender in one case; ratio = seconds of the first contender / its own, so more is faster."""

    area: str
    case: str
    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    note: str = ""


def published(loss, model, noised, t, generator):
    """(score, v^T S, v^T J v) as published: the batch copied n_proj times, v^T J by reverse mode, and reverse mode through that."""
    v = loss.directions(model, noised.x_t, t, generator)
    x = noised.x_t.repeat(len(v), *[1] * (noised.x_t.ndim - 1)).requires_grad_()
    score = model.score(x, t.repeat(len(v)))
    projected = (score * v.flatten(0, 1)).flatten(1).sum(1)
    gradient = torch.autograd.grad(projected.sum(), x, create_graph=True)[0]
    return score, projected, (gradient * v.flatten(0, 1)).flatten(1).sum(1)


class PublishedSSM(SSM):
    """The sliced loss by double reverse mode."""

    def value(self, model, sde, x0, noised, t, generator):
        _, projected, curvature = published(self, model, noised, t, generator)
        return (projected.square() + 2.0 * curvature).view(-1, len(t)).mean(0)


class PublishedSSMVR(SSMVR):
    """The same with the square exact."""

    def value(self, model, sde, x0, noised, t, generator):
        score, _, curvature = published(self, model, noised, t, generator)
        return (score.square().flatten(1).sum(1) + 2.0 * curvature).view(-1, len(t)).mean(0)


class ReverseISM(ISM):
    """The exact trace by one reverse pass a dimension."""

    def value(self, model, sde, x0, noised, t, generator):
        x = noised.x_t.detach().requires_grad_()
        score = model.score(x, t)
        trace = sum(
            torch.autograd.grad(score[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(score.shape[1])
        )
        return score.square().sum(1) + 2.0 * trace


def plan_for(d: int, width: int, batch: int, loss, *, low: bool = False, depth: int = 4) -> loop.Plan:
    """A training plan on random data: an MLP with `depth` hidden layers of SiLU, not at zero."""
    x = normal((4096, d), generator(0, "data"))
    torch.manual_seed(0)
    network = MLP((d,), width, depth)
    torch.nn.init.normal_(network.last.weight, std=width**-0.5)
    model = ScoreModel(network, VP(), Residual(), fit_gaussian(x, "auto")).float()
    model.low = low
    return loop.Plan(
        model, model, model.sde, loss, Adam(), x, x[:500], model, 0, 10**9, None, batch, None, 50, 1000,
    )  # fmt: skip


def stepper(plan: loop.Plan, compiled: bool = False) -> Callable[[], object]:
    if compiled:
        plan = replace(plan, field=Compiled(plan.model))
    state = loop.start(plan)
    return lambda: loop.train_step(plan, state, 1e-6)


def products(d: int, width: int, rows: int) -> Callable[[], object]:
    """The matrix products of one step alone, with 4 hidden layers: forward, and both of the backward pass."""
    sizes = (d, width, width, width, width, d)
    layers = [(torch.randn(rows, a), torch.randn(b, a), torch.randn(rows, b)) for a, b in itertools.pairwise(sizes)]

    def run() -> None:
        for i, (x, w, g) in enumerate(layers):
            torch.nn.functional.linear(x, w)
            torch.mm(g.T, x)
            if i > 0:  # the data needs no gradient
                torch.mm(g, w)

    return run


def gradient_of(plan: loop.Plan, field: FieldModel | None = None) -> torch.Tensor:
    """The gradient of one step's loss, flat."""
    weights = list(plan.model.network.parameters())
    value = plan.loss(field or plan.model, plan.sde, plan.train[: plan.batch_size], generator(0, "same")).mean()
    grads = torch.autograd.grad(value, weights, allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def off_by(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


clock = time.perf_counter


def in_turns(contenders: Contenders, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of a call, `repeats` of them for each contender, each over about `seconds` of calls."""
    counts = {}
    for name, call in contenders.items():
        call(), call()
        began = clock()
        call()
        counts[name] = max(1, round(seconds / (clock() - began)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            began = clock()
            for _ in range(counts[name]):
                call()
            times[name].append((clock() - began) / counts[name])
    return times


def rows_of(area: str, case: str, times: dict[str, list[float]], notes: dict[str, str] | None = None) -> list[Row]:
    first = next(iter(times.values()))
    rows = []
    for name, found in times.items():
        ratios = [a / b for a, b in zip(first, found, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        row = Row(area, case, name, statistics.median(found), statistics.median(ratios), low, high)
        rows.append(replace(row, note=(notes or {}).get(name, "")))
    return rows


def step_area(options) -> list[Row]:
    rows = []
    for d, width, batch in options.cases:
        for k in options.directions:
            ours, published = SSM(Rademacher(), k), PublishedSSM(Rademacher(), k)
            plan = plan_for(d, width, batch, ours)
            error = off_by(gradient_of(plan), gradient_of(plan_for(d, width, batch, published)))
            assert error < 1e-3, f"the two gradients differ by {error}"
            contenders: Contenders = {
                "published": stepper(plan_for(d, width, batch, published)),
                "fp32": stepper(plan),
                "fp32 compiled": stepper(plan_for(d, width, batch, ours), compiled=True),
            }
            if width >= 512 or options.small:
                contenders["bf16"] = stepper(plan_for(d, width, batch, ours, low=True))
                contenders["bf16 compiled"] = stepper(plan_for(d, width, batch, ours, low=True), compiled=True)
            contenders["bare products, fp32"] = products(d, width, (1 + k) * batch)
            times = in_turns(contenders, options.repeats, options.seconds)
            over = statistics.median(a / b for a, b in zip(times["fp32"], times["bare products, fp32"], strict=True))
            notes = {"fp32": f"{over:.2f} of the bare products; gradient equal to {error:.0e}"}
            rows += rows_of("step", f"d={d} width={width} batch={batch} n_proj={k}", times, notes)
    return rows


def image_plan(loss, *, low: bool = False, batch: int = 32, size: int = 28, kind: str = "small") -> loop.Plan:
    """A training plan of a U-Net, not at zero, on random images."""
    x = normal((512, 1, size, size), generator(0, "data"))
    network = randomise(UNet((1, size, size), kind), 0)
    model = ScoreModel(network, VP(), Residual(), fit_gaussian(x, "isotropic")).float()
    model.low = low
    return loop.Plan(
        model, model, model.sde, loss, Adam(), x, x[:500], model, 0, 10**9, None, batch, None, 50, 1000,
    )  # fmt: skip


def image_area(options) -> list[Row]:
    """Training steps of the small U-Net at 28 x 28 against DSM's, and against double reverse mode."""
    rows = []
    size, batch = (8, 4) if options.small else (28, options.images)

    def plan(loss, **keys) -> loop.Plan:
        return image_plan(loss, batch=batch, size=size, **keys)

    few: Contenders = {"dsm": stepper(plan(DSM())), "ssm_vr n_proj=1": stepper(plan(SSMVR(Rademacher(), 1)))}
    few["dsm_cv n_proj=1"] = stepper(plan(DSMCV(Rademacher(), 1)))
    few |= {
        "dsm, bf16": stepper(plan(DSM(), low=True)),
        "ssm_vr n_proj=1, bf16": stepper(plan(SSMVR(Rademacher(), 1), low=True)),
        "dsm, patched": stepper(plan(DSM(), kind="patched")),
        "dsm, patched, bf16": stepper(plan(DSM(), low=True, kind="patched")),
    }
    times = in_turns(few, options.repeats, options.seconds)
    against = {
        name: f"{statistics.median(a / b for a, b in zip(found, times['dsm'], strict=True)):.2f} of the time of dsm"
        for name, found in times.items()
    }
    rows += rows_of("image", f"{size} x {size} batch={batch}", times, against)
    for k in (1,) if options.small else (1, 4):
        ours, published = plan(SSMVR(Rademacher(), k)), plan(PublishedSSMVR(Rademacher(), k))
        error = off_by(gradient_of(ours), gradient_of(published))
        assert error < 1e-3, f"the two gradients differ by {error}"
        pair: Contenders = {"double reverse": stepper(published), "ssm_vr": stepper(ours)}
        times = in_turns(pair, options.repeats, options.seconds)
        ratio = statistics.median(a / b for a, b in zip(times["ssm_vr"], times["double reverse"], strict=True))
        notes = {"ssm_vr": f"{ratio:.2f} of the time of double reverse; gradient equal to {error:.0e}"}
        rows += rows_of("image", f"{size} x {size} batch={batch} n_proj={k}", times, notes)
    return rows


def trace_area(options) -> list[Row]:
    rows = []
    for d, width, batch in ((8, 32, 16),) if options.small else ((64, 128, 64), (64, 128, 256), (64, 512, 64)):
        plan, reverse = plan_for(d, width, batch, ISM()), plan_for(d, width, batch, ReverseISM())
        error = off_by(gradient_of(plan), gradient_of(reverse))
        pieces = plan_for(d, width, batch, ISM())
        pieces.model.chunk = d // 4
        contenders: Contenders = {
            "d reverse passes": stepper(reverse), "unit tangents": stepper(plan), "unit tangents in 4 chunks": stepper(pieces),
        }  # fmt: skip
        contenders["bare products, fp32"] = products(d, width, (1 + d) * batch)
        times = in_turns(contenders, options.repeats, options.seconds)
        notes = {"unit tangents": f"gradient equal to {error:.0e}"}
        rows += rows_of("trace", f"d={d} width={width} batch={batch}", times, notes)
    return rows


def composed(*overrides: str):
    """The parts of a run, by the configs of the package."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from scoresde_cli import compose as composition
    from scoresde_cli import configs

    with initialize_config_dir(str(configs.conf_dir()), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)
    return composition.compose(config), config


def loop_area(options) -> list[Row]:
    """The default run: `steps` steps with all that the command does around them, and the same steps bare."""
    from scoresde_cli.commands.train import optimise
    from scoresde_cli.rundir import RunDir
    from scoresde_cli.tracking import console
    from scoresde_cli.tracking.jsonl import JsonLines
    from scoresde_cli.tracking.wandb import WandB
    from scoresde_cli.training.stop import StopRequest

    steps = 100 if options.small else 1000
    rows = []
    for loss in ("ssm_vr", "ssm"):
        overrides = [f"loss={loss}", f"steps={steps}", f"checkpoint.every={steps}", "device=cpu", "compile=false"]
        parts, config = composed(*overrides)
        bare = replace(parts.plan(), ema=None)
        state = loop.start(bare)

        def bare_steps(bare=bare, state=state) -> None:
            for _ in range(steps):
                loop.train_step(bare, state, 1e-6)

        with tempfile.TemporaryDirectory() as folder:
            quiet = console.out.quiet
            console.out.quiet = True
            times: dict[str, list[float]] = {"bare step": [], "scoresde train": []}
            for i in range(options.repeats):
                began = time.perf_counter()
                bare_steps()
                times["bare step"].append((time.perf_counter() - began) / steps)
                run = RunDir.create(config, f"{folder}/{i}")
                run.begin(config, parts, [])
                wandb = WandB(mode="offline")
                trackers = [JsonLines(run.path / "metrics.jsonl", 0), console.Training(steps, None, 0, 0.0), wandb]
                wandb.begin(run.path, config, None)  # once a run, not once a step
                fresh = loop.start(parts.plan())
                began = time.perf_counter()
                optimise(run, config, parts, fresh, trackers, wandb, StopRequest())
                times["scoresde train"].append((time.perf_counter() - began) / steps)
                for tracker in trackers:
                    tracker.finish(0)
            console.out.quiet = quiet
        rows += rows_of("loop", f"defaults, loss={loss}, {steps} steps", times)
    return rows


def sample_area(options) -> list[Row]:
    from scoresde_cli.samplers import base
    from scoresde_cli.samplers.heun_ode import HeunODE

    n, sampler = 512 if options.small else 4096, HeunODE(steps=40)

    def draw(field: FieldModel, d: int, block: int) -> Callable[[], object]:
        def run() -> None:
            kept, base.block_rows = base.block_rows, lambda d: block
            sampler.sample(field, VP(), (d,), n, 0)
            base.block_rows = kept

        return run

    rows = []
    for d, width in ((2, 16),) if options.small else ((2, 128), (64, 512)):
        model = plan_for(d, width, 256, SSM(Rademacher(), 1), depth=3).model
        blocks = (64,) if options.small else (64, 256, 1024, 4096)
        contenders: Contenders = {f"blocks of {block}": draw(model, d, block) for block in blocks}
        contenders[f"blocks of {base.block_rows(d)}, compiled"] = draw(Compiled(model), d, base.block_rows(d))
        times = in_turns(contenders, options.repeats, 0.0)
        rows += rows_of("sample", f"d={d} width={width} n={n}, {sampler.steps} Heun steps", times)
    return rows


def noise_area(options) -> list[Row]:
    """What correlated noise costs in d = 4096: sampling with the Gaussian part alone, so that nothing else takes time."""
    d, steps = (256, 2) if options.small else (4096, 20)

    def draw(sde: SDE) -> Callable[[], object]:
        gaussian = Gaussian(torch.zeros(d).double(), torch.ones(d).double(), None)
        model, sampler = ScoreModel(Zero(), sde, Residual("isotropic"), gaussian).float(), EulerMaruyama(steps=steps)
        return lambda: sampler.sample(model, sde, (d,), 256, 0)

    kinds: dict[str, dict] = {"equi": {"rho": 0.9}, "low_rank": {"rank": 8}, "circulant": {}, "ar1": {"rho": 0.9}}
    contenders = {"isotropic (vp)": draw(VP())}
    contenders |= {kind: draw(Correlated(kind, **keys, shape=(d,))) for kind, keys in kinds.items()}
    times = in_turns(contenders, options.repeats, 0.0)
    return rows_of("noise", f"d={d}, 256 samples, {steps} Euler-Maruyama steps, no network", times)


def startup_area(options) -> list[Row]:
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "scoresde --help": [sys.executable, "-m", "scoresde_cli", "--help"],
        "scoresde train --help": [sys.executable, "-m", "scoresde_cli", "train", "--help"],
        "scoresde train --cfg job": [sys.executable, "-m", "scoresde_cli", "train", "--cfg", "job"],
        "scoresde list": [sys.executable, "-m", "scoresde_cli", "list"],
    }
    contenders = {
        name: lambda command=command: subprocess.run(command, capture_output=True, check=True)
        for name, command in commands.items()
    }
    return rows_of("startup", "seconds of a process", in_turns(contenders, options.repeats, 0.0))


def peak_of_a_step(name: str, d: int, width: int, batch: int, k: int) -> None:
    """In a process of its own: print the bytes of the second step's peak above what stood before it."""
    loss = (PublishedSSM if name == "published" else SSM)(Rademacher(), k)
    step = stepper(plan_for(d, width, batch, loss, low=name.startswith("bf16")), compiled=name.endswith("compiled"))
    step()

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    step()
    print(status("VmHWM") - before)


def memory_area(options) -> list[Row]:
    if not Path("/proc/self/clear_refs").exists():
        print("memory: not measured, it needs Linux's /proc")
        return []
    rows = []
    cases = [(*case, k) for case in options.cases for k in options.directions if k > 1]
    for case in cases:
        names = ["published", "fp32", "fp32 compiled"] + (["bf16"] if case[1] >= 512 else [])
        found = {}
        for name in names:
            command = [sys.executable, __file__, "--peak", name, *map(str, case), "--threads", str(options.threads)]
            # What is freed goes back to the kernel at once, so that the resident set is what is in use.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found[name] = [max(1, int(done.stdout))]
        d, width, batch, k = case
        notes = {
            name: f"{bytes[0] / 2**20:.0f} MiB, {bytes[0] / found['published'][0]:.2f} of the published"
            for name, bytes in found.items()
        }
        rows += rows_of("memory", f"d={d} width={width} batch={batch} n_proj={k}", found, notes)
    return [replace(row, seconds=0.0) for row in rows]


AREAS = {
    "step": step_area, "image": image_area, "trace": trace_area, "loop": loop_area, "sample": sample_area, "noise": noise_area,
    "startup": startup_area,
    "memory": memory_area,
}  # fmt: skip


def show(rows: list[Row]) -> None:
    """A Markdown table."""
    print(f"\n| {rows[0].area} | | time | faster than the first by (quartiles) | |\n| --- | --- | --- | --- | --- |")
    case = None
    for row in rows:
        took = "" if row.seconds == 0 else f"{1e3 * row.seconds:.3g} ms"
        shown = "" if row.case == case else row.case
        print(f"| {shown} | {row.name} | {took} | {row.ratio:.2f} ({row.low:.2f} to {row.high:.2f}) | {row.note} |")
        case = row.case


def summarise(rows: list[Row]) -> None:
    """The step's ratios in one table: a line a contender, a column a number of directions (the table of the README)."""
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        case, _, directions = row.case.rpartition(" ")
        if row.name != "published":
            line = table.setdefault(f"{case}, {row.name}".replace("=", " "), {})
            line[directions] = f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"
    columns = list(dict.fromkeys(directions for line in table.values() for directions in line))
    print(f"\n| times faster than the published algorithm | {' | '.join(columns)} |\n|{' --- |' * (1 + len(columns))}")
    for name, line in table.items():
        print(f"| {name} | {' | '.join(line.get(column, '') for column in columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"of {', '.join(AREAS)}; none for all")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all)")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=0.3, help="of calls in a turn")
    parser.add_argument("--images", type=int, default=32, help="images a batch in the area image")
    parser.add_argument(
        "--cpu", action="store_true", help="processor time, not the clock's: for a busy machine, --threads 1"
    )
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--small", action="store_true", help="tiny cases, one turn: does it run at all?")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    global clock
    clock = time.process_time if options.cpu else time.perf_counter
    torch.set_num_threads(options.threads)
    if options.peak:
        peak_of_a_step(options.peak[0], *map(int, options.peak[1:]))
        return
    unknown = [area for area in options.areas if area not in AREAS]
    if unknown:
        parser.error(f"no area {unknown[0]!r}; expected some of {', '.join(AREAS)}")
    options.cases, options.directions = ((3, 16, 8),) if options.small else CASES, (2,) if options.small else DIRECTIONS
    if options.small:
        options.repeats, options.seconds = 1, 0.0
    rows: list[Row] = []
    for area in options.areas or AREAS:
        found = AREAS[area](options)
        rows += found
        if found:
            show(found)
        if area == "step":
            summarise(found)
    if options.json:
        facts = {
            "torch": torch.__version__,
            "threads": options.threads,
            "cores": os.cpu_count(),
            "rows": [asdict(r) for r in rows],
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
