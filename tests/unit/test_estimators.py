"""The estimators of a single run against independent computations and known truths."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from prefopt.report import estimators as est


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ---- means, shares, differences ------------------------------------------------------------------


@pytest.mark.parametrize(("df", "table"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (10**6, 1.960)])
def test_students_t_agrees_with_the_printed_table(df, table):
    assert est.t95(df) == pytest.approx(table, rel=2e-3)


def test_an_interval_is_the_classical_one():
    found = est.interval(np.array([1.0, 2.0, 4.0, 5.0, 8.0]))
    assert found.mean == 4 and found.high - 4 == pytest.approx(2.776 * math.sqrt(7.5 / 5), rel=1e-3) == 4 - found.low


def test_a_share_without_ties_has_wilsons_interval():
    values = np.array([1.0] * 70 + [0.0] * 30)
    found, z = est.interval(values, share=True), est.t95(99)
    n = 99  # p (1 - p) / se^2, where se^2 divides by n - 1
    centre, half = (0.7 + z**2 / (2 * n)) / (1 + z**2 / n), z / (1 + z**2 / n) * math.sqrt(0.21 / n + z**2 / (4 * n**2))
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))
    ties = est.interval(np.array([1.0] * 20 + [0.5] * 100 + [0.0] * 10), share=True)
    sure = est.interval(np.array([1.0] * 70 + [0.0] * 60), share=True)
    assert ties.high - ties.low < 0.6 * (sure.high - sure.low), "a tie says more than a coin"


def test_shares_at_the_ends_keep_a_width_and_ties_alone_have_none():
    low, high = (est.interval(np.full(40, x), share=True) for x in (0.0, 1.0))
    assert low.low == 0 and 0.05 < low.high < 0.12 and high.high == 1 and high.low == pytest.approx(1 - low.high)
    tied = est.interval(np.full(40, 0.5), share=True)
    assert (tied.low, tied.mean, tied.high) == (0.5, 0.5, 0.5)
    one = est.interval(np.array([0.3]), share=True)
    assert one.mean == 0.3 and math.isnan(one.low) and not one.excludes_zero


@pytest.mark.parametrize(("p", "prompts"), [(0.5, 40), (0.9, 40), (0.97, 60)])
def test_intervals_of_shares_cover_the_truth_with_several_pairs_per_prompt(p, prompts):
    """Pairs of one prompt share their fate in half of the cases."""
    rng, covered = np.random.default_rng(int(100 * p)), []
    for _ in range(400):
        keys = np.repeat(np.arange(prompts), rng.integers(1, 6, prompts))
        fate = rng.random(prompts) < p
        hit = np.where(rng.random(len(keys)) < 0.5, fate[keys], rng.random(len(keys)) < p).astype(float)
        found = est.interval(est.by_prompt(hit, keys.tolist()), share=True)
        covered.append(found.low <= p <= found.high)
    assert np.mean(covered) > 0.915


def test_values_by_prompt_have_the_mean_of_the_units_and_the_spread_of_a_cluster_bootstrap():
    rng = np.random.default_rng(0)
    keys = np.repeat(np.arange(80), rng.integers(1, 6, 80))
    x, w = rng.normal(0, 1, 80)[keys] + rng.normal(0, 0.3, len(keys)), rng.uniform(0.5, 2, len(keys))
    values = est.by_prompt(x, keys.tolist(), w)
    assert len(values) == 80 and values.mean() == pytest.approx((w * x).sum() / w.sum())
    drawn = rng.integers(0, 80, (3000, 80))
    wx, ww = np.bincount(keys, w * x), np.bincount(keys, w)
    means = wx[drawn].sum(1) / ww[drawn].sum(1)
    assert values.std(ddof=1) / math.sqrt(80) == pytest.approx(means.std(), rel=0.06)


def test_pairing_cancels_what_makes_a_prompt_hard():
    rng = np.random.default_rng(1)
    covered, narrow = [], []
    for _ in range(300):
        hard = rng.normal(0, 3, 50)
        before, after = hard + rng.normal(0, 0.5, 50), hard + 0.2 + rng.normal(0, 0.5, 50)
        found = est.paired(after, before)
        covered.append(found.low <= 0.2 <= found.high)
        narrow.append((found.high - found.low) < 0.4 * (est.interval(after).high - est.interval(after).low))
    assert 0.92 <= np.mean(covered) <= 0.98 and all(narrow)


# ---- length-controlled win rate ------------------------------------------------------------------


def by_descent(won, longer):
    """The same criterion minimised by another method: sigmoid of theta."""
    won, longer = torch.tensor(won), torch.tensor(longer)
    x = torch.tanh(longer / longer.std(correction=0))
    c = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([c], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        z = c[0] + c[1] * x
        value = (torch.nn.functional.softplus(z) - won * z).sum() + est.RIDGE * c[1] ** 2 / 2
        value.backward()
        return value

    optimizer.step(loss)
    return float(torch.sigmoid(c[0]).detach())


@pytest.mark.parametrize("seed", range(4))
def test_the_fit_agrees_with_another_optimiser_and_its_spread_with_the_jackknife(seed):
    rng = np.random.default_rng(seed)
    longer = np.round(rng.normal(4, 10, 90))
    won = np.where(rng.random(90) < 0.2, 0.5, rng.random(90) < sigmoid(0.4 + 1.5 * np.tanh(longer / 10)))
    values = est.length_controlled(won, longer)
    assert values.mean() == pytest.approx(by_descent(won, longer), abs=1e-6)
    left_out = np.array([est.length_controlled(np.delete(won, i), np.delete(longer, i)).mean() for i in range(90)])
    jackknife = math.sqrt(89 / 90 * ((left_out - left_out.mean()) ** 2).sum())
    assert values.std(ddof=1) / math.sqrt(90) == pytest.approx(jackknife, rel=0.08)


@pytest.mark.parametrize(("prompts", "theta", "phi", "shift"), [
    (60, 0.0, 2.0, 8.0), (128, 0.0, 3.0, 5.0), (128, 0.8, -2.0, 5.0), (40, 1.0, 1.0, 3.0),
])  # fmt: skip
def test_the_truth_is_found_and_covered(prompts, theta, phi, shift):
    """Outcomes drawn from the model itself; theta = 0 is a pure length effect, whose answer is 50 %."""
    rng, rates, plain, covered = np.random.default_rng(prompts), [], [], []
    truth = sigmoid(theta)
    for _ in range(300):
        longer = np.round(rng.normal(shift, 10, prompts))
        won = (rng.random(prompts) < sigmoid(theta + phi * np.tanh(longer / 10))).astype(float)
        found = est.interval(est.length_controlled(won, longer), share=True)
        rates.append(found.mean)
        plain.append(won.mean())
        covered.append(found.low <= truth <= found.high)
    assert np.mean(rates) == pytest.approx(truth, abs=0.02) and np.mean(covered) > 0.9
    if theta == 0:
        assert np.mean(plain) > 0.62, "the plain win rate is fooled"


def test_where_length_alone_decides_the_answer_is_about_one_half():
    longer = np.random.default_rng(0).normal(6, 10, 400)
    won = (longer > 0).astype(float)
    assert won.mean() > 0.7 and est.length_controlled(won, longer).mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("won", "longer"), [
    ([1, 0, 1], [1, -1, 2]), ([1, 0], [3, -3]), ([1, 1, 0.5], [5, -5, 0]), ([1, 0, 0] * 5, [10_000, -1, 2] * 5),
    ([0, 1] * 8, [0] * 15 + [900]),
])  # fmt: skip
def test_few_or_separable_samples_stay_finite(won, longer):
    values = est.length_controlled(np.array(won, dtype=float), np.array(longer, dtype=float))
    found = est.interval(values, share=True)
    assert 0 < found.mean < 1 and 0 <= found.low <= found.mean <= found.high <= 1


def test_without_lengths_or_without_contrast_it_is_the_plain_win_rate():
    won = np.array([1.0, 0.0, 0.5, 1.0])
    assert est.length_controlled(won, np.zeros(4)).tolist() == won.tolist()
    assert est.length_controlled(np.ones(4), np.array([1.0, -1, 2, 3])).tolist() == [1.0] * 4
    assert est.length_controlled(won, np.array([1.0, 2, 3, 4])) is None, "equal lengths lie outside of what was seen"
    assert est.length_controlled(won, np.array([-1.0, -2, -3, -4])) is None


def test_a_longer_policy_that_is_no_better_at_equal_length_mirrors():
    """Swapping the two sides gives the complement."""
    rng = np.random.default_rng(3)
    longer = np.round(rng.normal(5, 8, 70))
    won = (rng.random(70) < 0.6).astype(float)
    assert est.length_controlled(1 - won, -longer).mean() == pytest.approx(1 - est.length_controlled(won, longer).mean(), abs=1e-8)


# ---- rankings and diversity ----------------------------------------------------------------------


def test_kendall_against_counting():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, truth = rng.integers(0, 4, 5), rng.integers(0, 3, 5)
        pairs = [(i, j) for i, j in combinations(range(5), 2) if truth[i] != truth[j]]
        agree = sum((scores[i] > scores[j]) == (truth[i] > truth[j]) for i, j in pairs if scores[i] != scores[j])
        against = sum((scores[i] > scores[j]) != (truth[i] > truth[j]) for i, j in pairs if scores[i] != scores[j])
        assert est.kendall(scores, truth) == ((agree - against) / len(pairs) if pairs else None)
    assert est.kendall([3, 2, 1], [9, 5, 0]) == 1 and est.kendall([1, 2, 3], [9, 5, 0]) == -1


def test_distinct_and_its_jackknife():
    texts = ["a b c", "a b d", "e", "a b c d"]
    values = est.distinct(texts)
    assert values.mean() == pytest.approx(4 / 7), "ab bc bd cd of seven"
    left = [est.distinct(texts[:i] + texts[i + 1 :]).mean() for i in range(4)]
    spread = math.sqrt(3 / 4 * sum((x - sum(left) / 4) ** 2 for x in left))
    assert values.std(ddof=1) / 2 == pytest.approx(spread)
    assert est.distinct(["x", "y"]) is None
