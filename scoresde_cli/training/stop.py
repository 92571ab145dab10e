"""SIGINT and SIGTERM: finish the step, save, leave a status. So does SIGUSR2 under submitit, whose handler requeues the job."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from scoresde_cli.errors import Stopped

AT_ONCE = 2.0  # seconds in which several SIGTERM are one
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopRequest:
    """Set by the first signal where `deferred`, so that the loop can save; raised at once otherwise or by a second one."""

    def __init__(self) -> None:
        self.deferred = False
        self.signum: int | None = None
        self.at = 0.0
        self.requeue: Callable[[int, FrameType | None], Any] | None = None

    def leave_the_node(self, signum: int, frame: FrameType | None) -> None:
        """At once where nothing would be lost that can be saved; submitit's own handler ends the process."""
        assert self.requeue is not None
        if not self.deferred or self.signum is not None:
            self.requeue(signum, frame)
        self.signum = signum

    def receive(self, signum: int, frame: FrameType | None) -> None:
        before, self.at = self.at, time.monotonic()
        if signum == signal.SIGTERM and self.signum == signum and self.at - before < AT_ONCE:
            return  # Slurm, its batch script and torchrun each send the one
        again = self.signum is not None
        self.signum = signum
        if again or not self.deferred:
            raise self.stopped("stopped")

    def stopped(self, what: str) -> Stopped:
        assert self.signum is not None
        if self.signum == signal.SIGUSR2 and self.requeue is not None:
            self.requeue(self.signum, None)
        name = "interrupted" if self.signum == signal.SIGINT else "asked to stop"
        return Stopped(f"{name}: {what}", CODES.get(signal.Signals(self.signum), 143))


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handle both signals for a while (in the main thread; elsewhere the process's own handlers stay)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    old: dict[int, Any] = {signum: signal.signal(signum, request.receive) for signum in CODES}
    if "SUBMITIT_EXECUTOR" in os.environ and callable(signal.getsignal(signal.SIGUSR2)):
        request.requeue = signal.signal(signal.SIGUSR2, request.leave_the_node)  # type: ignore[assignment]
        old[signal.SIGUSR2] = request.requeue
    try:
        yield request
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
