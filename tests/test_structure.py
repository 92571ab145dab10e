"""The house keeps its shape: imports run downward, configs match constructors, the wheel carries its configs."""

import ast
import inspect
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from scoresde_cli import configs
from scoresde_cli.compose import build, locate

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scoresde_cli"

# Lower levels come first; a module imports from its own level or from below. (DESIGN: commands -> ... -> errors.)
LEVELS = [
    {"errors", "rng", "configs", "__init__", "checks", "provenance", "processes"},
    {"sdes", "projections", "divergence", "fields"},
    {"sketching"},
    {"losses", "networks", "datasets"},
    {"training", "samplers", "metrics", "likelihood", "identity", "tracking", "claims"},
    {"keys"},
    {"compose"},
    {"stored"},
    {"rundir", "advice", "tuning"},
    {"figures", "evaluation", "runs", "sweeps", "launching", "together", "slurm"},
    {"writers"},
    {"studies"},
    {"commands"},
    {"pages", "completion", "hydra_app", "batch", "cli"},
    {"__main__"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def imports():
    """(importing unit, imported unit, file) for every import inside the package, wherever it stands."""
    for path in PACKAGE.rglob("*.py"):
        unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("scoresde_cli"):
                names = [
                    f"{node.module}.{a.name}" if node.module == "scoresde_cli" else node.module for a in node.names
                ]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names if a.name.startswith("scoresde_cli")]
            for name in names:
                parts = name.split(".")
                if len(parts) > 1 and not parts[1].startswith("__"):
                    yield unit, parts[1], path


def test_imports_run_downward():
    wrong = [
        f"{path.relative_to(ROOT)}: {unit} imports {other}"
        for unit, other, path in imports()
        if LEVEL[other] > LEVEL[unit] and unit != "__init__"
    ]
    assert wrong == []


def test_no_two_units_import_each_other():
    pairs = {(a, b) for a, b, _ in imports() if a != b and a != "__init__"}
    assert [
        (a, b)
        for a, b in pairs
        if (b, a) in pairs and a < b and {a, b} != {"cli", "pages"} and {a, b} != {"cli", "completion"}
    ] == []


def test_modules_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


GROUPS = [(g, o) for g in configs.groups("ablate") for o in configs.options(g)]
RUNTIME = {  # what the program fills in
    "network": ("shape", "classes"), "study": ("size", "run"), "sde": ("shape", "train", "kept"),
}  # fmt: skip


@pytest.mark.parametrize(("group", "option"), GROUPS, ids=lambda v: v)
def test_every_yaml_matches_its_constructor(group, option):
    """Same names, same defaults; and it builds (unless it needs the user's path)."""
    node = configs.node(group, option)
    cls = locate(node["_target_"], group)
    parameters = {
        n: p for n, p in inspect.signature(cls).parameters.items()
        if n not in RUNTIME.get(group, ()) and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }  # fmt: skip
    assert {k for k in node if k != "_target_"} == set(parameters)
    for name, value in node.items():
        if name == "_target_" or (isinstance(value, str) and ("${" in value or value == "???")):
            continue
        default = parameters[name].default
        if (group, name) not in {("sampler", "steps"), ("tracker", "tags"), ("study", "sizes")}:
            assert value == default, f"{group}/{option}.yaml: {name} is {value}, the constructor's default is {default}"
    if "???" in node.values():
        return
    filled = {
        "projection": {"_target_": "scoresde_cli.projections.Rademacher"},
        "n_proj": 4,
        "times": "mixed",
        "t_min": 1e-3,
    }
    node = {k: filled.get(k, v) if isinstance(v, str) and "${" in v else v for k, v in node.items()}
    runtime = {"network": {"shape": (3,)}, "study": {"size": "quick", "run": None}}.get(group, {})
    if group == "sde" and "shape" in inspect.signature(cls).parameters:
        runtime = {"shape": (3,)}
    assert isinstance(build(node, group, **runtime), cls)


def test_the_wheel_carries_its_configs_and_runs_from_another_folder(tmp_path):
    pytest.importorskip("hatchling")
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")  # fmt: skip
    for name in filter(None, tracked):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "env"
    venv.create(place, with_pip=False)
    site = next(place.glob("lib/python*/site-packages"))
    # The dependencies (torch among them) are shared with this interpreter; an editable install there is not followed.
    shared = [p for p in sys.path if p.endswith("site-packages")]
    (site / "shared.pth").write_text("\n".join(shared))
    subprocess.run(
        [*pip, "--python", str(place / "bin/python"), "install", "--no-deps", "--ignore-installed", str(wheel)],
        check=True,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*argv):
        return subprocess.run(
            [str(place / "bin/scoresde"), *argv],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert str(site) in run("doctor").splitlines()[0]
    run(
        "train",
        "loss=ssm",
        "n_proj=4",
        "steps=20",
        "data.n=300",
        "eval.n=100",
        "eval.figures=false",
        "tracker.mode=disabled",
        "dir=r",
    )
    assert (elsewhere / "r/summary.json").exists()
