"""What scorers are asked beside log-probs: they answer as their full logits would, whoever they are."""

from __future__ import annotations

import pytest
import torch

from prefopt.data import bandit
from prefopt.data.batch import Row, build
from prefopt.data.tokenise import Branch, Tokens
from prefopt.policies.asked import Asked, States, extrapolate
from prefopt.policies.divergence import KINDS, token_divergence
from prefopt.policies.logprob import Head
from prefopt.policies.reference import make_reference
from prefopt.policies.tabular import Tabular
from tests import toy

N, V = 7, 23


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return toy.save_model(tmp_path_factory.mktemp("asked") / "llama", "llama")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return toy.save_model(tmp_path_factory.mktemp("asked") / "gemma2", "gemma2", "gemma")


def micro_of(policy):
    rows = [Row(Tokens(p, [Branch(r, [True] * len(r), True) for r in replies]), "pair")
            for p, replies in (([5, 6, 7, 8], ([9, 10, 11], [12, 13])), ([20, 21], ([22], [23, 24, 25, 26])))]
    return build(rows, [0, 1], "pairs", policy.pad)


def moved(folder, seed: int = 0, **settings):
    """A policy in float64 whose weights are not those on disk."""
    policy = toy.policy(folder, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return policy.to(torch.float64)


def full_logp(policy, micro):
    """[N, V] log-probs of all words at the places that predict the trained tokens, from the model's own logits."""
    with policy.plainly():
        logits = policy.model(input_ids=micro.input_ids, attention_mask=micro.attention.long(), use_cache=False).logits
    return logits[:, :-1][micro.trained[:, 1:]].log_softmax(-1)


def by_definition(p, q, kind):
    """[N] from log-probs of all words."""
    if kind == "reverse":
        return (p.exp() * (p - q)).sum(-1)
    if kind == "forward":
        return (q.exp() * (q - p)).sum(-1)
    if kind == "tv":
        return (p.exp() - q.exp()).abs().sum(-1)
    m = ((p.exp() + q.exp()) / 2).log()
    return (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # the second caps its logits
def test_a_policy_compares_itself_as_its_full_logits_would(request, family, kind):
    """In values and in the gradient of every weight; nothing reaches the other model."""
    folder = request.getfixturevalue({"llama": "llama", "gemma2": "gemma"}[family])
    policy, other = moved(folder, 1), moved(folder, 2).eval()
    micro = micro_of(policy)
    with torch.no_grad():
        q, states = full_logp(other, micro), other(micro, Asked(states=True))["states"]
    made = policy(micro, Asked(divergence=(kind, states)))
    want = by_definition(full_logp(policy, micro), q, kind)
    upstream = torch.linspace(-1, 2, len(want), dtype=torch.float64)
    torch.testing.assert_close(made["divergence"], want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made["token_logp"], policy(micro), rtol=1e-6, atol=1e-6)
    weights = list(policy.trainable().values())
    for got, expected in zip(torch.autograd.grad(made["divergence"] @ upstream, weights), torch.autograd.grad(want @ upstream, weights),
                             strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=3e-6)  # norms compute in float32
    assert all(weight.grad is None for weight in other.parameters()) and not states.hidden.requires_grad
    assert not states.head.weight.requires_grad


def test_value_and_hidden_states(llama):
    policy = moved(llama)
    micro = micro_of(policy)
    made = policy(micro, Asked(value=(0.7, 1.0), hidden=True))
    logp = full_logp(policy, micro)
    torch.testing.assert_close(made["value"], (0.7 * logp).logsumexp(-1).detach(), rtol=1e-5, atol=1e-6)
    head = policy.inner.get_output_embeddings().weight
    torch.testing.assert_close((made["hidden"] @ head.t()).log_softmax(-1), logp, rtol=1e-5, atol=1e-6)
    assert made["hidden"].requires_grad and set(made) == {"token_logp", "value", "hidden"}


def test_nothing_asked_is_nothing_changed(llama):
    policy = toy.policy(llama)
    micro = micro_of(policy)
    assert torch.equal(policy(micro), policy(micro, Asked())["token_logp"])


@pytest.mark.parametrize("lora", [None, {"enabled": True, "targets": "all-linear"}, {"enabled": True, "targets": "lm_head"}],
                         ids=["copy", "adapter off", "adapter off, on the head"])
def test_a_reference_hands_over_its_states(llama, lora):
    """They give its own distributions, and go on giving them when the policy has moved."""
    policy = toy.policy(llama, lora)
    micro, score = micro_of(policy), make_reference(policy, "initial")
    before = score(micro, Asked(states=True))
    assert torch.equal(before["token_logp"], score(micro))
    at_start = policy(micro, Asked(divergence=("forward", before["states"])))["divergence"]
    assert at_start.abs().max() < 1e-6
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    after = score(micro, Asked(states=True))
    torch.testing.assert_close(after["states"].hidden, before["states"].hidden)
    drift = policy(micro, Asked(divergence=("forward", after["states"])))["divergence"]
    assert (drift > 1e-4).all()
    frozen = after["states"]
    p, q = policy(micro, Asked(states=True))["states"], frozen
    torch.testing.assert_close(drift, token_divergence(p.hidden, p.head, q.hidden, q.head, "forward"))


def test_a_table_is_a_linear_head_over_prompts():
    table, other = Tabular(torch.device("cpu")), Tabular(torch.device("cpu"))
    with torch.no_grad():
        other.logits += torch.randn(other.logits.shape, generator=torch.Generator().manual_seed(0))
    rows = [Row(Tokens([x], [Branch([0], [True], True), Branch([1], [True], True)]), "pair") for x in range(bandit.PROMPTS)]
    micro = build(rows, range(len(rows)), "pairs", 0)
    p, q = (t.logits.log_softmax(-1)[micro.input_ids[:, 0]] for t in (table, other))
    with torch.no_grad():
        states = other(micro, Asked(states=True))["states"]
    for kind in KINDS:
        made, want = table(micro, Asked(divergence=(kind, states)))["divergence"], by_definition(p, q.detach(), kind)
        torch.testing.assert_close(made, want, rtol=1e-5, atol=1e-6)
        (got,), (expected,) = (torch.autograd.grad(x.square().sum(), [table.logits], retain_graph=True) for x in (made, want))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(table(micro, Asked(value=(1.0, 1.0)))["token_logp"], table(micro))


# ---- extrapolation ---------------------------------------------------------------------------------------


def scorer(width: int, seed: int, bias: bool = False, rank: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = Head(draw(V, width), draw(V) if bias else None, down=draw(rank, width) if rank else None, up=draw(V, rank) if rank else None)
    return States(draw(N, width), head)


def logits(states: States):
    head = states.head
    z = states.hidden @ head.weight.t() + (0 if head.bias is None else head.bias)
    return z if head.down is None else z + states.hidden @ head.down.t() @ head.up.t()


@pytest.mark.parametrize("first", [{}, {"bias": True}, {"rank": 2}, {"bias": True, "rank": 3}], ids=str)
@pytest.mark.parametrize("second", [{}, {"bias": True, "rank": 2}], ids=str)
def test_extrapolated_logits(first, second):
    """One linear head gives z + w (z - z'), whatever either head is made of; at w = 0 it is the first scorer."""
    states, away = scorer(5, 0, **first), scorer(4, 1, **second)
    weight = torch.linspace(0, 20, N, dtype=torch.float64)
    z, other = logits(states), logits(away)
    made = logits(extrapolate(states, away, weight))
    torch.testing.assert_close(made, z + weight[:, None] * (z - other), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(made[0], z[0], rtol=1e-12, atol=1e-12)


def test_what_cannot_be_extrapolated_is_refused():
    states, weight = scorer(5, 0), torch.ones(N, dtype=torch.float64)
    capped = States(states.hidden, Head(states.head.weight, softcap=30.0))
    with pytest.raises(ValueError, match="capped or scaled cannot be extrapolated"):
        extrapolate(states, capped, weight)
    with pytest.raises(ValueError, match=f"vocabularies have {V} and {V - 1} words"):
        extrapolate(states, States(states.hidden, Head(states.head.weight[1:])), weight)
