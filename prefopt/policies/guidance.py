"""Classifier-free guidance as one value, so that what is sampled, what is trained and what is evaluated can be compared."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """prediction = blank + scale (conditional - blank), `blank` without caption and user (arXiv 2207.12598); a scale of 1 is none.

    With `blank_gradient` false the blank prediction is held constant in the gradient, as Flow-GRPO's scripts have it.
    """

    scale: float = 1.0
    blank_gradient: bool = True

    @property
    def on(self) -> bool:
        return self.scale != 1

    @property
    def blank(self) -> int:
        """What the blank prediction takes in training: 0 nothing, 1 a forward pass, 2 a backward pass as well."""
        return self.on * (1 + self.blank_gradient)

    def __call__(self, conditional: Tensor, blank: Tensor) -> Tensor:
        return blank + self.scale * (conditional - blank)


PLAIN = Guidance()
