"""Who compares the candidates of a step: the reward of the picture that each foresees, or a scorer trained here on the data's pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from prefopt.config.schema import TrainConfig
from prefopt.data.batch import Row
from prefopt.errors import UserError
from prefopt.policies.diffusion import DiffusionPolicy
from prefopt.policies.guidance import Guidance
from prefopt.rewards.step_aware import StepAwareScorer
from prefopt.rewards.true_reward import RewardFunction, judged
from prefopt.training.branches import StepScorer
from prefopt.training.checkpoint import naming
from prefopt.training.judge import answer
from prefopt.training.parallel import from_main


class Foreseen:
    """The reward of decoded pictures: it was made for finished ones, whatever the step."""

    def __init__(self, policy: DiffusionPolicy, reward: RewardFunction):
        self.policy, self.reward = policy, reward

    def __call__(self, x: Tensor, captions: list[int], left: Tensor, examples: Sequence[Any]) -> Tensor:
        images = self.policy.encoders().decode(x)
        return torch.tensor(judged(self.reward, [answer(e, "", image) for e, image in zip(examples, images, strict=True)]))


def make_scorer(cfg: TrainConfig, policy: DiffusionPolicy, reward: RewardFunction, rows: Sequence[Row], held_out: Sequence[Row],
                accelerator: Accelerator) -> StepScorer:
    """The scorer that `trajectory.scorer` names, the same on every process. One that is trained is kept in the run's folder, for when the
    run goes on."""
    if cfg.trajectory.scorer == "reward":
        return Foreseen(policy, reward)
    if not rows:
        raise UserError(f"trajectory.scorer=step_aware is trained on pairs, and data={cfg.data.name} has none; use data with pairs, or "
                        "trajectory.scorer=reward")
    scale = policy.cfg.guidance if cfg.trajectory.guidance is None else cfg.trajectory.guidance
    guidance, path, scorer = Guidance(scale), Path(cfg.run_dir) / "scorer.safetensors", StepAwareScorer(policy, cfg.seed)
    if from_main(path.is_file(), accelerator):  # the others must not come upon what the main process is writing
        scorer.load(path)
        return scorer
    scorer.train(rows, guidance, cfg.seed)
    # Every process trains one meanwhile, for none waits an hour for another; GPUs round differently, and all are to judge alike.
    scorer.network.load_state_dict(from_main({n: t.cpu() for n, t in scorer.network.state_dict().items()}, accelerator))
    if accelerator.is_main_process:
        with naming(path):
            scorer.save(path)
        found = ", ".join(f"{value:.0%} with {left} of the noise left" for left, value in scorer.accuracy(held_out, guidance).items())
        print(f"scorer: trained on {len(rows)} rows; of held-out pairs it has right {found or 'nobody knows how many: there are none'}",
              file=sys.stderr)
    return scorer
