"""SIGINT and SIGTERM: finish the step, save, leave a status."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from scoresde_cli.errors import Stopped

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopRequest:
    """Set by the first signal where `deferred`, so that the loop can save; raised at once otherwise or by a second one."""

    def __init__(self) -> None:
        self.deferred = False
        self.signum: int | None = None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        again = self.signum is not None
        self.signum = signum
        if again or not self.deferred:
            raise self.stopped("stopped")

    def stopped(self, what: str) -> Stopped:
        assert self.signum is not None
        name = "interrupted" if self.signum == signal.SIGINT else "asked to stop"
        return Stopped(f"{name}: {what}", CODES[signal.Signals(self.signum)])


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handle both signals for a while (in the main thread; elsewhere the process's own handlers stay)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    old = {signum: signal.signal(signum, request.receive) for signum in CODES}
    try:
        yield request
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
