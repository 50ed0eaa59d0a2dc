"""Sampling trajectories: drawn from the policy with all their latents, and scored step by step.

A *walk* is a run of latents x_first, x_first+1, ... of a sampler; a *transition* is two neighbours of it. A branch names a walk by its
address and a transition by its number STEP + i, i counted from the noise. So a completion may be one transition, and its log-prob is
the Gaussian log-density of the stored next latent, `step_logp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefopt.config.schema import TrajectoryConfig
from prefopt.data.tokenise import Branch
from prefopt.errors import UserError
from prefopt.policies.guidance import Guidance
from prefopt.policies.noise import HEAD, normals
from prefopt.policies.process import Process
from prefopt.policies.samplers import gaussian_kl, log_prob, reduced, transition

if TYPE_CHECKING:
    from prefopt.policies.diffusion import DiffusionPolicy

STEP = 1 << 50  # numbers of a branch from here on are transitions


@dataclass(frozen=True)
class Sampling:
    """How trajectories are drawn, and therefore how their transitions are scored: one object for both. `times` [T + 1], from noise to
    picture; `trained`: numbers of the steps that are; `levels` [T] of noise at each step."""

    process: Process
    times: Tensor
    levels: Tensor
    trained: tuple[int, ...]
    guidance: Guidance
    kind: str = "sde"
    reduction: str = "mean"
    kl: str = "exact"
    targets: bool = False  # what a walk leads to is no next latent, but a noise that is to be predicted (see `training/branches.py`)

    @property
    def second(self) -> Tensor:
        return self.times[min(1, len(self.times) - 2)]

    def gaussian(self, prediction: Tensor, x_t: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation) of the latents after steps `step` [B] from `x_t`, on its device."""
        t, to, level = (part.to(x_t.device) for part in (self.times[step], self.times[step + 1], self.levels[step]))
        return transition(self.process, prediction, x_t, t, to, level, self.second, self.kind)

    def score(self, prediction: Tensor, x_t: Tensor, x_to: Tensor, step: Tensor) -> Tensor:
        """[B] log-prob of a transition from `x_t` to `x_to`, nats; of a target minus its squared distance from the noise that is predicted,
        which is the log-density of a Gaussian of variance 1/2 but for a constant."""
        if not self.targets:
            return log_prob(x_to, *self.gaussian(prediction, x_t, step), self.reduction)
        return -reduced((self.noise_of(prediction, x_t, step) - x_to.detach()).square(), self.reduction)

    def noise_of(self, prediction: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """The noise that a prediction at steps `step` [B] means."""
        return self.process.eps_of(prediction, x_t, self.times[step].to(x_t.device))

    def distance(self, prediction: Tensor, other: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """[B] how far a step under `prediction` is from that under `other`, as `kl` says: `exact`, the KL of both Gaussians, nats; `code`,
        the same times the length of the step, as Flow-GRPO's scripts compute it; `error`, the mean squared distance of the predictions
        (DPOK's code)."""
        if self.kl == "error":
            return (prediction - other).square().flatten(1).mean(1)
        (mean, std), (other_mean, _) = self.gaussian(prediction, x_t, step), self.gaussian(other, x_t, step)
        found = gaussian_kl(mean, other_mean, std, self.reduction)
        return found if self.kl == "exact" else found * (self.times[step] - self.times[step + 1]).to(found)


@dataclass
class Transitions:
    """N transitions of a micro-batch: `x_t` and `x_to` [N, C, h, w], `step` [N] on the CPU; captions and sizes for the network."""

    x_t: Tensor
    x_to: Tensor
    step: Tensor
    captions: list[int]
    sizes: Tensor | None
    sampling: Sampling


@dataclass
class Walk:
    """Latents [n + 1, C, h, w] of a sampler from its step `first` on, fp32, on the CPU."""

    first: int
    latents: Tensor

    def pair(self, step: int) -> tuple[Tensor, Tensor]:
        return self.latents[step - self.first], self.latents[step - self.first + 1]


def make_sampling(cfg: TrajectoryConfig, process: Process, guidance: float, window: range) -> Sampling:
    """`guidance` is the model's own, for a config that names none. `window`: steps that are trained; outside of it the sampler is as noisy
    as inside, or (`outside=ode`) not at all. Raises `UserError` for a window that the schedule does not have, or with a step that has no
    noise and so no log-prob."""
    times = process.schedule(cfg.steps)
    level = torch.full((cfg.steps,), cfg.noise, dtype=torch.float64)
    if cfg.outside == "ode":
        level[[i for i in range(cfg.steps) if i not in window]] = 0.0
    scale = guidance if cfg.guidance is None else cfg.guidance
    made = Sampling(process, times, level, tuple(window), Guidance(scale, cfg.blank_gradient), cfg.kind, cfg.reduction, cfg.kl)
    zero, every = torch.zeros(cfg.steps, 1), torch.arange(cfg.steps)
    std = made.gaussian(zero, zero, every)[1]
    silent = [i for i in window if not std[i] > 0]
    if silent:
        raise UserError(f"step {silent[0]} of the {cfg.steps} sampling steps (counted from 0) has no noise, so its transition has no "
                        f"log-prob; leave it out: trajectory.window=[{window.start},{silent[0]}]")
    return made


def window_of(cfg: TrajectoryConfig, process: Process, draw: Callable[[int], int]) -> range:
    """The steps that a round trains: `cfg.window_size` of them at a place that `draw(n)` (a number below n) decides, the same for all
    pictures of the round, or without a size all. They lie in `cfg.window`; without one they begin in the first `cfg.early` of the steps,
    and a last step without noise is none of them."""
    start, end = cfg.window or (0, min(math.ceil(cfg.early * cfg.steps) + (cfg.window_size or 1) - 1,
                                       cfg.steps - (process.kind != "flow" or cfg.kind == "cps")))
    if not 0 <= start < end <= cfg.steps:
        raise UserError(f"trajectory.window=[{start},{end}] is not inside the schedule of {cfg.steps} steps (trajectory.steps); give "
                        f"[first, end] with 0 <= first < end <= {cfg.steps}")
    size = cfg.window_size
    if size is None:
        return range(start, end)
    if size > end - start:
        raise UserError(f"trajectory.window_size={size} is more than the {end - start} steps of the window [{start},{end}]; make it "
                        "smaller, or the window wider")
    begin = start + draw(end - start - size + 1)
    return range(begin, begin + size)


def transition_branch(walk: int, caption: int, step: int) -> Branch:
    """One transition as a completion. The third number, a group of draws in other branches, is not used."""
    return Branch([walk, caption, 0, STEP + step], [False] * HEAD + [True], True)


def transitions_of(micro: Any, walks: dict[int, Walk], sampling: Sampling, sizes: Tensor | None) -> Transitions | None:
    """The transitions that a micro-batch asks about, on its device; None where it asks about draws of noise."""
    ids, trained, start = micro.input_ids.cpu(), micro.trained.cpu(), micro.prompt.tolist()
    numbers = ids[trained].tolist()
    if not numbers or numbers[0] < STEP:
        return None
    captions, pairs = [], []
    for edge, number in zip(micro.layout.token_edge.tolist(), numbers, strict=True):
        walk, caption = ids[edge, start[edge] : start[edge] + 2].tolist()
        captions.append(caption)
        pairs.append(walks[walk].pair(number - STEP))
    x_t, x_to = (torch.stack(side).to(micro.input_ids.device) for side in zip(*pairs, strict=True))
    step = torch.tensor(numbers) - STEP
    return Transitions(x_t, x_to, step, captions, None if sizes is None else sizes.expand(len(captions), -1).to(x_t.device), sampling)


def start_of(shape: tuple[int, ...], keys: Sequence[tuple], shared: bool) -> Tensor:
    """[B, ...] noise that trajectories begin with, a function of `keys` (seed, round, row, sample); with `shared` the same for all samples
    of a row."""
    return torch.stack([normals(shape, "walk", *(key[:-1] if shared else key)) for key in keys])


@torch.no_grad()
def step_forward(policy: DiffusionPolicy, sampling: Sampling, x: Tensor, step: int, captions: list[int], noise: Tensor | None) \
        -> tuple[Tensor, Tensor]:
    """(latents after step `step` from `x`, their log-prob [B] and NaN where the step is deterministic). `noise` None: the mean."""
    number = torch.full((len(x),), step)
    mean, std = sampling.gaussian(policy.predict(x, policy_times(sampling, number, x), captions, policy.sizes(len(x)), sampling.guidance),
                                  x, number)
    if noise is None or not bool((std > 0).all()):
        return mean, torch.full((len(x),), torch.nan, device=x.device)
    after = mean + std.to(mean.dtype).view(-1, *[1] * (mean.dim() - 1)) * noise.to(mean)
    return after, log_prob(after, mean, std, sampling.reduction)


def policy_times(sampling: Sampling, step: Tensor, like: Tensor) -> Tensor:
    """The times that the network is told at steps `step` [B]: those of the schedule, not rounded."""
    return sampling.times[step].to(like.device)


def draw_walks(policy: DiffusionPolicy, sampling: Sampling, captions: list[int], keys: Sequence[tuple], shared_start: bool = False) \
        -> tuple[Tensor, Tensor]:
    """([B, T + 1, C, h, w] latents from noise to picture, [B, T] log-probs of the steps), fp32, on the CPU. Noise follows from `keys`."""
    shape = policy.encodings.shape
    x = start_of(shape, keys, shared_start).to(policy.device)
    latents, logps = [x.cpu()], []
    for step in range(len(sampling.times) - 1):
        noise = torch.stack([normals(shape, "transition", *key, step) for key in keys])
        x, logp = step_forward(policy, sampling, x, step, captions, noise)
        latents.append(x.cpu())
        logps.append(logp.cpu())
    return torch.stack(latents, 1), torch.stack(logps, 1)
