"""Each prompt is computed once and its completions branch off: the rows of a micro-batch as trees of tokens.

A tree is one row: the prompt, then its completions one after the other. A token attends to its prompt and to what precedes it in its own
completion; positions restart after the prompt in each. Log-probs and gradients are those of the completions run apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.data.batch import MicroBatch


@dataclass
class Trees:
    """B trees of at most T tokens. `predict` [N] are places in the flattened [B * T] whose hidden states predict the trained tokens."""

    input_ids: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    branch: Tensor  # [B, T] 0: prompt, 1 and up: completion, -1: padding
    predict: Tensor  # [N] in the order of the micro-batch's trained tokens
    last: Tensor  # [E] place of each edge's last token

    def allowed(self, window: int | None = None) -> Tensor:
        """[B, 1, T, T] bool: which token attends to which. `window`: only to positions less than so many before its own."""
        branch, positions = self.branch, self.positions
        same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
        order = torch.arange(branch.shape[1], device=branch.device)
        seen = same & (order[:, None] >= order) & (branch[:, None, :] >= 0)
        if window is not None:
            seen &= positions[:, :, None] - positions[:, None, :] < window
        seen |= torch.eye(len(order), dtype=torch.bool, device=branch.device)  # padding attends to itself: no row of a softmax is empty
        return seen[:, None]


def plant(micro: MicroBatch, pad: int) -> Trees:
    """The trees of a micro-batch's edges."""
    device, (edges, width) = micro.input_ids.device, micro.input_ids.shape
    _, tree = micro.tree.unique_consecutive(return_inverse=True)
    first = torch.ones(edges, dtype=torch.bool, device=device)
    first[1:] = tree[1:] != tree[:-1]
    time = torch.arange(width, device=device)
    own = micro.attention & (first[:, None] | (time >= micro.prompt[:, None]))  # [E, T] tokens that the edge brings along
    count = own.sum(1)
    begin = count.cumsum(0) - count
    start = begin - begin[first][tree]  # where the edge's own tokens begin in its tree
    place = start[:, None] + time - torch.where(first, 0, micro.prompt)[:, None]  # [E, T] column of a token of its own
    number = torch.arange(edges, device=device)
    ordinal = number - number[first][tree] + 1
    shape = (int(tree[-1]) + 1, int(torch.zeros_like(count[: int(tree[-1]) + 1]).index_add(0, tree, count).max()))
    ids = torch.full(shape, pad, dtype=micro.input_ids.dtype, device=device)
    positions, branch = torch.zeros(shape, dtype=torch.long, device=device), torch.full(shape, -1, device=device)
    e, t = own.nonzero(as_tuple=True)
    row, column = tree[e], place[e, t]
    ids[row, column], positions[row, column] = micro.input_ids[e, t], t
    branch[row, column] = torch.where(t < micro.prompt[e], 0, ordinal[e])

    def flat(edge: Tensor, when: Tensor) -> Tensor:
        """Where the token of `edge` at `when` stands; a prompt's tokens stand at the beginning of the tree."""
        return tree[edge] * shape[1] + torch.where(when < micro.prompt[edge], when, place[edge, when])

    e, t = micro.trained[:, 1:].nonzero(as_tuple=True)  # the hidden state at t predicts the token at t + 1
    return Trees(ids, positions, branch, flat(e, t), flat(number, micro.attention.sum(1) - 1))


def attention_mask(trees: Trees, config: Any, attention: str, dtype: torch.dtype) -> Any:
    """What a transformers model with this (text) config takes as `attention_mask` for the trees.

    A 4-D mask is used as it is given, so windows are built here, from positions. Layers of different kinds take a dict of masks. The
    plain kernel (`eager`) adds its mask to the scores; the others select.
    """
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not getattr(config, "use_sliding_window", True):
        window = None

    def made(width: int | None) -> Tensor:
        allowed = trees.allowed(width)
        if attention != "eager":
            return allowed
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)

    if kinds and set(kinds) != {"full_attention"}:
        return {kind: made(window if kind == "sliding_attention" else None) for kind in sorted(set(kinds))}
    return made(window)
