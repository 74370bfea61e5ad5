"""Decoder-only transformers for language: Llama's (Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024,
arXiv:2407.21783) and, with the options that its configs choose, GPT-2's (Radford et al. 2019).

Both are pre-norm. Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases. GPT-2: LayerNorm, learned
positions, a GELU, biases everywhere, the head tied to the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NOT_COUNTED = -100  # the target of a position that has no part in the loss
# for each block its keys and values of all positions so far, (batch, kv heads, tokens, head_dim)
Cache = list[list[Tensor]]


class Rope:
    """Cosine and sine of rotations, each float32 (tokens, head_dim / 2). No tuple or dataclass: FSDP in bf16 casts the tensors
    in those on their way into a block, and eight bits of mantissa turn far positions by the wrong angle."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


def rope(positions: Tensor, head_dim: int, theta: float, scaling: Mapping[str, float] | None = None) -> Rope:
    """Cosine and sine of each position's rotations, float32 (Su et al. 2021, arXiv:2104.09864).

    `scaling` is Llama 3.1's for longer contexts, with the keys of its published configs: wavelengths beyond
    `original_max_position_embeddings / low_freq_factor` grow by `factor`, those below `.../ high_freq_factor` stay, and
    between the two it is blended.
    """
    half = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = theta ** (-half / head_dim)
    if scaling:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the first context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    angles = positions.float()[:, None] * frequencies
    return Rope(angles.cos(), angles.sin())


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turns each pair of channels (i, i + head_dim / 2), the order in which Llama's checkpoints on Hugging Face are stored."""
    cos, sin = rope.cos, rope.sin
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention, each key and value shared by a group of heads (Ainslie et al. 2023, arXiv:2305.13245):
    (batch, tokens, width) -> the same shape.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.q = nn.Linear(width, width, bias)
        self.k = nn.Linear(width, num_kv_heads * self.head_dim, bias)
        self.v = nn.Linear(width, num_kv_heads * self.head_dim, bias)
        self.out = nn.Linear(width, width, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None, cache: list[Tensor] | None) -> Tensor:
        # the number of heads is what the layers give: under tensor parallelism each rank has some of them
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
            cache[:] = [k, v]
        dropout = self.dropout.p if self.training else 0.0
        # a single new token sees all that came before: no mask, and is_causal would let it see the first one alone
        causal = mask is None and q.shape[2] > 1
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=q.shape[1] != k.shape[1])
        return self.dropout(self.out(x.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    """A gated linear unit on each token alone (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias)
        self.up = nn.Linear(width, hidden, bias)
        self.down = nn.Linear(hidden, width, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


class Mlp(nn.Module):
    """Two linear layers on each token alone, between them GPT-2's GELU, by its tanh approximation."""

    def __init__(self, width: int, hidden: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias)
        self.down = nn.Linear(hidden, width, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then an MLP; each reads a normalised copy of the tokens and adds to them."""

    def __init__(self, norm1: nn.Module, attn: nn.Module, norm2: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attn = attn
        self.norm2 = norm2
        self.mlp = mlp

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None, cache: list[Tensor] | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, mask, cache)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Logits (batch, tokens, vocab_size) of each next token, from token ids (batch, tokens).

    `num_kv_heads` < `num_heads` shares each key and value among heads. `seq_len` bounds the learned positions; rotary ones
    have no bound. `tied`: the head is the embedding's matrix. `dropout` acts where GPT-2 has it: after the embedding, on the
    attention's weights and on what each block adds. `weights`: a folder of safetensors that a run starts from, with Hugging
    Face's names of a Llama or GPT-2.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        width: int,
        depth: int,
        num_heads: int,
        num_kv_heads: int,
        hidden: int,
        positions: Literal["rope", "learned"] = "rope",
        rope_theta: float = 10_000.0,
        rope_scaling: Mapping[str, float] | None = None,
        norm: Literal["rms", "layer"] = "rms",
        norm_eps: float = 1e-5,
        mlp: Literal["swiglu", "gelu"] = "swiglu",
        bias: bool = False,
        tied: bool = False,
        dropout: float = 0.0,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("positions", positions, ("rope", "learned")),
            ("norm", norm, ("rms", "layer")),
            ("mlp", mlp, ("swiglu", "gelu")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: a Transformer has {name} {' or '.join(map(repr, known))}")
        if width % num_heads:
            raise ValueError(f"width={width} is not divisible by num_heads={num_heads}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} is not divisible by num_kv_heads={num_kv_heads}")
        if positions == "rope" and width // num_heads % 2:
            raise ValueError(f"width={width} / num_heads={num_heads} is odd: rotary positions turn pairs of channels")
        if rope_scaling and (missing := ROPE_SCALING - rope_scaling.keys()):
            raise ValueError(f"rope_scaling lacks {', '.join(sorted(missing))}")
        self.seq_len = seq_len
        self.max_tokens = seq_len if positions == "learned" else None  # that it can read at once
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling

        def make_norm() -> nn.Module:
            return nn.RMSNorm(width, eps=norm_eps) if norm == "rms" else nn.LayerNorm(width, norm_eps, bias=bias)

        make_mlp = SwiGLU if mlp == "swiglu" else Mlp
        self.embed = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(seq_len, width) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                make_norm(),
                Attention(width, num_heads, num_kv_heads, bias, dropout),
                make_norm(),
                make_mlp(width, hidden, bias, dropout),
            )
            for _ in range(depth)
        )
        self.norm = make_norm()
        # a tied head is no module with the embedding's parameter: a model that goes to another device would get two of them
        self.head = None if tied else nn.Linear(width, vocab_size, bias=False)
        self.weights = weights  # which whoever fills the tensors reads
        self.published_names = {
            ours.replace("*", str(number)): theirs._replace(name=theirs.name.replace("*", str(number)))
            for ours, theirs in (GPT2_NAMES if positions == "learned" else LLAMA_NAMES).items()
            for number in range(depth if "*" in ours else 1)
        }
        # how tensor parallelism cuts the layers, for strategy=fsdp_tp. A tied embedding stays whole: it is used both ways
        self.tensor_parallel = {
            "blocks.*.attn": "shared_input",
            "blocks.*.attn.[qkv]": "colwise",
            "blocks.*.attn.out": "rowwise",
            "blocks.*.mlp": "shared_input",
            **({"blocks.*.mlp.gate": "colwise"} if mlp == "swiglu" else {}),
            "blocks.*.mlp.up": "colwise",
            "blocks.*.mlp.down": "rowwise",
            **({} if tied else {"embed": "embedding_rowwise", "head": "colwise_gather_output"}),
        }

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
        chunk: int = 0,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits; or with `targets` float32 (batch, tokens, 2): each position's cross-entropy and log-sum-exp, see `losses`.

        `documents` (batch, tokens) numbers the documents of each row, and attention doesn't cross them. `cache`, at first an
        empty list, keeps what earlier calls have seen; the tokens follow on that.
        """
        past = cache[0][0].shape[2] if cache else 0
        if cache is not None and not cache:
            cache.extend([] for _ in self.blocks)
        end = past + tokens.shape[1]
        at = torch.arange(past, end, device=tokens.device)
        x = self.embed(tokens)
        rotations = None
        if self.positions is None:
            # not a buffer: it takes a few small kernels, and has no state to save, move or shard
            rotations = rope(at, self.head_dim, self.rope_theta, self.rope_scaling)
        elif end > self.seq_len:
            raise ValueError(f"{end} tokens: this model has learned {self.seq_len} positions (model.seq_len)")
        else:
            x = x + self.positions(at)
        mask = None
        if documents is not None:
            mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # one for all heads
        elif past and len(at) > 1:
            mask = torch.arange(end, device=tokens.device) <= at[:, None]
        x = self.dropout(x)
        for number, block in enumerate(self.blocks):
            x = block(x, rotations, mask) if cache is None else block(x, rotations, mask, cache[number])
        x = self.norm(x)
        return self.logits(x) if targets is None else self.losses(x, targets, chunk)

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)

    def losses(self, x: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """Cross-entropy (0 where the target is -100) and log-sum-exp of each position, from the last norm's output.

        `chunk` positions at a time, each chunk's logits computed again in backward: with a vocabulary of 128,256, the float32
        logits of 8,192 tokens and their gradient would take 8.4 GB. 0: all at once, nothing twice.
        """
        positions, wanted = x.flatten(0, 1), targets.flatten()
        if not chunk:
            losses = self._losses(positions, wanted)
        else:
            losses = torch.cat(
                [
                    checkpoint(self._losses, *pair, use_reentrant=False, preserve_rng_state=False)
                    for pair in zip(positions.split(chunk), wanted.split(chunk), strict=True)
                ]
            )
        return losses.view(*targets.shape, 2)

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(x).float()
        log_sum_exp = logits.logsumexp(-1)
        correct = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
        return torch.stack([(log_sum_exp - correct).where(targets != NOT_COUNTED, 0.0), log_sum_exp], dim=-1)

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations that training on one token of a sequence needs, forward and backward: 6 for each
        parameter that multiplies, 12 * layers * heads * head_dim * seq_len for attention.

        As in PaLM's appendix B (Chowdhery et al. 2022, arXiv:2204.02311) and torchtitan: what causal attention may leave out
        and what is recomputed don't count. A look-up multiplies nothing, a tied head does.
        """
        looked_up = [self.positions] if self.head is None else [self.positions, self.embed]
        not_multiplied = sum(table.weight.numel() for table in looked_up if table is not None)
        multiplied = sum(parameter.numel() for parameter in self.parameters()) - not_multiplied
        return 6 * multiplied + 12 * len(self.blocks) * self.num_heads * self.head_dim * seq_len

    def init_tensor(self, name: str, tensor: Tensor) -> None:
        """Fills the full parameter `name` in place; called under an RNG seeded from the run's seed and `name`, so that
        weights do not depend on world size or sharding. GPT-2's: what adds to the residual stream starts smaller, so that
        the stream's variance doesn't grow with depth.
        """
        if name.endswith("bias"):
            nn.init.zeros_(tensor)
        elif "norm" in name:
            nn.init.ones_(tensor)
        elif name.endswith(("attn.out.weight", "mlp.down.weight")):
            nn.init.normal_(tensor, std=0.02 / math.sqrt(2 * len(self.blocks)))
        else:
            nn.init.normal_(tensor, std=0.02)


class Published(NamedTuple):
    """Where a published checkpoint has one of our tensors: under which name, with its two dimensions exchanged or not, and as
    which third of the tensor, for three that are stored as one."""

    name: str
    transposed: bool = False
    third: int | None = None


# our name -> theirs on Hugging Face, * a block's number
LLAMA_NAMES = {
    "embed.weight": Published("model.embed_tokens.weight"),
    "norm.weight": Published("model.norm.weight"),
    "head.weight": Published("lm_head.weight"),
    "blocks.*.norm1.weight": Published("model.layers.*.input_layernorm.weight"),
    "blocks.*.norm2.weight": Published("model.layers.*.post_attention_layernorm.weight"),
    **{
        f"blocks.*.{ours}.{kind}": Published(f"model.layers.*.{theirs}.{kind}")
        for kind in ("weight", "bias")
        for ours, theirs in (
            ("attn.q", "self_attn.q_proj"),
            ("attn.k", "self_attn.k_proj"),
            ("attn.v", "self_attn.v_proj"),
            ("attn.out", "self_attn.o_proj"),
            ("mlp.gate", "mlp.gate_proj"),
            ("mlp.up", "mlp.up_proj"),
            ("mlp.down", "mlp.down_proj"),
        )
    },
}
GPT2_NAMES = {
    "embed.weight": Published("transformer.wte.weight"),
    "positions.weight": Published("transformer.wpe.weight"),
    "head.weight": Published("lm_head.weight"),
    **{
        f"{ours}.{kind}": Published(f"transformer.{theirs}.{kind}", linear and kind == "weight", third)
        for kind in ("weight", "bias")
        for ours, theirs, linear, third in (
            ("norm", "ln_f", False, None),
            ("blocks.*.norm1", "h.*.ln_1", False, None),
            ("blocks.*.norm2", "h.*.ln_2", False, None),
            ("blocks.*.attn.q", "h.*.attn.c_attn", True, 0),
            ("blocks.*.attn.k", "h.*.attn.c_attn", True, 1),
            ("blocks.*.attn.v", "h.*.attn.c_attn", True, 2),
            ("blocks.*.attn.out", "h.*.attn.c_proj", True, None),
            ("blocks.*.mlp.up", "h.*.mlp.c_fc", True, None),
            ("blocks.*.mlp.down", "h.*.mlp.c_proj", True, None),
        )
    },
}
ROPE_SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
