"""hydra/launcher=slurm: the jobs of a grid as a Slurm array by submitit, and a parent that can be killed and comes back.

What a job is at is known from files and from Slurm, never from the parent's memory. Before an array is submitted, its name, which
no other array has, and the jobs in it are written to .slurm/NAME.json in the sweep's directory; so a later parent finds in the
queue what an earlier one has submitted, waits for that, and submits the rest. A job is over where submitit's file with its result
is there. One that has left the queue without that file, for SETTLE seconds, was cancelled, or lost, or ended by a signal (before
submitit could take it, say). What Slurm remembers of it, by sacct where that works, else by scontrol, decides: it is submitted
again, up to TIMES times, or listed as failed.

submitit requeues a job on the signal before the end of its time and on preemption, Slurm after the loss of a node; each goes on in
its own directory, from its last checkpoint (training/stop.py saves one first where there is time).
"""

import getpass
import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scoresde_cli.errors import ScoreSDEError, one_line
from scoresde_cli.rundir import RunDir
from scoresde_cli.sweeps import failed_meanwhile, give_up, slug, status
from scoresde_cli.tracking import console
from scoresde_cli.training.state import write_durably

EVERY, SETTLE, ASK = 0.5, 15.0, 5.0  # seconds: between looks at files, for a file to show, between questions to Slurm
TIMES = 2
FOR_GOOD = ("CANCELLED", "OUT_OF_MEMORY", "DEADLINE")  # to do it again would be against somebody's will, or in vain
TAIL = 5  # lines of a lost job's log that are shown
LAUNCH = "launch failed requeued held"  # after a node that could not start it
STUCK = (LAUNCH, "JobHeld", "BadConstraints", "PartitionTimeLimit", "PartitionNodeLimit", "QOS", "Assoc")


@dataclass(frozen=True)
class Job:
    """A job of the sweep: its number, its overrides, its directory."""

    number: int
    overrides: list[str]
    folder: Path


@dataclass
class Submitted:
    """A job in Slurm: its id, when it was first missed in the queue."""

    job: Job
    id: str
    missed: float | None = None
    told: bool = False


def query(*command: str) -> str | None:
    """What a Slurm command prints; None where it fails or hangs."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout if found.returncode == 0 else None


def queued() -> dict[str, tuple[str, str, str]] | None:
    """What this user has in the queue, {id: (name, state, reason)}, arrays task by task; None where Slurm does not answer."""
    found = query("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%j|%T|%r")
    if found is None:
        return None
    return {a: (b, c, d) for a, b, c, d in (line.split("|", 3) for line in found.splitlines() if line.count("|") >= 3)}


def result_file(root: Path, job: str) -> Path:
    """Where submitit leaves the result of a job that has come to its end, whatever the end was."""
    return root / job / f"{job}_0_result.pkl"


def launch(launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
    """Run the jobs, those that are done already in this process, where they return at once."""
    sweep = Path(str(launcher.config.hydra.sweep.dir)).absolute()
    root = Path(str(launcher.params["submitit_folder"])).absolute().parent
    jobs = [Job(initial_job_idx + i, list(o), place(launcher, o)) for i, o in enumerate(job_overrides)]
    finished = [job for job in jobs if (job.folder / "run.json").is_file() and status(RunDir(job.folder)) == "finished"]
    results = {job.number: once(launcher, job) for job in finished}
    left = {job.folder.name: job for job in jobs if job.number not in results}
    there = adopt(sweep, left)
    if there:
        console.note(f"slurm    {len(there)} jobs of an earlier call are in the queue; waiting for them")
    new = [job for name, job in left.items() if name not in {one.job.folder.name for one in there}]
    try:
        there += submit(launcher, sweep, new) if new else []
        last = wait(there, root, lambda job: submit(launcher, sweep, [job]))
    except BaseException:
        console.warn(
            "the jobs go on in Slurm: the same command waits for them, scancel ends them (squeue --me lists them)"
        )
        raise
    return [
        results[job.number] if job.number in results else result(root, last[job.number], job, launcher) for job in jobs
    ]


def place(launcher: Any, overrides: Sequence[str]) -> Path:
    """The directory of a job, as the job itself will find it."""
    config = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
    if config.get("dir"):  # of a study
        return Path(config.dir).absolute()
    sweep = Path(str(launcher.config.hydra.sweep.dir)).absolute()
    return sweep / (slug(str(config.hydra.job.override_dirname)) or "run")


def once(launcher: Any, job: Job) -> Any:
    """A job in this process."""
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    here = BasicLauncher()
    here.setup(hydra_context=launcher.hydra_context, task_function=launcher.task_function, config=launcher.config)
    (found,) = here.launch([job.overrides], job.number)
    return found


def adopt(sweep: Path, left: dict[str, Job]) -> list[Submitted]:
    """The jobs of the sweep that are in the queue already. Raises ScoreSDEError where Slurm does not answer."""
    there = queued()
    if there is None:
        raise ScoreSDEError(
            "Slurm does not answer (squeue fails): is this a node of the cluster? `scoresde doctor` looks"
        )
    arrays: dict[str, list[str]] = {}
    for file in (sweep / ".slurm").glob("*.json"):
        entry = json.loads(file.read_text())
        arrays[file.stem] = entry["jobs"]
    found = {}
    for name, (array, state, _) in there.items():
        which = int(name.split("_")[1]) if "_" in name else 0
        if array in arrays and state != "COMPLETING" and arrays[array][which] in left:
            found[arrays[array][which]] = Submitted(left[arrays[array][which]], name)
    return list(found.values())


def submit(launcher: Any, sweep: Path, jobs: Sequence[Job]) -> list[Submitted]:
    """A Slurm array of these jobs. Raises ScoreSDEError with sbatch's own words where it is refused."""
    import submitit
    from hydra.core.singleton import Singleton

    params, folder = dict(launcher.params), str(launcher.params["submitit_folder"])
    name = f"{params.pop('name', 'train')}-{secrets.token_hex(4)}"
    (sweep / ".slurm").mkdir(parents=True, exist_ok=True)
    entry = {"jobs": [job.folder.name for job in jobs], "submitted": time.time()}
    write_durably(sweep / ".slurm" / f"{name}.json", (json.dumps(entry, indent=1) + "\n").encode())
    for key in ("_target_", "submitit_folder"):
        params.pop(key, None)
    shared = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "stderr_to_stdout")
    try:
        executor = submitit.AutoExecutor(
            folder=folder, cluster="slurm", slurm_max_num_timeout=params.pop("max_num_timeout")
        )
        executor.update_parameters(
            name=name, **{key if key in shared else f"slurm_{key}": value for key, value in params.items()}
        )
        arguments = [
            (job.overrides, "hydra.sweep.dir", job.number, f"job_id_for_{job.number}", Singleton.get_state())
            for job in jobs
        ]
        made = executor.map_array(launcher, *zip(*arguments, strict=True))
    except Exception as problem:  # submitit and sbatch refuse in many ways
        raise ScoreSDEError(f"hydra/launcher=slurm: not submitted, {refusal(problem)}") from problem
    console.note(f"slurm    {len(made)} jobs submitted as {made[0].job_id.split('_')[0]} ({name})")
    return [Submitted(job, one.job_id) for job, one in zip(jobs, made, strict=True)]


def refusal(problem: Exception) -> str:
    """What sbatch said."""
    text = f"{problem} {getattr(problem, 'stderr', '') or ''}"
    said = re.search(r"sbatch: error: (.*)", text)
    return one_line(said.group(1) if said else text)[:300]


def wait(jobs: Sequence[Submitted], root: Path, again: Callable[[Job], list[Submitted]]) -> dict[int, str]:
    """Until every job has a result, or is out of the queue without one for good; the last Slurm id of each."""
    there: dict[str, tuple[str, str, str]] | None = {}
    asked, left, losses = -ASK, list(jobs), Counter[int]()
    last = {one.job.number: one.id for one in jobs}
    while left:
        if time.monotonic() - asked > ASK:
            there, asked = queued(), time.monotonic()
            for one in left:
                with suppress(OSError):
                    os.utime(result_file(root, one.id).parent)  # a network file system then looks again
        for one in list(left):
            if result_file(root, one.id).is_file():
                left.remove(one)
                word = "failed  " if failed_meanwhile(one.job.folder) else ""
                console.note(f"{len(jobs) - len(left):4d} of {len(jobs)}  {word}{one.job.folder.name}")
            elif there is not None and one.id in there:
                one.missed = None
                tell(one, *there[one.id])
            elif there is not None:
                one.missed = one.missed or asked
                if asked - one.missed > SETTLE:
                    left.remove(one)
                    state = ended(one.id)
                    losses[one.job.number] += 1
                    if state not in FOR_GOOD and losses[one.job.number] <= TIMES:
                        console.warn(f"{one.job.folder.name}: {fate(one.id, state)}; once more")
                        left += again(one.job)
                        last[one.job.number] = left[-1].id
                    elif not failed_meanwhile(one.job.folder):
                        give_up(one.job.folder, f"{fate(one.id, state)}; {last_words(one, root)}", 1)
        if left:
            time.sleep(EVERY)
    return last


def tell(one: Submitted, name: str, state: str, reason: str) -> None:
    """Say once of a job that Slurm will not start by itself why not; let go of one that is held because of the node it was on."""
    reason = reason.replace("_", " ")
    if state != "PENDING" or one.told or not reason.startswith(STUCK):
        return
    one.told = True
    where = f"{one.job.folder.name}: Slurm holds job {one.id} ({reason})"
    if reason == LAUNCH and query("scontrol", "release", one.id) is not None:
        console.warn(f"{where}; released")
    else:
        console.warn(f"{where}; `scontrol release {one.id}` or scancel")


def ended(job: str) -> str:
    """The state in which a job that is no longer in the queue has ended, as Slurm remembers it; empty where it does not."""
    found = query("sacct", "-n", "-X", "-P", "-o", "State", "-j", job)
    if found and found.strip():
        return found.split()[0]
    told = re.search(r"JobState=(\S+)", query("scontrol", "show", "job", "-o", job) or "")
    return told.group(1) if told else ""


def fate(job: str, state: str) -> str:
    """The end of a job in words."""
    words = {
        "CANCELLED": "was cancelled", "TIMEOUT": "was ended by its time limit", "NODE_FAIL": "was lost with its node",
        "OUT_OF_MEMORY": "was out of memory (hydra.launcher.mem_gb)", "PREEMPTED": "was preempted and not requeued",
    }  # fmt: skip
    unknown = f"left the queue without a result ({state.lower() or 'nothing is remembered of it'})"
    return f"Slurm job {job} {words.get(state, unknown)}"


def last_words(one: Submitted, root: Path) -> str:
    """The last lines of what a job has said."""
    logs = [
        one.job.folder.parent / "logs" / f"{one.job.folder.name}.txt",
        root / one.id.split("_")[0] / f"{one.id}_0_log.out",
    ]
    said = [
        line for log in logs if log.is_file() for line in log.read_text(errors="replace").splitlines() if line.strip()
    ]
    return f"its last lines: {' | '.join(said[-TAIL:])}" if said else "it had said nothing"


def result(root: Path, last: str, job: Job, launcher: Any) -> Any:
    """What Hydra's sweepers want to know of a job: its return value, NaN where it has none."""
    from hydra.core.utils import JobReturn, JobStatus

    try:
        import cloudpickle  # as submitit has written it, in the user's own directory

        kind, found = cloudpickle.loads(result_file(root, last).read_bytes())
        if kind == "success":
            return found
        give_up(job.folder, one_line(str(found).strip().splitlines()[-1])[:300], 1, str(found))
    except (OSError, ValueError, EOFError):
        pass
    lost = JobReturn(overrides=job.overrides, _return_value=float("nan"), status=JobStatus.COMPLETED)
    lost.cfg = launcher.config
    return lost


def examine() -> str:
    """What `scoresde doctor` says of the cluster."""
    if shutil.which("sbatch") is None:
        return "no sbatch here: hydra/launcher=joblib uses the cores of this machine"
    rows = query("sinfo", "-h", "-o", "%P|%a|%l|%D|%c|%m|%G")
    if rows is None:
        return (
            "sbatch is here, and sinfo gets no answer: slurmctld is down, or SLURM_CONF names another cluster; "
            "hydra/launcher=slurm will not work, joblib uses the cores of this machine"
        )
    found = []
    for row in rows.splitlines():
        name, up, limit, nodes, cores, memory, gres = row.split("|")
        gpus = "no GPUs, so leave gpus_per_node out" if gres == "(null)" else gres
        found.append(f"{name} ({up}, {nodes} nodes of {cores} cores and {memory} MB, {gpus}, time limit {limit})")
    if importlib.util.find_spec("submitit") is None:
        found.append(
            "submitit is missing for hydra/launcher=slurm (pip install 'scoresde[slurm]'); scoresde batch needs none"
        )
    if query("sacct", "-n", "-X", "-j", "1") is None:
        found.append(
            "sacct does not work (no accounting): the queue is asked, and how a lost job ended is known for a while only"
        )
    else:
        found.append("sacct works")
    return "; ".join(["partitions " + ", ".join(found[: len(rows.splitlines())]), *found[len(rows.splitlines()) :]])


SHARED = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.ceph",
    "cephfs",
    "panfs",
    "afs",
    "glusterfs",
    "wekafs",
    "smb3",
    "9p",
)


def shared_folder() -> str:
    """Whether compute nodes see this folder: what its file system is, and whether it has locks."""
    here = Path.cwd()
    kind = (query("stat", "-f", "-c", "%T", str(here)) or "?").strip()
    mounts = (
        [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        if Path("/proc/mounts").exists()
        else []
    )
    under = [m for m in mounts if here.is_relative_to(m[1].replace("\\040", " "))]
    kind = max(under, key=lambda m: len(m[1]))[2] if under else kind
    from scoresde_cli.claims import acquire

    with tempfile.TemporaryDirectory(dir=here) as folder:
        try:
            with acquire(Path(folder) / "lock") as held:  # type: ignore[union-attr]
                assert held
        except OSError as problem:
            raise ScoreSDEError(
                f"{here} ({kind}) has no locks ({problem.strerror}); put the outputs elsewhere"
            ) from None
    if kind.startswith(SHARED):
        return f"{here} is on {kind}, which nodes share; locks work"
    if (query("sinfo", "-h", "-o", "%D") or "1").split()[0] in ("0", "1"):
        return f"{here} is on {kind}, of this machine alone; locks work"
    return f"{here} is on {kind}, of this machine alone: on a cluster put the sweep where all nodes see it (hydra.sweep.dir=)"
