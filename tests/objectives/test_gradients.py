"""Gradients, shapes and numerics of every objective."""

import math
import random
from decimal import Decimal, localcontext

import pytest
import torch
from oracle import EXACT, FUNCTIONS, expected
from samples import YAML, default, floats, layout_of, random_layout, random_tokens, scored, settings_of, several

from prefopt.objectives.base import Demonstrations, Groups, Pairs, Rankings, Unary, reduce_terms, total_weights
from prefopt.objectives.reference_free import ORPO, log1mexp
from tests.extra_samples import extreme_tokens, with_extra_edges

# Losses a part of which is held constant in the gradient: differences of the whole loss are not its gradient.
HELD = [slug for slug in YAML if any("sg(" in text for text in default(slug).formula.values())]


def loss_of(objective, layout, tokens):
    batch = scored(objective, layout, tokens)
    return reduce_terms(batch, objective(batch), total_weights(objective, layout))[0]


def free_tokens(layout):
    """Numbers of the tokens whose log-prob may carry a gradient: all but those of mismatched edges."""
    held = layout.unary.mismatched if layout.unary is not None else torch.tensor([], dtype=torch.long)
    return (~layout.tokens_of(held)).nonzero()[:, 0]


@pytest.mark.parametrize("slug", [slug for slug in YAML if slug not in HELD])
def test_gradient_matches_finite_differences(slug):
    rng = random.Random(f"gradcheck {slug}")
    for objective in several(slug, draws=2):
        layout = random_layout(objective, rng, 4, edges=8)
        tokens, free = random_tokens(objective, layout, rng), free_tokens(layout)

        def loss(leaf, objective=objective, layout=layout, tokens=tokens, free=free):
            return loss_of(objective, layout, tokens | {"policy": tokens["policy"].index_put((free,), leaf)})

        leaf = tokens["policy"][free].clone().requires_grad_()
        assert torch.autograd.gradcheck(loss, (leaf,), atol=1e-7, rtol=1e-5)
        assert torch.autograd.grad(loss(leaf), leaf)[0].any()


def formula_loss(objective, layout, tokens) -> float:
    """The loss as the formulas give it: means over units, weighted by the data."""
    batch, loss = scored(objective, layout, tokens), 0.0
    for term in objective(batch).terms:
        values, weights = expected(objective, term.batch or batch, term.name, term.unit)
        loss += math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)
    return loss


@pytest.mark.parametrize("slug", HELD)
def test_gradient_holds_what_the_formula_holds(slug, monkeypatch):
    """Central differences of the formula in decimals, every sg(...) kept at the value that it has at the point."""
    rng, step = random.Random(f"held {slug}"), 1e-5
    for objective in several(slug, draws=2):
        layout = random_layout(objective, rng, 4, edges=8)
        tokens, held, slopes = random_tokens(objective, layout, rng), [], []
        leaf = tokens["policy"].clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(objective, layout, tokens | {"policy": leaf}), leaf)
        monkeypatch.setitem(FUNCTIONS, "sg", lambda x, held=held: held.append(x) or x)
        assert formula_loss(objective, layout, tokens) == pytest.approx(loss_of(objective, layout, tokens).item(), rel=1e-9)
        for token in range(len(leaf)):
            ends = []
            for move in (step, -step):
                kept = iter(held)
                monkeypatch.setitem(FUNCTIONS, "sg", lambda _, kept=kept: next(kept))
                moved = tokens["policy"].clone()
                moved[token] += move
                ends.append(formula_loss(objective, layout, tokens | {"policy": moved}))
            slopes.append((ends[0] - ends[1]) / (2 * step))
        assert held and grad.any()
        assert grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("slug", YAML)
def test_only_the_policy_on_its_own_replies_learns(slug):
    rng = random.Random(f"leak {slug}")
    for objective in several(slug):
        layout = random_layout(objective, rng, 5)
        tokens = {scorer: t.requires_grad_() for scorer, t in random_tokens(objective, layout, rng).items()}
        loss = loss_of(objective, layout, tokens)
        grads = dict(zip(tokens, torch.autograd.grad(loss, tokens.values(), allow_unused=True), strict=True))
        own = torch.zeros_like(layout.token_edge, dtype=torch.bool)
        own[free_tokens(layout)] = True
        assert grads["policy"][own].any() and not grads["policy"][~own].any()
        assert all(g is None or not g.any() for scorer, g in grads.items() if scorer != "policy")


@pytest.mark.parametrize("slug", [slug for slug in YAML if settings_of(slug)[0].first_step == "apart"])
def test_first_step_goes_the_right_way(slug):
    """Where policy = reference and both sides are equally likely, descent raises what is preferred and lowers the rest."""
    rng, objective = random.Random(f"descent {slug}"), default(slug)
    lengths = [rng.randint(1, 6) for _ in range(8)]
    up, down, edges = [0, 2, 4, 6], [1, 3, 5, 7], torch.arange(8)
    one, half = floats([1] * 4), edges[:4] * 2
    if objective.view == "pairs":
        views = {"pairs": Pairs(half, half + 1, one, one, 0 * one)}
    elif objective.view == "unary":
        views = {"unary": Unary(edges, edges % 2 == 0, floats([1] * 8), edges[:0])}
    elif objective.view == "ranking":
        views = {"ranking": Rankings(edges, edges // 2, (edges % 2 == 0).double(), one)}
    elif objective.view == "groups":
        views = {"groups": Groups(edges, edges - edges % 2, (edges % 2 == 0).double(), floats([1] * 8))}
    else:
        views, down = {"demonstrations": Demonstrations(half, one)}, []
    layout = with_extra_edges(objective, layout_of(lengths, **views), rng)
    policy = floats(-4 / layout.lengths[e] for e in layout.token_edge).requires_grad_()
    tokens = {scorer: policy if scorer == "policy" else policy.detach() for scorer in objective.quantities}
    (grad,) = torch.autograd.grad(loss_of(objective, layout, tokens), policy)
    for token, edge in enumerate(layout.token_edge.tolist()):
        if edge >= len(lengths):  # an extra sequence
            continue
        sign = -1 if edge in up else 1 if edge in down else 0
        assert math.copysign(1, grad[token]) == sign if sign else grad[token] == 0


@pytest.mark.parametrize("slug", YAML)
def test_trap_20_one_value_per_unit_and_metrics_detached(slug):
    """Edges, tokens, units and row weights all differ in number, so a term of the wrong level cannot broadcast unseen."""
    rng = random.Random(f"shape {slug}")
    for objective in several(slug):
        layout = random_layout(objective, rng, 4, edges=11)
        edges, tokens = len(layout.lengths), len(layout.token_edge)
        assert len({4, edges, tokens}) == 3
        policy = random_tokens(objective, layout, rng)
        policy["policy"].requires_grad_()
        terms = objective(scored(objective, layout, policy))
        for term in terms.terms:
            read = term.batch or layout
            imitated = read.demonstrations.edge if read.demonstrations else read.pairs.chosen if read.pairs else None
            units = 16 if term.batch is not None and term.unit == "completion" else 4  # both replies of a mixture's pairs, good and bad
            count = int(layout.tokens_of(imitated).sum()) if term.unit == "token" else units
            assert term.values.shape == (count,) and term.values.dtype == torch.float64 and term.values.requires_grad
        assert not any(metric.requires_grad for metric in terms.metrics.values())


LOGPS = (-1e-7, -1e-3, -1.0, -50.0, -1e4, -1e5)


def extreme_batch(objective, dtype):
    """Every two of `LOGPS` as the sides of a unit, with references that make log-ratios of 0 and of plus and minus 1e4 and more."""
    lengths, tokens, sides = [], {"policy": [], "reference": []}, []
    for w in LOGPS:
        for lose in LOGPS:
            for rw, rl in ((w, lose), (w - 1e4, lose), (w, lose - 1e4), (-1e-7, -1e4), (-1e4, -1e-7)):
                for logp, ref, length in ((w, rw, 1), (lose, rl, 4)):
                    lengths.append(length)
                    tokens["policy"] += [logp / length] * length
                    tokens["reference"] += [ref / length] * length
                sides.append((len(lengths) - 2, len(lengths) - 1))
    edges = torch.arange(len(lengths))
    chosen, rejected = torch.tensor(sides).T
    one = torch.ones(len(sides), dtype=dtype)
    if objective.view == "pairs":
        views = {"pairs": Pairs(chosen, rejected, one * 0.75 if "label" in objective.columns else one, one, 0 * one)}
    elif objective.view == "unary":
        views = {"unary": Unary(edges, edges % 3 == 0, torch.ones(len(edges), dtype=dtype), edges[:1])}
    elif objective.view == "ranking":
        views = {"ranking": Rankings(edges, edges // 2, (edges % 2 == 0).to(dtype), one)}
    elif objective.view == "groups":
        reward = (edges % 3).to(dtype)
        views = {"groups": Groups(edges, edges - edges % 8, reward, torch.ones(len(edges), dtype=dtype))}
    else:
        views = {"demonstrations": Demonstrations(edges, torch.ones(len(edges), dtype=dtype))}
    tokens["previous"], tokens["teacher"] = tokens["reference"], [t / 2 for t in tokens["policy"]]
    tokens["slow"] = [t / 3 for t in tokens["policy"]]
    layout = with_extra_edges(objective, layout_of(lengths, **views), random.Random("extreme"))
    tokens = {s: extreme_tokens(layout, len(lengths), values, LOGPS, shift) for shift, (s, values) in enumerate(tokens.items())}
    return layout, {s: torch.tensor(tokens[s], dtype=dtype) for s in objective.quantities}


@pytest.mark.parametrize("slug", YAML)
def test_extreme_scores_stay_finite_and_right(slug):
    for objective in several(slug, draws=1):
        for dtype in (torch.float32, torch.float64):
            layout, tokens = extreme_batch(objective, dtype)
            tokens["policy"].requires_grad_()
            batch = scored(objective, layout, tokens)
            terms = objective(batch).terms
            (grad,) = torch.autograd.grad(sum((t.weight * t.values).sum() for t in terms), tokens["policy"])
            assert grad.isfinite().all()
            for term in terms:
                assert term.values.isfinite().all()
                if dtype == torch.float64:
                    values, _ = expected(objective, term.batch or batch, term.name, term.unit)
                    assert (term.weight * term.values).tolist() == pytest.approx(values, rel=1e-9, abs=1e-9)


def sweep():
    """-1e-7 to -100, evenly in the logarithm, and points next to the place where the two forms meet."""
    points = [-(10 ** (-7 + 9 * i / 400)) for i in range(401)]
    return points + [-0.6, -0.693147, math.nextafter(-0.693147, 0), -math.log(2), -0.7]


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_log1mexp_over_its_range(dtype, rel):
    x = torch.tensor(sweep(), dtype=dtype, requires_grad=True)
    y = log1mexp(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    with localcontext(EXACT):
        exact = [(1 - Decimal(v).exp()).ln() for v in x.tolist()]
        slopes = [Decimal(v).exp() / (Decimal(v).exp() - 1) for v in x.tolist()]
    assert y.tolist() == pytest.approx([float(v) for v in exact], rel=rel, abs=1e-38)
    assert slope.tolist() == pytest.approx([float(v) for v in slopes], rel=2 * rel, abs=1e-38)


@pytest.mark.parametrize("value", [0.0, -0.0, -1e-40, -1e-30, -1e30])
def test_log1mexp_beyond_its_range_is_finite(value):
    x = torch.tensor([value], requires_grad=True)
    y = log1mexp(x)
    assert y.isfinite() and torch.autograd.grad(y, x)[0].isfinite()


@pytest.mark.parametrize("other", [-1e-7, -0.01, -0.7, -30.0, -100.0])
def test_orpo_odds_over_the_whole_range(other):
    """Trap: the odds of a reply that the policy is almost sure of."""
    objective, x = ORPO(lambda_=1.0), sweep()
    count = len(x)
    pairs = Pairs(torch.arange(count), torch.full((count,), count), *floats([1] * count)[None].repeat(2, 1), floats([0] * count))
    layout = layout_of([1] * (count + 1), pairs=pairs)
    batch = scored(objective, layout, {"policy": floats([*x, other])})
    term = objective(batch).terms[1]
    values, _ = expected(objective, batch, "odds_ratio", "pair")
    assert term.values.tolist() == pytest.approx(values, rel=1e-9, abs=0)
    single = scored(objective, layout, {"policy": floats([*x, other]).float().requires_grad_()})
    term = objective(single).terms[1]
    rounded, _ = expected(objective, single, "odds_ratio", "pair")
    assert term.values.tolist() == pytest.approx(rounded, rel=1e-4, abs=1e-30)
    assert torch.autograd.grad(term.values.sum(), single.logp())[0].isfinite().all()
