"""Divergences between the next-token distributions of two scorers over the whole vocabulary, and the soft value of one, without [tokens,
vocabulary] logits.

As the log-prob op (`policies/logprob.py`): logits of both scorers are made for a chunk of tokens, reduced to a number per token, and made
again in the backward pass. A chunk has all words here, because the support of a top-k divergence is known only when all are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefopt.policies.logprob import ALL, Head, Logits, operands, product_type

# Logits of a scorer held at a time, in numbers; some ten arrays of that size are alive at once.
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 25}

KINDS = ("reverse", "forward", "js", "tv")


def token_divergence(hidden: Tensor, head: Head, other_hidden: Tensor, other_head: Head, kind: str = "reverse", top_k: int | None = None,
                     beta: float = 0.5) -> Tensor:
    """[N] divergence in nats, fp32 (float64 if the inputs are), at each of N positions, of p = softmax of the policy's logits (`hidden`
    [N, D], `head`) and q = softmax of the other scorer's (`other_hidden` [N, D'], `other_head`, over the same vocabulary):

    reverse   KL(p || q) = sum p log(p / q): the policy covers no more than the other does
    forward   KL(q || p) = sum q log(q / p): the policy covers all that the other does; cross-entropy distillation up to a constant
    js        beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p: GKD's generalised Jensen-Shannon divergence (arXiv
              2306.13649); Jensen-Shannon at beta 1/2, at most ln 2
    tv        sum |p - q|: twice the total variation, in [0, 2]; where p = q its gradient is taken as 0

    `top_k`: only the k words that q likes best count one by one; all others are one more outcome, with the mass that p and q give them
    (the tail term of SDPO, arXiv 2601.20802). Merging outcomes never raises a divergence, so this is a lower bound of the full one, and
    0 where the distributions agree; leaving the tail out, or renormalising without it, lets p's tail grow unseen.

    Gradients reach both scorers' tensors; those that need none (a frozen or detached scorer) cost no product. No second derivatives.
    ValueError for different vocabularies, an unknown kind, a `top_k` below 1 or a `beta` outside (0, 1).
    """
    if len(head.weight) != len(other_head.weight):
        raise ValueError(f"the scorers' vocabularies have {len(head.weight)} and {len(other_head.weight)} words; a divergence needs one")
    if len(hidden) != len(other_hidden):
        raise ValueError(f"{len(hidden)} positions of one scorer and {len(other_hidden)} of the other")
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
    if top_k is not None and top_k < 1 or not 0 < beta < 1:
        raise ValueError(f"top_k is at least 1 and beta between 0 and 1, not {top_k} and {beta}")
    if top_k is not None and top_k >= len(head.weight):
        top_k = None
    scorers, tensors = [], []
    for states, of in ((hidden, head), (other_hidden, other_head)):
        dtype = product_type(states)
        tensors += operands(states, of, dtype)
        scorers.append((of.softcap, of.temperature, dtype))
    return _TokenDivergence.apply(*tensors, scorers, kind, top_k, beta)


@torch.no_grad()
def token_value(hidden: Tensor, head: Head, weight: float = 1.0, temperature: float = 1.0) -> Tensor:
    """[N] soft value temperature x log sum_v p_v^(weight / temperature) at each of N positions, in nats, of p = softmax of the logits;
    fp32 (float64 if the inputs are). 0 where weight = temperature, above 0 below, the larger the wider p is. No gradient.

    ValueError for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is above 0, not {temperature}")
    dtype = product_type(hidden)
    logits = Logits(operands(hidden, head, dtype), head.softcap, head.temperature, dtype)
    made = hidden.new_zeros(len(hidden), dtype=logits.wide)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in _parts(hidden, head.weight):
            made[part] = temperature * (logits.tile(part, ALL).log_softmax(-1) * (weight / temperature)).logsumexp(-1)
    return made


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        tensors, (scorers, kind, top_k, beta) = arguments[:10], arguments[10:]
        ctx.settings = scorers, kind, beta
        p_logits, q_logits = Logits(tensors[:5], *scorers[0]), Logits(tensors[5:], *scorers[1])
        hidden, wide = tensors[0], torch.promote_types(p_logits.wide, q_logits.wide)
        made = hidden.new_zeros(len(hidden), dtype=wide)
        top = hidden.new_zeros(len(hidden), top_k or 0, dtype=torch.long)  # saved: equal logits could be picked in another order later
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(hidden, tensors[1]):
                p, q = (side.tile(part, ALL).log_softmax(-1) for side in (p_logits, q_logits))
                if top_k:
                    top[part] = q.topk(top_k).indices
                    p, q = (_coarse(logp, top[part]) for logp in (p, q))
                made[part] = _divergence(p, q, kind, beta)
        ctx.save_for_backward(*tensors, top)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *tensors, top = ctx.saved_tensors
        scorers, kind, beta = ctx.settings
        needs = ctx.needs_input_grad[:5], ctx.needs_input_grad[5:10]
        p_logits, q_logits = (Logits(tuple(tensors[5 * i : 5 * i + 5]), *scorers[i], needs[i]) for i in (0, 1))
        with torch.autocast(grad.device.type, enabled=False):
            for part in _parts(tensors[0], tensors[1]):
                p, q = (side.tile(part, ALL).log_softmax(-1) for side in (p_logits, q_logits))
                chosen = top[part]
                coarse = [_coarse(logp, chosen) for logp in (p, q)] if chosen.shape[1] else [p, q]
                for side, need, logp, flow in zip((p_logits, q_logits), needs, (p, q), _flows(*coarse, kind, beta), strict=True):
                    if any(need):
                        dz = _fine(flow, logp, chosen) if chosen.shape[1] else flow
                        dz -= logp.exp() * flow.sum(-1, keepdim=True)  # through the softmax
                        side.add(part, ALL, dz.mul_(grad[part, None]).to(side.wide))
        return *p_logits.gradients(), *q_logits.gradients(), None, None, None, None


def _parts(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """The tokens in pieces whose logits are a chunk."""
    size = max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // len(weight))
    return (slice(i, i + size) for i in range(0, len(hidden), size))


def _divergence(p: Tensor, q: Tensor, kind: str, beta: float) -> Tensor:
    """Sum over the last axis, of log-probs."""
    if kind == "reverse":
        return (p.exp() * (p - q)).sum(-1)
    if kind == "forward":
        return (q.exp() * (q - p)).sum(-1)
    if kind == "tv":
        return (p.exp() - q.exp()).abs().sum(-1)
    m = _mixture(p, q, beta)
    return ((1 - beta) * p.exp() * (p - m) + beta * q.exp() * (q - m)).sum(-1)


def _flows(p: Tensor, q: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """(p times the derivative by p, q times the derivative by q), up to multiples of p and q, which a softmax takes away."""
    if kind == "reverse":
        return p.exp() * (p - q), -p.exp()
    if kind == "forward":
        return -q.exp(), q.exp() * (q - p)
    if kind == "tv":
        sign = (p - q).sign()
        return p.exp() * sign, -q.exp() * sign
    m = _mixture(p, q, beta)
    return (1 - beta) * p.exp() * (p - m), beta * q.exp() * (q - m)


def _mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))


def _coarse(logp: Tensor, top: Tensor) -> Tensor:
    """[c, k + 1] log-probs of the words in `top` and of all others together."""
    rest = logp.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logp.gather(-1, top), rest], -1)


def _fine(flow: Tensor, logp: Tensor, top: Tensor) -> Tensor:
    """[c, V] of `flow` [c, k + 1]: the last outcome's is shared among its words as their mass is."""
    rest = logp.scatter(-1, top, -torch.inf).log_softmax(-1).exp_()
    return rest.mul_(flow[:, -1:]).scatter_(-1, top, flow[:, :-1])
