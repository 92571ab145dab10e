"""What a user can do wrong, and what can go wrong without them: each an exception with an exit code.

Exit codes: 0 done, 2 the user's mistake, 3 diverged, 4 data or checkpoint unreadable, 5 another process of the run lost,
130 interrupted, 143 asked to stop (and, while training, checkpointed). The command line prints the message as one line on
stderr; a traceback is a bug.
"""

import difflib
from collections.abc import Iterable


class ScoreSDEError(Exception):
    """A mistake of the user's: what was given, what was expected, the nearest right thing."""

    exit_code = 2


class Unreadable(ScoreSDEError):
    """Data, a run directory or a checkpoint that cannot be read."""

    exit_code = 4


class Diverged(ScoreSDEError):
    """The loss or the weights are no longer finite."""

    exit_code = 3


class Stopped(BaseException):
    """Asked to stop (SIGINT or SIGTERM); the state is on disk. No Exception, so that nothing on its way swallows it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type["Stopped"], tuple[str, int]]:
        return Stopped, (str(self), self.exit_code)  # from a worker process to its parent


NO_MEMORY = "out of memory: a smaller batch_size, n, network or data set needs less"


def in_words(problem: BaseException) -> tuple[str, int] | None:
    """The line and the exit code of a problem that a user can do something about; None for what is a bug of ours."""
    if isinstance(problem, ScoreSDEError | Stopped):
        return str(problem), problem.exit_code
    if isinstance(problem, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(problem, OSError):
        where = f"{problem.filename}: " if problem.filename else ""
        return f"{where}{problem.strerror or one_line(problem)}", 2
    text = str(problem).lower()
    if isinstance(problem, MemoryError) or (
        isinstance(problem, RuntimeError) and ("alloc" in text or "out of memory" in text)
    ):
        return NO_MEMORY, 2
    return None


def nearest(given: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(given, [name for name in known if name != given], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(text: object) -> str:
    """The first lines of a message folded into one, for messages that come from other libraries."""
    return " ".join(str(text).split())
