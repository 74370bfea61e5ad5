"""Llama and GPT-2 checkpoints of Hugging Face: what transformers computes, fairexp's Transformer computes, in both directions."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import TINY, Fairexp, Tiny, Trained
from torch import Tensor, nn

from fairexp import cli
from fairexp.config import hugging_face
from fairexp.errors import RunError, UserError
from fairexp.models.transformer import Transformer
from fairexp.runtime import init
from fairexp.runtime.export import write
from fairexp.runtime.make import make
from fairexp.runtime.pretrained import INDEX

transformers = pytest.importorskip("transformers", reason="needs pip install 'fairexp[transformers]'")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

VOCAB, LENGTH = 61, 48
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
}
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama_tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama3": lambda: transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, **SCALED}
    ),
    "llama_biased": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    ),
}
every_model = pytest.mark.parametrize("kind", MODELS)
# runs of two steps on text
TEXT = (
    "model=transformer",
    "model.width=32",
    "model.depth=2",
    "model.num_heads=4",
    "model.hidden=40",
    "task=next_token",
    "dataset=synthetic_tokens",
    f"dataset.vocab_size={VOCAB}",
    f"dataset.seq_len={LENGTH}",
    "dataset.train.num_samples=84",
    "dataset.eval.num_samples=9",
    "trainer.max_steps=2",
    "trainer.ema_decay=0.5",
)
SCALING = f"{{{', '.join(f'{key}: {value}' for key, value in SCALED.items())}}}"
RUNS = {
    "llama": ("model.tied=false", "model.rope_theta=5e5", f"model.rope_scaling={SCALING}"),
    "gpt2": (
        "model.positions=learned",
        "model.num_kv_heads=4",
        "model.norm=layer",
        "model.mlp=gelu",
        "model.bias=true",
        "optimizer.lr=0.1",  # biases start at 0
    ),
}


def theirs(kind: str) -> Any:
    """A model of theirs with weights so large that each matters, in float32."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[kind]()).float().eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name or "ln_" in name), std=0.1)
    return model


def started(folder: Path, **more: Any) -> Transformer:
    """A model of ours as a run makes it from their folder."""
    arguments = hugging_face.options(json.loads((folder / "config.json").read_text())) | {"seq_len": LENGTH} | more
    model = init.construct(lambda: Transformer(**arguments, weights=str(folder)), Transformer, 0)
    init.materialize(model, torch.device("cpu"), 0)
    assert isinstance(model, Transformer)
    return model.eval()


def text() -> Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@every_model
@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
@torch.no_grad()
def test_their_checkpoint_gives_their_logits(kind: str, max_shard_size: str, tmp_path: Path) -> None:
    model = theirs(kind)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "8KB")
    logits = model(text()).logits
    assert logits.std() > 0.3
    torch.testing.assert_close(started(tmp_path)(text()), logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_checkpoint_without_its_head_s_prefix_is_read_too(tmp_path: Path) -> None:
    model = theirs("gpt2")
    model.transformer.save_pretrained(tmp_path)  # as OpenAI's GPT-2 is on the hub: wte.weight, h.0...
    torch.testing.assert_close(started(tmp_path)(text()), model(text()).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def their_loss(model: Any, run: Trained) -> float:
    """The mean loss of their model on the run's evaluation set."""
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    batch = make(config["dataset"]["eval"]).__getitems__(torch.arange(9))
    return F.cross_entropy(model(batch["tokens"]).logits.flatten(0, 1), batch["targets"].flatten()).item()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_run_is_exported_and_transformers_evaluates_it_alike(
    tiny: Tiny, fairexp: Fairexp, tmp_path: Path, kind: str
) -> None:
    run = tiny("single", *TEXT, *RUNS[kind])
    ended = fairexp("export", str(run.path), str(tmp_path / "whole"))
    assert ended.returncode == 0, ended.stderr
    assert "step 2: averaged weights, " in ended.stderr
    config = yaml.safe_load((run.path / "config.yaml").read_text())["model"]
    write(config, hugging_face.config_json(config), run.path / "checkpoints/step_00000002", tmp_path, most_bytes=9_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    for folder in tmp_path / "whole", tmp_path:
        assert hugging_face.differences(config, json.loads((folder / "config.json").read_text())) == {}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert their_loss(model, run) == pytest.approx(run.evals[2]["eval/loss"], rel=1e-6)


def test_a_run_starts_from_a_checkpoint_each_rank_reading_its_own_part(
    fairexp: Fairexp, tiny: Tiny, tmp_path: Path
) -> None:
    model = theirs("llama3")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    words = ["train", *TINY, *TEXT, *RUNS["llama"], f"model.weights={tmp_path / 'theirs'}", "optimizer.lr=0.0"]
    words += ["strategy=fsdp_tp", "launcher.num_processes=2", f"runs_dir={tmp_path / 'runs'}"]
    ended = fairexp(*words)
    assert ended.returncode == 0, ended.stderr
    run = Trained(next((tmp_path / "runs").glob("*-*")), tuple(words))
    (tmp_path / "theirs").rename(tmp_path / "gone")
    evaluated = fairexp("eval", str(run.path), "--json")
    assert json.loads(evaluated.stdout)["metrics"] == pytest.approx(run.evals[2], rel=1e-5)
    assert run.evals[2]["eval/loss"] == pytest.approx(their_loss(model, run), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'; fairexp's Transformer reads llama and gpt2"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; fairexp's Transformer has default, llama3"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; fairexp's Transformer has silu"),
        ({"head_dim": 16}, "head_dim is 16; "),
        ({"mlp_bias": True}, "mlp_bias is True; "),
    ],
)
def test_a_model_that_ours_can_not_be_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        hugging_face.options(MODELS["llama"]().to_dict() | change)
    with pytest.raises(UserError, match="transformers has no model of these options; it has Llama's: positions=rope"):
        hugging_face.config_json(hugging_face.options(MODELS["llama"]().to_dict()) | {"norm": "layer"})


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path)
    for change, message in (
        (
            {"hidden": 39},
            "mlp.gate_proj.weight is [40, 32] there, and the model's blocks.0.mlp.gate.weight takes [39, 32]",
        ),
        ({"depth": 3}, "has no model.layers.2.input_layernorm.weight for the model's blocks.2.norm1.weight"),
        ({"depth": 1}, "has model.layers.1.input_layernorm.weight, for which the model has no place; "),
    ):
        with pytest.raises(RunError, match=re.escape(message)):
            started(tmp_path, **change)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RunError, match=f"^model.weights: {tmp_path}: "):
        started(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}')
    with pytest.raises(RunError, match=r"elsewhere\.safetensors', which is no file of this folder"):
        started(tmp_path)


def test_arguments_that_differ_from_the_checkpoint_s_config_are_named_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs("llama3").save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["train", *TINY, *TEXT, *RUNS["llama"], f"model.weights={tmp_path}"]
    assert cli.main([*words, "model.rope_theta=1e4", "model.hidden=41"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"fairexp: model.{key} (command line): {value}, but {tmp_path}/config.json says {there}"
        for key, value, there in (("hidden", 41, 40), ("rope_theta", 10000.0, 500000.0))
    ]
    (tmp_path / "model.safetensors").unlink()
    assert cli.main(words) == 2
    assert f"{tmp_path} holds no model.safetensors, nor an index of several" in capsys.readouterr().err


def test_an_export_that_finds_no_room_is_one_line_and_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    run = tiny("single", *TEXT, *RUNS["llama"])
    # a limit on the size of a file fails as a full disk does
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))"
    words = ["export", str(run.path), str(tmp_path / "a folder" / "theirs")]
    program = f"{limit}; import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from fairexp.cli import main"
    command = [sys.executable, "-c", f"import sys; {program}; sys.exit(main({words!r}))"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith(f"fairexp: export: {tmp_path}/a folder/theirs: ")
    assert ended.stderr.count("\n") == 1
    assert list((tmp_path / "a folder").iterdir()) == []
