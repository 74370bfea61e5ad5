"""`tracker=wandb`: the run on its Weights & Biases page, or recorded in RUN_DIR/wandb for `wandb sync`.

It asks nothing, waits for a server no longer than it was told, and sends metrics, the config and hardware use: not the
command line, the environment, the source or git's state, where keys and private paths are found.
"""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fairexp.errors import PREEMPTED, UserError
from fairexp.runtime.track import one_line

if TYPE_CHECKING:
    import wandb

Mode = Literal["auto", "online", "offline", "disabled"]

# An axis of our own: wandb's counts its calls and drops a row that goes back, so a resumed run would tear the curve.
STEP = "trainer/step"


class Wandb:
    """One wandb run whose id is our run's, so a resumed run goes on in the same page.

    `mode: auto` does what the environment asks for: WANDB_MODE if it is set, else online where a key is found
    (WANDB_API_KEY, ~/.netrc, wandb's settings), else offline. Any other mode is taken as written, whatever WANDB_MODE
    says. What can't start online records offline. Offline, each attempt is a folder of its own, and a resumed one
    repeats the rows between the checkpoint and the kill.
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
        self._run = _start(wandb, chosen, settings, config)
        # Rows before this step are on the server already.
        self._sent = self._run.summary.get(STEP, 0) if self._run is not None and self._run.resumed and resumed else 0

    def log(self, record: Mapping[str, float], step: int) -> None:
        # A run that was killed repeats the steps after its checkpoint. The last one sent comes again: it may lack its
        # evaluation.
        if self._run is not None and step >= self._sent:
            self._run.log({STEP: step, **record})

    def finish(self, exit_code: int) -> None:
        if self._run is None:
            return
        if exit_code == PREEMPTED:
            self._run.mark_preempting()  # the page says "preempted" and not "failed"
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            raise RuntimeError(f"{_sync_later(self._run)} ({one_line(error)})") from error


def _start(wandb: Any, mode: str, settings: Any, config: dict[str, Any]) -> "wandb.Run | None":
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
        _say(f"wandb is off, the run and metrics.jsonl go on: {one_line(error)}")
        return None
    if settings.mode == "offline":
        _say(f"wandb: {why}recording offline; {_sync_later(run)}")
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


def _sync_later(run: "wandb.Run") -> str:
    return f"upload with: wandb sync --include-online {run.settings.sync_dir}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
