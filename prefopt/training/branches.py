"""Candidates at each step of the sampler, of which a scorer that knows the step picks a better and a worse one (SPO, arXiv 2406.04314)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefopt.config.schema import TrajectoryConfig
from prefopt.data.batch import Row
from prefopt.policies.diffusion import DiffusionPolicy
from prefopt.policies.noise import address, normals, share
from prefopt.policies.samplers import log_prob
from prefopt.policies.trajectory import Sampling, Walk, policy_times, start_of, step_forward

if TYPE_CHECKING:
    from prefopt.training.trajectories import Round

# (foreseen pictures as latents [N, C, h, w], captions, share of the process that is left [N], their examples) -> [N] scores, in logits
StepScorer = Callable[[Tensor, list[int], Tensor, Sequence[Any]], Tensor]


class Branches:
    """At each trained step `candidates` latents are drawn from the same parent, and the picture that each leads to in one jump is scored;
    best and worst are a pair where the difference of their softmax probabilities is above `threshold`. The walk goes on from a random
    candidate, or with `go_on=best` from the best.

    With a `pull` s (GradSPO) the pair are two targets at the parent, noises that are to be predicted: that of the prediction which both
    candidates come from, moved by -s sigma_t g for the best one and by s sigma_t g for the worst, g = (z_best - z_worst) / 2 of the normal
    numbers z that made them.
    """

    def __init__(self, cfg: TrajectoryConfig, scorer: StepScorer, pull: float | None = None):
        self.cfg, self.scorer, self.pull = cfg, scorer, pull

    def draw(self, policy: DiffusionPolicy, sampling: Sampling, captions: list[int], keys: Sequence[tuple], examples: Sequence[Any]) \
            -> tuple[Tensor, Tensor, Tensor]:
        """([B, W, 3, C, h, w] parent, and best and worst candidate or their targets, at each of the W trained steps; [B, W, 3] log-probs of
        both and the difference of their probabilities; [B, C, h, w] the pictures' latents), fp32, on the CPU; all of them drawn by
        `policy`."""
        k, shape = self.cfg.candidates, policy.encodings.shape
        x = start_of(shape, keys, self.cfg.shared_start).to(policy.device)
        latents, found = [], []
        for step in range(len(sampling.times) - 1):
            if step not in sampling.trained:
                x, _ = step_forward(policy, sampling, x, step, captions,
                                    torch.stack([normals(shape, "transition", *key, step) for key in keys]))
                continue
            number = torch.full((len(x),), step)
            prediction = policy.predict(x, policy_times(sampling, number, x), captions, policy.sizes(len(x)), sampling.guidance)
            mean, std = (part.repeat_interleave(k, 0) for part in sampling.gaussian(prediction, x, number))
            noise = torch.stack([normals(shape, "candidate", *key, step, j) for key in keys for j in range(k)]).to(mean)
            after = mean + std.to(mean.dtype).view(-1, *[1] * (mean.dim() - 1)) * noise
            logp = log_prob(after, mean, std, sampling.reduction).view(-1, k)
            scores = self._scores(policy, sampling, after, step + 1, captions, examples).view(-1, k)
            best, worst = scores.argmax(1), scores.argmin(1)
            each, candidates = torch.arange(len(x)), after.view(-1, k, *shape)
            gap = torch.tanh((scores.max(1).values - scores.min(1).values) / 2)  # of a softmax over the two
            sides, own = [candidates[each, best], candidates[each, worst]], [logp[each, best], logp[each, worst]]
            if self.pull is not None:
                z = noise.view(-1, k, *shape)
                sides = self._targets(sampling, prediction, x, number, (z[each, best] - z[each, worst]) / 2)
                own = [sampling.score(prediction, x, side, number) for side in sides]
            latents.append(torch.stack([x, *sides], 1).cpu())
            found.append(torch.stack([*own, gap.to(logp)], 1).cpu())
            goes_on = best if self.cfg.go_on == "best" else torch.tensor([int(k * share("goes on", *key, step)) for key in keys])
            x = candidates[each, goes_on.to(x.device)]
        return torch.stack(latents, 1), torch.stack(found, 1), x.cpu()

    def _targets(self, sampling: Sampling, prediction: Tensor, x: Tensor, step: Tensor, g: Tensor) -> list[Tensor]:
        """The noises [B, C, h, w] that the better and the worse side are to predict at `x`."""
        sigma = sampling.process.scales(sampling.times[step])[1].to(x).view(-1, *[1] * (x.dim() - 1))
        eps = sampling.noise_of(prediction, x, step)
        return [eps - self.pull * sigma * g, eps + self.pull * sigma * g]

    def _scores(self, policy: DiffusionPolicy, sampling: Sampling, x: Tensor, step: int, captions: list[int], examples: Sequence[Any]) \
            -> Tensor:
        """[B k] of candidates that stand before step `step`: of what one more call of the network foresees; at the end of themselves."""
        k = self.cfg.candidates
        said, asked = [c for c in captions for _ in range(k)], [e for e in examples for _ in range(k)]
        last = len(sampling.times) - 1
        if step < last:
            t = policy_times(sampling, torch.full((len(x),), step), x)
            x = policy.process.x0_of(policy.predict(x, t, said, policy.sizes(len(x)), sampling.guidance), x, t)
        return self.scorer(x, said, torch.full((len(x),), 1 - step / last), asked).to(x.device)

    def walks(self, made: Round, sampling: Sampling) -> dict[int, Walk]:
        """A walk of one step for each side of a pair."""
        return {address("branch", d.walk, step, side): Walk(step, torch.stack([own[place, 0], own[place, 1 + side]]))
                for d, own in zip(made.drawn, made.latents, strict=True)
                for place, step in enumerate(sampling.trained) for side in (0, 1)}

    def rows(self, made: Round, sampling: Sampling, row: Callable[..., Row]) -> tuple[list[list[Row]], float]:
        """(the pairs of each prompt, the share of comparisons that became one)."""
        by_prompt: dict[int, list[Row]] = {d.group: [] for d in made.drawn}
        kept = []
        for d, found in zip(made.drawn, made.logps.tolist(), strict=True):
            for step, (best, worst, gap) in zip(sampling.trained, found, strict=True):
                kept.append(gap > self.cfg.threshold)
                if kept[-1]:
                    sides = [(address("branch", d.walk, step, side), step, logp) for side, logp in enumerate((best, worst))]
                    by_prompt[d.group].append(row(d.prompt, sides, 0.0))
        return list(by_prompt.values()), fmean(kept)
