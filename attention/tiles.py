"""A sparse mask as tiles of tokens and lists of what each tile attends to: what tiled.py reads.

A tile is 64 tokens that are computed together, against one list: every token that any of them
attends to. Neighbors share most of their neighbors, so the list is short: an 8x8 tile of patches in
which each attends to a square of 5x5 needs 12x12 keys. Any mask has such lists.

Which tokens make a tile is found by counting: `find_tiles` tries 64 consecutive tokens, and patches
of the grids that the mask could belong to, and takes those with the shortest lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64  # the rows of a matrix product of Hopper's tensor cores
BLOCK = 32  # tokens of a list that are computed at a time: as many as an int32 has bits

PATCH_SHAPES = ((8, 8), (4, 16), (16, 4))  # rows and columns of a tile, if the tokens are a grid

# With more allowed pairs than this, no grid is looked for: there is little to gain, and it would
# take seconds.
MAX_PAIRS_TO_COUNT = 2**24


@dataclass(frozen=True)
class TileLists:
    """Tiles, and what each attends to. All tensors are int32 on the CPU.

    t tiles and n blocks of BLOCK tokens. Tile i attends to the tokens in blocks starts[0, i] to
    starts[0, i + 1], and those in blocks starts[1, i] to starts[1, i + 1] attend to it.
    """

    tokens: Tensor  # [t, TILE]; -1 at the end of a tile that is not full
    starts: Tensor  # [2, t + 1]
    columns: Tensor  # [n, BLOCK]; the end of a list repeats its last token
    bits: Tensor  # [n, TILE]; bit c of row r: the pair of the tile's r-th token and column c counts

    @property
    def num_pairs(self) -> int:
        """How many pairs of a query and a key a forward pass computes, allowed or not."""
        return int(self.starts[0, -1]) * TILE * BLOCK

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tokens, self.starts, self.columns, self.bits


def find_tiles(mask: Tensor, num_global: int = 0) -> TileLists:
    """The lists of a bool [N, N] mask on the CPU, after `num_global` tokens that attend to all."""
    patches = find_best_tiles(mask)
    tokens = add_global_tokens(torch.where(patches < 0, -1, patches + num_global), num_global)

    allowed = F.pad(mask, (num_global, 0) * 2, value=True)  # [T, T]
    kinds = (allowed, allowed.T.contiguous())  # what a token attends to, what attends to it
    lists = [_list(pairs, tile[tile >= 0]) for pairs in kinds for tile in tokens]
    columns, bits = zip(*lists, strict=True)

    num_blocks = torch.tensor([len(block) for block in columns]).view(2, -1)
    ends = num_blocks.view(-1).cumsum(0).view(2, -1)  # those of the second kind follow the first
    starts = torch.cat([ends[:, :1] - num_blocks[:, :1], ends], dim=1)
    return TileLists(tokens.int(), starts.int(), torch.cat(columns).int(), torch.cat(bits).int())


def _list(allowed: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
    """What the tokens of a tile attend to, in blocks: columns [n, BLOCK], bits [n, TILE]."""
    rows = allowed[tile]  # [up to TILE, T]
    columns = rows.any(0).nonzero()[:, 0]
    padding = -len(columns) % BLOCK
    pairs = F.pad(rows[:, columns], (0, padding, 0, TILE - len(tile)))  # [TILE, n * BLOCK]
    columns = F.pad(columns[None], (0, padding), mode="replicate")[0] if padding else columns

    weights = 2 ** torch.arange(BLOCK)
    words = (pairs.view(TILE, -1, BLOCK) * weights).sum(-1)  # [TILE, n], without a sign
    return columns.view(-1, BLOCK), words.T


# --------------------------------------------------------------------------------------------------
# Which tokens make a tile: each function returns [t, TILE], with -1 at the end if it is not full


def consecutive(num_tokens: int) -> Tensor:
    """Tiles of TILE tokens in a row."""
    return F.pad(torch.arange(num_tokens), (0, -num_tokens % TILE), value=-1).view(-1, TILE)


def rectangles(num_tokens: int, width: int, shape: tuple[int, int]) -> Tensor:
    """Tiles of `shape` patches on the grid of this width, cut off at its right and lower end."""
    rows, columns = shape
    grid = torch.arange(num_tokens).view(-1, width)
    grid = F.pad(grid, (0, -width % columns, 0, -len(grid) % rows), value=-1)
    tiles = grid.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [., rows, ., columns]
    tiles = tiles.transpose(1, 2).reshape(-1, TILE)
    padding_last = (tiles < 0).byte().sort(dim=1, stable=True).indices
    return tiles.gather(1, padding_last)


def add_global_tokens(tiles: Tensor, num_global: int) -> Tensor:
    """The tiles with that of the global tokens first: its list, of all tokens, is the longest.

    They join the fullest tile that has room for them, because its other rows cost nothing then.
    Without one, they make tiles of their own.
    """
    sizes = (tiles >= 0).sum(1)
    has_room = sizes + num_global <= TILE
    if not num_global or not has_room.any():
        return torch.cat([consecutive(num_global), tiles])

    host = int(sizes.where(has_room, -1).argmax())
    shared = torch.cat([torch.arange(num_global), tiles[host][tiles[host] >= 0]])
    shared = F.pad(shared, (0, TILE - len(shared)), value=-1)
    return torch.cat([shared[None], tiles[:host], tiles[host + 1 :]])


def find_best_tiles(mask: Tensor) -> Tensor:
    """Of consecutive tokens and rectangles on any grid, those with the shortest lists.

    The mask [N, N] does not say what grid it belongs to. Any divisor of N may be its width.
    """
    num_tokens = len(mask)
    best = consecutive(num_tokens)
    if len(best) == 1 or int(mask.sum()) > MAX_PAIRS_TO_COUNT:
        return best

    query, key = mask.nonzero().unbind(1)
    widths = [width for width in range(2, num_tokens // 2 + 1) if num_tokens % width == 0]
    candidates = [best, *(rectangles(num_tokens, width, PATCH_SHAPES[0]) for width in widths)]
    costs = [count_blocks(tiles, query, key) for tiles in candidates]
    at_best = min(range(len(candidates)), key=costs.__getitem__)
    if at_best == 0:
        return best

    others = [rectangles(num_tokens, widths[at_best - 1], shape) for shape in PATCH_SHAPES[1:]]
    candidates = [candidates[at_best], *others]
    return min(candidates, key=lambda tiles: count_blocks(tiles, query, key))


def count_blocks(tiles: Tensor, query: Tensor, key: Tensor) -> int:
    """Blocks in all lists of these tiles, of both kinds, for the allowed pairs [E]."""
    num_tokens = int(tiles.max()) + 1
    tile_of = torch.empty(num_tokens, dtype=torch.long)
    tile_of[tiles[tiles >= 0]] = torch.arange(len(tiles)).repeat_interleave((tiles >= 0).sum(1))

    def count(tokens: Tensor, others: Tensor) -> int:
        listed = torch.zeros(len(tiles), num_tokens, dtype=torch.uint8)
        listed.view(-1).index_fill_(0, tile_of[tokens] * num_tokens + others, 1)
        return int(((listed.sum(1) + BLOCK - 1) // BLOCK).sum())

    return count(query, key) + count(key, query)
