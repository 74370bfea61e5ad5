"""Memory that a step gives back is there for the next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, torch
from fairexp.runtime import heap
torch.set_num_threads(1)
heap.keep()
def step():
    kept = [torch.ones(1 << 20) for _ in range(4)]  # 4 MiB each, all given back at once
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


def faults(**environment: str) -> int:
    """Page faults of such a step, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", FAULTS], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in str(os.confstr("CS_GNU_LIBC_VERSION")), reason="glibc's"
)
def test_a_steps_memory_is_not_asked_for_anew_unless_the_user_says_so() -> None:
    pages = 4 * (4 << 20) // 4096
    assert faults() < pages // 20
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > pages // 2


def test_a_rank_begins_with_it(tmp_path: Path) -> None:
    words = ["train", "model=mlp", "trainer.max_steps=1", "launcher=inline", "tracker=none", f"runs_dir={tmp_path}"]
    code = f"""
from fairexp import cli
from fairexp.runtime import heap
heap.keep = lambda: print("kept")
raise SystemExit(cli.main({words}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kept\n")
