"""By how much a picture is worth more than others of its prompt: the advantages of a round, from its rewards."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Sequence

import numpy as np


def group_advantages(rewards: Sequence[float], group: Sequence[int], over_round: bool = False) -> list[float]:
    """(R - mean of its group) / (standard deviation + 1e-4); the population's deviation of the group, or `over_round` that of all rewards
    (Flow-GRPO, arXiv 2505.05470). Groups are numbers, so that prompts which look alike are not mixed."""
    values, numbers = np.asarray(rewards, dtype=np.float64), np.asarray(group)
    out = np.empty_like(values)
    for number in np.unique(numbers):
        own = values[numbers == number]
        out[numbers == number] = (own - own.mean()) / ((values if over_round else own).std() + 1e-4)
    return out.tolist()


class Running:
    """(R - mean) / (standard deviation + 1e-6) over a prompt's last `size` rewards, those of the round included; of the whole round while a
    prompt has fewer than `least` of them (DDPO, arXiv 2305.13301)."""

    def __init__(self, size: int, least: int):
        self.least, self.past = least, defaultdict(lambda: deque(maxlen=size))

    def __call__(self, rewards: Sequence[float], prompts: Sequence[Hashable]) -> list[float]:
        everything = np.asarray(rewards, dtype=np.float64)
        for prompt, reward in zip(prompts, rewards, strict=True):
            self.past[prompt].append(reward)
        out = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            own = np.asarray(self.past[prompt]) if len(self.past[prompt]) >= self.least else everything
            out.append(float((reward - own.mean()) / (own.std() + 1e-6)))
        return out
