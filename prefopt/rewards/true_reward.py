"""The reward that a generated world is known to have."""

from __future__ import annotations

from collections.abc import Callable

from prefopt.config.schema import DataConfig, RewardConfig
from prefopt.data import bandit, tiny_feedback

RewardFunction = Callable[[str, str], float]


def make_reward(cfg: RewardConfig, data: DataConfig) -> RewardFunction | None:
    """`(prompt, completion) -> reward` in nats of Bradley-Terry, or None where `reward=none` or the data has no known reward."""
    if cfg.kind == "none":
        return None
    return {"tiny_feedback": tiny_feedback.true_reward, "bandit": bandit.true_reward}.get(data.source)
