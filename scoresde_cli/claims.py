"""Whose a job is: a file .JOB.claim beside its directory, locked while a process works on it.

Two sweeps of the same jobs, started together, then take turns: what one is at, the other waits for, and finds done. The system
lets go of a lock when its process ends, however it ends. A file that is left without one tells of a process that was killed.
"""

import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from scoresde_cli.tracking import console

PARENT = "SCORESDE_PARENT"  # in the environment of workers: the process that started them
BEGAN = "SCORESDE_BEGAN"  # in the environment of jobs: when their sweep began, in seconds since the epoch
PATIENCE = 15.0  # seconds for a process that is to end


def sweep() -> str:
    """The sweep that this process belongs to."""
    return f"{os.environ.get(PARENT, os.getpid())} on {socket.gethostname()}"


def acquire(file: Path) -> IO[str] | None:
    """The file, locked; None where another process has it. A file that its last owner has just removed is made anew."""
    while True:
        held = file.open("a+")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(held.fileno()), file.stat()):
                return held
        except BlockingIOError:
            held.close()
            return None
        except FileNotFoundError:
            pass
        held.close()


@contextmanager
def claim(folder: Path, number: int = 0) -> Iterator[None]:
    """Have a job, of that number in its sweep, to oneself; waits for as long as another process has it."""
    file = folder.with_name(f".{folder.name}.claim")
    file.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while (held := acquire(file)) is None:
        if not told:
            console.note(f"{folder.name}: run by another sweep; waiting for it")
        told = True
        time.sleep(0.2)
    with held:
        held.truncate(0)
        json.dump({"sweep": sweep(), "pid": os.getpid(), "job": number}, held)
        held.flush()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def abandoned(root: Path) -> dict[int, Path]:
    """The jobs below a directory, {number: directory}, that workers of this process were at when they were killed.

    Their claims are removed. Workers that are still about to end are waited for.
    """
    found = {}
    limit = time.monotonic() + PATIENCE
    for file in root.rglob(".*.claim"):
        try:
            facts = json.loads(file.read_text())
        except (OSError, ValueError):  # it has just ended, or just begun
            continue
        if facts["sweep"] != sweep():
            continue
        while (held := acquire(file)) is None and time.monotonic() < limit:
            time.sleep(0.1)
        if held is not None:
            with held:
                file.unlink(missing_ok=True)
            found[int(facts["job"])] = file.with_name(file.name[1 : -len(".claim")])
    return found


def follow_parent() -> None:
    """In a worker process: ask it to stop, as SIGTERM does, when the process that started it is no more."""
    parent = int(os.environ.get(PARENT, os.getppid()))  # as it was before this process began
    if parent == os.getpid() or any(thread.name == "follow-parent" for thread in threading.enumerate()):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)  # to save; afterwards a worker would wait for its next job forever
        os._exit(143)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()
