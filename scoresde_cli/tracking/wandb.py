"""Weights & Biases by its own client, which may be away: no network never hangs or fails a run."""

import importlib
import netrc
import os
import threading
from pathlib import Path
from typing import Any, Literal

from scoresde_cli.errors import one_line
from scoresde_cli.tracking.base import Tracker
from scoresde_cli.tracking.console import note, warn

Mode = Literal["auto", "online", "offline", "disabled"]
SECONDS_TO_CONNECT = 15
SECONDS_TO_FINISH = 60


def has_credentials() -> bool:
    """Whether a W&B key is at hand: WANDB_API_KEY, or an entry for its host in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandB(Tracker):
    """Rows, config, summary and figures to W&B.

    Args:
        mode: auto is online where credentials exist (and not on a Slurm compute node), else offline.
        project, entity, group, name, tags: as W&B has them.
    """

    def __init__(
        self, mode: Mode = "auto", project: str = "scoresde", entity: str | None = None, group: str | None = None,
        name: str | None = None, tags: list[str] | None = None,
    ) -> None:  # fmt: skip
        if mode == "auto":
            mode = "online" if has_credentials() and "SLURM_JOB_ID" not in os.environ else "offline"
        self.mode: Mode = mode
        self.run: Any = None
        self.identity = {"project": project, "entity": entity, "group": group, "name": name, "tags": tags or []}

    def begin(self, folder: Path, config: dict[str, Any], run_id: str | None) -> str | None:
        """Start or go on with a W&B run; its id. A failure becomes one warning, and the run goes on without."""
        if self.mode == "disabled":
            return run_id
        try:
            self.wandb = importlib.import_module("wandb")
            self.run = self._init(folder, config, run_id, self.mode)
        except Exception as problem:  # whatever the client raises, the run goes on
            if self.mode != "online":
                warn(f"tracker: W&B did not start, the run goes on without it ({one_line(problem)[:160]})")
                return run_id
            warn(f"tracker: W&B is out of reach, logging offline ({one_line(problem)[:120]})")
            self.mode = "offline"
            try:
                self.run = self._init(folder, config, run_id, "offline")
            except Exception as again:  # as above
                warn(f"tracker: W&B did not start, the run goes on without it ({one_line(again)[:160]})")
                return run_id
        return str(self.run.id)

    def _init(self, folder: Path, config: dict[str, Any], run_id: str | None, mode: str) -> Any:
        settings = self.wandb.Settings(
            init_timeout=SECONDS_TO_CONNECT, login_timeout=SECONDS_TO_CONNECT, silent=True, console="off", disable_git=True,
            symlink=False,
        )  # fmt: skip
        return self.wandb.init(
            dir=str(folder), config=config, id=run_id, resume="allow" if run_id else None, mode=mode, settings=settings,
            **self.identity,
        )  # fmt: skip

    def _try(self, what: str, call: Any) -> None:
        try:
            call()
        except Exception as problem:  # whatever the client raises, the run goes on
            warn(f"tracker: W&B stopped at {what} ({one_line(problem)[:160]})")
            self.run = None

    def log(self, row: dict[str, Any]) -> None:
        run = self.run
        if run is not None:
            values = {f"train/{name}": value for name, value in row.items() if name != "step"}
            self._try("logging", lambda: run.log(values, step=row["step"]))

    def summary(self, values: dict[str, dict[str, Any]], figures: list[Path]) -> None:
        run = self.run
        if run is not None:
            flat = {name: entry["value"] for name, entry in values.items()}
            images = {f"figures/{path.stem}": self.wandb.Image(str(path)) for path in figures}
            self._try("the summary", lambda: (run.summary.update(flat), run.log(images)))

    def page(self, file: Path) -> None:
        """A report, as HTML."""
        run = self.run
        if run is not None:
            html = file.read_text(encoding="utf-8")
            self._try("the report", lambda: run.log({"report": self.wandb.Html(html)}))

    def finish(self, exit_code: int) -> None:
        run, self.run = self.run, None
        if run is None:
            return
        ending = threading.Thread(
            target=lambda: self._try("finishing", lambda: run.finish(exit_code=exit_code)), daemon=True
        )
        ending.start()
        ending.join(SECONDS_TO_FINISH)
        if ending.is_alive():
            note(f"tracker: W&B is still uploading; what is missing stays on disk: wandb sync {run.dir}")
