"""How much likelier prompts are among desirable rows than among undesirable ones: BCO's density ratio (arXiv 2404.04656)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

PLACES = 512  # of bags of words: each word has one, by its hash


def bags_of_words(texts: Sequence[str]) -> Tensor:
    """[texts, PLACES] how often each word occurs, case left aside; words whose hashes agree share a place."""
    out = torch.zeros(len(texts), PLACES, dtype=torch.float64)
    for row, text in zip(out, texts, strict=True):
        for word in re.findall(r"\w+", text.lower()):
            row[crc32(word.encode()) % PLACES] += 1
    return out


def log_density_ratios(vectors: Tensor, desirable: Sequence[bool], fitted: Sequence[int]) -> list[float]:
    """log p(x | desirable) - log p(x | undesirable) of the prompt x of each row, by logistic regression on `vectors` [rows, d].

    Vectors are scaled to length 1. The classifier minimises |w|^2 / 2 + sum_i c_i log(1 + exp(-y_i (w v_i + b))) over the rows `fitted`, of
    which both classes have some; c_i makes the classes equally heavy, so the log-odds w v + b are the log-ratio wanted. Deterministic.
    """
    vectors = F.normalize(vectors.double(), dim=-1)
    known, good = vectors[list(fitted)], torch.tensor([desirable[i] for i in fitted])
    counts = torch.stack([(~good).sum(), good.sum()])
    each = len(good) / (2 * counts[good.long()])
    sign = torch.where(good, 1.0, -1.0).double()
    w, b = torch.zeros(vectors.shape[1], dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = w @ w / 2 - (each * F.logsigmoid(sign * (known @ w + b))).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return (vectors @ w + b).tolist()


def clipped_ratio(log_ratio: float, low: float, high: float) -> float:
    """exp(log_ratio), no less than `low` and no more than `high`."""
    return math.exp(min(max(log_ratio, math.log(low)), math.log(high)))
