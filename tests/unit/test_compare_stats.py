"""The statistics of the comparison against known truths."""

from __future__ import annotations

import numpy as np
import pytest

from prefopt.report import compare_stats as stats


def grids(rng, seeds=3, prompts=64, seed_sd=0.1, noise=1.0, gap=0.0):
    """Two methods over the same prompts, whose difficulty they share."""
    hard = rng.normal(0, 1, prompts)
    return [hard + g + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, noise, (seeds, prompts)) for g in (0.0, gap)]


def differ(a, b):
    return stats.compare_pairs([stats.reward_pair(0, 1, a, b)], [len(a), len(b)])[0]


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (2, 0.2), (3, 0.0), (3, 0.3)])
def test_equal_methods_are_rarely_called_different(seeds, seed_sd):
    rng = np.random.default_rng(seeds)
    p = [differ(*grids(rng, seeds, seed_sd=seed_sd)).p for _ in range(120)]
    assert np.mean(np.array(p) < 0.05) <= 0.09


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_a_difference_of_one_standard_deviation_is_found(seeds):
    rng = np.random.default_rng(seeds)
    found = [differ(*grids(rng, seeds, gap=-1.0, seed_sd=0.05)) for _ in range(20)]
    assert np.mean([d.significant for d in found]) > 0.9
    assert abs(np.mean([d.value for d in found]) - 1.0) < 0.1
    assert all(d.low < d.value < d.high for d in found)


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (3, 0.05), (3, 0.5)])
def test_intervals_cover_the_truth(seeds, seed_sd):
    rng = np.random.default_rng(seeds)
    covered = [(e := stats.mean_interval(grids(rng, seeds, seed_sd=seed_sd)[0])).low <= 0 <= e.high for _ in range(300)]
    assert 0.91 <= np.mean(covered) <= 1.0


def test_one_seed_gives_the_classical_interval_over_prompts():
    values = np.random.default_rng(0).normal(2, 1, (1, 400))
    e = stats.mean_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert e.mean == pytest.approx(values.mean())
    assert (e.high - e.low) / 2 == pytest.approx(half, rel=0.08)


def test_intervals_widen_with_the_spread_between_seeds():
    calm = np.random.default_rng(1).normal(0, 1, (3, 100))
    calm -= calm.mean(1, keepdims=True)
    wild = calm + np.array([[-1.0], [0.0], [1.0]])
    narrow, wide = stats.mean_interval(calm), stats.mean_interval(wild)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    # Seeds alone: three means with deviation 1 and Student's t with two degrees of freedom.
    assert (wide.high - wide.low) / 2 == pytest.approx(4.30 / np.sqrt(3), rel=0.1)
    assert stats.seed_variance(calm) == 0 and stats.seed_variance(wild) == pytest.approx(1 / 3, rel=0.05)
    assert stats.seed_variance(wild[:1]) == 0, "one seed knows no spread"


def test_pairing_by_prompt_sharpens_a_comparison():
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 3, 80)
    a, b = hard + 0.5 + rng.normal(0, 0.5, (1, 80)), hard + rng.normal(0, 0.5, (1, 80))
    paired, unpaired = differ(a, b), differ(a, rng.permuted(b, axis=1))
    assert paired.significant and not unpaired.significant
    assert paired.value == pytest.approx(unpaired.value)
    assert unpaired.high - unpaired.low > 3 * (paired.high - paired.low)


@pytest.mark.parametrize(("prompts", "least"), [(1, 1.0), (2, 0.5), (5, 1 / 16), (30, 1 / 2001)])
def test_a_few_prompts_prove_nothing(prompts, least):
    better = np.linspace(1.0, 1.1, prompts)
    (found,) = stats.compare_pairs([stats.Pair(0, 1, better, 0.0, 0.0)], [1, 1])
    assert found.p == pytest.approx(least)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []
    p = np.random.default_rng(3).uniform(0, 0.2, 20)
    adjusted = np.array(stats.holm(list(p)))
    order = np.argsort(p)
    assert (np.diff(adjusted[order]) >= 0).all() and (adjusted >= p).all() and adjusted[order[0]] == pytest.approx(min(1, 20 * p.min()))


def test_many_pairs_can_still_be_significant():
    rng = np.random.default_rng(4)
    methods = [rng.normal(i, 0.5, (1, 40)) for i in range(16)]
    pairs = [stats.reward_pair(a, b, methods[a], methods[b]) for a in range(16) for b in range(a + 1, 16)]
    found = stats.compare_pairs(pairs, [1] * 16)
    assert len(found) == 120 and all(d.significant for d in found)


def test_head_to_head_counts_wins_and_ties():
    a, b = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[0.0, 2.0, 5.0, 1.0]])
    pair = stats.win_pair(0, 1, a, b, [0], [0])
    assert pair.prompts.tolist() == [1.0, 0.5, 0.0, 1.0] and pair.null == 0.5
    turned = stats.win_pair(1, 0, b, a, [0], [0])
    assert (turned.prompts + pair.prompts).tolist() == [1.0] * 4
    two = stats.win_pair(0, 1, np.vstack([a, a + 10]), b, [0, 1], [0])
    assert two.prompts.tolist() == [1.0, 0.75, 0.5, 1.0], "the mean over pairs of seeds"
    often = np.tile(b, 2)  # four prompts are too few for any difference
    few, everything = (stats.compare_pairs([stats.win_pair(0, 1, x + 9, x, [0], [0])], [1, 1])[0] for x in (b, often))
    assert few.value == everything.value == 1.0 and everything.significant and not few.significant
    same = stats.compare_pairs([stats.win_pair(0, 1, b, b, [0], [0])], [1, 1])[0]
    assert same.value == 0.5 and same.p == 1.0


def test_runs_of_one_seed_count_as_one():
    rows = np.array([[1.0, 3.0], [3.0, 5.0], [7.0, 7.0]])
    assert stats.by_seed(rows, [0, 0, 4]).tolist() == [[2.0, 4.0], [7.0, 7.0]]


def test_shares_at_the_border_have_an_interval():
    e = stats.mean_interval(np.ones((3, 100)), share=True)
    assert e.high == 1.0 and e.low == pytest.approx(0.964, abs=1e-3), "the exact binomial bound for 100 of 100"
    assert stats.mean_interval(np.zeros((1, 100)), share=True).low == 0.0
    known = stats.share_interval([0.7], 400)
    assert (known.high - known.low) / 2 == pytest.approx(1.96 * np.sqrt(0.21 / 400), rel=0.08)
    assert stats.share_interval([0.7], None).low is None, "one mean over unknown units says nothing about its error"
    spread = stats.share_interval([0.6, 0.7, 0.8], 400)
    assert spread.high - spread.low > known.high - known.low
