"""Which rank of a run that stands still is at fault."""

from collections.abc import Sequence
from typing import Any

import pytest

from fairexp.launch.guilty import Fact, judge, place
from fairexp.launch.stacks import Frame, main_thread

TORCH = "/venv/lib/python3.11/site-packages/torch"
FIT = Frame("/fairexp/runtime/loop.py", 30, "fit")


def step(line: int) -> list[Frame]:
    return [Frame("/fairexp/runtime/loop.py", line, "train_step"), FIT]


IN_COLLECTIVE = [Frame(f"{TORCH}/distributed/distributed_c10d.py", 3252, "all_reduce")]
IN_MODEL = [Frame("/mine.py", 7, "forward"), Frame(f"{TORCH}/nn/modules/module.py", 1, "_call_impl")]
IN_DDP = [Frame(f"{TORCH}/nn/parallel/distributed.py", 1890, "forward")]
FORWARD = [*IN_COLLECTIVE, *IN_MODEL, *IN_DDP, *step(58)]
BACKWARD = [Frame(f"{TORCH}/autograd/graph.py", 979, "_engine_run_backward"), *step(61)]
COMPUTES = [*IN_MODEL, *IN_DDP, *step(58)]
WRITES = [
    Frame("/usr/lib/python3.11/pathlib.py", 1, "write"),
    Frame(f"{TORCH}/distributed/checkpoint/filesystem.py", 9, "write"),
    FIT,
]


def fact(rank: int, stack: Sequence[Frame], **more: Any) -> Fact:
    values = {"host": f"n{rank}", "step": 17, "phase": "step", "marks": 50, "since": 0.0, "state": "S", "busy": False}
    return Fact(rank=rank, stack=stack, **{**values, **more})


@pytest.mark.parametrize(
    ("facts", "rank", "words"),
    [
        ([fact(0, BACKWARD), fact(1, COMPUTES, state="T")], 1, "stopped by a signal"),
        ([fact(0, BACKWARD, state="D"), fact(1, BACKWARD)], 0, "stuck in the kernel"),
        ([fact(0, BACKWARD), fact(1, [FIT], phase="data")], 1, "its next batch doesn't come"),
        ([fact(0, COMPUTES, busy=True, state="R"), fact(1, BACKWARD)], 0, "it computes without an end"),
        ([fact(0, BACKWARD), fact(1, BACKWARD, busy=True, state="R")], 1, "it computes without an end"),
        ([fact(0, COMPUTES), fact(1, FORWARD)], 0, "it waits for something that isn't a collective"),
        ([fact(0, WRITES, phase="save"), fact(1, FORWARD, phase="save")], 0, "it waits for something"),
        # rank 1 went past the collective in the model that rank 0 waits in
        ([fact(0, FORWARD), fact(1, BACKWARD)], 1, "it missed a collective"),
        ([fact(0, BACKWARD), fact(1, BACKWARD, step=18, marks=53)], 1, "it missed a collective"),
        ([fact(0, BACKWARD), fact(1, FORWARD), fact(2, BACKWARD)], 1, "it missed a collective"),
        ([fact(0, FORWARD), fact(1, FORWARD)], 0, "all 2 ranks wait in the same collective"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_guilty(facts: list[Fact], rank: int, words: str) -> None:
    verdict = judge(facts)
    assert (verdict.rank, verdict.host) == (rank, f"n{rank}")
    assert words in verdict.line
    assert verdict.line.startswith(f"rank {rank} on n{rank} hangs in step ")


def test_the_users_line_is_the_place() -> None:
    assert place(FORWARD) == "/mine.py:7 in forward"
    assert place([]) == "a place that can't be seen"


def test_the_stack_of_the_thread_that_was_interrupted_is_read() -> None:
    text = """\
Thread 0x00007f (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

Current thread 0x00007f (most recent call first):
  File "/a folder/\\xe9t\\xe9.py", line 7 in forward
  File "/fairexp/runtime/loop.py", line 30 in fit
"""
    assert main_thread(text) == [Frame("/a folder/été.py", 7, "forward"), FIT]
