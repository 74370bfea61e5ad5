"""experiment=lm_text on its corpus, made ready as docs/text.md says: the corpus is the documented one, and the losses begin as
those of the whole run do (tests/golden/lm_text.txt: train/loss by step; evaluations in bits per byte)."""

import json
from pathlib import Path

import pytest
from conftest import Fairexp
from test_processes import REPO, Command

TEXT = REPO / "data/usr/share/dictd/gcide.dict.dz"
GOLDEN = Path(__file__).parent / "golden" / "lm_text.txt"
STEPS = 20  # the kernels of another CPU change the loss by 1e-6 of it after 20 steps, and by 1e-3 after 40
PREP = ("--encoding", "cp1252", "--split-on", r"\n\n+(?=\S)", "--valid", "0.02", "--tokenizer", "bpe:4096")


@pytest.mark.skipif(not TEXT.exists(), reason=f"needs {TEXT.relative_to(REPO)}: docs/text.md, dataset=gcide")
def test_a_language_model_on_real_text_begins_with_the_committed_losses(fairexp: Fairexp, tmp_path: Path) -> None:
    made = fairexp("prep", str(TEXT), *PREP, "--out", str(tmp_path / "gcide"))
    assert made.returncode == 0, made.stderr
    meta = json.loads((tmp_path / "gcide" / "meta.json").read_text())
    found = {split: (facts["documents"], facts["tokens"], facts["bytes"]) for split, facts in meta["splits"].items()}
    assert found == {"train": (123_849, 12_809_841, 38_945_192), "valid": (2_451, 249_135, 754_445)}
    words = ("experiment=lm_text", f"dataset.root={tmp_path / 'gcide'}", "tracker=none", "trainer.device=cpu")
    command = Command(tmp_path, *words, "launcher.num_processes=2", "launcher.threads_per_process=1")
    try:
        command.until(lambda: command.process.poll() is not None or command.trained(STEPS), timeout=200)
        assert command.process.poll() is None, command.seen
        rows = [json.loads(line) for line in (command.run_dir / "metrics.jsonl").read_text().splitlines()]
    finally:
        command.close()
    golden = [line.split() for line in GOLDEN.read_text().splitlines() if not line.startswith("eval")]
    losses = {int(step): float(loss) for step, loss in golden}
    first = {row["step"]: row["train/loss"] for row in rows[:1]}
    assert first == pytest.approx({STEPS: losses[STEPS]}, rel=1e-5)
