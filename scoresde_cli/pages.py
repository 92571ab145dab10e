"""The help pages, drawn from conf/ and the command table: plain text, nothing heavy imported."""

import textwrap

from scoresde_cli import __version__, configs
from scoresde_cli.cli import COMMANDS

EXAMPLES = {
    "train": [
        ("scoresde train loss=ssm n_proj=4", "sliced score matching with 4 directions on the eight Gaussians"),
        ("scoresde train data=table data.path=wine.csv", "your own table, results in its units and column names"),
        ("scoresde train data=image_folder data.path=photos data.size=16 data.fit=crop", "your own pictures, PNG or JPEG"),
        ("scoresde train data=gmm data.d=16 projection=orthogonal steps=5000", "a 16-dimensional mixture, orthogonal frames"),
        ("scoresde train -m n_proj=1,2,4,8 seed=0,1,2", "a sweep of twelve runs"),
    ],
    "sample": [
        ("scoresde sample run=DIR n=10000", "10,000 samples into the run directory"),
        ("scoresde sample run=DIR n=500 out=new.csv", "as a table with the data's column names"),
        ("scoresde sample run=DIR sampler=euler_maruyama sampler.steps=500", "by another sampler"),
        ("scoresde sample run=DIR sampler.steps=20", "by the run's own sampler in fewer steps"),
        ("scoresde sample run=DIR seed=1", "other samples; the same seed gives the same ones"),
        ("scoresde sample run=DIR out=way.gif", "the way from noise to data as a film"),
        ("scoresde sample run=DIR label=3 guidance=2", "of one class, where the data had labels"),
        ("scoresde sample run=DIR 'sampler.known={alcohol: 12}'", "the other columns, given this one"),
    ],
    "evaluate": [
        ("scoresde evaluate run=DIR", "all numbers again, with the run's own sampler"),
        ("scoresde evaluate run=DIR n=20000 seed=1", "more samples, other draws"),
        ("scoresde evaluate run=DIR metrics=nll", "-log p alone; projection=rademacher n_proj=4 for random directions"),
        ("scoresde evaluate DIR1 DIR2 metrics=[nll,c2st]", "two runs beside each other"),
        ("scoresde evaluate run=DIR sampler=heun_ode sampler.steps=10", "with another sampler"),
        ("scoresde evaluate run=DIR average=false", "of the last weights instead of the averaged ones"),
    ],
    "ablate": [
        ("scoresde ablate study=estimator", "bias, variance and cost of a step by law and n_proj: how many, which law"),
        ("scoresde ablate study=n_proj size=full", "runs over n_proj x loss x seeds, over night; the same command goes on"),
        ("scoresde ablate study=projection data=table data.path=wine.csv", "laws of directions on your own data"),
        ("scoresde ablate study=dsm_cv data=digits", "does a sliced control variate improve denoising score matching here"),
        ("scoresde ablate study=loss study.losses=[ssm_vr,dsm] study.seeds=10", "another grid"),
        ("scoresde ablate study=loss size=smoke hydra/launcher=basic", "one job after the other"),
    ],
    "report": [
        ("scoresde report studies/DIR", "the report of a study, as far as it has come"),
        ("scoresde report multirun/DIR", "the runs of a sweep, with intervals over seeds"),
        ("scoresde report A B C out=compared", "any runs beside each other"),
    ],
    "verify": [
        ("scoresde verify", "every law at d = 8"),
        ("scoresde verify d=16 projection=orthogonal n_proj=4", "one law"),
        ("scoresde verify network=resmlp network.activation=tanh", "another network"),
        ("scoresde verify projection=rademacher projection._target_=mylaws.Law", "your own law, from ./mylaws.py"),
    ],
    "rerun": [
        ("scoresde rerun DIR", "train again, compare every number"),
        ("scoresde rerun DIR dir=again", "into a directory of your choice"),
        ("scoresde rerun DIR trust=true", "where the run's own config names your own classes"),
        ("scoresde rerun DIR tracker.mode=disabled", "without W&B"),
    ],
    "list": [
        ("scoresde list", "all groups and their options"),
        ("scoresde list loss", "the losses, with their keys"),
        ("scoresde list data", "the data sets, with their keys"),
        ("scoresde list runs", "the runs below this folder, with their status"),
    ],
    "batch": [
        ("scoresde batch train -m n_proj=1,2,4 seed=0,1", "writes multirun/DIR/batch.sbatch, and says what to do with it"),
        ("scoresde batch time=4:00:00 mem=8G cpus=2 parallel=20 train -m ...", "limits of a job, jobs at a time"),
        ("scoresde batch gpus=1 partition=gpu account=me qos=long train -m ...", "where it runs"),
        ("scoresde batch tries=20 grace=120 train -m ...", "how often a job is requeued, seconds it has to save"),
    ],
    "doctor": [("scoresde doctor", "versions, devices, disk, credentials, Slurm; every config composed")],
}  # fmt: skip

COMPLETION = 'eval "$(scoresde -sc install=bash)"'


def overview() -> str:
    """`scoresde --help`."""
    rows = "\n".join(f"  {n:<10} {summary}" for n, (summary, _) in COMMANDS.items())
    return f"""scoresde {__version__}: score-based generative models from the command line

usage: scoresde COMMAND [key=value ...]

{rows}

  scoresde COMMAND --help    what a command takes, with examples

start here:
  scoresde train loss=ssm n_proj=4

tab completion in bash: {COMPLETION}"""


def shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def command(name: str) -> str:
    """`scoresde NAME --help`: what it does, its keys, its groups, examples."""
    summary, hydra = COMMANDS[name]
    parts = [f"scoresde {name}: {summary}"]
    if hydra:
        parts.append(
            f"usage: scoresde {name} [key=value ...] [group=option ...]"
            + (" [-m for a sweep]" if name == "train" else "")
        )
        keys = configs.keys(name)
        width = max(len(f"{key}={shown(value)}") for key, value, _ in keys) + 2
        parts.append("keys:\n" + "\n".join(f"  {f'{key}={shown(value)}':<{width}} {what}" for key, value, what in keys))
        parts += [
            f"the keys of {p} are those of the jobs: `scoresde {p} --help` shows them" for p in configs.parents(name)
        ]
        lines = []
        for group, default in configs.groups(name).items():
            options = [f"{o}*" if o == default else o for o in configs.options(group)]
            lines.append(
                textwrap.fill(", ".join(options), 100, initial_indent=f"  {group:<17}", subsequent_indent=" " * 19)
            )
        if lines:
            parts.append(
                "groups (* is the default; `scoresde list GROUP` shows the keys of each option):\n" + "\n".join(lines)
            )
        parts.append(
            "Hydra's own flags work: --cfg job prints the config, --config-dir DIR adds your own options, --info all."
        )
    width = max(len(line) for line, _ in EXAMPLES[name]) + 2
    parts.append("examples:\n" + "\n".join(f"  {line:<{width}} {what}" for line, what in EXAMPLES[name]))
    return "\n\n".join(parts)
