"""Alarms: what sets them off, and what does not."""

from __future__ import annotations

import json

import pytest

from prefopt.report import alarms as limits
from prefopt.report.alarms import alarms


def two_evals(**pairs) -> list[dict]:
    """Eval rows at steps 0 and 100 from key=(before, after); `__` in a name stands for `/`."""
    names = [key.replace("__", "/") for key in pairs]
    columns = [dict(zip(names, values, strict=True)) for values in zip(*pairs.values(), strict=True)]
    return [{"step": step, "split": "eval"} | columns[step // 100] for step in (0, 100)]


def names(rows: list[dict]) -> list[str]:
    return [alarm.name for alarm in alarms(rows)]


def train_rows(key: str, values) -> list[dict]:
    return [{"step": i + 1, "split": "train", key: value} for i, value in enumerate(values)]


WIDE = {"true_reward_low": (0.8, 0.3), "true_reward_high": (1.2, 0.7)}  # around 1.0 and 0.5
WIDER = {"true_reward_low": (0.6, 0.1), "true_reward_high": (1.4, 0.9)}
UP = {"reward__margin": (0.0, 2.0)}

FIRES = [
    ("likelihood_displacement", two_evals(logp__chosen=(-20.0, -22.0), logp__rejected=(-22.0, -31.0))),
    ("likelihood_displacement", two_evals(logp__chosen=(-300.0, -310.0), logp__rejected=(-300.0, -320.0))),
    ("length_growth", two_evals(length=(20.0, 26.5))),
    ("over_optimisation", two_evals(true_reward=(1.0, 0.5), **UP)),
    ("over_optimisation", two_evals(true_reward=(1.0, 0.5), loss=(0.7, 0.2))),
    ("over_optimisation", two_evals(true_reward=(1.0, 0.5), **WIDE, **UP)),
    ("skipped_steps", train_rows("skipped_steps", [0, 0, 1])),
    ("unfinished", two_evals(finished=(0.98, 0.70))),
    ("non_finite_loss", train_rows("loss", [0.7, None, 0.6])),
    ("non_finite_loss", train_rows("loss", [0.7, float("nan")])),
    ("wrong_reference", [{"step": 0, "split": "check", "loss": 0.6, "theory": 0.693, "policy_minus_reference": 2.0}]),
    ("wrong_reference", two_evals(kl=(0.5, 0.9))),  # without the self-check
    ("collapse", two_evals(kl=(0.0, 21.0), length=(20.0, 20.0))),
    ("collapse", two_evals(loss=(0.69, 0.75)) + train_rows("loss", [0.69, 0.9, 0.8])),
]

QUIET = [
    [],
    two_evals(logp__chosen=(-20.0, -19.0), logp__rejected=(-22.0, -31.0)),  # only rejected fell
    two_evals(logp__chosen=(-20.0, -20.0 - 0.9 * limits.DISPLACEMENT_NATS), logp__rejected=(-22.0, -31.0)),
    two_evals(logp__chosen=(-300.0, -303.0), logp__rejected=(-300.0, -320.0)),  # three nats of three hundred
    two_evals(logp__chosen=(-20.0, -25.0), logp__rejected=(-22.0, None)),
    two_evals(length=(20.0, 20.0 * (1 + limits.LENGTH_GROWTH) - 0.1)),
    two_evals(length=(20.0, 8.0)),
    two_evals(length=(0.0, 0.0)),
    two_evals(true_reward=(1.0, 0.5), reward__margin=(2.0, 1.0)),  # the margin fell too
    two_evals(true_reward=(1.0, 0.95), **UP),
    two_evals(true_reward=(1.0, 0.5)),
    two_evals(true_reward=(1.0, 0.5), **WIDER, **UP),
    two_evals(true_reward=(0.4, 1.9), **UP),
    train_rows("skipped_steps", [0, 0, 0]),
    two_evals(finished=(0.98, 0.98 - limits.UNFINISHED_DROP + 0.01)),
    two_evals(finished=(0.2, 0.9)),
    train_rows("loss", [0.7, 0.6]),
    two_evals(logp__chosen=(-9.0, -90.0), logp__rejected=(-9.0, -99.0))[:1],  # no second evaluation
    [{"step": 0, "split": "check", "loss": 0.693, "theory": 0.693, "policy_minus_reference": 0.02}],  # rounding in bf16
    [{"step": 0, "split": "check", "loss": 1.35}],  # an objective without a reference
    two_evals(kl=(0.0, 19.0), length=(20.0, 20.0)),
    two_evals(kl=(0.0, 3.0), length=(2.0, 2.0)),  # answers of a word or two
    two_evals(loss=(0.69, 0.75)) + train_rows("loss", [0.69, 0.6, 0.3]),  # overfitting
    two_evals(loss=(0.0, 0.2)) + train_rows("loss", [0.0, 0.2, 0.3]),  # a policy gradient's loss
]


@pytest.mark.parametrize(("name", "rows"), FIRES)
def test_an_alarm_fires(name, rows):
    assert names(rows) == [name]
    assert alarms(rows)[0].explanation.count("\n") == 1, "what it means, and what to do"


@pytest.mark.parametrize("rows", QUIET)
def test_no_alarm_without_cause(rows):
    assert names(rows) == []


def test_over_optimisation_is_measured_from_the_best_step():
    rows = two_evals(true_reward=(0.2, 0.9), reward__margin=(0.0, 3.0))
    rows.append({"step": 50, "split": "eval", "true_reward": 1.8, "reward/margin": 1.0})
    assert "1.80 at step 50" in alarms(rows)[0].explanation


def test_alarms_are_pure_and_do_not_care_for_order():
    rows = FIRES[0][1] + FIRES[6][1]
    copy = json.loads(json.dumps(rows))
    assert names(rows) == names(rows[::-1]) == ["likelihood_displacement", "skipped_steps"]
    assert rows == copy


def test_what_moves_away_from_given_pairs_is_no_displacement_where_samples_are_judged():
    """A run that learns from its own samples owes nothing to pairs that it never trained on."""
    rows = two_evals(logp__chosen=(-20.0, -22.0), logp__rejected=(-22.0, -31.0))
    assert names(rows) == ["likelihood_displacement"]
    assert names([*rows, {"step": 1, "split": "train", "loss": 0.5, "samples": 64}]) == []


# ---- reward hacking ---------------------------------------------------------------------------------------


ROUND = [{"step": 50, "split": "train", "rollout/reward": 0.5, "pictures": 100, "samples": 64}]


def hacked(reward=(0.2, 0.9), half=0.1, **others):
    """Two evaluations of a run that learns from what a reward says of its pictures; every reward has an interval of +- `half`."""
    pairs = {"reward": reward, **others}
    for key in [k for k in pairs if k in ("reward", "true_reward", "prompt_match") or k.startswith("held_out/")]:
        pairs |= {f"{key}_low": [v - half for v in pairs[key]], f"{key}_high": [v + half for v in pairs[key]]}
    return ROUND + two_evals(**pairs)


@pytest.mark.parametrize("rows", [
    hacked(true_reward=(1.0, 0.2)),
    hacked(prompt_match=(0.9, 0.5)),
    hacked(true_reward=(1.0, 1.4), **{"held_out/brisque": (-20.0, -22.0)}),
    hacked(true_reward=(1.0, 1.4), **{"held_out/brisque": (-20.0, -19.0), "held_out/look": (0.5, 0.1)}),
    hacked(variety=(1.0, 0.99 - limits.VARIETY_FALL)),
    hacked(high_frequency=(0.02, 0.021 * limits.DETAIL_GROWTH)),
])
def test_a_reward_that_rises_alone_is_hacked(rows):
    assert "reward_hacking" in names(rows)


@pytest.mark.parametrize("rows", [
    hacked(true_reward=(1.0, 1.4), prompt_match=(0.8, 0.9), variety=(1.0, 1.0), high_frequency=(0.02, 0.02)),
    hacked(true_reward=(1.0, 0.95), **{"held_out/brisque": (-20.0, -19.0)}),  # within its noise
    hacked(reward=(0.2, 0.25), true_reward=(1.0, 0.2)),  # what is trained on did not rise
    hacked(variety=(1.0, 1.3), high_frequency=(0.02, 0.01)),
    two_evals(reward=(0.2, 0.9), true_reward=(1.0, 0.2)),  # it does not learn from its own pictures
])
def test_rewards_that_rise_together_are_not(rows):
    assert "reward_hacking" not in names(rows)


def test_a_part_of_the_trained_reward_may_fall_for_the_others():
    """The known reward weighs the look itself; of another reward that is trained on, it is a judge."""
    rows = ROUND + two_evals(true_reward=(0.2, 0.9), true_reward_low=(0.1, 0.8), true_reward_high=(0.3, 1.0),
                             **{"held_out/look": (0.5, 0.1), "held_out/look_low": (0.4, 0.0), "held_out/look_high": (0.6, 0.2)})
    assert "reward_hacking" not in names(rows)


# ---- clipped ratios ---------------------------------------------------------------------------------------


def clipped(*shares, **others):
    rounds = {"rollout/reward": 0.5, **others}
    return [{"step": i + 1, "split": "train", "clipped": share} | rounds for i, share in enumerate(shares)]


def test_ratios_that_are_mostly_clipped_are_noticed_at_the_end():
    late = (0.1,) * 30 + (0.0, 0.95) * 2 + (0.8,) * 6  # first steps of rounds among them
    (alarm,) = alarms(clipped(*late))
    assert alarm.name == "clipped_ratios" and "67 %" in alarm.explanation


@pytest.mark.parametrize("rows", [
    clipped(*(0.9,) * 30, *(0.5,) * limits.CLIPPED_STEPS),  # it got better
    clipped(*(0.0, 0.9) * 10),  # every second step begins a round
    clipped(*(0.9,) * (limits.CLIPPED_STEPS - 1)),  # too few to say
    [{k: v for k, v in row.items() if k != "rollout/reward"} for row in clipped(*(0.9,) * 20)],  # given pairs, whose clip is another one
])
def test_ratios_within_their_band_are_fine(rows):
    assert "clipped_ratios" not in names(rows)


# ---- equal rewards ----------------------------------------------------------------------------------------


def rounds_of(key, *shares):
    """Two steps to a round."""
    return [{"step": i + 1, "split": "train", "samples": 64 * (i // 2 + 1), key: share, "rollout/reward": 0.5}
            for i, share in enumerate(share for share in shares for _ in range(2))]


@pytest.mark.parametrize("rows", [
    rounds_of("rollout/ties", 0.2, 0.3, 1.0, 1.0, 0.9),
    rounds_of("rollout/ties", 1.0),  # one large round
    rounds_of("rollout/kept", 0.02, 0.0, 0.0),
])
def test_rounds_in_which_all_samples_are_worth_the_same_are_noticed(rows):
    (alarm,) = alarms(rows)
    assert alarm.name == "equal_rewards" and alarm.explanation.count("\n") == 1


def test_what_is_told_of_equal_rewards():
    assert "In the last 3 rounds 97 % of" in alarms(rounds_of("rollout/ties", 0.2, 1.0, 1.0, 0.9))[0].explanation
    assert "In the last 1 round 100 % of" in alarms(rounds_of("rollout/ties", 1.0))[0].explanation


@pytest.mark.parametrize("rows", [
    rounds_of("rollout/ties", 1.0, 1.0, 0.8),  # a reward that is scarce
    rounds_of("rollout/kept", 1.0, 1.0),
    rounds_of("rollout/reward", 0.5, 0.5),  # nothing is compared
    train_rows("loss", [0.7, 0.6]),
])
def test_rewards_that_differ_somewhere_are_fine(rows):
    assert "equal_rewards" not in names(rows)


def test_texts_have_no_pictures_to_hack():
    assert "reward hacking" not in dict(limits.checked(two_evals(length=(20.0, 20.0))))
    assert "reward hacking" in dict(limits.checked(ROUND))
