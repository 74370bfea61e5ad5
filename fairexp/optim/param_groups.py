"""Which parameters get which learning rate and weight decay: the groups that the run hands to its optimizer."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# fairexp's and timm's ViTs, Llama, Hugging Face's BERT and ViT, T5, GPT-2
BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers|layer|block|h)\.(\d+)\.")


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    rules: Sequence[Mapping[str, Any]] = (),
    layer_decay: float | None = None,
    split_decay: bool = True,
) -> list[dict[str, Any]]:
    """Optimizer groups: `params`, their `param_names` (as torch calls them), and what differs from the optimizer's settings.

    `split_decay`: parameters of fewer than 2 dimensions (biases, norms) get no weight decay, whatever a rule says. That is
    the number of dimensions alone: a ViT's positions and class token have 3 and decay. A parameter that FSDP sharded still
    answers with its global number. `rules`: `{"match": glob or globs on the names, "lr": ...}`, of which the first that
    matches a parameter gives it its other keys. `layer_decay`: groups get an `lr_scale`, see `layer_scales`.

    The first group is that of the matrices with no rule nearest to the output, so its learning rate is the one to log.
    Frozen parameters are left out, and so is an empty group. ValueError: a rule matches nothing, or there are no blocks.
    """
    trainable = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    rule_of = _rule_of(list(trainable), rules)
    scales = layer_scales(list(trainable), layer_decay) if layer_decay is not None else {}
    groups: dict[tuple[int, float, bool], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        number, scale = rule_of.get(name, -1), scales.get(name, 1.0)
        undecayed = split_decay and parameter.ndim < 2
        group = groups.setdefault((number, -scale, undecayed), {"params": [], "param_names": []})
        group["params"].append(parameter)
        group["param_names"].append(name)
    for (number, scale, undecayed), group in groups.items():
        group |= {key: value for key, value in rules[number].items() if key != "match"} if number >= 0 else {}
        group |= {"weight_decay": 0.0} if undecayed else {}
        group |= {"lr_scale": -scale} if scales else {}
    return [groups[key] for key in sorted(groups)]


def layer_scales(names: Sequence[str], decay: float) -> dict[str, float]:
    """A factor on each parameter's learning rate: `decay` to the number of layers above it (Bao et al. 2022,
    arXiv:2106.08254; He et al. 2022, arXiv:2111.06377), as fine-tuned transformers have it.

    The blocks are numbered in the names (`blocks.N.`, `layers.N.`, `layer.N.`, `block.N.`, `h.N.`); with D of them, block N has
    decay^(D - N). What stands in front of the first of them (patch embedding, class token, positions) has decay^(D + 1),
    what follows the last (final norm, head) has 1. ValueError: no name has such a number.
    """
    numbers = [int(match[1]) if (match := BLOCK.search(name)) else None for name in names]
    blocks = [number for number in numbers if number is not None]
    if not blocks:
        first = ", ".join(names[:5])
        raise ValueError(
            f"layer_decay: no parameter's name has blocks.N, layers.N, layer.N, block.N or h.N in it: {first} ..."
        )
    depth, begins = max(blocks) + 1, numbers.index(blocks[0])
    # embeddings are layer 0, block N is layer N + 1, the head is layer depth + 1
    layers = [(0 if i < begins else depth + 1) if number is None else number + 1 for i, number in enumerate(numbers)]
    return {name: decay ** (depth + 1 - layer) for name, layer in zip(names, layers, strict=True)}


def _rule_of(names: Sequence[str], rules: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The number of the first rule that matches each name. ValueError: a pattern matches none."""
    rule_of: dict[str, int] = {}
    for number, rule in enumerate(rules):
        patterns = [rule["match"]] if isinstance(rule["match"], str) else rule["match"]
        for pattern in patterns:
            matched = [name for name in names if fnmatchcase(name, pattern)]
            if not matched:
                close = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.3) or names[:5]
                raise ValueError(
                    f"groups.{number}.match: no trainable parameter is named {pattern!r}; nearest: {', '.join(close)}"
                )
            for name in matched:
                rule_of.setdefault(name, number)
        if number not in rule_of.values():
            raise ValueError(f"groups.{number}.match: what it names belongs to groups that stand before it")
    return rule_of
