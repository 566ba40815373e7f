"""A sparse mask as lists of neighbors: the one description that kernels read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class NeighborLists:
    """Who attends to whom, as edges (query, key), sorted by query and again by key.

    All tensors are int32. T tokens, E edges. The edges of query i are start[i] to start[i + 1].
    Those of key j are key_start[j] to key_start[j + 1], and key_edge holds their numbers in the
    first order.
    """

    start: Tensor  # [T + 1]
    query: Tensor  # [E]
    key: Tensor  # [E]

    key_start: Tensor  # [T + 1]
    key_query: Tensor  # [E]
    key_edge: Tensor  # [E]

    # For kernels that go through the queries in order:
    by_last_query: Tensor  # [T] keys, in the order in which they are complete
    last_query: Tensor  # [T] the last query of each of these
    needed: Tensor  # [T] how many tokens, from the first on, the queries up to this one involve

    @cached_property
    def flat(self) -> Tensor:
        """All lists as one tensor [2 (T + 1) + 4 E + 3 T], in the order above, for operators.

        An operator takes a single tensor in a fifth of the time that nine of them need.
        """
        return torch.cat([getattr(self, field.name) for field in fields(self)])


def find_neighbors(mask: Tensor) -> NeighborLists:
    """The lists of a bool [T, T] mask on the CPU, in which each token has a neighbor."""
    num_tokens = len(mask)
    query, key = mask.nonzero().unbind(1)  # [E] each, sorted by query, then by key
    by_key = key.sort(stable=True).indices

    # A key that no query attends to is complete from the start.
    tokens = torch.arange(num_tokens)
    last_query = torch.full_like(tokens, -1).scatter_reduce(0, key, query, "amax")
    by_last_query = last_query.sort(stable=True)

    furthest = tokens.scatter_reduce(0, query, key, "amax")  # at least the query itself
    lists = NeighborLists(
        start=_starts(query, num_tokens),
        query=query,
        key=key,
        key_start=_starts(key, num_tokens),
        key_query=query[by_key],
        key_edge=by_key,
        by_last_query=by_last_query.indices,
        last_query=by_last_query.values,
        needed=furthest.cummax(0).values + 1,
    )
    return NeighborLists(*(getattr(lists, field.name).int() for field in fields(lists)))


def _starts(tokens: Tensor, num_tokens: int) -> Tensor:
    """Where the edges of each token begin, and the end: [T + 1]."""
    counts = torch.bincount(tokens, minlength=num_tokens)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
