"""scoresde: train, sample, evaluate and compare score-based generative models.

The Python door is `load_run(DIR)`; everything else is the command `scoresde`. Nothing heavy is imported here,
so that `scoresde --help` and shell completion stay quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scoresde_cli.runs import Run, load_run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load_run"]


def __getattr__(name: str) -> Any:
    if name in ("load_run", "Run"):
        from scoresde_cli import runs

        return getattr(runs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
