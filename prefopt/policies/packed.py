"""All trees of a micro-batch in one row, without padding, and the two attention kernels that take it.

`varlen` is the flash kernel for sequences of any length that torch ships (`torch.nn.attention.varlen`): the queries of an edge are the
tokens that it brings along, its keys all of its tokens, gathered from the row; the causal mask is aligned to the last of both. `flex` is
FlexAttention with a mask by blocks (arXiv 2412.05496), for models that cap their scores. Both run through transformers' own interface for
attention functions, under names that no saved model carries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.errors import UserError
from prefopt.policies.trees import Trees, by_layer, sees

KERNELS = ("varlen", "flex")
NAMES = {kernel: f"prefopt_{kernel}" for kernel in KERNELS}  # what transformers knows them by


@dataclass
class Sequences:
    """What the variable-length kernel asks for: S sequences of queries and of keys, end to end."""

    queries: Tensor  # [S + 1] int32, where each sequence's queries begin
    keys: Tensor  # [S + 1] int32, where its keys begin
    most_queries: int
    most_keys: int
    gather: Tensor | None  # places of the keys in the packed row; None: they are the row itself


def sequences(trees: Trees) -> Sequences:
    """An edge is a sequence: the tokens that it brings along look at its prompt and at themselves."""
    most_queries, most_keys = torch.stack((trees.own.max(), trees.whole.max())).tolist()
    shared = len(trees.context) > trees.input_ids.shape[1]
    return Sequences(_begins(trees.own), _begins(trees.whole), most_queries, most_keys, trees.context if shared else None)


def _begins(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def inputs(trees: Trees, config: Any, kernel: str) -> dict[str, Any]:
    """What a transformers decoder takes for a packed row."""
    made = {"input_ids": trees.input_ids, "position_ids": trees.positions}
    if kernel == "flex":
        return made | {"attention_mask": by_layer(config, lambda window: block_mask(trees, window))}
    by_layer(config, lambda window: None)  # each layer names its own window to the kernel; this refuses layers of other kinds
    return made | {"attention_mask": None, "packed_sequences": sequences(trees)}


def block_mask(trees: Trees, window: int | None) -> Any:
    """FlexAttention's mask for a packed row: blocks in which no token attends to another are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    device, width = trees.branch.device, trees.branch.shape[1]
    tree, branch, positions = trees.tree[0], trees.branch[0], trees.positions[0]

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees((q, tree[q], branch[q], positions[q]), (k, tree[k], branch[k], positions[k]), window)

    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask  # compiled, it holds no [T, T] mask
    return make(mask, 1, None, width, width, device=device)


@cache
def takes() -> frozenset[str]:
    """What torch's kernel is told: 2.11 brought window_size, 2.12 enable_gqa. Importing it takes seconds, so it waits for a use."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen(query: Tensor, key: Tensor, value: Tensor, s: Sequences, scale: float | None, window: int | None) -> Tensor:
    """[T, H, d] softmax(q k^T scale) v within each sequence of `s`; query [T, H, d], key and value [T', H', d] with H' dividing H.

    The last query of a sequence sits on its last key; a query sees the keys before and at its own place, with `window` only so many.
    """
    kernel, grouped = one_by_one, {}
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn as kernel
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in takes():
            grouped = {"enable_gqa": True}
        else:
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    left = -1 if window is None else window - 1
    return kernel(query, key, value, s.queries, s.keys, s.most_queries, s.most_keys, scale=scale, window_size=(left, 0), **grouped)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
               scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` for the CPU, which has none: sequence after sequence."""
    left, right = window_size
    q_cuts, k_cuts, out = cu_seq_q.tolist(), cu_seq_k.tolist(), []
    for q0, q1, k0, k1 in zip(q_cuts, q_cuts[1:], k_cuts, k_cuts[1:], strict=False):
        q, k, v = (t.transpose(0, 1)[None] for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        settings = {"scale": scale, "enable_gqa": enable_gqa}
        if q1 - q0 == k1 - k0 and (left < 0 or left >= k1 - k0) and right == 0:  # half the work is not done at all
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **settings)[0].transpose(0, 1))
            continue
        places = torch.arange(k1 - k0)
        ahead = places - places[len(places) - (q1 - q0):, None]  # how far a key lies ahead of a query
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if left >= 0:
            seen &= ahead >= -left
        if right >= 0:
            seen &= ahead <= right
        out.append(F.scaled_dot_product_attention(q, k, v, seen, **settings)[0].transpose(0, 1))
    return torch.cat(out)


def _varlen_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
                      sliding_window: int | None = None, packed_sequences: Sequences | None = None, **other: Any) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, T, d], key and value [1, H', T, d] -> [1, T, H, d]."""
    if other.get("dropout"):
        raise NotImplementedError("the variable-length kernel has no dropout")
    for name in ("softcap", "s_aux", "position_bias"):
        if other.get(name) is not None:
            raise NotImplementedError(f"the variable-length kernel has no {name}")
    q, k, v = (t[0].transpose(0, 1) for t in _alike(query, key, value))
    if (gather := packed_sequences.gather) is not None:  # autograd adds up what the completions ask of their prompt
        k, v = k.index_select(0, gather), v.index_select(0, gather)
    return varlen(q, k, v, packed_sequences, scaling, sliding_window)[None], None


def _flex_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **other: Any) -> tuple[Tensor, Any]:
    from transformers.integrations.flex_attention import flex_attention_forward

    return flex_attention_forward(module, *_alike(query, key, value), attention_mask, **other)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's type: rotations leave queries and keys in fp32 beside values in bf16, which these kernels refuse."""
    kind = tensors[0].device.type
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors) if torch.is_autocast_enabled(kind) else tensors


def register() -> None:
    """Makes both kernels known to transformers. No mask is built for these names: what comes in is used."""
    from transformers import AttentionInterface

    functions: dict[str, Callable] = {"varlen": _varlen_attention, "flex": _flex_attention}
    for kernel, name in NAMES.items():
        AttentionInterface.register(name, functions[kernel])


# ---- which kernel ----


def plain_attention(config: Any, attention: str) -> str:
    """transformers' name of the kernel for everything but packed rows, given `model.attention`; a model that caps its scores has one."""
    capped = bool(getattr(config, "attn_logit_softcapping", None))
    if attention in ("auto", *KERNELS):
        return "eager" if capped else "sdpa"
    return attention


def packed_kernel(config: Any, attention: str, device: torch.device, precision: str, dropout: float) -> str | None:
    """The kernel for packed rows of a model with this (text) config, or None: padded rows of trees are better, or asked for."""
    if attention == "auto":
        capped = bool(getattr(config, "attn_logit_softcapping", None))
        if device.type != "cuda":
            return None if capped or dropout else "varlen"
        if precision != "bf16" or dropout:
            return None
        return "varlen" if has_varlen(device) and not capped and _fits(config) else "flex"
    if attention in KERNELS and dropout:
        raise UserError(f"model.attention={attention} has no dropout; set model.dropout=0, or model.attention=sdpa")
    if attention == "varlen" and device.type == "cuda":
        if precision != "bf16":
            raise UserError("model.attention=varlen computes in bf16 on a GPU; set hardware.precision=bf16, or model.attention=auto")
        if not has_varlen(device):
            raise UserError("model.attention=varlen needs torch 2.11 or later with flash attention, and a GPU of compute capability 8.0 or "
                            "later; set model.attention=auto")
    if attention == "flex" and device.type != "cuda":
        raise UserError("model.attention=flex needs a GPU (FlexAttention has no backward pass elsewhere); set model.attention=auto")
    return attention if attention in KERNELS else None


def has_varlen(device: torch.device) -> bool:
    """Whether torch has the kernel, with sliding windows, on this GPU."""
    flash = torch.backends.cuda.is_flash_attention_available()
    return flash and torch.cuda.get_device_capability(device) >= (8, 0) and "window_size" in takes()


def _fits(config: Any) -> bool:
    """Heads of up to 256 numbers, a multiple of 8."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size <= 256 and size % 8 == 0
