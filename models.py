"""A standard pre-norm Vision Transformer. A mask may restrict attention; nothing else differs.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words". Parameter names and shapes match timm's
`vit_base_patch16_224`, so its weights load with `strict=True`.

Legend for shapes:
    B batch, C channels, E embed dim, H heads, D = E / H head dim
    N patches (grid height * grid width), T = G + N tokens
    G global tokens: the class token, if there is one, and R registers
"""

from __future__ import annotations

import types
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attention
from attention import CompiledMask, LayerMasks

PRESETS = {
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_micro": {"embed_dim": 64, "depth": 4, "num_heads": 4},
}
POOLS = ("cls", "mean")
MAX_COMPILED = 64  # versions of one block


class VisionTransformer(nn.Module):
    """Images [B, C, height, width] -> logits [B, num_classes].

    Args:
        img_size: height and width of the images in pixels, or one number for both. Both must be
            multiples of `patch_size`.
        pool: "cls" classifies from a class token, which is global: it attends to all patches, and
            all patches attend to it. "mean" has no class token and classifies from the mean of the
            patch tokens.
        num_registers: learned tokens without a place on the grid, global like the class token
            (Darcet et al. 2023, "Vision Transformers Need Registers"); their output is not used.
        embed_dim, depth, num_heads: width E, number of blocks, heads per block.
        mlp_ratio: width of the MLP's hidden layer, as a multiple of E.
        dropout: on the embeddings, after the projection of attention and that of the MLP, and on
            the MLP's hidden layer, but never on the attention weights.
        drop_path: stochastic depth (Huang et al. 2016): the probability, per image, of skipping
            each of the last block's two branches. It grows linearly from 0 at the first block.
        attention_mask: bool [N, N] over patches in row-major order, True = query i may attend to
            key j. None = full attention. Or a list of these, one for each layer.
        backend: how masked attention is computed, see `attention.compile_mask`.
        norm_eps: added to the variance by each LayerNorm. Weights of others may need another.

    Raises ValueError if sizes do not fit together, for an unknown `pool` or backend, a negative
    number of registers, and if the mask does not fit the patch grid or the number of layers.
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
        attention_mask: Tensor | Sequence[Tensor | None] | None = None,
        backend: str = "auto",
        norm_eps: float = 1e-6,
        num_registers: int = 0,
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
        if num_registers < 0:
            raise ValueError(f"num_registers must be at least 0, got {num_registers}")
        masks = self._masks_of_layers(attention_mask, depth)

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
            "norm_eps": norm_eps,
            "num_registers": num_registers,
        }
        # Save memory: recompute each block's activations in the backward instead of keeping them.
        self.checkpoint_activations = False
        self.run_block = run_block  # or compiled, see compile_blocks
        self.replays_graphs = False

        num_global_tokens = int(pool == "cls") + num_registers
        self.layer_masks = LayerMasks(masks, num_global_tokens, backend)

        self.patch_embed = PatchEmbedding(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if pool == "cls" else None
        self.reg_token = None
        if num_registers:
            self.reg_token = nn.Parameter(torch.zeros(1, num_registers, embed_dim))
        num_tokens = num_global_tokens + self.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim))
        self.pos_drop = nn.Dropout(dropout)

        drop_paths = [drop_path * layer / max(1, depth - 1) for layer in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, dropout, probability, norm_eps)
            for probability in drop_paths
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = nn.Linear(embed_dim, num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """As timm's init_weights_vit_jax: Xavier for all matrices, q, k and v as one; small head.

        That is the original JAX code, but for q, k and v, which it takes one by one, and which are
        larger by sqrt(2) there. Another difference: the learned positions start from 2D sin-cos
        values, so that the model need not discover the grid first when there is little data.
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
        if self.reg_token is not None:  # last, so that the others are as without them
            nn.init.trunc_normal_(self.reg_token, std=0.02)

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
        # Dynamo limits recompilations per code object, so each model gets its own. By default that
        # is 8; there is one for each mask, each also for frozen blocks, the first one without
        # drop_path, and evaluations.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, MAX_COMPILED)
        own = types.FunctionType(run_block.__code__.replace(), globals(), run_block.__name__)
        self.run_block = torch.compile(own, mode=mode, dynamic=False)
        self.replays_graphs = mode == "reduce-overhead"

    @property
    def num_global_tokens(self) -> int:
        return self.layer_masks.num_global_tokens

    @property
    def compiled_mask(self) -> CompiledMask:
        """The compiled mask of all layers. Raises ValueError if they have different ones."""
        masks = self.layer_masks.different
        if len(masks) > 1:
            raise ValueError(f"the layers have {len(masks)} different masks; use layer_masks")
        return masks[0]

    def _masks_of_layers(
        self, mask: Tensor | Sequence[Tensor | None] | None, depth: int
    ) -> list[Tensor | None]:
        """A mask for each layer. Raises ValueError if they do not fit the grid or the depth."""
        is_list = isinstance(mask, Sequence)
        masks = list(mask) if is_list else [mask] * depth
        if len(masks) != depth:
            raise ValueError(f"got masks for {len(masks)} layers, but the model has {depth}")

        num_patches = self.num_patches
        for mask in masks:
            if mask is not None and mask.shape != (num_patches, num_patches):
                raise ValueError(
                    f"attention_mask has shape {list(mask.shape)}, but the "
                    f"{self.grid[0]}x{self.grid[1]} grid of {num_patches} patches needs "
                    f"[{num_patches}, {num_patches}]"
                )
        return masks

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, height, width].

        Raises ValueError for images of another size: as many patches in another shape would get
        the positions and the mask of a grid that is not theirs.
        """
        if tuple(images.shape[2:]) != self.config["img_size"]:
            raise ValueError(
                f"got images of {images.shape[2]}x{images.shape[3]} pixels, but the model is for "
                f"{self.config['img_size'][0]}x{self.config['img_size'][1]}"
            )
        if self.replays_graphs:  # the results of the step before may be overwritten now
            torch.compiler.cudagraph_mark_step_begin()

        x = self.patch_embed(images)  # [B, N, E]
        for tokens in (self.reg_token, self.cls_token):  # each [1, number, E]
            if tokens is not None:
                x = torch.cat([tokens.expand(x.shape[0], -1, -1), x], dim=1)  # [B, T, E] in the end
        x = self.pos_drop(x + self.pos_embed)

        # Once for all blocks, which then call `attention.attend_checked`.
        self.layer_masks.check(x.shape[1], x.device)

        recomputes = self.checkpoint_activations and self.training
        for layer, block in enumerate(self.blocks):
            x = self.run_block(block, x, self.layer_masks[layer], recomputes)

        x = self.norm(x)
        patches = x[:, self.num_global_tokens :]  # [B, N, E]
        x = patches.mean(dim=1) if self.cls_token is None else x[:, 0]  # [B, E]
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
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        dropout: float,
        drop_path: float,
        norm_eps: float,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.attn = Attention(embed_dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(embed_dim, eps=norm_eps)
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


def resample_positions(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int
) -> Tensor:
    """Learned positions [1, prefix + N, E] of one grid (height, width) for the patches of another.

    Bicubic and antialiased (Dosovitskiy et al. 2021, section 3.2, resize them likewise). The
    `num_prefix` positions before those of the patches have no place on the grid, and stay.

    Raises ValueError if the number of positions does not fit `old_grid`.
    """
    num_expected = num_prefix + old_grid[0] * old_grid[1]
    if pos_embed.ndim != 3 or pos_embed.shape[1] != num_expected:
        raise ValueError(
            f"positions of shape {list(pos_embed.shape)} do not fit {num_prefix} prefix tokens and "
            f"a grid of {old_grid[0]}x{old_grid[1]}; expected [1, {num_expected}, E]"
        )
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed

    prefix, positions = pos_embed.split([num_prefix, num_expected - num_prefix], dim=1)
    positions = positions.float().transpose(1, 2).unflatten(2, old_grid)  # [1, E, h, w]
    positions = F.interpolate(positions, tuple(new_grid), mode="bicubic", antialias=True)
    positions = positions.flatten(2).transpose(1, 2)  # [1, new N, E]
    return torch.cat([prefix, positions.to(pos_embed.dtype)], dim=1)


def count_forward_flops(model: VisionTransformer) -> dict[str, int]:
    """FLOPs of one image's forward pass: `total`, and `attention` for scores and weighted sums.

    Only matrix products count, at 2 FLOPs per multiply-add, and only the pairs of tokens that the
    mask allows.
    """
    c = model.config
    num_tokens = model.num_global_tokens + model.num_patches

    # For each pair of tokens, q . k and then p * v: two products over all heads.
    num_pairs = model.layer_masks.count_pairs(model.num_patches)
    attention_flops = 2 * 2 * num_pairs * c["embed_dim"]

    # qkv and proj have 4 E² weights, the MLP 2 * ratio * E².
    block_weights = (4 + 2 * c["mlp_ratio"]) * c["embed_dim"] ** 2
    patch_weights = c["in_channels"] * c["patch_size"] ** 2 * c["embed_dim"]
    head_weights = c["embed_dim"] * c["num_classes"]
    linear_flops = 2 * (
        c["depth"] * num_tokens * block_weights + model.num_patches * patch_weights + head_weights
    )
    return {"total": int(linear_flops + attention_flops), "attention": attention_flops}
