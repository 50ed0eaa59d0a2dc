"""The chunked log-prob op equals log-softmax, in values and in every gradient, however it is cut."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefopt.policies import logprob
from prefopt.policies.logprob import Head, token_logprobs, token_logprobs_and_entropy

N, D, V = 13, 8, 29


def inputs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(V, (N,), generator=generator)
    return *(t.to(dtype).requires_grad_() for t in (hidden, weight, bias)), targets


def plain(hidden, weight, bias, targets, softcap, temperature):
    z = hidden @ weight.t() + (0 if bias is None else bias)
    z = softcap * (z / softcap).tanh() if softcap else z
    logp = (z / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def in_pieces(monkeypatch, pieces: int, tokens: int = N, words: int = V) -> None:
    """So that the op goes through the vocabulary in so many pieces."""
    monkeypatch.setattr(logprob, "NARROW", 1)
    monkeypatch.setitem(logprob.CHUNK, "cpu", tokens * math.ceil(words / pieces))
    assert len(list(logprob._words(torch.empty(tokens, 1), torch.empty(words, 1)))) == pieces


@pytest.fixture(params=[1, 8, V])
def chunk(request, monkeypatch):
    in_pieces(monkeypatch, request.param)


class Seen(TorchDispatchMode):
    """Which types are multiplied, and the sizes of all that is made."""

    def __init__(self):
        super().__init__()
        self.products, self.sizes = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if "mm" in function.__name__:
            self.products.add(frozenset(t.dtype for t in args if t.dim() == 2 and t is not made))
        self.sizes += [t.numel() for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]
        return made


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_equals_log_softmax(chunk, softcap, temperature, with_bias, entropy):
    hidden, weight, bias, targets = inputs()
    head = Head(weight, bias if with_bias else None, softcap, temperature)
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    made = token_logprobs_and_entropy(hidden, head, targets, entropy)
    want = plain(hidden, weight, head.bias, targets, softcap, temperature)
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)

    def loss(pair):
        return (pair[0] * upstream).sum() + ((pair[1] * upstream.flip(0)).sum() if entropy else 0)

    torch.testing.assert_close(made[0], want[0], rtol=1e-12, atol=1e-12)
    assert made[1].shape == ((N,) if entropy else (0,))
    for got, expected in zip(torch.autograd.grad(loss(made), leaves), torch.autograd.grad(loss(want), leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_gradcheck(chunk):
    hidden, weight, bias, targets = inputs()
    assert torch.autograd.gradcheck(lambda h, w, b: token_logprobs_and_entropy(h, Head(w, b, 3.0, 0.8), targets), (hidden, weight, bias))


def test_a_frozen_weight_gets_no_gradient_and_frozen_hidden_states_neither():
    hidden, weight, _, targets = inputs()
    token_logprobs(hidden, Head(weight.detach()), targets).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    hidden.grad = None
    token_logprobs(hidden.detach(), Head(weight), targets).sum().backward()
    assert hidden.grad is None and weight.grad is not None


def test_tied_weights_add_up():
    """The head is the embedding: its gradient is the sum of both uses."""
    _, weight, _, targets = inputs()
    ids = torch.arange(N) % V
    token_logprobs(weight[ids], Head(weight), targets).sum().backward()
    made, weight.grad = weight.grad, None
    plain(weight[ids], weight, None, targets, None, 1.0)[0].sum().backward()
    torch.testing.assert_close(made, weight.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [64, 512])
@pytest.mark.parametrize("entropy", [False, True])
def test_nothing_of_size_tokens_times_vocabulary_is_made(tokens, entropy, monkeypatch):
    """The largest tensor of a step is the weight or a chunk, however many tokens there are."""
    words, width = 600, 4
    monkeypatch.setattr(logprob, "NARROW", 1)
    monkeypatch.setitem(logprob.CHUNK, "cpu", 3000)
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(words, width, requires_grad=True)
    with Seen() as seen:
        made = token_logprobs_and_entropy(hidden, Head(weight), torch.randint(words, (tokens,)), entropy)
        sum(m.sum() for m in made).backward()
    assert max(seen.sizes) <= 3000 < tokens * words / 10


@pytest.mark.parametrize("size", [0, 1])
def test_few_tokens(size):
    hidden, weight, _, targets = inputs()
    made = token_logprobs(hidden[:size], Head(weight), targets[:size])
    made.sum().backward()
    assert made.shape == (size,) and torch.isfinite(weight.grad).all()


# ---- types (traps 7, 22, 23, 26) ----


@pytest.mark.parametrize("low_rank", [False, True])
def test_under_autocast_products_are_bf16_and_sums_are_not(low_rank):
    """Trap: a custom function does not see autocast, or computes its backward pass outside of it in another type."""
    hidden, weight, _, targets = inputs(torch.float32)
    down, up = torch.randn(2, D, requires_grad=True), torch.randn(V, 2, requires_grad=True)
    head = Head(weight, down=down, up=up) if low_rank else Head(weight)
    with Seen() as seen:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = token_logprobs(hidden, head, targets)
        made.sum().backward()
    assert seen.products == {frozenset([torch.bfloat16])}
    assert made.dtype == torch.float32 and weight.grad.dtype == torch.float32
    with torch.no_grad():
        z = (hidden.bfloat16() @ weight.bfloat16().t()).float()
        if low_rank:
            z += (hidden.bfloat16() @ down.bfloat16().t() @ up.bfloat16().t()).float()
        want = z.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(made, want, rtol=1e-5, atol=1e-5)


def test_products_follow_the_type_of_the_hidden_states_without_autocast_and_none_is_narrowed_by_it_in_the_backward_pass():
    hidden, weight, _, targets = inputs(torch.float32)
    with Seen() as seen:
        made = token_logprobs(hidden, Head(weight), targets)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made.sum().backward()
    assert seen.products == {frozenset([torch.float32])}


def test_a_sequence_of_bf16_states_is_summed_in_fp32():
    """Trap: logged sums that sit on bf16's steps. The op is within 1e-3 nats of float64 sums of the same logits; bf16 sums are not."""
    tokens, words = 300, 2000
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, 64, generator=generator).bfloat16()
    weight = torch.randn(words, 64, generator=generator).mul(0.3).bfloat16()
    targets = torch.randint(words, (tokens,), generator=generator)
    z = (hidden @ weight.t()).double()
    want = z.log_softmax(-1).gather(-1, targets[:, None]).sum()
    made = token_logprobs(hidden, Head(weight), targets)
    assert made.dtype == torch.float32 and abs(made.sum() - want) < 1e-3
    narrow = z.bfloat16().log_softmax(-1).gather(-1, targets[:, None]).sum()
    assert abs(narrow - want) > 0.1


@pytest.mark.parametrize("pieces", [1, 8, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_gradients_in_any_number_of_pieces_are_those_of_float64(pieces, dtype, tolerance, monkeypatch):
    """With another upstream gradient for each token; the error, relative to the largest entry, does not grow with the pieces."""
    tokens, words, width = 40, 64, 16
    in_pieces(monkeypatch, pieces, tokens, words)
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype).requires_grad_() for n in (tokens, words))
    targets = torch.randint(words, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    token_logprobs(hidden, Head(weight), targets).backward(upstream)
    plain(*exact, None, targets, None, 1.0)[0].backward(upstream.double())
    for made, want in zip((hidden, weight), exact, strict=True):
        assert made.grad.dtype == dtype
        assert (made.grad.double() - want.grad).abs().max() < tolerance * want.grad.abs().max()


def test_gradients_are_summed_over_pieces_in_fp32(monkeypatch):
    """Many small shares: 2,000 words take 0.0005 each from a hidden state's gradient, which bf16 sums would not notice at -1."""
    words = 2000
    in_pieces(monkeypatch, words, 1, words)
    hidden, weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True), torch.ones(words, 1, dtype=torch.bfloat16)
    weight[0] = -1
    token_logprobs(hidden, Head(weight), torch.zeros(1, dtype=torch.long)).sum().backward()
    assert hidden.grad.item() == pytest.approx(-2, rel=0.01)


def test_weight_gradient_is_summed_over_tokens_in_fp32():
    """Many small shares: summed in bf16 they would stop growing at 256 times the share."""
    hidden, weight = torch.ones(2000, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    token_logprobs(hidden, Head(weight), torch.zeros(2000, dtype=torch.long)).sum().backward()
    assert weight.grad[0].item() == pytest.approx(1000, rel=0.01)


def test_extreme_logits_stay_finite(chunk):
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    made, entropy = token_logprobs_and_entropy(hidden, Head(weight), torch.tensor([0, 0]))
    (made.sum() + entropy.sum()).backward()
    assert made.tolist() == [0.0, -2e4] and entropy.tolist() == [0.0, 0.0]
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_beyond_the_range_of_fp16_stay_finite(autocast):
    """Trap: a product of 96,000 is infinite in fp16, and log-softmax makes NaN of it."""
    dtype = torch.float32 if autocast else torch.float16
    hidden = torch.tensor([[300.0, 20.0], [-300.0, 10.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[320.0, 1.0], [-320.0, 2.0], [0.0, 3.0]], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16) if autocast else contextlib.nullcontext():
        made = token_logprobs(hidden, Head(weight), torch.tensor([0, 2]))
    made.sum().backward()
    assert made[0] == 0 and made[1].item() == pytest.approx(-96000 + 10, rel=1e-4)
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


# ---- adapters ----


@pytest.mark.parametrize("entropy", [False, True])
def test_a_low_rank_term_equals_the_merged_weight(chunk, entropy):
    hidden, weight, bias, targets = inputs()
    down, up = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, D), (V, 2)))
    made = token_logprobs_and_entropy(hidden, Head(weight, bias, 3.0, 0.8, down, up), targets, entropy)
    want = plain(hidden, weight + up @ down, bias, targets, 3.0, 0.8)
    leaves = (hidden, weight, bias, down, up)

    def loss(pair):
        return (pair[0] ** 2).sum() + (pair[1].sin().sum() if entropy else 0)

    torch.testing.assert_close(made[0], want[0], rtol=1e-12, atol=1e-12)
    for got, expected in zip(torch.autograd.grad(loss(made), leaves), torch.autograd.grad(loss(want), leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_small_low_rank_term_is_not_rounded_away_in_bf16():
    """Merged, it would be less than half a step of the bf16 weight it is added to, and the first steps of LoRA would change nothing."""
    hidden, weight = torch.ones(1, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16)
    down, up = torch.full((1, 4), 0.01), torch.tensor([[0.03], [0.0]])
    gain = token_logprobs(hidden, Head(weight, down=down, up=up), torch.zeros(1, dtype=torch.long)) + math.log(2)
    assert gain.item() == pytest.approx(0.5 * 0.04 * 0.03, rel=0.01)
