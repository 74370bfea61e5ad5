"""Models of transformers and timm: they train as ours do, and a config can't make the libraries run code."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STRATEGIES, TINY, Fairexp, Trained

from fairexp.models.libraries import causal_lm, timm_model

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEXT = (
    "model=transformers",
    *(f"model.config.{key}={value}" for key, value in SIZES.items() if key != "vocab_size"),
    "+model.config.tie_word_embeddings=true",
    "task=next_token",
    "dataset=synthetic_tokens",
    "dataset.vocab_size=61",
    "dataset.seq_len=16",
    "dataset.train.num_samples=84",
    "dataset.eval.num_samples=9",
    "trainer.max_steps=4",
)


@pytest.fixture(scope="session", autouse=True)
def needs_transformers() -> None:
    pytest.importorskip("transformers", reason="needs pip install 'fairexp[transformers]'")


def test_a_language_model_of_transformers_trains_alike_under_fsdp(fairexp: Fairexp, tmp_path: Path) -> None:
    def run(strategy: str) -> Trained:
        runs_dir = tmp_path / strategy
        words = [word for word in TINY if not word.startswith("model")]
        ended = fairexp("train", *words, *STRATEGIES[strategy], *TEXT, f"runs_dir={runs_dir}")
        assert ended.returncode == 0, ended.stderr
        return Trained(next(runs_dir.glob("*-*")), ())

    single, sharded = run("single"), run("fsdp2")
    assert single.losses[4] < single.losses[1]
    assert sharded.losses == pytest.approx(single.losses, rel=1e-5)
    assert sharded.evals[4] == pytest.approx(single.evals[4], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"config": SIZES | {"auto_map": {"AutoModelForCausalLM": "evil--evil.Evil"}}},
            "model.config: 'auto_map' is none",
        ),
        ({"config": SIZES | {"attn_implementation": "someone/kernel"}}, "model.config: 'attn_implementation' is none"),
        (
            {"config": SIZES | {"_attn_implementation": "someone/kernel"}},
            "model.config: '_attn_implementation' is none",
        ),
        ({"config": SIZES, "weights": "folder"}, "takes a model_type with its config, or a folder of weights"),
        ({"model_type": None, "weights": "no/folder"}, "no/folder holds no config.json"),
    ],
)
def test_what_could_run_code_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        causal_lm(**{"model_type": "llama"} | arguments)


def test_a_folder_of_weights_is_loaded_and_its_code_and_pickles_are_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = causal_lm("llama", SIZES).eval()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    loaded = causal_lm(weights=str(tmp_path)).eval()
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="don't keep documents of a row apart"):
        loaded(tokens, documents=torch.zeros(1, 12))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        causal_lm(weights=str(tmp_path))


def test_an_image_model_of_timm_classifies() -> None:
    pytest.importorskip("timm", reason="needs pip install 'fairexp[timm]', which brings torchvision")
    model = timm_model("vit_tiny_patch16_224", 10, {"img_size": 32, "in_chans": 1})
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="timm has no 'hf-hub:someone/model'"):
        timm_model("hf-hub:someone/model", 10)
    with pytest.raises(ValueError, match="'checkpoint_path' reads weights from elsewhere"):
        timm_model("resnet18", 10, {"checkpoint_path": "weights.pth"})
