"""The vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), pre-norm with learned positions.

Parameter names are those of timm and DeiT, so their state dicts load. Initialisation is the original's: Xavier's for
the blocks' linear layers, but DeiT's (Touvron et al. 2021, arXiv:2012.12877) small random head.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """One token for each patch: (batch, channels, size, size) -> (batch, patches, width)."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention: (batch, tokens, width) -> the same shape."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, width / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on each token alone."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.gelu(self.fc1(x)))
        return self.dropout(self.fc2(x))


class Block(nn.Module):
    """Attention, then an MLP; each reads a normalised copy of the tokens and adds to them."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(mlp_ratio * width), dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Class scores (batch, num_classes) from images (batch, in_channels, image_size, image_size).

    `pool="cls"` reads the scores from a class token; `"mean"` has no such token and averages over the patches.
    `dropout` acts where the paper has it: after the positions are added and after every linear layer but qkv.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        pool: Literal["cls", "mean"] = "cls",
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size} is not a multiple of patch_size={patch_size}")
        if width % num_heads:
            raise ValueError(f"width={width} is not divisible by num_heads={num_heads}")
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool={pool!r}: a ViT has pool 'cls' or 'mean'")
        num_tokens = (image_size // patch_size) ** 2 + (pool == "cls")

        self.patch_embed = PatchEmbed(patch_size, in_channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if pool == "cls" else None
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.dropout(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.cls_token is None else x[:, 0])

    def init_tensor(self, name: str, tensor: Tensor) -> None:
        """Fills the full parameter or buffer `name` in place; called under an RNG seeded from the run's seed and
        `name`, so that weights do not depend on world size or sharding.
        """
        if name.endswith("bias"):
            nn.init.zeros_(tensor)
        elif "norm" in name:
            nn.init.ones_(tensor)
        elif name == "patch_embed.proj.weight":
            # Each patch passes through a linear layer of fan_in = channels * patch_size**2. Small patches have a small
            # fan_in, so a fixed std of 0.02 would make their tokens vanish beside the positions.
            nn.init.trunc_normal_(tensor, std=tensor[0].numel() ** -0.5)
        elif name.startswith("blocks."):
            # as in the first ViT and in MAE; a fixed std of 0.02 is right for widths near 1,000 and far too small for 100
            nn.init.xavier_uniform_(tensor)
        else:  # positions, class token and head
            nn.init.trunc_normal_(tensor, std=0.02)
