"""A standard pre-norm Vision Transformer. A mask may restrict attention; nothing else differs.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words". Parameter names and shapes match timm's
`vit_base_patch16_224`, so its weights load with `strict=True`.

Legend for shapes:
    B batch, C channels, E embed dim, H heads, D = E / H head dim
    N patches (grid height * grid width), G global tokens (1 class token, or 0), T = G + N tokens
"""

from __future__ import annotations

import types

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
        img_size: height and width of the images in pixels, or one number for both. Both must be
            multiples of `patch_size`.
        pool: "cls" classifies from a class token, which is global: it attends to all patches, and
            all patches attend to it. "mean" has no class token and classifies from the mean of the
            patch tokens.
        dropout: on the embeddings, after both projections and inside the MLP, but never on the
            attention weights.
        drop_path: stochastic depth (Huang et al. 2016): the probability, per image, of skipping
            each of the last block's two branches. It grows linearly from 0 at the first block.
        attention_mask: bool [N, N] over patches in row-major order, True = query i may attend to
            key j. None = full attention.
        backend: how masked attention is computed, see `attention.compile_mask`.

    Raises ValueError if sizes do not fit together, or if the mask does not fit the patch grid.
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
            raise ValueError(
                f"img_size {height}x{width} is not a multiple of patch_size {patch_size}"
            )
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if pool not in POOLS:
            raise ValueError(f"unknown pool {pool!r}; expected one of {', '.join(POOLS)}")

        self.grid = (height // patch_size, width // patch_size)
        num_patches = self.num_patches
        if attention_mask is not None and attention_mask.shape != (num_patches, num_patches):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, but the "
                f"{self.grid[0]}x{self.grid[1]} grid of {num_patches} patches needs "
                f"[{num_patches}, {num_patches}]"
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
        # Save memory: recompute each block's activations in the backward instead of keeping them.
        self.checkpoint_activations = False
        self.run_block = run_block  # or compiled, see compile_blocks
        self.replays_graphs = False

        # One compiled mask, shared by all blocks.
        num_global_tokens = 1 if pool == "cls" else 0
        self.compiled_mask = attention.compile_mask(attention_mask, num_global_tokens, backend)

        self.patch_embed = PatchEmbedding(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if pool == "cls" else None
        num_tokens = num_global_tokens + num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim))
        self.pos_drop = nn.Dropout(dropout)

        drop_paths = [drop_path * layer / max(1, depth - 1) for layer in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, dropout, probability)
            for probability in drop_paths
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """As in the original JAX code: weights scaled by their fan-in, for any width; small head.

        A difference: the learned positions start from 2D sin-cos values, so that the model need not
        discover the grid first when there is little data.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        projection = self.patch_embed.proj
        fan_in = projection.weight[0].numel()
        nn.init.trunc_normal_(projection.weight, std=fan_in**-0.5)
        nn.init.zeros_(projection.bias)

        nn.init.trunc_normal_(self.head.weight, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

        positions = sincos_positions(*self.grid, self.config["embed_dim"])  # [N, E]
        self.pos_embed.data[0, -self.num_patches :] = positions

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def compile_blocks(self, mode: str) -> None:
        """Compile the blocks with torch.compile, in the mode "default" or "reduce-overhead".

        The blocks are alike and share one compiled function, so there is one block to compile
        instead of `depth`. Each has its own backward, so that in a parallel run its gradients are
        on their way while those of earlier blocks are being computed.
        """
        # Dynamo limits recompilations per code object, so each model gets its own.
        own = types.FunctionType(run_block.__code__.replace(), globals(), run_block.__name__)
        self.run_block = torch.compile(own, mode=mode, dynamic=False)
        self.replays_graphs = mode == "reduce-overhead"

    def forward(self, images: Tensor) -> Tensor:
        if self.replays_graphs:  # the results of the step before may be overwritten now
            torch.compiler.cudagraph_mark_step_begin()

        x = self.patch_embed(images)  # [B, N, E]
        if self.cls_token is not None:
            cls_token = self.cls_token.expand(len(x), -1, -1)  # [B, 1, E]
            x = torch.cat([cls_token, x], dim=1)  # [B, T, E]
        x = self.pos_drop(x + self.pos_embed)

        # Once for all blocks, which then call `attention.attend_checked`.
        self.compiled_mask.check(x.shape[1], x.device)

        recomputes = self.checkpoint_activations and self.training
        for block in self.blocks:
            x = self.run_block(block, x, self.compiled_mask, recomputes)

        x = self.norm(x)
        x = x.mean(dim=1) if self.cls_token is None else x[:, 0]  # [B, E]
        return self.head(x)  # [B, num_classes]


def run_block(block: Block, x: Tensor, compiled: CompiledMask, recomputes: bool) -> Tensor:
    """[B, T, E] -> [B, T, E]; `recomputes` activations in the backward instead of keeping them."""
    if recomputes:
        return checkpoint(block, x, compiled, use_reentrant=False)
    return block(x, compiled)


class PatchEmbedding(nn.Module):
    """[B, C, height, width] -> [B, N, E]: one linear map of each patch, in row-major order.

    The weights are those of a convolution, as in other ViTs, but patches do not overlap: cutting
    them out and one matrix product do the same, without cuDNN's changes of layout.
    """

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        side = self.proj.kernel_size[0]  # P
        x = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, C, rows, P, columns, P]
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, C * P * P]
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)  # [B, N, E]


class Attention(nn.Module):
    """Multi-head self-attention, [B, T, E] -> [B, T, E].

    The compiled mask decides who attends to whom, and which backend computes it.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, compiled: CompiledMask) -> Tensor:
        qkv = self.qkv(x)  # [B, T, 3 * E]
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, H, D]
        x = attention.attend_checked(qkv, compiled)  # [B, T, H, D]
        x = x.flatten(2)  # [B, T, E]
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    """[B, T, E] -> [B, T, E], token by token."""

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(self.fc1(x)))  # [B, T, hidden]
        return self.drop(self.fc2(x))  # [B, T, E]


class Block(nn.Module):
    """Pre-norm transformer block, [B, T, E] -> [B, T, E]."""

    def __init__(
        self, embed_dim: int, num_heads: int, mlp_ratio: float, dropout: float, drop_path: float
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), dropout)
        self.drop_path = StochasticDepth(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, compiled: CompiledMask) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), compiled))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class StochasticDepth(nn.Module):
    """Skip a branch with a probability, drawn per image: [B, T, E] -> [B, T, E].

    torchvision has the same with the probability as a number, which is part of what is compiled:
    each block would be compiled for itself.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.register_buffer("survival", torch.tensor(1 - probability), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        survives = torch.bernoulli(self.survival.expand(len(x)))  # [B], 0 or 1
        return x * (survives / self.survival).to(x.dtype)[:, None, None]


def sincos_positions(height: int, width: int, embed_dim: int) -> Tensor:
    """2D sin-cos position embeddings [height * width, E] (Chen et al. 2021, MoCo v3, section 4.1).

    A quarter of the channels each for sin and cos of the row and of the column, at wavelengths from
    2 pi to 20,000 pi patches. Channels beyond the last multiple of four are zero.
    """
    quarter = embed_dim // 4
    exponents = torch.arange(quarter, dtype=torch.float64) / max(quarter, 1)
    frequencies = 10000.0**-exponents  # [E / 4]

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = []
    for position in (rows, columns):
        angles = position.reshape(-1, 1) * frequencies  # [N, E / 4]
        waves += [torch.sin(angles), torch.cos(angles)]

    embedding = torch.cat(waves, dim=1)  # [N, 4 * (E // 4)]
    return F.pad(embedding, (0, embed_dim - 4 * quarter)).float()  # [N, E]


def count_forward_flops(model: VisionTransformer) -> dict[str, int]:
    """FLOPs of one image's forward pass: `total`, and `attention` for scores and weighted sums.

    Only matrix products count, at 2 FLOPs per multiply-add, and only the pairs of tokens that the
    mask allows.
    """
    c = model.config
    compiled = model.compiled_mask
    num_tokens = compiled.num_global_tokens + model.num_patches

    # For each pair of tokens, q . k and then p * v: two products over all heads.
    num_pairs = attention.count_pairs(compiled.mask, model.num_patches, compiled.num_global_tokens)
    attention_flops = 2 * c["depth"] * 2 * num_pairs * c["embed_dim"]

    # qkv and proj have 4 E² weights, the MLP 2 * ratio * E².
    block_weights = (4 + 2 * c["mlp_ratio"]) * c["embed_dim"] ** 2
    patch_weights = c["in_channels"] * c["patch_size"] ** 2 * c["embed_dim"]
    head_weights = c["embed_dim"] * c["num_classes"]
    linear_flops = 2 * (
        c["depth"] * num_tokens * block_weights + model.num_patches * patch_weights + head_weights
    )
    return {"total": int(linear_flops + attention_flops), "attention": attention_flops}
