"""What a diffusion policy draws, and where it scores pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prefopt.data.tokenise import Branch
from prefopt.policies.guidance import PLAIN, Guidance


@dataclass
class Drawing:
    """A sampled picture: `branch` is how it is scored, under draws that all evaluations share."""

    image: Any  # PIL.Image
    branch: Branch
    text: str = ""
    finished: bool = True

    @property
    def ids(self) -> list[int]:
        return self.branch.ids


@dataclass
class Way:
    """How a picture was drawn in S steps: `times` [S], the `states` x_t [S, C, h, w] at them and what was `said` (predicted) there."""

    picture: int
    times: Tensor
    states: Tensor
    said: Tensor


@dataclass
class Seen:
    """What N draws of a micro-batch look at: `clean` latents [N, C, h, w], `share` [N] of the process and `weight` [N] of that time, both
    fp64; the captions, the sizes, and (group, number, picture) of each."""

    clean: Tensor
    share: Tensor
    weight: Tensor
    captions: list[int]
    sizes: Tensor | None
    keys: list[tuple[int, int, int]]


@dataclass
class Sites:
    """Where N draws of a micro-batch are scored: `x_t` and `target` [N, C, h, w], `t` [N], `weight` [N]; captions and sizes for the
    network, and the guidance that its prediction is to have. With a `huber` h above 0 the target is a picture: its latent dims are off by
    d and count 2 (sqrt(d^2 + h^2) - h) each instead of a squared error."""

    x_t: Tensor
    target: Tensor
    t: Tensor
    weight: Tensor
    captions: list[int]
    sizes: Tensor | None
    guidance: Guidance = PLAIN
    huber: float = 0.0
