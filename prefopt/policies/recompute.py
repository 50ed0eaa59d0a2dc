"""Gradient checkpointing of a network of diffusers: which activations the backward pass computes again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
# What takes most of the time for each byte that it leaves behind. In a network of the U-Net kind all other operations together are a tenth
# of the time and seven tenths of the memory.
KEPT = {
    _aten.convolution.default, _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def checkpoint_blocks(network: nn.Module, recompute: str) -> None:
    """Has a block keep its inputs alone and run again in the backward pass (`recompute` all, arXiv 1604.06174), or keep what its
    convolutions and attentions have made as well and run the rest again (cheap, the selective recomputation of arXiv 2205.05198)."""
    if recompute == "all":
        network.enable_gradient_checkpointing()
        return

    def run(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy))

    network.enable_gradient_checkpointing(run)


def _policy(_: Any, operation: Any, *inputs: Any, **settings: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
