"""Records of a run: W&B offline is readable afterwards, its absence never fails a run, a resume keeps its id."""

import json
import threading
import time

import pytest

from scoresde_cli.tracking import wandb as tracking
from scoresde_cli.tracking.jsonl import JsonLines, read_rows
from scoresde_cli.tracking.wandb import WandB, has_credentials
from tests.conftest import NO_FIGURES, SMALL

QUIET = [a for a in SMALL if not a.startswith("tracker")]


def messages(content, block=32768):
    """The messages of a .wandb file: a LevelDB log (header of 7 bytes; records of crc, length, type and data in blocks)."""
    position, message = 7, b""
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


def records(folder):
    """What an offline W&B run wrote: (config keys, history rows, exit code)."""
    from wandb.proto import wandb_internal_pb2

    (file,) = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))[-1:]
    rows, config, code = [], set(), None
    deadline = time.time() + 20  # the client writes from a process of its own
    while time.time() < deadline and not list(messages(file.read_bytes())):
        time.sleep(0.1)
    for data in messages(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        elif kind == "run":
            config |= {item.key for item in record.run.config.update}
        elif kind == "exit":
            code = record.exit.exit_code
    return config, rows, code


def test_offline_run_holds_config_rows_and_exit_code_and_resume_keeps_its_id(tmp_path, cli):
    code, _, err = cli("train", "dir=run", *QUIET, *NO_FIGURES, "tracker.mode=offline", "tracker.tags=[a,b]")
    assert code == 0, err
    config, rows, exit_code = records(tmp_path / "run")
    assert {"loss", "n_proj", "seed", "threads"} <= config
    assert exit_code == 0
    logged = {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert logged == {r["step"]: pytest.approx(r["loss"]) for r in read_rows(tmp_path / "run/metrics.jsonl")}
    first = json.loads((tmp_path / "run/run.json").read_text())["wandb"]
    assert cli("train", "resume=run", "steps=80")[0] == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["wandb"] == first


def test_credentials_decide_the_mode(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_credentials()
    assert WandB().mode == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    assert has_credentials()
    assert WandB().mode == "online"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert WandB().mode == "offline"
    assert WandB(mode="online").mode == "online"


class Broken:
    """A client that fails at everything, or hangs when asked to finish."""

    id, dir = "broken", "nowhere"

    def __init__(self, hang=False):
        self.hang = hang
        self.summary = {}

    def Settings(self, **kwargs):
        return kwargs

    def init(self, **kwargs):
        if kwargs["mode"] == "online":
            raise ConnectionError("no network")
        return self

    def log(self, *args, **kwargs):
        raise OSError("connection lost")

    def finish(self, exit_code):
        if self.hang:
            threading.Event().wait(30)


def test_no_network_falls_back_to_offline_and_a_lost_connection_is_one_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tracking.importlib, "import_module", lambda name: Broken())
    tracker = WandB(mode="online")
    assert tracker.begin(tmp_path, {}, None) == "broken"
    assert tracker.mode == "offline"
    tracker.log({"step": 1, "loss": 2.0})
    tracker.log({"step": 2, "loss": 2.0})
    err = capsys.readouterr().err
    assert err.count("out of reach") == 1
    assert err.count("stopped at logging") == 1


def test_a_client_that_hangs_at_the_end_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.importlib, "import_module", lambda name: Broken(hang=True))
    monkeypatch.setattr(tracking, "SECONDS_TO_FINISH", 0.2)
    tracker = WandB(mode="offline")
    tracker.begin(tmp_path, {}, None)
    began = time.perf_counter()
    tracker.finish(0)
    assert time.perf_counter() - began < 5


def test_rows_after_the_checkpoint_are_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    tracker = JsonLines(path, 2)
    tracker.log({"step": 3, "loss": 1.0})
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
