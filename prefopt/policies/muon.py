"""Muon in fp32, for small networks that are trained on a CPU.

torch.optim.Muon multiplies in bf16, which a CPU without bf16 instructions does about twenty times slower than fp32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Muon's authors: five steps bring every singular value near 1


def orthogonalised(matrices: Tensor) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ [N, rows, columns], about: its singular values become 0.7 to 1.2 (five Newton-Schulz steps)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised Nesterov momentum of each matrix: W ← W − lr · 0.2 √max(rows, columns) · U Vᵀ.

    The factor gives a step the size that AdamW's has, as torch.optim.Muon does under "match_rms_adamw" (arXiv 2502.16982). A convolution's
    kernel [out, in, height, width] is the matrix [out, in · height · width].
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for weight in group["params"]:
                alike[weight.shape].append(weight)
            for shape, weights in alike.items():
                updates = torch.stack([self._momentum(weight, group["momentum"]).reshape(len(weight), -1) for weight in weights])
                length = 0.2 * max(updates.shape[1:]) ** 0.5
                steps = [step.view(shape) for step in orthogonalised(updates).unbind()]
                torch._foreach_add_(weights, steps, alpha=-group["lr"] * length)

    def _momentum(self, weight: Tensor, share: float) -> Tensor:
        mean = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        mean.lerp_(weight.grad, 1 - share)
        return weight.grad.lerp(mean, share)
