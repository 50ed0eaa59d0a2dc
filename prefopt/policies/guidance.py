"""Classifier-free guidance as one value, so that what is sampled, what is trained and what is evaluated can be compared."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


class Side(Protocol):
    """A model that predicts one side of guidance."""

    def model(self) -> AbstractContextManager[Any]:
        """In it, the policy that it gives predicts."""


@dataclass(frozen=True)
class Guidance:
    """prediction = blank + scale (conditional - blank), `blank` without caption and user (arXiv 2207.12598); a scale of 1 is none.

    With `blank_gradient` false the blank prediction is held constant in the gradient, as Flow-GRPO's scripts have it. `positive` predicts
    with the caption and `negative` without, where that is not the policy that is asked (Diffusion-NPO, arXiv 2505.11245).
    """

    scale: float = 1.0
    blank_gradient: bool = True
    positive: Side | None = None
    negative: Side | None = None

    @property
    def on(self) -> bool:
        return self.scale != 1

    @property
    def blank_passes(self) -> int:
        """What the blank prediction takes in training: 0 nothing, 1 a forward pass, 2 a backward pass as well."""
        return self.on * (1 + self.blank_gradient)

    def __call__(self, conditional: Tensor, blank: Tensor) -> Tensor:
        return blank + self.scale * (conditional - blank)

    def conditional(self, policy: nn.Module) -> AbstractContextManager[Any]:
        """In it, who predicts with the caption where `policy` is asked."""
        return self.positive.model() if self.positive else nullcontext(policy)

    def blank(self, policy: nn.Module) -> AbstractContextManager[Any]:
        """In it, who predicts without."""
        return self.negative.model() if self.negative else nullcontext(policy)


PLAIN = Guidance()


class Loaded:
    """A side that is a model of its own."""

    def __init__(self, policy: nn.Module):
        self.policy = policy.eval().requires_grad_(False)

    @contextmanager
    def model(self):
        yield self.policy
