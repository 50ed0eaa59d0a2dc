"""What can be asked of a scorer beside the log-probs of its tokens, and the answer, for any policy whose logits are a linear head.

Scorers that are frozen run first and hand over their `States`; the policy's own forward pass then compares itself with them, so that all
of its gradients begin inside its module, where data parallelism expects them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from prefopt.policies.divergence import token_divergence, token_value
from prefopt.policies.logprob import Head, wide_type


@dataclass(frozen=True)
class States:
    """What a scorer's next-token distributions are made of, at the N places that predict the trained tokens, without any gradient."""

    hidden: Tensor  # [N, d]
    head: Head
    layers: Tensor | None = None  # [N, L, d] the outputs of all of its layers, if asked for


@dataclass(frozen=True)
class Asked:
    """`policy(micro, asked)` answers with a dict that holds `token_logp` [N] and, as asked:

    states:      `states`, its `States`: of a frozen scorer, for others to compare themselves with.
    layers:      those with the outputs of all layers.
    hidden:      `hidden` [N, d], its last hidden state at the places that predict the trained tokens, with gradient.
    divergence:  `divergence` [N] in nats, of this kind (`policies/divergence.py`) and from the scorer with these states, with gradient.
    value:       `value` [N] in nats, its soft value there under this weight and temperature (`token_value`), without gradient.
    module:      what the module that the objective has given it says (`policies/owned.py`), of its hidden states and of `given`, the
                 outputs of all layers of the reference.
    """

    states: bool = False
    layers: bool = False
    hidden: bool = False
    divergence: tuple[str, States] | None = None
    value: tuple[float, float] | None = None
    module: bool = False
    given: Tensor | None = None


def answer(asked: Asked, token_logp: Tensor, hidden: Tensor, head: Head, layers: Tensor | None = None) -> dict[str, Any]:
    """The answer of a scorer with these hidden states [N, d], of all `layers` [N, L, d], and this head; to be called in the policy's
    forward, under its autocast."""
    made: dict[str, Any] = {"token_logp": token_logp}
    if asked.states:
        made["states"] = States(hidden.detach(), _detached(head), None if layers is None else layers.detach())
    if asked.hidden:
        made["hidden"] = hidden.to(wide_type(hidden.dtype))
    if asked.divergence is not None:
        kind, other = asked.divergence
        made["divergence"] = token_divergence(hidden, head, other.hidden, other.head, kind)
    if asked.value is not None:
        made["value"] = token_value(hidden, head, *asked.value)
    return made


def extrapolate(states: States, away: States, weight: Tensor, temperature: float = 1.0) -> States:
    """Whose logits are (z + w (z - z')) / temperature, of z made of `states`, z' of the states `away`, one w for each place, `weight` [N].

    One linear head again: states (1 + w) h and -w h' side by side, over the two matrices side by side. The matrices are copied. ValueError
    for heads that cap or scale their logits, which are not linear, and for different vocabularies.
    """
    parts = ((states, 1 + weight), (away, -weight))
    if any(part.head.softcap or part.head.temperature != 1 for part, _ in parts):
        raise ValueError("logits that are capped or scaled cannot be extrapolated by one linear head")
    if len(states.head.weight) != len(away.head.weight):
        raise ValueError(f"the scorers' vocabularies have {len(states.head.weight)} and {len(away.head.weight)} words")
    hidden, matrices = [], []
    for part, factor in parts:
        of, factor = part.head, factor[:, None]
        hidden.append(factor * part.hidden)
        matrices.append(of.weight)
        if of.bias is not None:
            hidden.append(factor)
            matrices.append(of.bias[:, None])
        if of.down is not None:  # an adapter on the head: more columns
            hidden.append(factor * (part.hidden.to(of.down.dtype) @ of.down.t()))
            matrices.append(of.up)
    wide = torch.promote_types(states.head.weight.dtype, away.head.weight.dtype)
    matrix = torch.cat([m.to(wide) for m in matrices], 1)
    return States(torch.cat([h.to(hidden[0].dtype) for h in hidden], -1), Head(matrix, temperature=temperature))


def _detached(head: Head) -> Head:
    """The same head, through which no gradient passes."""
    tensors = {f.name: value.detach() for f in fields(head) if isinstance(value := getattr(head, f.name), Tensor)}
    return replace(head, **tensors)
