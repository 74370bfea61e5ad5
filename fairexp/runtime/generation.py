"""Continues text with a run's language model, on one process, whatever strategy wrote the checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairexp.config.manifest import Damaged
from fairexp.config.rundir import RunDir
from fairexp.errors import RunError, UserError
from fairexp.runtime import build, checkpoint, dist
from fairexp.runtime.evaluation import SINGLE
from fairexp.runtime.make import trust
from fairexp.runtime.preempt import Stop


def continuation(
    run_dir: RunDir,
    config: Mapping[str, Any],
    folder: Path,
    trusted: Sequence[str],
    prompt: Sequence[int],
    count: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[int]:
    """`count` tokens that follow the prompt, one by one, from the checkpoint in `folder`."""
    trust(trusted)
    here = dist.place(config["trainer"]["device"])
    try:
        run = build.build(run_dir, {**config, "strategy": SINGLE}, here, Stop())
        checkpoint.load(run, folder)
    except (RunError, Damaged) as error:
        raise UserError(str(error)) from error
    limit = getattr(run.module, "max_tokens", None)
    if limit is not None and len(prompt) + count - 1 > limit:
        most = max(limit - len(prompt) + 1, 0)
        raise UserError(
            f"--tokens {count}: this model reads {limit} tokens at once, so {most} can follow on this prompt"
        )
    run.module.eval()
    generator = torch.Generator().manual_seed(seed)
    with run.ema.applied() if run.ema else nullcontext():
        for token in sample(run.module, prompt, here.device, temperature, top_k, generator):
            yield token
            count -= 1
            if not count:
                return


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt: Sequence[int],
    device: torch.device,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
) -> Iterator[int]:
    """Tokens without end, each drawn from the model's distribution after all before it.

    `temperature` divides the logits, 0 takes the likeliest; of the rest only the `top_k` likeliest can be drawn. A model whose
    forward has `cache` reads each token once; another reads the whole text for each.
    """
    caches: dict[str, Any] = {"cache": []} if "cache" in inspect.signature(model.forward).parameters else {}
    tokens = torch.tensor([list(prompt)], device=device)
    while True:
        output = model(tokens, **caches)
        logits = (output if isinstance(output, Tensor) else output.logits)[0, -1].float().cpu()
        token = draw(logits, temperature, top_k, generator)
        yield token
        new = torch.tensor([[token]], device=device)
        tokens = new if caches else torch.cat([tokens, new], dim=1)


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from the logits of a vocabulary."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
