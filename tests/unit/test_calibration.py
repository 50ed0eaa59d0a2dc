"""Calibration of pair predictions: by hand, on known probabilities, and either way round."""

import math

import numpy as np
import pytest

from prefopt.data.batch import Row
from prefopt.data.tokenise import Branch, Tokens
from prefopt.report.calibration import BINS, calibration, compared, reliability, reliability_text


def measures(logits, labels):
    return {name: float(values.mean()) for name, values in calibration(np.array(logits), np.array(labels)).items()}


def logit(q: float) -> float:
    return math.log(q / (1 - q))


def test_by_hand():
    logits, labels = [logit(0.82), logit(0.82), logit(0.38), 0.0], [1, 0, 0, 1]
    found = measures(logits, labels)
    assert found["log_loss"] == pytest.approx(-(math.log(0.82) + math.log(0.18) + math.log(0.62) + math.log(0.5)) / 4)
    assert found["brier"] == pytest.approx((0.18**2 + 0.82**2 + 0.38**2 + 0.25) / 4)
    # bins: 0.82 twice, right once (gap 0.32 each); 0.62 right (gap -0.38); a tie is right half of the time (gap 0)
    assert found["ece"] == pytest.approx((2 * 0.32 + 0.38 + 0) / 4)
    rows = reliability(np.array(logits), np.array(labels))
    assert [(r["low"], r["high"], r["pairs"], round(r["confidence"], 3), r["preferred"]) for r in rows] == [
        (0.5, 0.55, 1, 0.5, 0.5), (0.6, 0.65, 1, 0.62, 1.0), (0.8, 0.85, 2, 0.82, 0.5)]  # fmt: skip


def test_the_order_of_a_pair_does_not_matter():
    """A perfectly calibrated judge, shown pairs always as (chosen, rejected), must not be faulted; nor must any orientation differ."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, 40_000)
    first_wins = rng.random(len(logits)) < 1 / (1 + np.exp(-logits))
    as_drawn = measures(logits, first_wins.astype(float))
    chosen_first = measures(np.where(first_wins, logits, -logits), np.ones(len(logits)))
    assert chosen_first == {name: pytest.approx(value) for name, value in as_drawn.items()}
    assert chosen_first["ece"] < 0.01
    # what binning the probability of the chosen side alone would have said
    naive = np.abs(1 - 1 / (1 + np.exp(-np.where(first_wins, logits, -logits)))).mean()
    assert naive > 0.25


def test_exact_probabilities_are_calibrated_without_sampling_error():
    logits = np.linspace(-4, 4, 999)
    p = 1 / (1 + np.exp(-logits))
    found = measures(logits, p)
    assert found["ece"] == pytest.approx(0, abs=1e-12)
    assert found["log_loss"] == pytest.approx(float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()))
    sure = measures(3 * logits, p)
    assert sure["ece"] > 0.05 and sure["log_loss"] > found["log_loss"] and sure["brier"] > found["brier"]
    assert len(reliability(logits, p)) == BINS and len(reliability_text(reliability(logits, p)).splitlines()) == BINS + 1


def test_extreme_logits_stay_finite():
    found = measures([1e4, -1e4, 1e308], [1, 1, 0])
    assert found["log_loss"] == pytest.approx((0 + 1e4 + 1e308) / 3) and found["brier"] == pytest.approx(2 / 3)
    assert found["ece"] == pytest.approx(2 / 3)


def test_pairs_of_rows():
    def row(kind, count, **more):
        return Row(Tokens([1], [Branch([i], [True], True) for i in range(count)]), kind, **more)

    rows = [row("pair", 2, label=0.3), row("ranking_all", 3, scores=[2.0, 1.0, 1.0]), row("unary", 1), row("pair", 2, label=0.5)]
    pairs, logits, labels = compared(rows, {0: [1.0, 3.0], 1: [5.0, 1.0, 2.0], 2: [0.0], 3: [4.0, 0.0]})
    assert pairs == [(0, 0, 1), (1, 0, 1), (1, 0, 2), (3, 0, 1)]
    assert logits.tolist() == [-2, 4, 3, 4] and labels.tolist() == [0.3, 1, 1, 0.5]
