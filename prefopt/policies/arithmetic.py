"""Linear combinations of weights: several runs merged into one model, a step beyond the newest weights, moving along a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def combine(states: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Sum over k of coefficients[k] * states[k], tensor by tensor, in the types of the first state.

    Sums are float64. A state with coefficient 0 is not read, and one alone with coefficient 1 is copied, so (1, 0) gives the first state
    bit for bit. Whole numbers (positions, say) must be the same everywhere and stay. Raises `ValueError`, with the name, where the
    states do not hold the same tensors.
    """
    if len(states) != len(coefficients) or not states:
        raise ValueError(f"{len(coefficients)} coefficients for {len(states)} sets of weights")
    out = {}
    for name in _common(states):
        tensors = [state[name] for state in states]
        if len({tuple(t.shape) for t in tensors}) > 1:
            raise ValueError(f"{name} has the shapes {', '.join(str(list(t.shape)) for t in tensors)}")
        out[name] = _sum(name, tensors, coefficients)
    return out


def _common(states: Sequence[Mapping[str, Tensor]]) -> list[str]:
    names = set(states[0])
    for state in states[1:]:
        if different := sorted(names ^ set(state)):
            raise ValueError(f"{different[0]} is not in all of them")
    return list(states[0])


def _sum(name: str, tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    if not tensors[0].is_floating_point():
        if not all(torch.equal(tensors[0], t) for t in tensors[1:]):
            raise ValueError(f"{name} holds whole numbers, which differ")
        return tensors[0].clone()
    used = [(c, t) for c, t in zip(coefficients, tensors, strict=True) if c != 0]
    if [c for c, _ in used] == [1]:
        return used[0][1].to(tensors[0].dtype, copy=True)
    total = torch.zeros(tensors[0].shape, dtype=torch.float64, device=tensors[0].device)
    for c, t in used:
        total += c * t.double()
    return total.to(tensors[0].dtype)


def combine_adapters(states: Sequence[Mapping[str, Tensor]], scales: Sequence[float], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """LoRA weights, as PEFT names them, whose change of the model is the sum over k of coefficients[k] * scales[k] * B_k A_k, exactly.

    Ranks are put side by side: A = [A_1; A_2; ...], B = [c_1 s_1 B_1, c_2 s_2 B_2, ...], for an adapter of scale 1 (alpha = rank). To add
    up the matrices A and B themselves would not be linear in the change. Layers that are trained whole are combined as by `combine`,
    which is the sum of their changes only if the coefficients add up to 1.
    Raises `ValueError` as it does.
    """
    used = [k for k, c in enumerate(coefficients) if c != 0]
    whole = [{name: t for name, t in state.items() if not lora_matrix(name)} for state in states]
    out = combine(whole, coefficients)
    for name in _common(states):
        if (side := lora_matrix(name)) == "A":
            out[name] = torch.cat([states[k][name] for k in used], 0).contiguous()
        elif side == "B":
            parts = [(coefficients[k] * scales[k] * states[k][name].double()).to(states[0][name].dtype) for k in used]
            out[name] = torch.cat(parts, 1).contiguous()
    return out


def lora_matrix(name: str) -> str | None:
    """Whether a tensor is the matrix A [rank, in] or B [out, rank] of a LoRA layer."""
    parts = name.split(".")
    return next((side for side in "AB" if f"lora_{side}" in parts or f"lora_embedding_{side}" in parts), None)


class Extrapolation:
    """Nesterov's momentum between rounds: after each the weights go on by `alpha` times what they have moved in it.

    theta_t = reached_t + alpha (reached_t - reached_(t-1)), of the trainable weights; reached_0 are those at the start. For policies
    whose logits are linear in the weights that is pi_t proportional to reached_t (reached_t / reached_(t-1))^alpha (arXiv 2410.06293).
    Keeps a copy of the weights.
    """

    def __init__(self, parameters: Mapping[str, Tensor], alpha: float):
        self.parameters, self.alpha = parameters, alpha
        self.reached = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def jump(self) -> None:
        """Call it at the end of a round."""
        now = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, beyond in combine([now, self.reached], [1 + self.alpha, -self.alpha]).items():
            self.parameters[name].copy_(beyond)
        self.reached = now

    def state(self) -> dict[str, Tensor]:
        return self.reached

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.reached.items():
            tensor.copy_(state[name])
