"""The processes of one run: `torchrun --nproc-per-node=N -m scoresde_cli train ...`, or N tasks under srun.

All of them compute, the first one (rank 0) alone reads the command line, prints and writes. Each function here is what its name
says for one process too, so that no other file asks how many there are. By torch.distributed: gloo on CPUs, nccl between GPUs.

A process that ends takes the others with it: every follower keeps a connection to the first one, on which both sides say twice a
second that they live. One that closes, or is silent for SILENCE seconds, ends the work within GRACE seconds more, whatever call
it hangs in.
"""

import mmap
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

from scoresde_cli.errors import Diverged, ScoreSDEError, one_line

if TYPE_CHECKING:
    from torch import Tensor, dtype

T = TypeVar("T")
BEAT, SILENCE, GRACE = 0.5, 20.0, 8.0  # seconds
TO_MEET = timedelta(minutes=2)
ENOUGH = timedelta(hours=12)  # for a collective: the first process may measure, draw and write for long
GOODBYE = b"!"


class Lost(ScoreSDEError):
    """Another process of the run has ended before its time."""

    exit_code = 5


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, in all and on its machine, and where the first one is."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int


@dataclass
class Group:
    """What a process knows of the others."""

    place: Place
    handle: Any  # of torch.distributed
    links: dict[int, socket.socket] = field(default_factory=dict)  # rank: connection
    gone: int | None = None  # the rank that was lost
    ending: int | None = None  # the exit code that the first process has said goodbye with
    memory: "mmap.mmap | bytes | None" = b""  # that all processes of one machine see; None where that cannot be
    over: bool = False  # this one is about to end
    alone: bool = False


group: Group | None = None


def placed() -> Place | None:
    """This process's place by the environment of torchrun or srun; None where it is the only one."""
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) > 1 and "RANK" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local, there = (int(env.get(name, env[names[i % 2]])) for i, name in enumerate(names))
        return Place(rank, size, local, there, env["MASTER_ADDR"], int(env["MASTER_PORT"]))
    # The batch script itself has SLURM_NTASKS, and is no task; a step that srun has started has a number of its own.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        there = int(re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"])).group())  # type: ignore[union-attr]
        port = 20000 + (37 * int(env["SLURM_JOB_ID"]) + int(env.get("SLURM_STEP_ID", 0))) % 20000
        size = int(env["SLURM_STEP_NUM_TASKS"])
        address = env.get("MASTER_ADDR") or ("127.0.0.1" if there == size else first_host(env))
        port = int(env.get("MASTER_PORT", port))
        return Place(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), there, address, port)
    return None


def first_host(env: Any) -> str:
    """The address of the first node of a Slurm step."""
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
    with_names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    name = (with_names.stdout.split() or [env.get("SLURMD_NODENAME", "localhost")])[0]
    about = subprocess.run(["scontrol", "show", "node", name], capture_output=True, text=True, check=False).stdout
    found = re.search(r"NodeAddr=(\S+)", about)
    return found.group(1) if found else name


def join() -> None:
    """Meet the other processes. Raises ScoreSDEError where they cannot be reached."""
    global group
    place = placed()
    if place is None or group is not None:
        return
    import torch
    from torch import distributed

    if place.size == place.local_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    method = None if "MASTER_ADDR" in os.environ else f"tcp://{place.address}:{place.port}"
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", method, TO_MEET, world_size=place.size, rank=place.rank
        )
        group = Group(place, distributed.new_group(timeout=ENOUGH))
        meet(group)
    except (RuntimeError, OSError) as problem:
        raise ScoreSDEError(
            f"process {place.rank} of {place.size} cannot reach the first one at {place.address}:{place.port} "
            f"({one_line(problem)[:160]}); MASTER_ADDR and MASTER_PORT name another place"
        ) from problem
    threading.Thread(target=beat, args=[group], daemon=True).start()
    for other in group.links:
        threading.Thread(target=listen, args=[group, other], daemon=True).start()


def meet(found: Group) -> None:
    """A connection from every follower to the first process."""
    place, token = found.place, secrets.token_bytes(16)
    if place.rank == 0:
        with socket.create_server(("", 0), backlog=place.size) as server:
            server.settimeout(TO_MEET.total_seconds())
            broadcast((server.getsockname()[1], token))
            while len(found.links) < place.size - 1:
                link, _ = server.accept()
                link.settimeout(SILENCE)
                hello = link.recv(20, socket.MSG_WAITALL)
                if hello[:16] == token:
                    found.links[int.from_bytes(hello[16:], "big")] = link
    else:
        port, token = broadcast(None)
        link = socket.create_connection((place.address, port), timeout=SILENCE)
        link.sendall(token + place.rank.to_bytes(4, "big"))
        found.links[0] = link


def beat(found: Group) -> None:
    """Say to every other end that this process lives."""
    while not found.over:
        for link in list(found.links.values()):
            with suppress(OSError):  # who listens there notices
                link.sendall(b".")
        time.sleep(BEAT)


def listen(found: Group, rank: int) -> None:
    """Wait for a goodbye; without one, the end of the other process is the end of this one."""
    link = found.links[rank]
    while True:
        try:
            heard = link.recv(4096)
        except OSError:
            heard = b""
        if GOODBYE in heard:
            found.ending = heard[heard.index(GOODBYE) + 1]
        if not heard or found.ending is not None:
            break
    if found.ending is None and not found.over:
        found.gone = rank
    time.sleep(GRACE)  # what the main thread is at fails by itself, or hangs
    if not found.over:
        if found.ending is None:
            print(f"scoresde: {lost(found)}", file=sys.stderr, flush=True)
        os._exit(Lost.exit_code if found.ending is None else found.ending)


def lost(found: Group) -> str:
    gone = "another process" if found.gone is None else f"process {found.gone}"
    return f"{gone} of the {found.place.size} of this run has ended, so process {found.place.rank} ends too"


def part(code: int = 0) -> int:
    """The end of the work together, and the exit code of all: the first one says goodbye, the others wait for that."""
    found = group
    if found is None or found.over:
        return code
    if found.place.rank == 0:
        found.over = True
        for link in found.links.values():
            with suppress(OSError):
                link.sendall(GOODBYE + bytes([code]))
        return code
    if code in (0, Diverged.exit_code, 130, 143):  # what all come to at the same time
        while found.ending is None and found.gone is None:
            time.sleep(0.05)
    found.over = True
    return code if found.ending is None else found.ending


def leave(code: int) -> int:
    """The end of this process, and its exit code."""
    if group is None:
        return code
    code = part(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the library would wait for processes that are no more


def mourned() -> bool:
    """Whether the end of this process was told by the first one already, which has ended in an orderly way."""
    if group is None or group.place.rank == 0:
        return False
    limit = time.monotonic() + 2.0
    while group.ending is None and group.gone is None and time.monotonic() < limit:
        time.sleep(0.02)
    return group.ending is not None


def size() -> int:
    """How many processes compute."""
    return 1 if group is None or group.alone else group.place.size


def rank() -> int:
    """Which of them this is, from 0."""
    return 0 if group is None or group.alone else group.place.rank


def local_size() -> int:
    """How many of them are on this machine."""
    return 1 if group is None else group.place.local_size


@contextmanager
def alone() -> Iterator[None]:
    """In here this process computes by itself."""
    before = group.alone if group else False
    if group:
        group.alone = True
    try:
        yield
    finally:
        if group:
            group.alone = before


@contextmanager
def answered() -> Iterator[None]:
    """A call that needs the others fails with Lost where one of them is no more."""
    try:
        yield
    except RuntimeError as problem:
        assert group is not None
        raise Lost(lost(group)) from problem


def broadcast(value: Any) -> Any:
    """What the first process gives, in all of them."""
    if size() == 1:
        return value
    import torch
    from torch import distributed

    assert group is not None
    box = [value]
    with answered():
        distributed.broadcast_object_list(box, src=0, group=group.handle, device=torch.device("cpu"))
    return box[0]


def decided(decide: Callable[[], T]) -> T:
    """What the first process finds by itself, in all of them."""
    if size() == 1:
        return decide()
    found = None
    if rank() == 0:
        with alone():
            found = decide()
    return broadcast(found)


def shared(count: int, compute: Callable[[int], "tuple[Any, ...]"]) -> "list[tuple[Any, ...]]":
    """compute(0) .. compute(count - 1), each done by one of the processes and known to all; of several, tensors on the host."""
    n, me = size(), rank()
    if n == 1:
        return [compute(i) for i in range(count)]
    from torch import distributed

    assert group is not None
    every: list[Any] = [None] * n
    with alone():
        mine = [tuple(v.cpu() if hasattr(v, "cpu") else v for v in compute(i)) for i in range(me, count, n)]
    with answered():
        distributed.all_gather_object(every, mine, group=group.handle)
    return [every[i % n][i // n] for i in range(count)]


def largest(*values: float) -> list[float]:
    """The largest of each number over the processes."""
    if size() == 1:
        return list(values)
    import torch
    from torch import distributed

    assert group is not None
    found = torch.tensor(values, dtype=torch.float64)
    with answered():
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=group.handle)
    return found.tolist()


def add_up(tensors: "Iterable[Tensor]") -> None:
    """Put the sum over the processes into each tensor, all of one device, in one call."""
    tensors = list(tensors)
    if size() == 1:
        return
    import torch
    from torch import distributed

    assert group is not None
    kind = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    numbers = [tensor.numel() for tensor in tensors]
    with answered():
        table = None if tensors[0].is_cuda else common(group, sum(numbers), kind)
        if table is None:
            flat = torch.cat([tensor.reshape(-1).to(kind) for tensor in tensors])
            distributed.all_reduce(flat, group=group.handle)
        else:  # a row of the table is one process's, the last one is the sum, of which each process does its part
            flat = table[-1]
            for part, tensor in zip(table[rank()].split(numbers), tensors, strict=True):
                part.view_as(tensor).copy_(tensor)
            distributed.barrier(group=group.handle)
            columns = table.tensor_split(size(), dim=1)[rank()]
            torch.add(columns[0], columns[1], out=columns[-1])
            for row in columns[2:-1]:
                columns[-1].add_(row)
            distributed.barrier(group=group.handle)
    for part, tensor in zip(flat.split(numbers), tensors, strict=True):
        tensor.copy_(part.view_as(tensor))


def common(found: Group, numbers: int, kind: "dtype") -> "Tensor | None":
    """A table (processes + 1, numbers) in memory that all of them see; None where they are on several machines, or it has no room.

    Nothing of it is left in the file system once all have opened it. Sums in it take a third of the time of gloo's.
    """
    import torch

    rows = found.place.size + 1
    needed = rows * numbers * kind.itemsize
    if found.place.local_size < found.place.size or found.memory is None:
        return None
    if len(found.memory) < needed:
        with ExitStack() as held:
            path: str | None = None
            if found.place.rank == 0:
                with suppress(OSError):
                    file = held.enter_context(tempfile.NamedTemporaryFile(prefix="scoresde-", dir="/dev/shm"))
                    os.posix_fallocate(file.fileno(), 0, needed)
                    path = file.name
            path = broadcast(path)
            found.memory = None
            if path is not None:
                with suppress(OSError), open(path, "r+b") as opened:
                    found.memory = mmap.mmap(opened.fileno(), needed)
            missed = largest(found.memory is None)[0]
        if missed:
            found.memory = None
            return None
    return torch.frombuffer(found.memory, dtype=kind, count=rows * numbers).view(rows, numbers)
