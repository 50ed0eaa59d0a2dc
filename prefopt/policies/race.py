"""Sampling of tokens with noise that belongs to the reply alone, whatever is drawn beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefopt.errors import RunFailed
from prefopt.policies.noise import address


class Race:
    """A logits processor of transformers, for greedy search: the largest of its scores is a draw from softmax(scores).

    score_v - log E_v with E_v standard exponential, which is how torch.multinomial draws (Gumbel's trick). Row k of a batch has a random
    generator of its own, which follows from (seed, places[k]).
    """

    def __init__(self, seed: int, places: Sequence[int], device: torch.device):
        self.rows = [torch.Generator(device).manual_seed(address("reply", seed, place)) for place in places]
        self.sound = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] from [B, V]; minus infinity stays what it is. `ids` are not looked at."""
        self.sound &= scores.amax(-1).isfinite().all()
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.rows, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()

    def check(self) -> None:
        """Raises `RunFailed` if there was a row whose scores are no numbers: the largest of those means nothing. Once for all tokens, as a
        look at a GPU's numbers waits for it."""
        if not self.sound:
            raise RunFailed("the policy's scores of next tokens are not finite, so nothing can be sampled from it; its weights or its "
                            "precision are at fault (lower the learning rate, or set hardware.precision=fp32)")
