"""The chunked divergence op equals its definition over full distributions, in values and in every gradient, however it is cut."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.policies import divergence
from prefopt.policies.divergence import KINDS, token_divergence, token_value
from prefopt.policies.logprob import Head
from tests.unit.test_logprob import Seen

N, D, E, V = 12, 8, 5, 29


def inputs(dtype=torch.float64, seed=0):
    """(hidden, weight, bias) of the policy and of another scorer, whose hidden states are narrower."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, D), (V, D), (V,), (N, E), (V, E), (V,))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def heads(weight, bias, other_weight, other_bias):
    return Head(weight, bias, softcap=3.0, temperature=0.8), Head(other_weight, other_bias, temperature=1.3)


def probabilities(hidden, head):
    z = hidden @ head.weight.t() + (0 if head.bias is None else head.bias)
    z = head.softcap * (z / head.softcap).tanh() if head.softcap else z
    return (z / head.temperature).softmax(-1)


def plain(hidden, head, other_hidden, other_head, kind, top_k, beta):
    """By the definitions, from full distributions."""
    p, q = probabilities(hidden, head), probabilities(other_hidden, other_head)
    if top_k is not None and top_k < V:
        best = q.argsort(-1, descending=True)[:, :top_k]
        p, q = (torch.cat([d.gather(-1, best), 1 - d.gather(-1, best).sum(-1, keepdim=True)], -1) for d in (p, q))
    if kind == "reverse":
        return (p * (p / q).log()).sum(-1)
    if kind == "forward":
        return (q * (q / p).log()).sum(-1)
    if kind == "tv":
        return (p - q).abs().sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


def in_pieces(monkeypatch, pieces: int, tokens: int = N, words: int = V) -> None:
    monkeypatch.setitem(divergence.CHUNK, "cpu", words * math.ceil(tokens / pieces))
    assert len(list(divergence._parts(torch.empty(tokens, 1), torch.empty(words, 1)))) == pieces


@pytest.fixture(params=[1, 3, N])
def chunk(request, monkeypatch):
    in_pieces(monkeypatch, request.param)


@pytest.mark.parametrize("top_k", [None, 1, 6, V - 1, V])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(chunk, kind, top_k):
    """With another upstream gradient for each token, and gradients to both scorers."""
    leaves = inputs()
    hidden, weight, bias, other, other_weight, other_bias = leaves
    head, other_head = heads(weight, bias, other_weight, other_bias)
    made = token_divergence(hidden, head, other, other_head, kind, top_k, 0.3)
    want = plain(hidden, head, other, other_head, kind, top_k, 0.3)
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    torch.testing.assert_close(made, want, rtol=1e-9, atol=1e-12)
    for got, expected in zip(torch.autograd.grad(made @ upstream, leaves), torch.autograd.grad(want @ upstream, leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, top_k, monkeypatch):
    in_pieces(monkeypatch, 3)
    assert torch.autograd.gradcheck(
        lambda h, w, b, o, ow, ob: token_divergence(h, heads(w, b, ow, ob)[0], o, heads(w, b, ow, ob)[1], kind, top_k), inputs())


def test_adapters_of_either_scorer_count():
    hidden, weight, _, other, other_weight, _ = inputs()
    down, up = torch.randn(2, D, dtype=torch.float64, requires_grad=True), torch.randn(V, 2, dtype=torch.float64, requires_grad=True)
    made = token_divergence(hidden, Head(weight, down=down, up=up), other, Head(other_weight)).sum()
    want = plain(hidden, Head(weight + up @ down), other, Head(other_weight), "reverse", None, 0.5).sum()
    for got, expected in zip(torch.autograd.grad(made, (hidden, down, up)), torch.autograd.grad(want, (hidden, down, up)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_scorer_gets_no_gradient_and_costs_no_product(kind):
    hidden, weight, _, other, other_weight, _ = inputs()

    def products(detach: bool) -> int:
        o, ow = (other.detach(), other_weight.detach()) if detach else (other, other_weight)
        made = token_divergence(hidden, Head(weight), o, Head(ow), kind)
        with torch.profiler.profile() as profile:
            made.sum().backward()
        return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm_"))

    assert products(detach=True) == 4  # both scorers' logits, and two for the policy's gradients
    assert other.grad is None and other_weight.grad is None and hidden.grad is not None
    assert products(detach=False) == 6
    assert other.grad is not None and other_weight.grad is not None


# ---- limits ----


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_scorers_are_at_distance_0_with_no_gradient(kind, top_k):
    hidden, weight, bias = inputs(torch.float32)[:3]
    twin = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    made = token_divergence(hidden, Head(weight, bias), twin[0], Head(*twin[1:]), kind, top_k)
    made.sum().backward()
    assert made.abs().max() < 1e-6
    for leaf in (hidden, weight, bias, *twin):
        assert leaf.grad.abs().max() < 1e-5


def test_js_is_symmetric_and_at_most_ln_2():
    hidden, weight, _, other, other_weight, _ = inputs()
    ahead, back = (token_divergence(*pair, "js") for pair in ((hidden, Head(weight), other, Head(other_weight)),
                                                              (other, Head(other_weight), hidden, Head(weight))))
    torch.testing.assert_close(ahead, back, rtol=1e-12, atol=1e-12)
    assert (ahead > 0).all() and (ahead < math.log(2)).all()
    apart = token_divergence(1e4 * hidden, Head(weight), -1e4 * hidden, Head(weight), "js")
    torch.testing.assert_close(apart, torch.full_like(apart, math.log(2)), rtol=1e-9, atol=0)


def test_js_of_a_small_beta_is_a_kl():
    """D / beta -> KL(q || p) as beta -> 0, D / (1 - beta) -> KL(p || q) as beta -> 1 (arXiv 2306.13649, section 2)."""
    hidden, weight, _, other, other_weight, _ = inputs()
    arguments = hidden, Head(weight), other, Head(other_weight)
    for kind, beta in (("forward", 1e-8), ("reverse", 1 - 1e-8)):
        made = token_divergence(*arguments, "js", beta=beta) / 1e-8
        torch.testing.assert_close(made, token_divergence(*arguments, kind), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_more_words_raise_a_top_k_divergence_up_to_the_full_one(kind):
    hidden, weight, _, other, other_weight, _ = inputs()
    values = torch.stack([token_divergence(hidden, Head(weight), other, Head(other_weight), kind, k) for k in (1, 2, 8, 20, V - 1, None)])
    assert (values.diff(dim=0) > -1e-12).all() and (values >= 0).all()
    torch.testing.assert_close(values[-2], values[-1])  # a tail of one word is that word


def test_directions():
    """q has two words, p all: KL(q || p) is small, KL(p || q) large, and the other way round."""
    states, flat = torch.ones(1, 1), torch.zeros(4, 1)
    peaked = torch.tensor([[0.0], [0.0], [-30.0], [-30.0]])
    wide, narrow = (states, Head(flat)), (states, Head(peaked))
    assert token_divergence(*wide, *narrow, "forward").item() == pytest.approx(math.log(2), rel=1e-5)
    assert token_divergence(*wide, *narrow, "reverse").item() == pytest.approx(15 - math.log(2), rel=1e-5)
    assert token_divergence(*narrow, *wide, "reverse").item() == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind, top_k):
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    other_weight = torch.tensor([[-1.0], [0.5], [1.0]], requires_grad=True)
    made = token_divergence(hidden, Head(weight), hidden, Head(other_weight), kind, top_k)
    made.sum().backward()
    assert torch.isfinite(made).all() and (made >= 0).all()
    assert all(torch.isfinite(t.grad).all() for t in (hidden, weight, other_weight))


# ---- total variation and soft values ----


def test_total_variation_of_two_words():
    """p = (0.7, 0.3), q = (0.4, 0.6): 0.6; distributions with no word in common: 2."""
    one = torch.ones(1, 1, dtype=torch.float64)
    p, q = (Head(torch.tensor(d, dtype=torch.float64).log()[:, None]) for d in ((0.7, 0.3), (0.4, 0.6)))
    assert token_divergence(one, p, one, q, "tv").item() == pytest.approx(0.6, rel=1e-12)
    far = Head(torch.tensor([[1e3], [-1e3]], dtype=torch.float64))
    assert token_divergence(one, far, -one, far, "tv").item() == pytest.approx(2.0, rel=1e-12)


def test_soft_value_of_three_words():
    probabilities, one = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    head = Head(probabilities.log()[:, None])
    assert token_value(one, head, 0.7).item() == pytest.approx(0.264449, abs=1e-6)
    assert token_value(one, head, 1.0).item() == pytest.approx(0.0, abs=1e-12)
    assert token_value(one, head, 0.0).item() == pytest.approx(math.log(3), rel=1e-12)


@pytest.mark.parametrize(("weight", "temperature"), [(0.7, 1.0), (1.0, 1.0), (1.0, 2.5), (0.3, 0.5)])
def test_soft_value_equals_its_definition(chunk, weight, temperature):
    """From full distributions, of a head with bias, cap and temperature; no gradient comes back."""
    hidden, matrix, bias, *_ = inputs()
    head = heads(matrix, bias, matrix, bias)[0]
    made = token_value(hidden, head, weight, temperature)
    want = temperature * (probabilities(hidden, head) ** (weight / temperature)).sum(-1).log()
    torch.testing.assert_close(made, want.detach(), rtol=1e-9, atol=1e-12)
    assert not made.requires_grad and (weight == temperature or (made > 0).all() == (weight < temperature))


def test_soft_value_refuses_a_temperature_of_0():
    with pytest.raises(ValueError, match="temperature is above 0, not 0"):
        token_value(torch.zeros(N, D), Head(torch.zeros(V, D)), 1.0, 0)


# ---- types and memory ----


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_products_are_bf16_and_sums_are_not(kind, top_k):
    hidden, weight, _, other, other_weight, _ = inputs(torch.float32)
    with Seen() as seen:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = token_divergence(hidden, Head(weight), other, Head(other_weight), kind, top_k)
        made.sum().backward()
    assert seen.products == {frozenset([torch.bfloat16])}
    assert made.dtype == torch.float32 and weight.grad.dtype == torch.float32
    with torch.no_grad():
        z = [(a.bfloat16() @ b.bfloat16().t()).double() for a, b in ((hidden, weight), (other, other_weight))]
    one = torch.eye(V, dtype=torch.float64)
    torch.testing.assert_close(made.double(), plain(z[0], Head(one), z[1], Head(one), kind, top_k, 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pieces", [1, 8, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_any_number_of_pieces_are_those_of_float64(kind, dtype, tolerance, pieces, monkeypatch):
    tokens, words, width = 64, 40, 8
    in_pieces(monkeypatch, pieces, tokens, words)
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(n, width, generator=generator).to(dtype).requires_grad_() for n in (tokens, words, tokens, words)]
    upstream = torch.randn(tokens, generator=generator)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    token_divergence(leaves[0], Head(leaves[1]), leaves[2], Head(leaves[3]), kind).backward(upstream)
    plain(exact[0], Head(exact[1]), exact[2], Head(exact[3]), kind, None, 0.5).backward(upstream.double())
    for made, want in zip(leaves, exact, strict=True):
        assert (made.grad.double() - want.grad).abs().max() < tolerance * want.grad.abs().max()


@pytest.mark.parametrize("tokens", [64, 512])
@pytest.mark.parametrize("top_k", [None, 4])
def test_nothing_of_size_tokens_times_vocabulary_is_made(tokens, top_k, monkeypatch):
    words, width = 600, 4
    monkeypatch.setitem(divergence.CHUNK, "cpu", 5 * words)
    hidden, weight, other, other_weight = (torch.randn(n, width, requires_grad=True) for n in (tokens, words, tokens, words))
    with Seen() as seen:
        token_divergence(hidden, Head(weight), other, Head(other_weight), "js", top_k).sum().backward()
    assert max(seen.sizes) <= 5 * (words + 1) < tokens * words / 10


# ---- errors ----


@pytest.mark.parametrize(("change", "message"), [
    ({"words": V + 1}, f"vocabularies have {V} and {V + 1} words"),
    ({"tokens": N - 1}, f"{N} positions of one scorer and {N - 1} of the other"),
    ({"kind": "kl"}, "kind is one of reverse, forward, js, tv, not 'kl'"),
    ({"top_k": 0}, "top_k is at least 1"),
    ({"beta": 1.0}, "beta between 0 and 1"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, change = torch.zeros(N, D), torch.zeros(V, D), dict(change)
    tokens, words = change.pop("tokens", N), change.pop("words", V)
    with pytest.raises(ValueError, match=message):
        token_divergence(hidden, Head(weight), torch.zeros(tokens, E), Head(torch.zeros(words, E)), **change)
