"""The reward that a generated world is known to have, and which rewards a config asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from prefopt.config.rounds import HELD_OUT, held_out_reward
from prefopt.config.schema import PICTURE_REWARDS, DataConfig, EvaluationConfig, ModelConfig, RewardConfig, TrustConfig
from prefopt.data import bandit, tiny_feedback
from prefopt.data.records import Example
from prefopt.errors import UserError
from prefopt.rewards import pictures

# One reward for each example's first completion, given its prompt.
RewardFunction = Callable[[Sequence[Example]], list[float]]



def judged(reward: RewardFunction, made: Sequence[Example]) -> list[float]:
    """The reward of each sample, by which rows are made. Raises `UserError` where that is not one finite number for each."""
    found = list(reward(made))
    if len(found) != len(made):
        raise UserError(f"the reward gave {len(found)} numbers for {len(made)} samples; it must give one for each, in their order")
    for example, value in zip(made, found, strict=True):
        if not math.isfinite(value):
            raise UserError(f"the reward of a sample for the prompt of {example.origin} is {value}; a reward must be a finite number")
    return [float(value) for value in found]


WORLDS = {"tiny_feedback": tiny_feedback.true_reward, "bandit": bandit.true_reward}


def of_pictures(kind: str, path: str | None, device: torch.device | str, **settings: Any) -> RewardFunction:
    """One of `PICTURE_REWARDS`."""
    if kind == "brisque":
        return pictures.Brisque()
    from prefopt.rewards.scorers import SCORERS

    return SCORERS[kind](path, torch.device(device), **settings)


def held_out_rewards(cfg: EvaluationConfig, device: torch.device | str = "cpu") -> dict[str, RewardFunction]:
    """Metric name -> function: samples are judged by them and nothing is trained on them."""
    asked = ((said, *held_out_reward(said)) for said in cfg.rewards)
    return {f"{HELD_OUT}{kind}": of_pictures(kind, path, device, asked=f"evaluation.rewards: {said}") for said, kind, path in asked}


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
    if cfg.kind in PICTURE_REWARDS:
        own = {"photos": cfg.photos, "likeness": cfg.likeness} if cfg.kind == "harmonic" else {}
        found["reward"] = of_pictures(cfg.kind, cfg.path, device, **own)
    if cfg.kind == "model":
        from prefopt.rewards.learned import LearnedReward

        found["reward"] = LearnedReward(cfg.path, data, trust or TrustConfig(), torch.device(device), precision)
    if cfg.kind == "followup":
        from prefopt.rewards.followup import FollowupLikelihood

        found["reward"] = FollowupLikelihood(cfg.path, trust or TrustConfig(), torch.device(device), precision, model)
    return found
