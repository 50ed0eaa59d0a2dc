"""The chunked log-prob op equals log-softmax, in values and in every gradient, however it is cut."""

from __future__ import annotations

import pytest
import torch

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


@pytest.fixture(params=[V, 3 * V, 1 << 22], ids=["one row", "three rows", "all rows"])
def chunk(request, monkeypatch):
    monkeypatch.setitem(logprob.CHUNK, "cpu", request.param)


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


def test_nothing_of_size_tokens_times_vocabulary_is_kept(monkeypatch):
    monkeypatch.setitem(logprob.CHUNK, "cpu", 2 * V)
    hidden, weight, bias, targets = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        sizes: list[int] = []
        token_logprobs(hidden, Head(weight, bias), targets)
    assert max(sizes) < N * V


@pytest.mark.parametrize("size", [0, 1])
def test_few_tokens(size):
    hidden, weight, _, targets = inputs()
    made = token_logprobs(hidden[:size], Head(weight), targets[:size])
    made.sum().backward()
    assert made.shape == (size,) and torch.isfinite(weight.grad).all()


def test_under_autocast_products_are_bf16_and_sums_are_not(monkeypatch):
    """Trap: log-sum-exp of thousands of bf16 numbers, or a weight gradient that is summed over chunks in bf16."""
    hidden, weight, _, targets = inputs(torch.float32)
    seen: set[tuple[torch.dtype, torch.dtype]] = set()

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in function.__name__:
                seen.add((args[0].dtype, args[1].dtype))
            return function(*args, **(kwargs or {}))

    with Seen():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = token_logprobs(hidden, Head(weight), targets)
        made.sum().backward()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert made.dtype == torch.float32 and weight.grad.dtype == torch.float32
    with torch.no_grad():
        z = (hidden.bfloat16() @ weight.bfloat16().t()).float()
        want = z.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(made, want, rtol=1e-6, atol=1e-6)


def test_weight_gradient_is_summed_over_chunks_in_fp32(monkeypatch):
    """Many small shares: summed in bf16 they would stop growing at 256 times the share."""
    monkeypatch.setitem(logprob.CHUNK, "cpu", 2)
    hidden, weight = torch.ones(2000, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    made = token_logprobs(hidden, Head(weight), torch.zeros(2000, dtype=torch.long))
    made.sum().backward()
    assert weight.grad[0].item() == pytest.approx(1000, rel=0.01)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    made = token_logprobs(hidden, Head(weight), torch.tensor([0, 0]))
    made.sum().backward()
    assert made.tolist() == [0.0, -2e4] and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
