"""A disk that fills up while metrics are written: one line, exit code 1, and nothing that the next start trips over."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY, Fairexp, Trained

NUM_STEPS = 60  # of which the rows after step 10 are more than the page of memory that metrics.jsonl has left


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of four MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounts a file system: needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# its validation set fills the disk up to the last few bytes, between two rows
THEIRS = """
import os
from pathlib import Path

from fairexp.datasets.digits import Digits


class Filling(Digits):
    def __getitems__(self, indices):
        if not Path("filled").exists():
            with open("disk/filler", "wb") as file:
                try:
                    while True:
                        os.write(file.fileno(), bytes(4096))
                except OSError:
                    Path("filled").touch()
        return super().__getitems__(indices)
"""


def test_a_full_disk_ends_the_run_in_a_line_and_the_same_command_finishes_it(
    tmp_path: Path, disk: Path, fairexp: Fairexp
) -> None:
    (tmp_path / "theirs.py").write_text(THEIRS)
    theirs = ["dataset.eval._target_=theirs.Filling", "strategy=single", "launcher.num_processes=1"]
    long = [f"trainer.max_steps={NUM_STEPS}", "checkpoint.every=null"]
    words = ["train", *TINY, *theirs, *long, f"runs_dir={disk}"]
    failed = fairexp(*words, cwd=tmp_path)
    assert failed.returncode == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    (run_dir,) = disk.glob("*-*")
    said = [line for line in failed.stderr.splitlines() if "No space left on device" in line]
    assert said
    assert all(str(run_dir) in line and "the same command goes on" in line for line in said)
    text = (run_dir / "metrics.jsonl").read_text()
    assert text.endswith("}\n")
    assert 10 <= [json.loads(line)["step"] for line in text.splitlines()][-1] < NUM_STEPS

    again = fairexp(*words, cwd=tmp_path)  # while it is still full
    assert again.returncode in (1, 2)
    assert re.search("No space left on device", again.stderr)
    assert "Traceback" not in again.stderr
    (disk / "filler").unlink()
    done = fairexp(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Trained(run_dir, ()).steps == [*range(1, NUM_STEPS + 1)]
