"""Gradient checkpointing of a network of diffusers: which activations the backward pass computes again."""

from __future__ import annotations

import ctypes
from functools import partial
from itertools import count
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
HAND_BACK_EVERY = 8  # blocks: often enough that little piles up, and seldom enough that it takes little time


def checkpoint_blocks(network: nn.Module, recompute: str) -> None:
    """Has a block keep its inputs alone and run again in the backward pass (`recompute` all, arXiv 1604.06174), or keep what its
    convolutions and attentions have made as well and run the rest again (cheap, the selective recomputation of arXiv 2205.05198).

    On the CPU freed memory goes back to the system before a forward pass and after every few blocks of a backward pass. The C library
    would keep it, and since gradients seldom fit into what activations have left, a process would grow by what no tensor uses."""
    context = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if recompute == "cheap" else {}
    on_cpu, runs = next(network.parameters()).device.type == "cpu", count(1)

    def run(block: nn.Module, *inputs: Any) -> Any:
        outputs = checkpoint(block.__call__, *inputs, use_reentrant=False, **context)
        if on_cpu and next(runs) % HAND_BACK_EVERY == 0:
            several = outputs if isinstance(outputs, tuple) else (outputs,)  # the last block of an MMDiT has a None among them
            if learnt := [output for output in several if torch.is_tensor(output) and output.requires_grad]:
                learnt[0].register_hook(_hand_back)
        return outputs

    network.enable_gradient_checkpointing(run)
    if on_cpu:
        network.register_forward_pre_hook(lambda *_: _hand_back() if torch.is_grad_enabled() else None)


def _policy(_: Any, operation: Any, *inputs: Any, **settings: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _hand_back(_: Any = None) -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: other C libraries have none, and need none
    if trim is not None:
        trim(0)
