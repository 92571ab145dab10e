"""Whose a job is: a file .JOB.claim beside its directory, locked while a process works on it.

Two sweeps of the same jobs, started together, then take turns: what one is at, the other waits for, and finds done. The system
lets go of a lock when its process ends, however it ends. A file that is left without one tells of a process that was killed.

On a file system of several machines the lock of a machine that is no more may be kept for long, and some give the same lock twice.
So the owner also touches its file every BEAT seconds: one of another machine is an owner while it does, lock or no lock, and none
after STALE seconds. An owner whose file has gone to somebody else stops.
"""

import fcntl
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from scoresde_cli.tracking import console

PARENT = "SCORESDE_PARENT"  # in the environment of workers: the process that started them
BEGAN = "SCORESDE_BEGAN"  # in the environment of jobs: when their sweep began, in seconds since the epoch
TASK = "SCORESDE_TASK"  # in the environment: the one job of a sweep that this process is to run, by its number
PATIENCE = 15.0  # seconds for a process that is to end
BEAT, STALE = 5.0, 60.0  # seconds


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


def facts(file: Path) -> dict[str, Any]:
    """What the owner has written; empty where it is none, or has just begun or ended."""
    try:
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def age(file: Path) -> float:
    """Seconds since the file was touched, by the clock of the file system; infinite where it is no more."""
    probe = file.with_name(f".{file.name}.{os.getpid()}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime
    except OSError:
        return math.inf
    finally:
        probe.unlink(missing_ok=True)


def taken(file: Path) -> IO[str] | None:
    """The file, locked, where no living process has it."""
    held, host = acquire(file), facts(file).get("host")
    foreign = host not in (None, socket.gethostname())
    if held is not None and foreign and age(file) < STALE:  # the lock means nothing between these machines
        held.close()
        return None
    if held is None and foreign and age(file) > STALE:  # the lock of a machine that is no more
        console.warn(f"{file.name}: its owner on {host} has been silent for {STALE:.0f} s and is taken for dead")
        file.unlink(missing_ok=True)
        (file.with_name(file.name[1 : -len(".claim")]) / "lock").unlink(missing_ok=True)
        return acquire(file)
    return held


def keep(file: Path, mine: os.stat_result, over: threading.Event) -> None:
    """Touch a file as long as it is this process's own."""
    while not over.wait(BEAT):
        try:
            if not os.path.samestat(mine, file.stat()):
                raise FileNotFoundError
            os.utime(file)
        except FileNotFoundError:
            if over.is_set():  # removed by this process itself
                return
            console.warn(f"{file.name}: another process has taken this job over")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        except OSError:
            continue  # the file system is away for a while


@contextmanager
def claim(folder: Path, number: int = 0) -> Iterator[None]:
    """Have a job, of that number in its sweep, to oneself; waits for as long as another process has it."""
    file = folder.with_name(f".{folder.name}.claim")
    file.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while (held := taken(file)) is None:
        if not told:
            console.note(f"{folder.name}: run by another sweep; waiting for it")
        told = True
        time.sleep(0.2)
    over = threading.Event()
    with held:
        held.truncate(0)
        json.dump({"sweep": sweep(), "pid": os.getpid(), "job": number, "host": socket.gethostname()}, held)
        held.flush()
        threading.Thread(target=keep, args=(file, os.fstat(held.fileno()), over), daemon=True).start()
        try:
            yield
        finally:
            over.set()
            file.unlink(missing_ok=True)


def abandoned(root: Path) -> dict[int, Path]:
    """The jobs below a directory, {number: directory}, that workers of this process were at when they were killed.

    Their claims are removed. Workers that are still about to end are waited for.
    """
    found = {}
    limit = time.monotonic() + PATIENCE
    for file in root.rglob(".*.claim"):
        owner = facts(file)
        if owner.get("sweep") != sweep():
            continue
        while (held := acquire(file)) is None and time.monotonic() < limit:
            time.sleep(0.1)
        if held is not None:
            with held:
                file.unlink(missing_ok=True)
            found[int(owner["job"])] = file.with_name(file.name[1 : -len(".claim")])
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
