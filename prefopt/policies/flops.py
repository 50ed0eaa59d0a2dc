"""Floating-point operations of a decoder-only transformer, counted by hand, and how many a device can do. Imports no torch by itself.

One forward pass over T tokens, of which H go through the head, and whose queries see C keys in all, costs

    F = 2 body T + 2 head H + 4 a C        (a: attention heads x their width, summed over layers)

A multiplication and its addition count as two. Softmax, norms, rotations and activation functions are left out, as is customary: together
they are below one per cent. A training step is one forward and, per matrix product, two products backward (towards the input and towards
the weight); a frozen weight needs only the first. See arXiv 2001.08361 (2 N per token) and 2204.02311 (MFU, appendix B).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Work:
    """What is to be computed, whatever the model. `tokens`: positions that go through the layers. `scored`: positions that go through the
    head. `context`: how many positions each attends to, itself included, summed over positions. `windowed`: the same where a layer only
    looks back over a window (None: as `context`).
    """

    tokens: float = 0.0
    scored: float = 0.0
    context: float = 0.0
    windowed: float | None = None

    @property
    def near(self) -> float:
        return self.context if self.windowed is None else self.windowed

    def __add__(self, other: Work) -> Work:
        windowed = None if self.windowed is None and other.windowed is None else self.near + other.near
        return Work(self.tokens + other.tokens, self.scored + other.scored, self.context + other.context, windowed)

    def __mul__(self, times: float) -> Work:
        windowed = None if self.windowed is None else self.windowed * times
        return Work(self.tokens * times, self.scored * times, self.context * times, windowed)

    __rmul__ = __mul__


@dataclass(frozen=True)
class ModelShape:
    """What of an architecture decides its cost, in weights. `attention` and `sliding`: heads x width of a head, summed over the layers that
    look at everything, and over those that look back over `window` positions.
    """

    body: int  # weights multiplied per token in the layers; the embedding is looked up, not multiplied
    head: int  # vocabulary x hidden
    attention: int
    layers: int
    hidden: int
    vocabulary: int
    parameters: int  # all of the causal LM, tied matrices once
    sliding: int = 0
    window: int | None = None

    def matrices(self, work: Work) -> float:
        """FLOPs of the products with weights in one forward pass."""
        return 2.0 * self.body * work.tokens + 2.0 * self.head * work.scored

    def products(self, work: Work) -> float:
        """FLOPs of the products of attention (queries with keys, probabilities with values) in one forward pass."""
        return 4.0 * (self.attention * work.context + self.sliding * work.near)

    def forward(self, work: Work) -> float:
        """FLOPs of one forward pass."""
        return self.matrices(work) + self.products(work)

    def step(self, work: Work, frozen: bool = False) -> float:
        """FLOPs of one forward and backward pass; with `frozen` weights (LoRA) no gradient is taken with respect to them.

        6 resp. 4 per weight and token. Attention has no weights: its products cost three forward passes in either case. The adapter's own
        products are not counted.
        """
        return (2 if frozen else 3) * self.matrices(work) + 3 * self.products(work)


def shape_of(config: Any) -> ModelShape:
    """The shape of a causal LM with this transformers config (its text part). Builds the model without storage, so that every architecture
    is counted as it is, and of a mixture of experts what one token uses.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    config = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(model.get_output_embeddings().weight)}
    experts = next((n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(config, key, None))), None)
    share = getattr(config, "num_experts_per_tok", experts) / experts if experts else 1.0
    body = sum(p.numel() * (share if experts and _is_expert(name, p, experts) else 1.0)
               for name, p in model.named_parameters() if p.dim() >= 2 and id(p) not in outside)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    kinds, window = layer_kinds(config)
    return ModelShape(
        body=round(body), head=vocabulary * hidden, attention=width * kinds.count("full_attention"), layers=len(kinds), hidden=hidden,
        vocabulary=vocabulary, parameters=sum(p.numel() for p in model.parameters()), sliding=width * kinds.count("sliding_attention"),
        window=window,
    )


def _is_expert(name: str, parameter: Any, experts: int) -> bool:
    stacked = parameter.dim() == 3 and parameter.shape[0] == experts and "experts" in name
    return stacked or re.search(r"(?<!shared_)experts\.\d+\.", name) is not None


def layer_kinds(config: Any) -> tuple[list[str], int | None]:
    """(kind of each layer's attention, window of the sliding ones) of a transformers (text) config."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    return list(kinds), window


def causal_context(start: int, length: int, window: int | None = None) -> float:
    """Positions attended to by `length` tokens that follow `start` others, each by itself and all (or the last `window`) before it."""
    def upto(n: int) -> float:  # 1 + 2 + ... + n, capped
        if window is None or n <= window:
            return n * (n + 1) / 2
        return window * (window + 1) / 2 + (n - window) * window

    return upto(start + length) - upto(start)


def tree_work(prompt: int, replies: Sequence[int], scored: int, window: int | None = None) -> Work:
    """A prompt that is computed once, and replies that branch off. Lengths in tokens."""
    def context(width: int | None) -> float:
        return causal_context(0, prompt, width) + sum(causal_context(prompt, r, width) for r in replies)

    return Work(prompt + sum(replies), scored, context(None), context(window) if window else None)


def row_work(length: int, scored: int, window: int | None = None) -> Work:
    """One plain causal row of `length` tokens."""
    return tree_work(length, (), scored, window)


def padded_work(rows: int, width: int, scored: int, dense: bool, window: int | None = None) -> Work:
    """`rows` x `width` slots, padding included. `dense`: attention under a mask, which computes all width^2 products and forgets some."""
    if dense:
        return Work(rows * width, scored, rows * width * width)
    return row_work(width, 0, window) * rows + Work(scored=scored)


# Peak of dense matrix products in TFLOP/s per device: (bf16 with fp32 accumulation, fp32 without tensor cores), from NVIDIA's data sheets
# and architecture white papers, without sparsity. Order matters: the first name that occurs in the device's name counts.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("GH200", 989.0, 67.0),
    ("H200 NVL", 835.0, 60.0),
    ("H200", 989.0, 67.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100", 989.0, 67.0),
    ("H800", 989.0, 67.0),
    ("H20", 148.0, 44.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("A40", 150.0, 37.4),
    ("A30", 165.0, 10.3),
    ("A10G", 70.0, 31.2),
    ("A10", 125.0, 31.2),
    ("RTX 6000 Ada", 364.0, 91.1),
    ("RTX A6000", 155.0, 38.7),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.0, 82.6),
    ("RTX 3090", 71.0, 35.6),
)


def peak_flops(hardware: Any, device_name: str, precision: str) -> float:
    """FLOP/s that one device could do at most, in `precision` (fp32 or bf16).

    `hardware.peak_tflops` if it is set; else the data sheet's figure for a known GPU; else what a matrix product reaches here and now.
    `device_name` is torch.cuda.get_device_name() of a GPU, or "cpu".
    """
    if hardware.peak_tflops:
        return hardware.peak_tflops * 1e12
    for name, bf16, fp32 in PEAKS:
        if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE):
            return (bf16 if precision == "bf16" else fp32) * 1e12
    return measured_peak("cpu" if device_name == "cpu" else "cuda", precision)


@cache
def measured_peak(device: str, precision: str) -> float:
    """FLOP/s of a large square matrix product on this machine: the best of several, in about a second at most."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 1024 if device == "cpu" else 8192
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers are left alone
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    best, until = 0.0, time.perf_counter() + 0.5
    for _ in range(20):
        began = time.perf_counter()
        with torch.no_grad():
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
        if time.perf_counter() > until:
            break
    return best
