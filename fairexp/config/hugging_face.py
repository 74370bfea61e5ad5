"""Between a Transformer's arguments and the config.json of the Llama and GPT-2 models on Hugging Face; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairexp.errors import UserError

# a Transformer's argument -> the key of theirs that says the same
LLAMA = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "hidden": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "bias": "attention_bias",
    "tied": "tie_word_embeddings",
}
GPT2 = {
    "vocab_size": "vocab_size",
    "seq_len": "n_positions",
    "width": "n_embd",
    "depth": "n_layer",
    "num_heads": "n_head",
    "hidden": "n_inner",
    "norm_eps": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
}
# what they leave out where it has this value
LLAMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
GPT2_DEFAULTS = {
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
LLAMA_KIND = {"positions": "rope", "norm": "rms", "mlp": "swiglu"}
GPT2_KIND = {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True}
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The Transformer's arguments that give the model of this config.json; what doesn't follow from it isn't there.
    UserError: fairexp's Transformer can't be that model."""
    kind = config.get("model_type")
    if kind == "llama":
        return _llama(LLAMA_DEFAULTS | dict(config))
    if kind == "gpt2":
        return _gpt2(GPT2_DEFAULTS | dict(config))
    raise UserError(f"model_type {kind!r}; fairexp's Transformer reads llama and gpt2")


def _llama(config: dict[str, Any]) -> dict[str, Any]:
    heads = config.get("num_attention_heads")
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    turns = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turns = {"rope_theta": config.get("rope_theta", 10_000.0), **turns}
    rope_type = turns.get("rope_type", turns.get("type", "default"))
    _refuse(rope_type not in ("default", "llama3"), "rope_type", rope_type, "default, llama3")
    _refuse(config["hidden_act"] != "silu", "hidden_act", config["hidden_act"], "silu")
    _refuse(config["mlp_bias"] != config["attention_bias"], "mlp_bias", config["mlp_bias"], "what attention_bias is")
    head_dim = config.get("head_dim")
    wide = heads and head_dim and head_dim * heads != config.get("hidden_size")
    _refuse(bool(wide), "head_dim", head_dim, "hidden_size / num_attention_heads")
    scaling = {key: turns.get(key) for key in ROPE_SCALING} if rope_type == "llama3" else None
    return LLAMA_KIND | _ours(config, LLAMA) | {"rope_theta": turns["rope_theta"], "rope_scaling": scaling}


def _gpt2(config: dict[str, Any]) -> dict[str, Any]:
    config["n_inner"] = config.get("n_inner") or 4 * config.get("n_embd", 0)
    act = config["activation_function"]
    _refuse(act not in ("gelu_new", "gelu_pytorch_tanh"), "activation_function", act, "gelu_new")
    _refuse(not config["scale_attn_weights"], "scale_attn_weights", False, "true")
    _refuse(config["scale_attn_by_inverse_layer_idx"], "scale_attn_by_inverse_layer_idx", True, "false")
    return GPT2_KIND | _ours(config, GPT2) | {"num_kv_heads": config.get("n_head")}


def _ours(config: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    if missing := [theirs for theirs in keys.values() if theirs not in config]:
        raise UserError(f"lacks {', '.join(missing)}")
    return {ours: config[theirs] for ours, theirs in keys.items()}


def _refuse(wrong: bool, key: str, value: Any, takes: str) -> None:
    if wrong:
        raise UserError(f"{key} is {value!r}; fairexp's Transformer has {takes}")


def config_json(given: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that transformers reads, from a Transformer's arguments. UserError: it has no model like that."""
    arguments: dict[str, Any] = {
        "positions": "rope",
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "norm": "rms",
        "norm_eps": 1e-5,
        "mlp": "swiglu",
        "bias": False,
        "tied": False,
        "dropout": 0.0,
    } | dict(given)
    if all(arguments[key] == value for key, value in LLAMA_KIND.items()):
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{theirs: arguments[ours] for ours, theirs in LLAMA.items()},
            "mlp_bias": arguments["bias"],
            "hidden_act": "silu",
            "max_position_embeddings": arguments["seq_len"],
            # as transformers 4 wrote them, which 5 reads too
            "rope_theta": arguments["rope_theta"],
            "rope_scaling": {"rope_type": "llama3", **arguments["rope_scaling"]} if arguments["rope_scaling"] else None,
            "bos_token_id": None,
            "eos_token_id": None,
            "dtype": "float32",
        }
    same_heads = arguments["num_kv_heads"] == arguments["num_heads"]
    if same_heads and all(arguments[key] == value for key, value in GPT2_KIND.items()):
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            **{theirs: arguments[ours] for ours, theirs in GPT2.items()},
            "activation_function": "gelu_new",
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), arguments["dropout"]),
            "bos_token_id": None,
            "eos_token_id": None,
            "dtype": "float32",
        }
    kinds = (f"{name}'s: {', '.join(f'{k}={v}' for k, v in kind.items())}" for name, kind in KINDS.items())
    raise UserError(f"transformers has no model of these options; it has {'; '.join(kinds)}")


KINDS: dict[str, dict[str, Any]] = {"Llama": LLAMA_KIND, "GPT-2": GPT2_KIND | {"num_kv_heads": "num_heads"}}


def differences(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The Transformer's arguments that differ from what a config.json asks for, each with the value that it asks for."""
    wanted = options(config)
    return {key: value for key, value in wanted.items() if key not in arguments or not _same(arguments[key], value)}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {key: a.get(key) for key in ROPE_SCALING} == {key: b.get(key) for key in ROPE_SCALING}
    return a == b
