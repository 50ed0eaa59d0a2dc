"""Each prompt is computed once and its completions branch off: the rows of a micro-batch as trees of tokens.

A tree is a prompt, then its completions one after the other. A token attends to its prompt and to what precedes it in its own completion;
positions restart after the prompt in each. Log-probs and gradients are those of the completions run apart.

Trees stand in rows of their own, padded to the longest, or all in one row, end to end, without padding (`policies/packed.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.data.batch import MicroBatch


@dataclass
class Trees:
    """Trees in B rows of T tokens. A place is an index into the flattened [B * T]."""

    input_ids: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    tree: Tensor  # [B, T] number of the token's tree, -1: padding
    branch: Tensor  # [B, T] 0: prompt, 1 and up: completion, -1: padding
    predict: Tensor  # [N] places whose hidden states predict the trained tokens, in the order of the micro-batch's trained tokens
    last: Tensor  # [E] place of each edge's last token
    own: Tensor  # [E] how many tokens an edge brings along: its completion, and the prompt if it is the first of its tree
    whole: Tensor  # [E] how many tokens it has, its prompt's included
    context: Tensor  # [sum of whole] places of those tokens, edge by edge

    def allowed(self, window: int | None = None) -> Tensor:
        """[B, 1, T, T] bool: which token attends to which (`sees`). Padding sees padding, so no row of a softmax is empty."""
        column = torch.arange(self.branch.shape[1], device=self.branch.device)
        tokens = (column[None], self.tree, self.branch, self.positions)
        return sees([t[:, :, None] for t in tokens], [t[:, None, :] for t in tokens], window)[:, None]


def sees(query: Sequence[Tensor], key: Sequence[Tensor], window: int | None) -> Tensor:
    """Whether one token attends to another of the same row, each given as (column, tree, branch, position); these broadcast. `window`:
    only to positions less than so many before its own.
    """
    (q, q_tree, q_branch, q_position), (k, k_tree, k_branch, k_position) = query, key
    seen = (q >= k) & (q_tree == k_tree) & ((q_branch == k_branch) | (k_branch == 0))
    return seen if window is None else seen & (q_position - k_position < window)


def plant(micro: MicroBatch, pad: int, packed: bool = False, share: bool = True) -> Trees:
    """The trees of a micro-batch's edges, a row for each; `packed`: all in one row. Without `share` every edge is a tree of its own."""
    device, (edges, width) = micro.input_ids.device, micro.input_ids.shape
    number, time = torch.arange(edges, device=device), torch.arange(width, device=device)
    tree = micro.tree.unique_consecutive(return_inverse=True)[1] if share else number
    first = torch.ones(edges, dtype=torch.bool, device=device)
    first[1:] = tree[1:] != tree[:-1]
    prompt = micro.prompt[:, None]
    own = micro.attention & (first[:, None] | (time >= prompt))  # [E, T] tokens that the edge brings along
    count = own.sum(1)
    begin = count.cumsum(0) - count
    root = begin[first]  # [trees] how many tokens stand before each
    total = torch.cat((begin, begin[-1:] + count[-1:]))[-1:]
    size = torch.cat((root[1:], total)) - root
    if packed:
        shape, start = (1, int(total)), root
    else:
        shape = (len(root), int(size.max()))
        start = torch.arange(len(root), device=device) * shape[1]
    # A prompt stands at the start of its tree; a completion where the edges before it end.
    skip = torch.where(first, 0, micro.prompt)[:, None]
    place = start[tree][:, None] + torch.where(time < prompt, time, (begin - root[tree])[:, None] + time - skip)  # [E, T]
    here = place[own]

    def laid(values: Tensor, empty: int) -> Tensor:
        """[B, T] of the values of own tokens."""
        return torch.full((shape[0] * shape[1],), empty, dtype=values.dtype, device=device).index_put((here,), values[own]).view(shape)

    ordinal = (number - number[first][tree] + 1)[:, None]
    return Trees(
        laid(micro.input_ids, pad), laid(time.expand(edges, -1), 0), laid(tree[:, None].expand(-1, width), -1),
        laid(torch.where(time < prompt, 0, ordinal), -1),
        place[:, :-1][micro.trained[:, 1:]],  # the hidden state at t predicts the token at t + 1
        place.gather(1, micro.attention.sum(1, keepdim=True) - 1)[:, 0], count, micro.attention.sum(1), place[micro.attention],
    )


def attention_mask(trees: Trees, config: Any, attention: str, dtype: torch.dtype) -> Any:
    """What a transformers model with this (text) config takes as `attention_mask` for the trees.

    The plain kernel (`eager`) adds its mask to the scores; the others select.
    """

    def made(window: int | None) -> Tensor:
        allowed = trees.allowed(window)
        if attention != "eager":
            return allowed
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)

    return by_layer(config, made)


def by_layer(config: Any, made: Any) -> Any:
    """`made(window)` for a model whose layers are alike, else a dict of it by their kinds, as transformers takes masks.

    A mask is used as it is given, windows are the giver's affair; so kinds of layers whose mask is not known here are refused.
    """
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    if other := sorted(set(kinds or ()) - {"full_attention", "sliding_attention"}):
        raise NotImplementedError(f"it has layers of kind {other[0]}")
    if kinds and set(kinds) != {"full_attention"}:
        return {kind: made(window if kind == "sliding_attention" else None) for kind in sorted(set(kinds))}
    return made(window)
