"""Log-probs of target tokens from hidden states, without ever holding [tokens, vocabulary] logits.

The plain way materialises N x V logits, their log-softmax and their gradient: at 2,048 tokens and a vocabulary of 128k, 1 GB each in fp32.
Here logits are made for some words of the vocabulary at a time, reduced to a number per token, and made again in the backward pass. Words
rather than tokens, because then each row of the weight's gradient is one matrix product over all tokens, and nothing of the weight's size
is read and written again for every chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at a time, in numbers. Small enough for a CPU's caches to help, large enough for a GPU's matrix units to be busy.
CHUNK = {"cpu": 1 << 21, "cuda": 1 << 27}
NARROW = 128  # columns below which a matrix product is mostly overhead, however many tokens there are

ALL = slice(None)


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: z = cap(h W^T + (h A^T) B^T + b) / temperature, cap(x) = softcap tanh(x / softcap) or x.

    A and B are LoRA's (arXiv 2106.09685), apart from W: added to a bf16 W, the first steps of training would be rounded away.
    """

    weight: Tensor  # W [V, D]
    bias: Tensor | None = None  # b [V]
    softcap: float | None = None
    temperature: float = 1.0
    down: Tensor | None = None  # A [R, D], its scale multiplied in
    up: Tensor | None = None  # B [V, R]


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """[N] log softmax(z)[target] in nats, fp32 (float64 if the inputs are), of `hidden` [N, D] and `targets` [N].

    Matrix products run in autocast's type if there is one, else in that of `hidden`; log-sum-exp and accumulated gradients in fp32.
    Gradients reach `hidden` and every tensor of `head`; a frozen weight costs no third product. No second derivatives.
    """
    return token_logprobs_and_entropy(hidden, head, targets, entropy=False)[0]


def token_logprobs_and_entropy(hidden: Tensor, head: Head, targets: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor]:
    """([N] log-probs, [N] entropies of softmax(z) in nats); without `entropy` the second is empty."""
    dtype = product_type(hidden)
    return _TokenLogprobs.apply(*operands(hidden, head, dtype), targets, head.softcap, head.temperature, dtype, entropy)


def product_type(hidden: Tensor) -> torch.dtype:
    """The type of matrix products: autocast's, which custom functions do not see by themselves, or else that of `hidden`."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def operands(hidden: Tensor, head: Head, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """(hidden, weight, bias, h A^T, B), what `Logits` is made of."""
    low = None
    if head.down is not None:
        with torch.autocast(hidden.device.type, enabled=False):
            low = hidden.to(dtype) @ head.down.to(dtype).t()
    return hidden, head.weight, head.bias, low, head.up


class Logits:
    """The logits of one scorer, tile by tile, and the gradients that come back through them: the inside of an autograd function."""

    def __init__(self, tensors: tuple[Tensor | None, ...], softcap: float | None, temperature: float, dtype: torch.dtype,
                 needs: tuple[bool, ...] = (False,) * 5):
        self.tensors, self.softcap, self.temperature, self.dtype = tensors, softcap, temperature, dtype
        self.wide = wide_type(dtype)
        self.grads = [torch.zeros_like(t, dtype=self.wide) if need else None for t, need in zip(tensors, needs, strict=True)]
        self.left = [t if t is None else t.to(dtype) for t in tensors[::3]]  # hidden, h A^T
        self.right: tuple[slice | None, list[Tensor | None]] = (None, [])
        self.squashed: Tensor | None = None

    def _columns(self, columns: slice) -> list[Tensor | None]:
        """W and B of some words, cast. Kept until others are asked for: a bf16 copy of the whole weight only where all are used at once."""
        if self.right[0] != columns:
            self.right = (columns, [t if t is None else t[columns].to(self.dtype) for t in (self.tensors[1], self.tensors[4])])
        return self.right[1]

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """z of some tokens and some words, in fp32 (float64)."""
        z, bias = None, self.tensors[2]
        for a, b in zip(self.left, self._columns(columns), strict=True):
            if a is not None:
                part = _product(a[rows], b.t(), self.wide)
                z = part if z is None else z.add_(part)
        if bias is not None:
            z += bias[columns]
        if self.softcap:
            self.squashed = z.div_(self.softcap).tanh_()
            z = self.softcap * self.squashed
        return z.div_(self.temperature) if self.temperature != 1 else z

    def add(self, rows: slice, columns: slice, dz: Tensor) -> None:
        """Takes the gradient at the tile made last; overwrites it."""
        if self.temperature != 1:
            dz /= self.temperature
        if self.softcap:
            dz *= 1 - self.squashed**2
        if self.grads[2] is not None:
            self.grads[2][columns] += dz.sum(0)
        dz = dz.to(self.dtype)
        for i, (a, b) in enumerate(zip(self.left, self._columns(columns), strict=True)):
            d_a, d_b = self.grads[3 * i], self.grads[3 * i + 1]
            if d_a is not None:
                _accumulate(d_a[rows], dz, b)
            if d_b is not None:
                _accumulate(d_b[columns], dz.t(), a[rows])

    def gradients(self) -> tuple[Tensor | None, ...]:
        return tuple(g if g is None else g.to(t.dtype) for g, t in zip(self.grads, self.tensors, strict=True))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, low, up, targets, softcap, temperature, dtype, entropy):
        ctx.settings = (softcap, temperature, dtype)
        logits = Logits((hidden, weight, bias, low, up), *ctx.settings)
        made = hidden.new_zeros(len(hidden), dtype=logits.wide)
        norm, mean = torch.full_like(made, -torch.inf), torch.zeros_like(made if entropy else made[:0])
        with torch.autocast(hidden.device.type, enabled=False):
            for words in _words(hidden, weight):
                z = logits.tile(ALL, words)
                place, inside = _place(targets, words)
                made += torch.where(inside, z.gather(-1, place).squeeze(-1), 0)
                old, norm = norm, torch.logaddexp(norm, z.logsumexp(-1))
                if entropy:  # the mean of z so far, under the softmax so far
                    mean = mean * (old - norm).exp() + ((z - norm[:, None]).exp_() * z).sum(-1)
        spread = norm - mean if entropy else mean
        ctx.save_for_backward(hidden, weight, bias, low, up, targets, norm, spread)
        return made - norm, spread

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_entropy):
        *tensors, targets, norm, spread = ctx.saved_tensors
        logits = Logits(tuple(tensors), *ctx.settings, ctx.needs_input_grad[:5])
        grad, grad_entropy, norm = grad.to(logits.wide), grad_entropy[:, None].to(logits.wide), norm[:, None]
        with torch.autocast(norm.device.type, enabled=False):
            for words in _words(tensors[0], tensors[1]):
                z = logits.tile(ALL, words).sub_(norm)
                if len(spread):  # dH/dz = -p (z - sum p z), and sum p z = norm - H
                    dz = z.exp() * (-grad[:, None] - grad_entropy * (z + spread[:, None]))
                else:
                    dz = z.exp_().mul_(-grad[:, None])
                place, inside = _place(targets, words)
                dz.scatter_add_(-1, place, torch.where(inside, grad, 0)[:, None])
                logits.add(ALL, words, dz)
        return *logits.gradients(), None, None, None, None, None


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _words(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """The vocabulary in pieces whose logits for all tokens are a chunk."""
    words = len(weight)
    size = min(words, max(NARROW, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // max(1, len(hidden))))
    return (slice(i, min(i + size, words)) for i in range(0, words, size))


def _place(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """([N, 1] column of each target among `words`, [N] whether it is one of them); elsewhere the column is any. No copy to the host."""
    inside = (targets >= words.start) & (targets < words.stop)
    return (targets - words.start).clamp_(0, words.stop - words.start - 1)[:, None], inside


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a b with a result in `wide`: on a GPU without rounding it to the narrow type first; in fp16, whose range is small, nowhere."""
    if a.is_cuda and a.dtype != wide:
        return torch.mm(a, b, out_dtype=wide)
    if a.dtype == torch.float16:
        return a.to(wide) @ b.to(wide)
    return (a @ b).to(wide)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in total's type."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b, total.dtype)
