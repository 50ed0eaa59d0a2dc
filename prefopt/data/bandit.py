"""The bandit world: a few prompts, a few replies each, a reward table, and closed-form optima. No torch.

Replies of prompt x are written "x:y". Rewards, the reference policy and hence every optimum are fixed constants of the world.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

PROMPTS, REPLIES = 4, 6


def reward_table() -> list[list[float]]:
    """[PROMPTS][REPLIES] true rewards in nats of Bradley-Terry, between -2 and 2."""
    rng = random.Random("prefopt bandit rewards")
    return [[round(rng.uniform(-2, 2), 3) for _ in range(REPLIES)] for _ in range(PROMPTS)]


def reference_table() -> list[list[float]]:
    """[PROMPTS][REPLIES] log-probs of the reference policy."""
    rng = random.Random("prefopt bandit reference")
    logits = [[rng.gauss(0, 1) for _ in range(REPLIES)] for _ in range(PROMPTS)]
    return [[z - math.log(sum(math.exp(v) for v in row)) for z in row] for row in logits]


def preference(x: int, a: int, b: int) -> float:
    """Probability that reply a beats reply b under prompt x (Bradley-Terry on the true reward)."""
    r = reward_table()[x]
    return 1 / (1 + math.exp(r[b] - r[a]))


def pair_rows(label_noise: float = 0.0) -> Iterator[dict]:
    """Every unordered pair of replies of every prompt once; `label` is the exact probability, after `label_noise` flips."""
    for x in range(PROMPTS):
        for a in range(REPLIES):
            for b in range(a + 1, REPLIES):
                p = preference(x, a, b)
                p = p * (1 - label_noise) + (1 - p) * label_noise
                first, second = (a, b) if p >= 0.5 else (b, a)
                yield {
                    "prompt": f"{x}",
                    "chosen": f"{x}:{first}",
                    "rejected": f"{x}:{second}",
                    "label": max(p, 1 - p),
                }


def parse(text: str) -> tuple[int, int] | None:
    """(prompt, reply) of a reply's text, or None if it is none of this world's."""
    x, _, y = text.strip().partition(":")
    if x.isdigit() and y.isdigit() and int(x) < PROMPTS and int(y) < REPLIES:
        return int(x), int(y)
    return None


def true_reward(prompt: str, completion: str) -> float:
    """The table's reward; the worst one for a reply that is not of this prompt."""
    place = parse(completion)
    if place is None or str(place[0]) != prompt.strip():
        return -2.0
    return reward_table()[place[0]][place[1]]


def optimal_policy(beta: float) -> list[list[float]]:
    """[PROMPTS][REPLIES] probabilities pi* proportional to pi_ref exp(r / beta): the optimum of KL-regularised reward (2305.18290)."""
    return _tilt(reward_table(), beta)


def ipo_optimal_policy(tau: float) -> list[list[float]]:
    """[PROMPTS][REPLIES] probabilities proportional to pi_ref exp(P(y beats mu) / tau), mu uniform over replies (2310.12036)."""
    wins = [[sum(preference(x, y, o) for o in range(REPLIES)) / REPLIES for y in range(REPLIES)] for x in range(PROMPTS)]
    return _tilt(wins, tau)


def _tilt(values: list[list[float]], temperature: float) -> list[list[float]]:
    out = []
    for logp, value in zip(reference_table(), values, strict=True):
        z = [lp + v / temperature for lp, v in zip(logp, value, strict=True)]
        top = max(z)
        total = sum(math.exp(v - top) for v in z)
        out.append([math.exp(v - top) / total for v in z])
    return out
