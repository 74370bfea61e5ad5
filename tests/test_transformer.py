"""The transformer for language: what attends to what, the loss in chunks, the cache, and what it costs."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fairexp.models.transformer import Attention, Rope, Transformer, rope, rotate
from fairexp.runtime import dist
from fairexp.runtime.dist import Place
from fairexp.runtime.strategies.fsdp import FSDP

torch.set_num_threads(1)

VOCAB, LENGTH = 61, 24
LLAMA: dict[str, Any] = {"num_kv_heads": 2, "hidden": 48}
GPT2: dict[str, Any] = {
    "num_kv_heads": 4,
    "hidden": 128,
    "positions": "learned",
    "norm": "layer",
    "mlp": "gelu",
    "bias": True,
    "tied": True,
}
KINDS = {"llama": LLAMA, "llama_tied": LLAMA | {"tied": True}, "gpt2": GPT2}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def built(options: dict[str, Any], **more: Any) -> Transformer:
    """A model as a run makes it: on the meta device, then each tensor filled by name; NaN where one is left alone."""
    with torch.device("meta"):
        model = Transformer(VOCAB, LENGTH, width=32, depth=2, num_heads=4, **options | more)
    model.to_empty(device="cpu")
    for number, (name, tensor) in enumerate(itertools.chain(model.named_parameters(), model.named_buffers())):
        nn.init.constant_(tensor, float("nan"))
        torch.manual_seed(number)
        model.init_tensor(name, tensor)
        if "norm" not in name:
            tensor.data.mul_(5)  # small weights would hide what attention does
    return model


def text(rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


@every_kind
def test_every_parameter_starts_and_learns_and_there_is_no_buffer(options: dict[str, Any]) -> None:
    model = built(options)
    logits = model(text())
    assert logits.shape == (2, LENGTH, VOCAB)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert not list(model.buffers())
    assert ("head.weight" in model.state_dict()) == (not options.get("tied", False))


def test_what_adds_to_the_stream_starts_smaller_with_depth() -> None:
    with torch.device("meta"):
        model = Transformer(VOCAB, LENGTH, 256, 8, 4, 2, 512)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        model.init_tensor(name, parameter)
    assert model.get_parameter("blocks.0.attn.q.weight").std().item() == pytest.approx(0.02, rel=0.02)
    for name in "attn.out", "mlp.down":
        assert model.get_parameter(f"blocks.7.{name}.weight").std().item() == pytest.approx(0.02 / 4, rel=0.02)


@every_kind
def test_a_position_depends_on_what_came_before_and_on_nothing_after(options: dict[str, Any]) -> None:
    model, tokens = built(options), text()
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax(-1).min() > 1e-4


@every_kind
def test_attention_does_not_cross_documents(options: dict[str, Any]) -> None:
    model, tokens = built(options), text()
    documents = torch.tensor([[0] * 7 + [1] * 12 + [2] * 5, [0] * LENGTH], dtype=torch.int32)
    masked = model(tokens, documents=documents)
    torch.testing.assert_close(masked[1], model(tokens)[1])  # one document: the causal mask
    torch.testing.assert_close(masked[0, :7], model(tokens[:1, :7])[0])
    changed = tokens.clone()
    changed[0, :7] = (changed[0, :7] + 1) % VOCAB
    assert torch.equal(model(changed, documents=documents)[0, 7:], masked[0, 7:])
    if options.get("positions") != "learned":  # rotary positions are relative: a document's place in the row is nothing
        torch.testing.assert_close(masked[0, 7:19], model(tokens[:1, 7:19])[0])


def test_grouped_heads_are_heads_with_repeated_keys_and_values() -> None:
    torch.manual_seed(0)
    grouped, full = Attention(32, 4, 2, False, 0.0), Attention(32, 4, 4, False, 0.0)
    weights = grouped.state_dict()
    for name in "k.weight", "v.weight":
        weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    x, turns = torch.randn(2, 9, 32), rope(torch.arange(9), 8, 10_000.0)
    torch.testing.assert_close(grouped(x, turns, None, None), full(x, turns, None, None))


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    scores = [
        float((rotate(q, rope(torch.tensor([i]), 8, 100.0)) * rotate(k, rope(torch.tensor([j]), 8, 100.0))).sum())
        for i, j in ((5, 2), (105, 102), (5, 3))
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert scores[0] != pytest.approx(scores[2], rel=1e-2)


def test_rotations_stay_in_float32_where_fsdp_computes_in_bf16() -> None:
    here = Place(0, 1, 0, torch.device("cpu"))
    dist.join(here)
    try:
        with torch.device("meta"):
            model = Transformer(VOCAB, LENGTH, 32, 2, 4, **LLAMA)
        FSDP(param_dtype="bf16").wrap(model, here, seed=0)
        seen: list[tuple[torch.dtype, ...]] = []

        def look(module: nn.Module, args: tuple[Tensor, Rope, None, None]) -> None:
            seen.append((args[0].dtype, args[1].cos.dtype, args[1].sin.dtype))

        for block in model.blocks:
            block.attn.register_forward_pre_hook(look)  # type: ignore[union-attr,operator]
        assert model(text()).isfinite().all()
        assert seen == [(torch.bfloat16, torch.float32, torch.float32)] * 2
    finally:
        dist.leave(here)


@every_kind
def test_losses_in_chunks_are_those_at_once_with_the_same_gradients(options: dict[str, Any]) -> None:
    tokens, targets = text(seed=1), text(seed=2)
    targets[0, :5] = -100
    results = []
    for chunk in 0, 7, 48, 1000:
        model = built(options)
        losses = model(tokens, targets=targets, chunk=chunk)
        assert losses.shape == (2, LENGTH, 2)
        assert losses.dtype == torch.float32
        (losses[..., 0].sum() + 1e-2 * losses[..., 1].square().sum()).backward()
        results.append([losses, *(parameter.grad for parameter in model.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    logits = built(options)(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    torch.testing.assert_close(results[0][0][..., 0].flatten(), expected)
    assert not results[0][0][0, :5, 0].any()
    torch.testing.assert_close(results[0][0][..., 1], logits.logsumexp(-1))


def test_chunks_keep_no_logits_for_backward() -> None:
    model, kept = built(LLAMA), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    for chunk, holds in (0, True), (8, False):
        kept.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            model(text(), targets=text(), chunk=chunk)
        logits = [shape for shape in kept if shape[-1:] == (VOCAB,) and shape.numel() > 8 * VOCAB]
        assert bool(logits) == holds


@every_kind
def test_a_cache_gives_the_logits_of_the_whole_text(options: dict[str, Any]) -> None:
    model, tokens = built(options).eval(), text()
    whole = model(tokens)
    cache: list[list[Tensor]] = []
    parts = [model(part, cache=cache) for part in tokens.split([9, 1, 1, 5, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert cache[1][0].shape == (2, options["num_kv_heads"], LENGTH, 8)  # of the shared heads only


def test_learned_positions_end_and_rotary_ones_do_not() -> None:
    tokens = torch.zeros(1, LENGTH + 1, dtype=torch.int64)
    assert built(LLAMA)(tokens).isfinite().all()
    with pytest.raises(ValueError, match=r"25 tokens: this model has learned 24 positions \(model.seq_len\)"):
        built(GPT2)(tokens)


def test_dropout_acts_in_training_only() -> None:
    model, tokens = built(GPT2, dropout=0.3), text()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_flops_count_what_multiplies(tied: bool) -> None:
    with torch.device("meta"):
        model = Transformer(1000, 512, 64, 3, 4, 2, 160, tied=tied)
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) + 64 * 1000
    norms = 7 * 64
    assert model.flops_per_token(512) == 6 * (matrices + norms) + 12 * 3 * 4 * 16 * 512


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built(LLAMA, norm="batch"), "norm='batch': a Transformer has norm 'rms' or 'layer'"),
        (lambda: built(LLAMA, num_kv_heads=3), "num_heads=4 is not divisible by num_kv_heads=3"),
        (lambda: Transformer(9, 9, 30, 1, 4, 4, 9), "width=30 is not divisible by num_heads=4"),
        (lambda: Transformer(9, 9, 12, 1, 4, 4, 9), "turn pairs of channels"),
        (lambda: built(LLAMA, rope_scaling={"factor": 2.0}), "rope_scaling lacks high_freq_factor, low_freq_factor"),
    ],
)
def test_impossible_arguments_are_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
