"""The verb `generate`: text from a run's language model, in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fairexp.config.rundir import RunDir
from fairexp.errors import UserError
from fairexp.launch.evaluate import chosen, prepared
from fairexp.prep.tokenizer import of_shards


def generate(
    run_dir: RunDir,
    prompt: str,
    count: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    step: str | None,
    trusted: Sequence[str],
    as_json: bool,
) -> int:
    """Prints the prompt and what the last checkpoint, or `step`'s, makes of it; it ends where the model ends the document."""
    number, folder = chosen(run_dir, step)
    config = run_dir.config()
    root = config["dataset"].get("root")
    if config["dataset"].get("vocab_size") is None or root is None:
        raise UserError(
            f"{run_dir.path.name}: dataset.root has no tokenizer: it isn't a language model on token shards"
        )
    launch = prepared(run_dir, trusted)
    tokenizer = of_shards(Path(root).expanduser())
    try:
        (start,) = tokenizer.encode([prompt.encode()])
    except UnicodeEncodeError:
        raise UserError("--prompt: is not UTF-8") from None
    from fairexp.runtime.generation import continuation

    # a document begins after another's end
    before = [tokenizer.end, *start.tolist()]
    tokens = continuation(run_dir, config, folder, launch["trusted"], before, count, temperature, top_k, seed)
    text, new = "", []
    for token in tokens:
        if token == tokenizer.end:
            break
        new.append(token)
        whole = tokenizer.decode(before[1:] + new)
        if not as_json and not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # half a letter
            print(whole[len(text) :], end="", flush=True)
            text = whole
    whole = tokenizer.decode(before[1:] + new)
    if as_json:
        print(
            json.dumps(
                {"run_dir": str(run_dir.path), "id": run_dir.id, "step": number, "text": whole, "tokens": len(new)}
            )
        )
    else:
        print(whole[len(text) :])
    return 0
