"""Log-probs of target tokens from hidden states, without ever holding [tokens, vocabulary] logits.

The plain way materialises N x V logits, their log-softmax and their gradient: at 2,048 tokens and a vocabulary of 128k, 1 GB each in fp32.
Here logits are made for a chunk of tokens at a time, reduced to a number per token, and made again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Logits held at a time, in numbers. Small enough for a CPU's caches to help, large enough for a GPU's matrix units to be busy.
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: z = cap(h W^T + b) / temperature, with cap(x) = softcap tanh(x / softcap) or x."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    temperature: float = 1.0


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """[N] log softmax(z)[target] in nats, fp32 (float64 if the inputs are), of `hidden` [N, D] and `targets` [N].

    Matrix products run in autocast's type if there is one, else in that of `hidden`; log-sum-exp and the accumulated gradient of the weight
    in fp32. Gradients reach `hidden`, `head.weight` and `head.bias`; a frozen weight costs no third product.
    """
    return token_logprobs_and_entropy(hidden, head, targets, entropy=False)[0]


def token_logprobs_and_entropy(hidden: Tensor, head: Head, targets: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor]:
    """([N] log-probs, [N] entropies of softmax(z) in nats); without `entropy` the second is empty."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, head.softcap, head.temperature, dtype, entropy)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, temperature, dtype, entropy):
        ctx.settings = (softcap, temperature, dtype, entropy)
        wide, cast = _wide(dtype), weight.to(dtype)
        made = hidden.new_empty(len(hidden), dtype=wide)
        norm, spread = torch.empty_like(made), torch.empty_like(made if entropy else made[:0])
        for part in _chunks(hidden, weight):
            z = _logits(hidden[part], cast, bias, softcap, temperature, dtype)[0]
            norm[part] = z.logsumexp(-1)
            made[part] = z.gather(-1, targets[part, None]).squeeze(-1) - norm[part]
            if entropy:
                spread[part] = norm[part] - ((z - norm[part, None]).exp() * z).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, norm, spread)
        return made, spread

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        hidden, weight, bias, targets, norm, spread = ctx.saved_tensors
        softcap, temperature, dtype, entropy = ctx.settings
        wide, cast = _wide(dtype), weight.to(dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        for part in _chunks(hidden, weight):
            z, squashed = _logits(hidden[part], cast, bias, softcap, temperature, dtype)
            p = (z - norm[part, None]).exp_()
            g = grad[part, None].to(wide)
            if entropy:  # dH/dz = -p (z - sum p z), and sum p z = norm - H
                dz = p * (-g - grad_entropy[part, None].to(wide) * (z - norm[part, None] + spread[part, None]))
            else:
                dz = p.mul_(-g)
            dz.scatter_add_(-1, targets[part, None], g)
            dz /= temperature
            if softcap:
                dz *= 1 - squashed**2
            if need_bias:
                d_bias += dz.sum(0)
            dz = dz.to(dtype)
            if need_hidden:
                d_hidden[part] = (dz @ cast).to(hidden.dtype)
            if need_weight:
                d_weight += _product(dz.t(), hidden[part].to(dtype), wide)
        return (d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None if d_bias is None else d_bias.to(bias.dtype),
                None, None, None, None, None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(hidden: Tensor, weight: Tensor):
    size = max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // weight.shape[0])
    return [slice(i, i + size) for i in range(0, len(hidden), size)]


def _logits(hidden: Tensor, cast: Tensor, bias: Tensor | None, softcap: float | None, temperature: float, dtype) -> tuple[Tensor, Tensor]:
    """(z, tanh of the softcap) of a chunk."""
    with torch.autocast(hidden.device.type, enabled=False):  # the type is chosen here, not by whoever runs the backward pass
        z = (hidden.to(dtype) @ cast.t()).to(_wide(dtype))
    if bias is not None:
        z = z + bias
    squashed = z
    if softcap:
        squashed = (z / softcap).tanh()
        z = softcap * squashed
    return (z / temperature if temperature != 1 else z), squashed


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a b with a result in `wide`: on a GPU without rounding the chunk's sum to the narrow type first."""
    if a.dtype != wide and a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return (a @ b).to(wide)
