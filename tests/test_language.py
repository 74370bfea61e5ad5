"""Language models from text to generated text: the same losses on any strategy though ranks have unequal numbers of counted
tokens, the same bits after an interruption.
"""

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from conftest import STRATEGIES, Fairexp, Trained, interrupted

WORDS = ("model=transformer", "model.width=32", "model.depth=2", "model.hidden=48", "task=next_token")
SHORT = (
    "trainer.max_steps=12",
    "trainer.max_epochs=null",
    "trainer.global_batch_size=12",
    "trainer.log_every=1",
    "trainer.eval_every=6",
    "trainer.device=cpu",
    "checkpoint.every=10",
    "checkpoint.keep_last=3",
    "launcher.threads_per_process=1",
    "tracker=none",
)
# documents of 3 to 60 tokens in rows of 40: the ranks' parts of a batch have other numbers of targets
DATA = ("dataset=tokens", "dataset.vocab_size=257", "dataset.seq_len=40", "+dataset.train.pack=documents")


@pytest.fixture(scope="module")
def shards(fairexp: Fairexp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    chance = random.Random(0)
    lines = [" ".join(chance.choices(("so", "many", "words", "é"), k=chance.randint(1, 12))) for _ in range(300)]
    (folder / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    done = fairexp(
        "prep", str(folder / "lines.txt"), "--split-on", "\n", "--valid", "0.1", "--out", str(folder / "shards")
    )
    assert done.returncode == 0, done.stderr
    return folder / "shards"


def train(fairexp: Fairexp, shards: Path, runs_dir: Path, *words: str) -> Trained:
    command = ("train", *WORDS, *SHORT, *DATA, f"dataset.root={shards}", *words)
    done = fairexp(*command, f"runs_dir={runs_dir}")
    assert done.returncode == 0, done.stderr
    return Trained(next(runs_dir.glob("*-*")), command)


@pytest.fixture(scope="module")
def single(fairexp: Fairexp, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(fairexp, shards, tmp_path_factory.mktemp("single"), *STRATEGIES["single"])


@pytest.fixture(scope="module")
def trained(
    single: Trained, fairexp: Fairexp, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trained]:
    """The run under that strategy, made once."""

    @cache
    def run(strategy: str) -> Trained:
        if strategy == "single":
            return single
        return train(fairexp, shards, tmp_path_factory.mktemp(strategy), *STRATEGIES[strategy], *MORE[strategy])

    return run


MORE: dict[str, tuple[str, ...]] = {
    "ddp2": ("trainer.micro_batch_size=2", "task.chunk=16"),
    "fsdp2": ("trainer.micro_batch_size=3",),
    "hybrid": (),
    "tp2": (),
    "tp2x2": ("trainer.micro_batch_size=2",),
}


@pytest.mark.parametrize("strategy", MORE)
def test_every_strategy_averages_over_the_global_batchs_tokens(
    single: Trained, trained: Callable[[str], Trained], strategy: str
) -> None:
    run = trained(strategy)
    assert run.losses == pytest.approx(single.losses, rel=1e-5)
    assert run.norms == pytest.approx(single.norms, rel=1e-4)
    assert run.evals.keys() == single.evals.keys() == {6, 12}
    for step, metrics in run.evals.items():
        assert metrics.keys() == {"eval/loss", "eval/bits_per_byte", "eval/perplexity"}
        assert metrics == pytest.approx(single.evals[step], rel=1e-4)


@pytest.mark.parametrize("strategy", ["single", *MORE])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    trained: Callable[[str], Trained], fairexp: Fairexp, tmp_path: Path, strategy: str
) -> None:
    whole = trained(strategy)
    copy = interrupted(whole, tmp_path)
    done = fairexp(*whole.command, f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "steps 10 -> 12 (resumed)" in done.stderr
    run = Trained(copy, whole.command)
    assert run.losses == whole.losses
    assert run.norms == whole.norms
    assert run.evals == whole.evals


def test_other_data_under_a_checkpoint_is_an_error_that_says_what_changed(
    single: Trained, fairexp: Fairexp, shards: Path, tmp_path: Path
) -> None:
    copy = interrupted(single, tmp_path)
    before = shards.with_name("before")
    shards.rename(before)
    try:
        text = before.with_name("lines.txt").read_text(encoding="utf-8").replace("many", "more")
        (tmp_path / "lines.txt").write_text(text, encoding="utf-8")
        words = (str(tmp_path / "lines.txt"), "--split-on", "\n", "--valid", "0.1", "--out", str(shards))
        assert fairexp("prep", *words).returncode == 0
        done = fairexp(*single.command, f"runs_dir={tmp_path}")
        assert done.returncode == 1
        assert "not the data that step_00000010 was trained on: content was " in done.stderr
        assert (copy / "checkpoints/step_00000010").is_dir()
    finally:
        shutil.rmtree(shards)
        before.rename(shards)


def test_a_run_generates_text(single: Trained, fairexp: Fairexp) -> None:
    words = ("generate", str(single.path), "--prompt", "so é", "--tokens", "30")
    text = fairexp(*words)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("so é")
    value = json.loads(fairexp(*words, "--json").stdout)
    assert value["text"] + "\n" == text.stdout
    assert value["step"] == 12
    assert 0 < value["tokens"] <= 30
    other = fairexp(*words, "--seed", "1")
    assert other.stdout != text.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tokens", "0"), "--tokens: takes a number >= 1, got 0"),
        (("--temperature", "hot"), "--temperature: takes a number >= 0, got hot"),
        (("--step", "7"), "--step 7: no such checkpoint; there are: 10, 12"),
        (("--prompt", "\udcff"), "--prompt: is not UTF-8"),
    ],
)
def test_what_generate_cannot_do_is_one_line(
    single: Trained, fairexp: Fairexp, words: tuple[str, str], said: str
) -> None:
    done = fairexp("generate", str(single.path), *words)
    assert (done.returncode, done.stderr) == (2, f"fairexp: {said}\n")


def test_a_model_with_learned_positions_says_how_many_tokens_can_follow(
    fairexp: Fairexp, shards: Path, tmp_path: Path
) -> None:
    learned = ("model.positions=learned", "trainer.max_steps=1", *STRATEGIES["single"])
    run = train(fairexp, shards, tmp_path, *learned)
    done = fairexp("generate", str(run.path), "--prompt", "so", "--tokens", "39")
    said = "fairexp: --tokens 39: this model reads 40 tokens at once, so 38 can follow on this prompt\n"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(said)
    assert fairexp("generate", str(run.path), "--prompt", "so", "--tokens", "38").returncode == 0


def test_a_run_of_images_writes_no_text(fairexp: Fairexp, tmp_path: Path) -> None:
    words = ("model=mlp", "model.hidden=[8]", "trainer.max_steps=1", "trainer.max_epochs=null", "tracker=none")
    assert fairexp("train", *words, f"runs_dir={tmp_path}", "launcher=inline").returncode == 0
    done = fairexp("generate", str(next(tmp_path.glob("*-*"))))
    assert done.returncode == 2
    assert "isn't a language model on token shards" in done.stderr
