"""Estimates with their intervals, for one run. Every measure is a vector with one value per prompt whose mean is the measure.

What is no plain mean over prompts (several pairs of one prompt, a loss, a length-controlled win rate, distinct n-grams) is linearised
first, so that the mean of the vector is exactly the measure and its spread is the measure's sampling error. Two measures of the same
prompts are then compared by the difference of their vectors, and intervals come from two formulas: `interval` and `paired`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution
RIDGE = 0.1  # penalty on the length coefficient: keeps it finite where length alone decides


@dataclass(frozen=True)
class Interval:
    """A measure with its 95 % interval over prompts; NaN ends where one prompt says nothing about the spread."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def t95(df: int) -> float:
    """Two-sided 95 % quantile of Student's t: exact for 1 and 2 degrees of freedom, else the Cornish-Fisher series (error below 0.2 %)."""
    if df <= 2:
        return {1: 12.706205, 2: 4.302653}[df]
    z = Z95
    series = (
        (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )  # fmt: skip
    return z + sum(term / df ** (k + 1) for k, term in enumerate(series))


def interval(values: np.ndarray, share: bool = False) -> Interval:
    """Mean of G values, one per prompt, and its 95 % interval.

    mean +- t(G-1) sd / sqrt(G). A `share` (in [0, 1]) gets Wilson's interval at the effective number of units n = m (1 - m) / se^2, which
    accounts for ties and for several units per prompt; where all are 0 or all are 1, n = G.
    """
    values = np.asarray(values, dtype=float)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    error, t = float(values.std(ddof=1)) / math.sqrt(count), t95(count - 1)
    if not share:
        return Interval(mean, mean - t * error, mean + t * error)
    if np.ptp(values) == 0 and 0 < mean < 1:  # every prompt is a tie: there is nothing that chance could change
        return Interval(mean, mean, mean)
    units = count if error == 0 or not 0 < mean < 1 else mean * (1 - mean) / error**2
    centre, extra = mean + t**2 / (2 * units), t * math.sqrt(max(mean * (1 - mean), 0) / units + t**2 / (4 * units**2))
    low, high = (end / (1 + t**2 / units) for end in (centre - extra, centre + extra))
    return Interval(mean, max(0.0, low), min(1.0, high))


def paired(after: np.ndarray, before: np.ndarray) -> Interval:
    """Difference of two measures of the same prompts: what makes a prompt hard for both cancels."""
    return interval(np.asarray(after, dtype=float) - np.asarray(before, dtype=float))


def by_prompt(values: Sequence[float], prompts: Sequence[Hashable], weights: Sequence[float] | None = None) -> np.ndarray:
    """[G] one value per prompt, in order of first appearance, whose mean is the (weighted) mean of all units.

    v_g = m + G / W * sum over units i of prompt g of w_i (x_i - m): the linearised ratio estimator, so that units of one prompt count
    as one draw.
    """
    x = np.asarray(values, dtype=float)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=float)
    place = {key: g for g, key in enumerate(dict.fromkeys(prompts))}
    mean = float((w * x).sum() / w.sum())
    sums = np.bincount([place[p] for p in prompts], w * (x - mean), minlength=len(place))
    return mean + len(place) / w.sum() * sums


def wins(ours: Sequence[float], theirs: Sequence[float], tie: float = 0.0) -> np.ndarray:
    """1 where ours is larger, 0 where it is smaller, one half at a tie: a difference of at most `tie`."""
    ahead = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    return 0.5 * (1 + np.sign(ahead) * (np.abs(ahead) > tie))


def length_controlled(won: np.ndarray, longer: np.ndarray) -> np.ndarray | None:
    """[P] values whose mean is the length-controlled win rate: the win rate that replies of equal length would have.

    After Dubois et al. (arXiv 2404.04475), without their term for how hard an instruction is:
      P(win) = sigmoid(theta + phi tanh(d / s)),  d = our tokens - their tokens,  s = standard deviation of d,
    fitted by maximum likelihood with ties as half a win and a penalty phi^2 RIDGE / 2; the measure is sigmoid(theta). The spread of the
    values is the fit's influence function. Where all lengths are equal, or all outcomes are, it is the plain win rate. None where
    ours is longer everywhere, or shorter everywhere: equal lengths then lie outside of what was seen.
    """
    won, longer = np.asarray(won, dtype=float), np.asarray(longer, dtype=float)
    if np.ptp(won) == 0 or not np.any(longer):
        return won.copy()
    if longer.min() > 0 or longer.max() < 0:
        return None
    x = np.stack([np.ones(len(won)), np.tanh(longer / longer.std())], axis=1)
    penalty = np.array([0.0, RIDGE])
    coefficient = np.zeros(2)

    def loss(c: np.ndarray) -> float:
        z = x @ c
        return float((np.logaddexp(0, z) - won * z).sum() + 0.5 * penalty @ c**2)

    for _ in range(100):
        p = 1 / (1 + np.exp(-(x @ coefficient)))
        gradient = x.T @ (p - won) + penalty * coefficient
        hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(coefficient - size * step) > loss(coefficient) + 1e-12 and size > 1e-6:  # a full Newton step may overshoot
            size /= 2
        coefficient = coefficient - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    p = 1 / (1 + np.exp(-(x @ coefficient)))
    hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty)
    scores = (won - p)[:, None] * x - penalty * coefficient / len(won)  # sum to 0 at the optimum
    influence = len(won) * np.linalg.solve(hessian, scores.T)[0]
    rate = 1 / (1 + math.exp(-coefficient[0]))
    return rate + rate * (1 - rate) * (influence - influence.mean())


def kendall(scores: Sequence[float], truth: Sequence[float]) -> float | None:
    """Agreement of two orders of K things in [-1, 1]: (concordant - discordant) / pairs that differ in `truth`; a tie in `scores` is 0."""
    pairs = [(scores[i] - scores[j], truth[i] - truth[j]) for i in range(len(truth)) for j in range(i) if truth[i] != truth[j]]
    return sum(float(np.sign(a) * np.sign(b)) for a, b in pairs) / len(pairs) if pairs else None


def distinct(texts: Sequence[str], n: int = 2) -> np.ndarray | None:
    """[P] values whose mean is distinct-n (arXiv 1510.03055): different word n-grams of all texts over all their n-grams.

    The spread is the jackknife's (each text left out once), which in expectation is not below the true one (Efron and Stein).
    None where no text has n words.
    """
    grams = []
    for text in texts:
        words = text.split()
        grams.append(Counter(zip(*(words[i:] for i in range(n)), strict=False)))
    total = Counter[tuple]()
    for own in grams:
        total.update(own)
    size = sum(total.values())
    if not size:
        return None
    rate, left = len(total) / size, []
    for own in grams:
        rest, lost = size - sum(own.values()), sum(total[g] == c for g, c in own.items())
        left.append((len(total) - lost) / rest if rest else rate)
    left_out = np.array(left)
    return rate + (len(texts) - 1) * (left_out.mean() - left_out)
