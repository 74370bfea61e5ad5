"""Sampling from a language model: which token follows, with and without a cache."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fairexp.models.transformer import Transformer
from fairexp.runtime.generation import draw, sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    tiny = Transformer(vocab_size=11, seq_len=32, width=16, depth=2, num_heads=4, num_kv_heads=2, hidden=24)
    for parameter in tiny.parameters():
        nn.init.normal_(parameter, std=0.5)
    return tiny.eval()


class Forgets(nn.Module):
    """A model without a cache, as Hugging Face's answer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.lengths: list[int] = []

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        self.lengths.append(tokens.shape[1])
        return SimpleNamespace(logits=self.model(tokens))


def first(count: int, model: nn.Module, temperature: float, top_k: int | None = None, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return list(itertools.islice(sample(model, [3, 1, 4], CPU, temperature, top_k, generator), count))


def test_a_cache_changes_nothing(model: Transformer) -> None:
    forgets = Forgets(model)
    assert first(12, model, 1.0) == first(12, forgets, 1.0)
    assert forgets.lengths == list(range(3, 15))
    assert first(12, model, 0.0) == first(12, forgets, 0.0)


def test_a_seed_gives_the_same_text_again(model: Transformer) -> None:
    assert first(12, model, 1.0, seed=1) == first(12, model, 1.0, seed=1) != first(12, model, 1.0, seed=2)


def test_top_k_and_temperature_say_what_can_be_drawn() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = {k: {draw(logits, 1.0, k, generator) for _ in range(300)} for k in (1, 2, None)}
    assert drawn == {1: {1}, 2: {1, 2}, None: {0, 1, 2, 3}}
    hot = [draw(logits, 4.0, None, generator) for _ in range(2000)].count(1) / 2000
    assert hot == pytest.approx((logits / 4).softmax(0)[1].item(), abs=0.05)
