"""The reward that a generated world is known to have, and which rewards a config asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from prefopt.config.schema import PICTURE_REWARDS, DataConfig, ModelConfig, RewardConfig, TrustConfig
from prefopt.data import bandit, tiny_feedback
from prefopt.data.records import Example
from prefopt.rewards import pictures

# One reward for each example's first completion, given its prompt.
RewardFunction = Callable[[Sequence[Example]], list[float]]

WORLDS = {"tiny_feedback": tiny_feedback.true_reward, "bandit": bandit.true_reward}


def make_rewards(cfg: RewardConfig, data: DataConfig, trust: TrustConfig | None = None, device: torch.device | str = "cpu",
                 precision: str = "fp32", model: ModelConfig | None = None) -> dict[str, RewardFunction]:
    """Metric name -> function; empty where `reward=none` or nothing is known about the data.

    `true_reward` is the known reward of a generated world, in nats of Bradley-Terry; `reward` is a learned one, a
    published scorer of pictures, or what a language model finds likely as follow-up (`model`, as it is to be loaded,
    unless `cfg.path` names another).
    """
    found: dict[str, RewardFunction] = {}
    if cfg.kind != "none" and data.source in WORLDS:
        known = WORLDS[data.source]
        found["true_reward"] = lambda examples: [known(e.prompt_text, e.completions[0].text) for e in examples]
    if cfg.kind != "none" and data.source in pictures.WORLDS:
        found["true_reward"] = pictures.known(data.source)
    if cfg.kind == "brisque":
        found["reward"] = pictures.Brisque()
    elif cfg.kind in PICTURE_REWARDS:
        from prefopt.rewards.scorers import SCORERS

        own = {"photos": cfg.photos, "likeness": cfg.likeness} if cfg.kind == "harmonic" else {}
        found["reward"] = SCORERS[cfg.kind](cfg.path, torch.device(device), **own)
    if cfg.kind == "model":
        from prefopt.rewards.learned import LearnedReward

        found["reward"] = LearnedReward(cfg.path, data, trust or TrustConfig(), torch.device(device), precision)
    if cfg.kind == "followup":
        from prefopt.rewards.followup import FollowupLikelihood

        found["reward"] = FollowupLikelihood(cfg.path, trust or TrustConfig(), torch.device(device), precision, model)
    return found
