"""Values: every objective against its own equation, its golden numbers and its limits."""

import math
import random

import pytest
import torch
from oracle import evaluate, expected
from samples import (
    NAMES,
    YAML,
    default,
    draw,
    one_unit,
    random_layout,
    random_names,
    random_tokens,
    scored,
    settings_of,
    several,
    with_derived,
)

from prefopt.objectives.base import reduce_terms, total_weights
from tests.extra_samples import silenced

GOLDEN = [(slug, i) for slug in YAML for i in range(len(settings_of(slug)[0].golden))]
LIMITS = [(slug, i) for slug in YAML for i in range(len(settings_of(slug)[0].limits))]


def close(want, rel=1e-9, scale=1.0):
    return pytest.approx(want, rel=rel, abs=1e-9 * scale)


@pytest.mark.parametrize(("formula", "names", "value"), [
    ("log(sigmoid(x))", {"x": -1e4}, -1e4),
    ("log(1 + exp(x))", {"x": 1e6}, 1e6),
    ("log(-expm1(x))", {"x": -1e-7}, math.log(1e-7) - 5e-8),
    ("a if b else 0.1 * a**2", {"a": 3.0, "b": False}, 0.9),
    ("max(0, 1/(2*x))", {"x": 0.1}, 5.0),
    ("tanh(x) - sqrt(4)", {"x": 0.0}, -2.0),
])
def test_oracle_itself(formula, names, value):
    assert evaluate(formula, names) == pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize("units", [1, 5, 7])
@pytest.mark.parametrize("slug", YAML)
def test_terms_equal_the_formula(slug, units):
    rng = random.Random(f"formula {slug} {units}")
    for objective in several(slug, units):
        layout = random_layout(objective, rng, units)
        batch = scored(objective, layout, random_tokens(objective, layout, rng))
        terms = objective(batch)
        assert [t.name for t in terms.terms] == list(objective.formula), "terms and formulas must carry the same names"
        totals, parts = {}, {}
        for term in terms.terms:
            values, weights = expected(objective, term.batch or batch, term.name, term.unit)
            assert term.values.shape == (len(values),), f"{term.name}: one value per {term.unit}"
            assert (term.weight * term.values).tolist() == close(values), f"{term.name} of {objective}"
            totals[term.name] = math.fsum(weights)
            parts[term.name] = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / totals[term.name]
        loss, shares = reduce_terms(batch, terms, totals)
        assert {name: share.item() for name, share in shares.items()} == {name: close(part) for name, part in parts.items()}
        assert loss.item() == close(math.fsum(parts.values()))
        assert total_weights(objective, layout) == {name: pytest.approx(total, rel=1e-6) for name, total in totals.items()}


@pytest.mark.parametrize("slug", YAML)
def test_no_units_no_loss(slug):
    rng = random.Random(0)
    for objective in several(slug):
        layout = random_layout(objective, rng, 0)
        tokens = {s: t.requires_grad_() for s, t in random_tokens(objective, layout, rng).items()}
        batch = scored(objective, layout, tokens)
        totals = total_weights(objective, layout)
        assert set(totals.values()) == {0.0}
        loss, _ = reduce_terms(batch, objective(batch), dict.fromkeys(totals, 3.0))
        (grad,) = torch.autograd.grad(loss, tokens["policy"])
        assert loss.item() == 0 and not grad.any()


def split_names(cls, pinned: dict) -> tuple[dict, dict]:
    """(scores, settings)"""
    return {k: v for k, v in pinned.items() if k in NAMES}, {k: v for k, v in pinned.items() if k not in NAMES}


def unit_parts(objective, names) -> dict[str, float]:
    batch = one_unit(objective, names)
    loss, shares = reduce_terms(batch, objective(batch), total_weights(objective, batch))
    assert loss.item() == close(sum(s.item() for s in shares.values()))
    return {name: share.item() for name, share in shares.items()}


@pytest.mark.parametrize(("slug", "index"), GOLDEN)
def test_golden_number(slug, index):
    cls, values = settings_of(slug)
    given, want = cls.golden[index]
    names, settings = split_names(cls, given)
    objective = cls(**values | settings)
    parts = unit_parts(objective, names)
    exact = {name: evaluate(formula, vars(objective) | with_derived(names)) for name, formula in objective.formula.items()}
    for found in (parts, exact):  # the golden numbers bind the class and the printed formula alike
        if isinstance(want, dict):
            assert found == {name: pytest.approx(v, abs=1e-6) for name, v in want.items()}
        else:
            assert sum(found.values()) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("slug", "index"), LIMITS)
def test_limit(slug, index):
    cls = settings_of(slug)[0]
    pinned, formula = cls.limits[index]
    scores, settings = split_names(cls, pinned)
    rng = random.Random(f"limit {slug} {index}")
    for _ in range(20):
        objective = draw(cls, rng, **settings)
        names = random_names(objective, rng) | scores
        want = evaluate(formula, vars(objective) | with_derived(names))
        assert sum(unit_parts(objective, names).values()) == close(want), f"{objective} at {names}"


@pytest.mark.parametrize("slug", [s for s in YAML if "reference" in default(s).quantities and default(s).starts_level])
def test_no_row_prefers_the_policy_at_the_start(slug):
    """Policy = reference: every row has the same loss, whatever the scores, and every implicit reward is exactly 0."""
    rng, objective = random.Random(slug), default(slug)
    layout = random_layout(objective, rng, 6)
    for column in ("label", "margin"):
        if layout.pairs is not None:
            getattr(layout.pairs, column).fill_(1 if column == "label" else 0)
    if layout.groups is not None:
        layout.groups.reward.fill_(1)
    if layout.ranking is not None:  # what a list costs depends on its length and its scores
        layout.ranking.score = (layout.ranking.best[layout.ranking.list] - torch.arange(len(layout.ranking.list))).double()
    policy = random_tokens(objective, layout, rng)["policy"]
    batch = scored(objective, layout, dict.fromkeys(objective.quantities, policy))
    for term in objective(batch).terms:
        kinds = layout.ranking.sizes.tolist() if layout.ranking is not None else [1] * len(term.values)
        assert len(set(zip(kinds, term.values.tolist(), strict=True))) == len(set(kinds))
    assert not objective.rewards(batch).any()


@pytest.mark.parametrize("slug", YAML)
def test_rewards_rank_edges_by_likelihood(slug):
    rng, objective = random.Random(slug), default(slug)
    layout = random_layout(objective, rng, 5)
    tokens = random_tokens(objective, layout, rng)
    tokens["policy"].requires_grad_()
    before = objective.rewards(scored(objective, layout, tokens))
    after = objective.rewards(scored(objective, layout, tokens | {"policy": tokens["policy"].detach() + 0.01}))
    assert before.shape == layout.lengths.shape and not before.requires_grad
    asked = layout.edge_sum(silenced(objective, layout, "policy", torch.ones_like(before[layout.token_edge]))) > 0
    assert (after > before)[asked].all() and asked.any()
