"""Statistical rejection sampling (RSO, 2309.06657): from many scored replies those that a better policy would have written.

Replies are drawn from pi, `r` is their reward. Keeping reply y with probability exp((r(y) - r_max) / beta) leaves draws from
pi* proportional to pi exp(r / beta), the optimum of reward with a KL penalty of weight beta against pi. No torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def acceptance(score: float, best: float, beta: float) -> float:
    """Probability in [0, 1] that a reply of this score is kept: exp((score - best) / beta); `beta` in units of the score, 0 or more."""
    if score >= best:
        return 1.0
    return math.exp((score - best) / beta) if beta > 0 else 0.0


def rejection_sample(scores: Sequence[float], keep: int, beta: float, rng: random.Random) -> list[int]:
    """The numbers of the `keep` replies that rejection sampling keeps of a pool, in the order in which they were kept.

    Goes through the pool, in a random order, as often as it takes; before each pass `best` is the highest score still in the pool, so a
    pass always keeps one. `beta` -> 0 keeps the best ones, best first; `beta` = inf keeps a uniform choice. All are kept where the pool
    holds no more than `keep`. Raises `ValueError` for scores that are not finite, a negative `beta` or `keep` below 1.
    """
    if keep < 1 or not beta >= 0 or not all(math.isfinite(score) for score in scores):
        raise ValueError(f"rejection sampling needs finite scores, keep >= 1 and beta >= 0, not keep={keep} and beta={beta}")
    pool, kept = list(range(len(scores))), []
    while pool and len(kept) < keep:
        best, left = max(scores[i] for i in pool), []
        while pool and len(kept) < keep:
            place = int(rng.random() * len(pool))  # callers hold their replies sorted, and the first ones must have no advantage
            pool[place], pool[-1] = pool[-1], pool[place]
            i = pool.pop()
            (kept if rng.random() < acceptance(scores[i], best, beta) else left).append(i)
        pool += left
    return kept
