"""Models of other libraries by their names there, built so that a config, or a folder of weights, can't make them run code or
reach the network. What comes back is the library's own model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

# settings by which transformers fetches and runs code from elsewhere (attention may be a "kernel" on the hub)
RUNS_CODE = ("auto_map", "trust_remote_code", "attn_implementation", "experts_implementation", "quantization_config")
FETCHES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def causal_lm(
    model_type: str | None = None,
    config: Mapping[str, Any] | None = None,
    weights: str | None = None,
    attention: Literal["sdpa", "eager"] = "sdpa",
) -> nn.Module:
    """A causal language model of Hugging Face's transformers, in float32: `model(tokens).logits` (batch, tokens, vocabulary).

    `model_type` (llama, gpt2, qwen3, ...) with the settings in `config`, newly drawn; or `weights`, a folder with config.json
    and safetensors, with `config` in place of what its config.json says. Every rank makes all of it before it is sharded.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(f"model=transformers: pip install 'fairexp[transformers]' ({error})") from error
    settings = dict(config or {})
    if wrong := [key for key in _keys(settings) if key in RUNS_CODE or key.startswith("_")]:
        raise ValueError(f"model.config: {wrong[0]!r} is none of a model's sizes and can run code; leave it out")
    if (model_type is None) == (weights is None):
        raise ValueError("model: takes a model_type with its config, or a folder of weights")
    settings["use_cache"] = False  # of keys and values: training would keep them for nothing
    safe: dict[str, Any] = {"trust_remote_code": False, "attn_implementation": attention, "dtype": torch.float32}
    if model_type is not None:
        made = AutoConfig.for_model(model_type, **settings)
        model = AutoModelForCausalLM.from_config(made, **safe)
    else:
        folder = Path(str(weights)).expanduser().absolute()
        if not (folder / "config.json").is_file():  # else transformers takes it for a name on the hub
            raise ValueError(f"model.weights: {folder} holds no config.json")
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, **safe, **settings
        )
    model.register_forward_pre_hook(_refuse_documents, with_kwargs=True)
    return model


def _refuse_documents(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # it would be swallowed among **kwargs
    if "documents" in kwargs:
        raise ValueError(
            "transformers' models don't keep documents of a row apart; use fairexp's, or data without them"
        )


def _keys(settings: Mapping[str, Any]) -> Iterable[str]:
    for key, value in settings.items():
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value)


def timm_model(name: str, num_classes: int, options: Mapping[str, Any] | None = None) -> nn.Module:
    """An image model of timm, newly drawn: images (batch, channels, height, width) -> logits (batch, num_classes).
    `options`: what the model takes, such as img_size and in_chans."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"model=timm: pip install 'fairexp[timm]' ({error})") from error
    if wrong := [key for key in options or {} if key in FETCHES]:
        raise ValueError(f"model.options: {wrong[0]!r} reads weights from elsewhere; leave it out")
    if not timm.is_model(name):  # nor is a name on a hub one
        raise ValueError(f"model.name: timm has no {name!r}; timm.list_models() lists what it has")
    return timm.create_model(name, pretrained=False, num_classes=num_classes, **(options or {}))
