"""How a micro-batch is laid out when a transformers decoder computes it.

`rows`: a padded row for each edge. `trees`: a padded row for each tree, whose prompt is computed once. `packed`: all trees in one row,
without padding (`policies/packed.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prefopt.data.batch import MicroBatch
from prefopt.policies import packed
from prefopt.policies.trees import attention_mask, plant


def hidden_states(
    decoder: nn.Module, config: Any, micro: MicroBatch, pad: int, layout: str, attention: str, share: bool = True,
    layers: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """([P, d] last hidden states, [N] places in them that predict the trained tokens, [E] places of the edges' last tokens).

    `config` is the text config of `decoder`; `attention` the kernel that it is set to: transformers' name, or of packed.KERNELS in the
    layout `packed`. With `share` the edges of a tree have one prompt together. With `layers` the states are [P, L, d], those that each
    layer puts out; the last ones are normalised.
    """
    if layout == "packed":
        trees = plant(micro, pad, packed=True, share=share)
        inputs = packed.inputs(trees, config, attention)
    elif layout == "trees" and share and len(micro.tree) > len(micro.tree.unique_consecutive()):
        trees = plant(micro, pad)
        mask = attention_mask(trees, config, attention, torch.float32)
        inputs = {"input_ids": trees.input_ids, "position_ids": trees.positions, "attention_mask": mask}
    else:
        hidden = _states(decoder, {"input_ids": micro.input_ids, "attention_mask": micro.attention.long()}, layers)
        place = torch.arange(micro.input_ids.numel(), device=hidden.device).view(micro.input_ids.shape)
        last = place[:, 0] + micro.attention.sum(1) - 1
        return hidden, place[:, :-1][micro.trained[:, 1:]], last
    return _states(decoder, inputs, layers), trees.predict, trees.last


def _states(decoder: nn.Module, inputs: dict[str, Any], layers: bool) -> Tensor:
    if not layers:
        return decoder(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    every = decoder(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    return torch.stack(every[1:], 2).flatten(0, 1)  # without the embeddings
