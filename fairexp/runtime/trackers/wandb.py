"""`tracker=wandb`: the run on its Weights & Biases page, or recorded in RUN_DIR/wandb.

What the page lacks, since it was offline, failed or was killed, `fairexp sync` sends from metrics.jsonl, and so does a resumed
run. It asks nothing, waits for a server no longer than it was told, and sends metrics, the config and hardware use: not the
command line, the environment, the source or git's state, where keys and private paths are found.
"""

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fairexp.errors import INTERRUPTED, UserError
from fairexp.runtime.track import one_line, read

if TYPE_CHECKING:
    import wandb

Mode = Literal["auto", "online", "offline", "disabled"]

# An axis of our own: wandb's counts its calls and drops a row that goes back, so a resumed run would tear the curve.
STEP = "trainer/step"
MOST_WAITING = 10_000  # rows that wandb-core hasn't taken yet
MARGIN_S = 5.0  # beyond wandb's own limits, which a frozen wandb-core doesn't keep


class Wandb:
    """One wandb run whose id is our run's, so a resumed run goes on in the same page.

    `mode: auto` does what the environment asks for: WANDB_MODE if it is set, else online where a key is found
    (WANDB_API_KEY, ~/.netrc, wandb's settings), else offline. Any other mode is taken as written, whatever WANDB_MODE
    says. What can't start online records offline.

    A thread talks to wandb: a wandb-core that is frozen, as by a file system that hangs, would hold training up.
    """

    def __init__(
        self,
        run_dir: Path,
        run_id: str,
        name: str,
        config: dict[str, Any],
        resumed: bool,
        *,
        project: str,
        entity: str | None,
        group: str | None,
        job_type: str | None,
        tags: Sequence[str],
        notes: str | None,
        mode: Mode,
        init_timeout_s: float,
        finish_timeout_s: float,
    ) -> None:
        if mode not in ("auto", "online", "offline", "disabled"):
            raise UserError(f"tracker.mode is {mode!r}; choose auto, online, offline or disabled")
        chosen = mode if mode != "auto" else os.environ.get("WANDB_MODE") or "online"
        folder = run_dir.absolute() / "wandb"
        # wandb's staging, cache and logs default to the home folder, which is read-only or full on many a compute node.
        for kind in ("DATA", "CACHE", "ARTIFACT"):
            os.environ.setdefault(f"WANDB_{kind}_DIR", str(folder / kind.lower()))
        # wandb's reports on itself: not ours to send, and a server that doesn't answer held the exit up by 12 s.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        folder.mkdir(exist_ok=True)

        import wandb

        settings = wandb.Settings(
            root_dir=str(folder.parent),
            project=project,
            entity=entity,
            run_id=run_id,
            run_name=name,
            run_group=group,
            run_job_type=job_type,
            run_tags=tuple(tags),
            run_notes=notes,
            resume="allow",  # on a first start too: else an id that the server knows already loses its rows there
            init_timeout=init_timeout_s,
            finish_timeout=finish_timeout_s,  # its default is to wait for ever
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1,  # s; at its default of 15 a killed process leaves an empty file
            program="fairexp",  # else the path of the script
            x_disable_meta=True,  # argv, user, paths, packages
            x_save_requirements=False,
            disable_git=True,
            disable_code=True,
            save_code=False,
            console="off",  # RUN_DIR/logs has the console
            silent=True,
        )
        self.later = f"fairexp sync {run_dir} fills the page from metrics.jsonl"
        self.run = _start(wandb, chosen, settings, config, self.later)
        self.online = self.run is not None and self.run.settings.mode == "online"
        self._finish_s = finish_timeout_s + MARGIN_S
        self._error: Exception | None = None
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()
        # Rows before this step are on the server already.
        self._sent = self.run.summary.get(STEP, 0) if self.run is not None and self.run.resumed and resumed else 0
        file = run_dir / "metrics.jsonl"
        if self.online and resumed and file.exists():
            # the last attempt was killed with its wandb-core, or couldn't reach the server: the rows that the page lacks
            self._call(partial(self._send, [row for row in read(file) if row["step"] > self._sent]))

    def log(self, record: Mapping[str, float], step: int) -> None:
        # A run that was killed repeats the steps after its checkpoint. The last one sent comes again: it may lack its
        # evaluation.
        if self.run is not None and step >= self._sent:
            self._call(partial(self.run.log, as_sent({"step": step, **record})))

    def finish(self, exit_code: int) -> None:
        if self.run is None:
            return
        self._call(partial(self._end, exit_code))
        self._call(None)
        self._thread.join(self._finish_s)
        if self._thread.is_alive():
            self._error = TimeoutError(f"no answer from wandb-core in {self._finish_s:.0f} s")
        if self._error:
            raise self._failure(self._error)

    def _send(self, rows: Sequence[Mapping[str, Any]]) -> None:
        assert self.run is not None
        for row in rows:
            self.run.log(as_sent(row))

    def _call(self, call: Callable[[], None] | None) -> None:
        if self._error:
            raise self._failure(self._error)
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            raise Unsent(f"wandb-core takes no more rows; {self.later}") from None

    def _talk(self) -> None:
        while call := self._calls.get():
            try:
                call()
            except Exception as error:
                self._error = error
                return

    def _end(self, exit_code: int) -> None:
        assert self.run is not None
        if exit_code == INTERRUPTED:
            self.run.mark_preempting()  # the page says "preempted" and not "failed": the same command goes on
        self.run.finish(exit_code=exit_code)

    def _failure(self, error: Exception) -> "Unsent":
        return Unsent(f"{one_line(error)}; {self.later}")


class Unsent(Exception):
    """Rows that the page lacks, why, and how to send them."""


def as_sent(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl as the page has it."""
    return {STEP if name == "step" else name: value for name, value in row.items()}


def _start(wandb: Any, mode: str, settings: Any, config: dict[str, Any], later: str) -> "wandb.Run | None":
    """A started run: online if that is wanted and works, else offline; None if wandb can't even do that."""
    try:
        settings.mode = mode
        wandb.setup(settings)
        run, why = None, ""
        if mode not in ("offline", "dryrun", "disabled"):  # dryrun: the old name of offline, still met in WANDB_MODE
            run, why = _online(wandb, settings, config)
        if run is None:
            settings.mode = mode if mode == "disabled" else "offline"
            run = wandb.init(config=config, settings=settings)
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
    except Exception as error:
        _say(f"wandb is off, the run and metrics.jsonl go on: {one_line(error)}; {later}")
        return None
    if settings.mode == "offline":
        _say(f"wandb: {why}recording offline; {later}")
    elif run.url:
        _say(f"wandb: {run.url}")
    return run


def _online(wandb: Any, settings: Any, config: dict[str, Any]) -> "tuple[wandb.Run | None, str]":
    """An online run, or why there is none."""
    try:
        # Looks for a key where wandb does, without the network and without a question: init would ask for a missing key
        # on a terminal, for ever.
        if not wandb.login(prompt=False, verify=False):
            return None, f"no API key for {wandb.setup().settings.base_url}; "
        return wandb.init(config=config, settings=settings), ""
    except Exception as error:
        with contextlib.suppress(SystemExit):  # teardown raises it when wandb-core ended badly
            wandb.teardown()  # the service keeps the id of the run that failed to start: "run ID is in use"
        return None, f"{one_line(error)}; "


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
