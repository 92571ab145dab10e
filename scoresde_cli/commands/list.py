"""`scoresde list`: groups, options and their keys; `list runs`: the runs below this folder."""

from scoresde_cli import configs
from scoresde_cli.errors import ScoreSDEError, Unreadable, nearest


def main(arguments: list[str]) -> int:
    if len(arguments) > 1:
        raise ScoreSDEError(f"list {' '.join(arguments)}: expected one group, or `runs`")
    defaults = configs.groups("ablate") | configs.groups()
    names = list(defaults)
    if not arguments:
        for group in names:
            print(f"{group}: {', '.join(configs.options(group))}")
        print(
            "\nscoresde list GROUP shows what each is and its keys; scoresde list runs shows the runs below this folder"
        )
        return 0
    if arguments[0] == "runs":
        return runs()
    if arguments[0] not in names:
        raise ScoreSDEError(
            f"list {arguments[0]}: expected one of {', '.join([*names, 'runs'])}{nearest(arguments[0], [*names, 'runs'])}"
        )
    group, default = arguments[0], defaults[arguments[0]]
    for option in configs.options(group):
        path = configs.conf_dir() / group / f"{option}.yaml"
        print(f"{group}={option}{' (default)' if option == default else ''}\n    {configs.describe(path)}")
        values = [
            f"{group}.{k}={'null' if v is None else v}"
            for k, v in configs.node(group, option).items()
            if not k.startswith("_") and not isinstance(v, dict)
        ]
        own = [v for v in values if "${" not in v]
        if own:
            print("    " + "  ".join(own))
    return 0


def runs() -> int:
    from scoresde_cli.rundir import recent
    from scoresde_cli.tracking.console import note, number

    found = recent()
    if not found:
        note("no runs in this folder, nor below its outputs/, multirun/ and studies/")
    for run in found:
        try:
            summary, became = run.summary(), run.status()
        except Unreadable as problem:
            note(str(problem))
            continue
        shown = [
            f"{k} {number(summary[k]['value'])}"
            for k in ("score_error", "sliced_wasserstein", "loss_gain")
            if k in summary
        ]
        note(f"{run.path}  {became:<9}  {'  '.join(shown)}")
    return 0
