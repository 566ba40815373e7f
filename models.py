"""A standard pre-norm Vision Transformer whose attention may be limited by a mask; nothing else differs between runs.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; parameter names and shapes are those of timm's
`vit_base_patch16_224`, so that its weights load with `strict=True`.

Shapes: B batch, C channels, N patches (grid height * grid width), G global tokens (1 class token, or 0),
T = G + N tokens, E embed dim, H heads, D = E / H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attention
from attention import CompiledMask

PRESETS = {
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_micro": {"embed_dim": 64, "depth": 4, "num_heads": 4},
}
POOLS = ("cls", "mean")


class VisionTransformer(nn.Module):
    """Images [B, C, height, width] -> logits [B, num_classes].

    Args:
        img_size: height and width of the images in pixels, or one number for both; multiples of `patch_size`.
        pool: "cls" classifies from a class token, which is global (it attends to all patches and all attend to it);
            "mean" has no class token and classifies from the mean of the patch tokens.
        dropout: on the embeddings, after both projections and inside the MLP; never on attention weights.
        drop_path: stochastic depth (Huang et al. 2016): the probability, of each image, to skip the last block's two
            branches; it grows linearly from 0 at the first block.
        attention_mask: bool [N, N] over patches in row-major order, True = query i may attend to key j; None = full.
        backend: how masked attention is computed, see `attention.compile_mask`.

    Raises ValueError for sizes that do not fit together and for a mask that is no mask of this patch grid.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 10,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        pool: str = "cls",
        attention_mask: Tensor | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width, patch_size) < 1 or height % patch_size or width % patch_size:
            raise ValueError(f"img_size {height}x{width} is no multiple of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}")
        if pool not in POOLS:
            raise ValueError(f"unknown pool {pool!r}; expected one of {', '.join(POOLS)}")
        self.grid = (height // patch_size, width // patch_size)
        num_patches = self.grid[0] * self.grid[1]
        if attention_mask is not None and attention_mask.shape != (num_patches, num_patches):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, but the {self.grid[0]}x{self.grid[1]} grid of "
                f"{num_patches} patches needs [{num_patches}, {num_patches}]"
            )
        self.config = {
            "img_size": (height, width),
            "patch_size": patch_size,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "dropout": dropout,
            "drop_path": drop_path,
            "pool": pool,
        }
        self.checkpoint_activations = False  # of blocks: computed again in the backward instead of kept
        num_global_tokens = 1 if pool == "cls" else 0
        self.compiled_mask = attention.compile_mask(attention_mask, num_global_tokens, backend)  # one for all blocks

        self.patch_embed = PatchEmbedding(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if num_global_tokens else None
        self.pos_embed = nn.Parameter(torch.zeros(1, num_global_tokens + num_patches, embed_dim))
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, dropout, drop_path * layer / max(1, depth - 1))
            for layer in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """As in the original JAX code: weights scaled by their fan-in, which suits any width, and a small head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.patch_embed.proj
        nn.init.trunc_normal_(projection.weight, std=projection.weight[0].numel() ** -0.5)
        nn.init.zeros_(projection.bias)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        # Learned positions that start from 2D sin-cos values: on small data the grid need not be discovered first.
        self.pos_embed.data[0, -self.num_patches :] = sincos_positions(*self.grid, self.config["embed_dim"])

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)  # [B, N, E]
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # [B, T, E]
        x = self.pos_drop(x + self.pos_embed)
        self.compiled_mask.check(x.shape[1], x.device)
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, self.compiled_mask, use_reentrant=False)
            else:
                x = block(x, self.compiled_mask)
        x = self.norm(x)
        x = x.mean(dim=1) if self.cls_token is None else x[:, 0]  # [B, E]
        return self.head(x)


class PatchEmbedding(nn.Module):
    """[B, C, height, width] -> [B, N, E]: one linear map of each patch, patches in row-major order."""

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, [B, T, E] -> [B, T, E]; the compiled mask says who attends to whom, and how."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, compiled: CompiledMask) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, H, D]
        x = attention.attend_checked(qkv, compiled)  # [B, T, H, D]
        return self.proj_drop(self.proj(x.flatten(2)))


class Mlp(nn.Module):
    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block, [B, T, E] -> [B, T, E]."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, dropout: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), dropout)
        self.drop_path = stochastic_depth(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, compiled: CompiledMask) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), compiled))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def stochastic_depth(probability: float) -> nn.Module:
    from torchvision.ops import StochasticDepth  # deferred: takes a second to import

    return StochasticDepth(probability, mode="row")


def sincos_positions(height: int, width: int, embed_dim: int) -> Tensor:
    """2D sin-cos position embeddings [height * width, embed_dim] (Chen et al. 2021, MoCo v3, section 4.1).

    A quarter of the channels each for sin and cos of the row and of the column, at wavelengths from 2 pi to 20,000 pi
    patches; channels beyond the last multiple of four are zero.
    """
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / max(quarter, 1))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (rows, columns)]  # each [N, E / 4]
    embedding = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(embedding, (0, embed_dim - 4 * quarter)).float()


def count_forward_flops(model: VisionTransformer) -> dict[str, int]:
    """FLOPs of one image's forward pass: `total`, and `attention`, the part spent on scores and weighted sums.

    Counted are matrix products, 2 FLOPs a multiply-add, and only the pairs of tokens that the mask allows.
    """
    c, compiled = model.config, model.compiled_mask
    tokens = compiled.num_global_tokens + model.num_patches
    pairs = attention.count_pairs(compiled.mask, model.num_patches, compiled.num_global_tokens)
    attention_flops = 2 * c["depth"] * 2 * pairs * c["embed_dim"]
    block_weights = (4 + 2 * c["mlp_ratio"]) * c["embed_dim"] ** 2
    patch_weights = c["in_channels"] * c["patch_size"] ** 2 * c["embed_dim"]
    head_weights = c["embed_dim"] * c["num_classes"]
    linear_flops = 2 * (c["depth"] * tokens * block_weights + model.num_patches * patch_weights + head_weights)
    return {"total": int(linear_flops + attention_flops), "attention": attention_flops}
