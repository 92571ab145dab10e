"""The one place that turns a config into parts and checks that they fit."""

import copy
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from scoresde_cli import projections
from scoresde_cli.checks import check_call
from scoresde_cli.datasets.base import Dataset
from scoresde_cli.errors import ScoreSDEError, nearest, one_line
from scoresde_cli.fields import FieldModel
from scoresde_cli.keys import CheckpointKeys, DivergenceKeys, EvalKeys, NLLKeys
from scoresde_cli.losses.base import Loss, Times
from scoresde_cli.losses.dsm_cv import DSMCV
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.networks import dual
from scoresde_cli.networks.flow_model import gaussian_model, model_of
from scoresde_cli.networks.model import Gaussian, ScoreModel, fit_white
from scoresde_cli.networks.parameterisation import Parameterisation, covariance_for
from scoresde_cli.rng import generator
from scoresde_cli.samplers.base import Sampler
from scoresde_cli.sdes.base import SDE, LinearSDE
from scoresde_cli.sdes.covariances import Covariance
from scoresde_cli.sdes.scale_mixture import Amplitude
from scoresde_cli.training.directions import Directions
from scoresde_cli.training.loop import Chooser, Plan
from scoresde_cli.training.mixing import Mixer
from scoresde_cli.training.optimizer import Adam
from scoresde_cli.training.paths import pool

PathText = Annotated[str, Field(min_length=1)]
Precision = Literal["fp32", "fp64", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32}
BASES: dict[str, type] = {
    "data": Dataset, "sde": SDE, "network": nn.Module, "parameterisation": Parameterisation, "loss": Loss,
    "projection": projections.Projection, "optimizer": Adam, "sampler": Sampler, "predictor": Sampler,
    "sigma": Covariance, "base": LinearSDE, "amplitude": Amplitude,
}  # fmt: skip
ALL_THREADS = torch.get_num_threads()  # before any run of this process changes it
PARTS = ("data", "sde", "network", "parameterisation", "loss", "projection", "optimizer", "sampler", "tracker")


@dataclass(frozen=True)
class Settings:
    """The top-level keys of `train` that are not parts, as conf/train.yaml describes them."""

    n_proj: PositiveInt | Literal["auto"]
    steps: PositiveInt
    max_seconds: PositiveFloat | None
    batch_size: PositiveInt
    seed: NonNegativeInt
    t_min: Annotated[float, Field(gt=0, lt=1)]
    times: Times
    ema: Annotated[float, Field(gt=0, lt=1)] | None
    label_dropout: Annotated[float, Field(gt=0, lt=1)]
    device: str
    precision: Precision
    compile: bool | Literal["auto"]
    threads: Annotated[int, Field(ge=1, le=1024)] | None
    select: Literal["auto", "last", "best"]
    log_every: PositiveInt
    divergence: dict[str, Any]
    checkpoint: dict[str, Any]
    eval: dict[str, Any]
    accumulate: PositiveInt = 1
    objective: str | None = None
    dir: PathText | None = None
    resume: PathText | None = None
    trust: bool = False


@dataclass(frozen=True)
class Parts:
    """What a run is made of. `field` is the model as the training loss sees it, on the same weights."""

    data: Dataset
    sde: SDE
    model: ScoreModel
    field: FieldModel
    baseline: ScoreModel
    loss: Loss
    optimizer: Adam
    sampler: Sampler
    settings: Settings
    device: torch.device
    dtype: torch.dtype

    @property
    def d(self) -> int:
        """The number of elements of one sample."""
        return int(torch.Size(self.data.shape).numel())

    def plan(self) -> Plan:
        """What the training loop needs of them, the data on the device."""
        s = self.settings

        def resident(split: str) -> torch.Tensor:
            return self.data.splits[split].to(device=self.device, dtype=self.dtype)

        train = resident("train")
        return Plan(
            self.model, self.field, self.sde, self.loss, self.optimizer, train, resident("valid"), self.baseline,
            s.seed, s.steps, s.max_seconds, s.batch_size, s.ema, s.log_every, s.checkpoint["every"],
            None if self.data.labels is None else self.data.labels["train"].to(self.device), s.label_dropout, self.chooser(),
            s.accumulate, pool(self.sde, self.loss, train, s.seed),
        )  # fmt: skip

    def chooser(self) -> Chooser | None:
        """Of the weights of dsm_cv; of the number of directions, where that is left open and what they cost is known."""
        if isinstance(self.loss, DSMCV):
            return Mixer(self.loss, self.sde) if self.loss.threshold == "auto" else None
        loss, costs = self.loss, [self.settings.divergence.get(name, "auto") for name in ("tangent_cost", "exact_cost")]
        if not isinstance(loss, SSM) or not loss.automatic or "auto" in costs:
            return None
        return Directions(loss, self.d, *costs)


def locate(target: object, where: str) -> Any:
    """The class that a `_target_` names. Raises ScoreSDEError where there is none.

    A class from outside this package may stand in the current folder, which is looked at last and for such a class only.
    """
    if not isinstance(target, str) or "." not in target:
        raise ScoreSDEError(
            f"{where}._target_={target}: expected the dotted path of a class, as in package.module.Class"
        )
    module, _, name = target.rpartition(".")
    if not module.startswith("scoresde_cli.") and "" not in sys.path:
        sys.path.append("")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as problem:
        raise ScoreSDEError(
            f"{where}._target_={target}: no module named {problem.name!r} (is its folder the current one, or on PYTHONPATH?)"
        ) from None
    except Exception as problem:  # a user's own module can fail in any way
        raise ScoreSDEError(
            f"{where}._target_={target}: importing it failed, {type(problem).__name__}: {one_line(problem)[:200]}"
        ) from problem
    except SystemExit:
        raise ScoreSDEError(
            f"{where}._target_={target}: importing {module} ends the program (it calls sys.exit)"
        ) from None
    found = getattr(loaded, name, None)
    if found is None:
        raise ScoreSDEError(f"{where}._target_={target}: no class {name!r} in {module}{nearest(name, vars(loaded))}")
    base = BASES.get(where.split(".")[-1])
    if not isinstance(found, type) or (base is not None and not issubclass(found, base)):
        wanted = "a class" if base is None else f"a subclass of {base.__module__}.{base.__name__}"
        raise ScoreSDEError(f"{where}._target_={target}: it is not {wanted}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ScoreSDEError(f"{where}._target_={target}: it leaves {missing} open, so no object can be made of it")
    return found


def build(node: Mapping[str, Any], where: str, **runtime: Any) -> Any:
    """The object that a config node describes, nested nodes first; `runtime` holds what the program fills in."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ScoreSDEError(
            f"{where}={node}: expected one of the options of the group; `scoresde list {where}` shows them"
        )
    cls = locate(node["_target_"], where)
    given: dict[str, Any] = {}
    for name, value in node.items():
        if name != "_target_":
            nested = isinstance(value, Mapping) and "_target_" in value
            given[name] = build(value, f"{where}.{name}") if nested else value
    check_call(cls, given, where, tuple(runtime))
    try:
        return cls(**given, **runtime)
    except (ScoreSDEError, OSError, MemoryError):
        raise
    except (Exception, SystemExit) as problem:
        if "alloc" in str(problem).lower():
            raise MemoryError from problem
        raise ScoreSDEError(
            f"{where}: {cls.__name__} cannot be made with these settings ({type(problem).__name__}: {one_line(problem)[:160]})"
        ) from problem


def settings(config: Mapping[str, Any]) -> Settings:
    """The checked top-level keys of a resolved config."""
    for name in PARTS:
        if not isinstance(config.get(name), Mapping):
            raise ScoreSDEError(f"{name} is missing; `scoresde list {name}` shows what there is")
    given = {name: value for name, value in config.items() if name not in PARTS}
    fields = [f.name for f in dataclasses.fields(Settings)]
    for name in given:
        if name not in fields:
            raise ScoreSDEError(f"unknown key {name}: no such key at the top level{nearest(name, [*fields, *PARTS])}")
    check_call(Settings, given, "")
    for name, keys in (("divergence", DivergenceKeys), ("checkpoint", CheckpointKeys), ("eval", EvalKeys)):
        check_call(keys, given[name], name)
    check_call(NLLKeys, given["eval"].get("nll", {}), "eval.nll")
    return Settings(**given)


def check(config: Mapping[str, Any]) -> None:
    """Refuse what can be seen to be wrong without the data: for the many configs of a sweep, before its first job."""
    keys = settings(config)
    pick_device(keys.device)
    for name in PARTS:
        if name in ("data", "network") or "shape" in takes(config[name], name):
            runtime = {"network": ("shape", "classes"), "sde": ("shape", "train", "kept")}.get(name, ())
            node = dict(config[name])
            cls = locate(node.pop("_target_", None), name)
            check_call(cls, node, name, runtime)
        elif name == "loss":
            build_loss(config[name], keys)
        else:
            build(config[name], name)


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda[:i] or mps. Raises ScoreSDEError where this machine lacks it."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if available["cuda"] else "mps" if available["mps"] else "cpu")
    kind = name.partition(":")[0]
    if kind not in available:
        raise ScoreSDEError(f"device={name}: expected auto, cpu, cuda or mps{nearest(name, available)}")
    if not available[kind]:
        here = ", ".join(k for k, there in available.items() if there)
        raise ScoreSDEError(f"device={name}: not available on this machine; it has {here}")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ScoreSDEError(f"device={name}: expected auto, cpu, cuda, cuda:INDEX or mps") from None


def build_network(
    node: Mapping[str, Any], shape: tuple[int, ...], seed: int, classes: int = 0, number: int = 0
) -> nn.Module:
    """The network, its weights of the seed and its number alone. Raises where the data has labels and it takes none."""
    runtime: dict[str, Any] = {"shape": tuple(shape)}
    if isinstance(node, Mapping) and "classes" in takes(node, "network"):
        runtime["classes"] = classes
    elif classes:
        raise ScoreSDEError(
            f"network={node.get('_target_')}: it takes no labels (no argument `classes`); leave out data.labels"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "init", *([number] if number else [])).initial_seed())
        network: nn.Module = build(node, "network", **runtime)
    return network


def takes(node: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The arguments of what a config node names."""
    return inspect.signature(locate(node.get("_target_"), where)).parameters


def build_sde(node: Mapping[str, Any], data: Dataset) -> SDE:
    """The process; one that takes them is given the data's shape, its training rows, and what a run kept of its matrices."""
    there = {"shape": tuple(data.shape), "train": data.splits.get("train"), "kept": data.kept}
    found: SDE = build(node, "sde", **{name: there[name] for name in there.keys() & takes(node, "sde")})
    return found


def build_loss(node: Mapping[str, Any], keys: Settings) -> Loss:
    """The loss; with n_proj=auto one that has its number of directions chosen, and one direction until then."""
    if keys.n_proj != "auto":
        found: Loss = build(node, "loss")
        return found
    if node.get("n_proj", "auto") != "auto":
        raise ScoreSDEError(f"loss.n_proj={node['n_proj']} with n_proj=auto: say one of them")
    loss: Loss = build({**node, **({"n_proj": 1} if "n_proj" in node else {})}, "loss")
    if not isinstance(loss, SSM) or loss.needs_kernel or loss.needs_jumps or not loss.second_order:
        raise ScoreSDEError(f"n_proj=auto with loss={loss.name}: expected a number; auto is for loss=ssm and ssm_vr")
    if loss.projection.adapted:
        raise ScoreSDEError(
            f"n_proj=auto with projection={type(loss.projection).__name__.lower()}: how its variance falls with n_proj depends on "
            "the Jacobian; expected a number, or a law that knows nothing of it, such as orthogonal"
        )
    loss.automatic = True
    return loss


def match(sde: SDE, loss: Loss, sampler: Sampler, model: ScoreModel) -> None:
    """Refuse parts that do not fit together, naming what would."""
    loss.check(model, sde)
    law = getattr(loss, "projection", None)
    if law is not None and law.adapted and not loss.second_order:
        raise ScoreSDEError(
            f"projection={type(law).__name__.lower()} with loss={loss.name}: the law looks at the Jacobian, and finite differences "
            "take no product with it; take orthogonal, or loss=ssm or ssm_vr"
        )
    sampler.check(model, sde)
    if sampler.known is not None:
        raise ScoreSDEError("sampler.known is for `scoresde sample`: a run measures samples of the whole law")
    if not any(p.requires_grad for p in model.network.parameters()):
        raise ScoreSDEError(f"network {type(model.network).__name__} has no weights to train")
    if loss.tangents(2) > 0:
        dual.refuse(model.network, loss.name, loss.second_order)


def compose(config: Mapping[str, Any], data: Dataset | None = None, gaussian: Gaussian | None = None) -> Parts:
    """All parts of a resolved config, checked against each other. Raises ScoreSDEError before any work starts.

    Args:
        config: the resolved config, plain data.
        data: a data set that exists already; None builds it.
        gaussian: moments of the training data, where they are known already.
    """
    keys = settings(config)
    device, dtype = pick_device(keys.device), DTYPES[keys.precision]
    optimizer: Adam = build(config["optimizer"], "optimizer")
    sampler: Sampler = build(config["sampler"], "sampler")
    build(config["projection"], "projection")
    loss = build_loss(config["loss"], keys)
    if data is None:
        data = build(config["data"], "data")
    sde = build_sde(config["sde"], data)
    if keys.t_min >= sde.T or keys.batch_size % keys.accumulate:
        raise ScoreSDEError(
            f"t_min={keys.t_min}: expected less than the process's T={sde.T}" if keys.t_min >= sde.T else
            f"accumulate={keys.accumulate}: expected a divisor of batch_size={keys.batch_size}"
        )  # fmt: skip
    parameterisation: Parameterisation = build(config["parameterisation"], "parameterisation")
    network = build_network(config["network"], data.shape, keys.seed, len(data.classes))
    if gaussian is None:
        gaussian = fit_white(sde, data.splits["train"], covariance_for(parameterisation, network))
    moments = None
    if "train" in data.splits:  # the baseline is the same whatever the parameterisation makes of the moments
        rows, d = len(data.splits["train"]), int(torch.Size(data.shape).numel())
        moments = fit_white(sde, data.splits["train"], "full" if rows > 10 * d else "isotropic")
    node, shape, classes = config["network"], data.shape, len(data.classes)
    model = model_of(
        loss.trains, lambda i: build_network(node, shape, keys.seed, classes, i) if i else network, sde, parameterisation, gaussian
    ).to(device=device, dtype=dtype)
    baseline = gaussian_model(sde, moments or gaussian, loss.trains).to(device=device, dtype=dtype)
    model.bounds = data.bounds
    match(sde, loss, sampler, model)
    if sde.still:
        loss.weighting = "one"  # there is one time
    if keys.precision == "bf16" and loss.tangents(2) > 0 and not loss.second_order:
        raise ScoreSDEError(
            f"precision=bf16 with loss={loss.name}: differences of two scores have no digit left; take fp32, or ssm"
        )
    field = copy.copy(model)
    field.low = keys.precision == "bf16"
    if sampler.t_min < keys.t_min:
        raise ScoreSDEError(f"sampler.t_min={sampler.t_min}: the score is trained on t >= t_min={keys.t_min}")
    law = getattr(loss, "projection", None)
    if law is not None and not type(law).__module__.startswith("scoresde_cli."):
        projections.check_law(
            law, data.shape, 4 if keys.n_proj == "auto" else keys.n_proj, keys.batch_size, dtype, type(law).__name__
        )
    return Parts(data, sde, model, field, baseline, loss, optimizer, sampler, keys, device, dtype)
