"""Whether a reward model's probabilities mean what they say. Pairs are (logit d that the first reply is better, probability p that it is).

A probability says the same of a pair either way round, so every pair is counted in both orders: q = sigmoid(d) against p, 1 - q against
1 - p. Measured on (chosen, rejected) order alone, a model would be faulted for every pair whose chosen reply it is not sure of. Counting
both ways makes bins below one half mirror those above, which is why only confidences max(q, 1 - q) in [1/2, 1] are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from prefopt.data.batch import Row

BINS = 10  # of equal width over [1/2, 1]


def compared(rows: Sequence[Row], rewards: Mapping[int, Sequence[float]]) -> tuple[list[tuple[int, int, int]], np.ndarray, np.ndarray]:
    """Of rows that hold pairs or rankings: (row, first reply, second reply) of each pair, its logit and its label.

    `rewards` has those of each row's replies. A ranking gives every two replies with different scores; a label of one half is a label.
    """
    pairs, labels = [], []
    for number, row in enumerate(rows):
        if row.kind == "ranking_all":
            order = range(len(row.scores))
            ids = [b.ids for b in row.tokens.branches]
            found = [(i, j, 1.0) for i in order for j in order if row.scores[i] > row.scores[j] and ids[i] != ids[j]]
        else:
            found = [(0, len(row.tokens.branches) - 1, row.label)] if row.kind in ("pair", "ranking") else []
        pairs += [(number, i, j) for i, j, _ in found]
        labels += [p for *_, p in found]
    logits = [rewards[r][i] - rewards[r][j] for r, i, j in pairs]
    return pairs, np.array(logits, dtype=float), np.array(labels, dtype=float)


def confidences(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([P] probability of the side that is thought better, [P] probability that it is): the label, or one half at a tie."""
    d, p = np.asarray(logits, dtype=float), np.asarray(labels, dtype=float)
    return 1 / (1 + np.exp(-np.abs(d))), np.where(d > 0, p, np.where(d < 0, 1 - p, 0.5))


def calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """One value per pair; the mean is the measure.

    log_loss = -p log q - (1-p) log(1-q), nats; brier = p (1-q)^2 + (1-p) q^2; both are smallest at q = p, not at 0.
    ece, the expected calibration error (Guo et al., arXiv 1706.04599) = sum over bins of n_b / P |mean confidence - mean share right|, as
    the mean of +-(confidence - share) with each bin's sign. It is 0 at best, and above 0 by chance on few pairs.
    """
    d, p = np.asarray(logits, dtype=float), np.asarray(labels, dtype=float)
    q = 1 / (1 + np.exp(-np.clip(d, -700, 700)))
    confidence, right = confidences(d, p)
    gaps, bins = confidence - right, _bins(confidence)
    signs = np.sign(np.bincount(bins, gaps, minlength=BINS))
    return {
        "log_loss": p * np.logaddexp(0, -d) + (1 - p) * np.logaddexp(0, d),
        "brier": p * (1 - q) ** 2 + (1 - p) * q**2,
        "ece": signs[bins] * gaps,
    }


def reliability(logits: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """For each bin that holds pairs: its ends, how many, their mean confidence, and the share in which that side was preferred."""
    confidence, right = confidences(logits, labels)
    bins, width = _bins(confidence), 0.5 / BINS
    return [
        {"low": round(0.5 + width * b, 3), "high": round(0.5 + width * (b + 1), 3), "pairs": int((bins == b).sum()),
         "confidence": float(confidence[bins == b].mean()), "preferred": float(right[bins == b].mean())}
        for b in range(BINS) if (bins == b).any()
    ]  # fmt: skip


def reliability_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal."""
    lines = [f"{'predicted, %':>14}  {'pairs':>6}  {'mean predicted, %':>18}  {'preferred, %':>13}"]
    for row in rows:
        ends = f"{100 * row['low']:.0f} to {100 * row['high']:.0f}"
        lines.append(f"{ends:>14}  {row['pairs']:>6}  {100 * row['confidence']:>18.1f}  {100 * row['preferred']:>13.1f}")
    return "\n".join(lines)


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
