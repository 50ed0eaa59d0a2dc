"""Warnings of a run, from the rows of its metrics.jsonl alone. Each links to the part of docs/reading-your-run.md that shows its curves.

The loop asks for them at every evaluation and at the end, the run report and comparisons afterwards. In train rows `skipped_steps` is a
running total. The row of split "check" holds what the self-check measured before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefopt.config.rounds import HELD_OUT
from prefopt.report.picture_panels import held_out_rewards, in_words, standard_errors, trained_reward
from prefopt.report.plots import Change, Row, change, finite, number, tidy

# docs/reading-your-run.md as one HTML file. It is installed with the package, so a link into it works without a network.
GUIDE = Path(__file__).with_name("reading-your-run.html")

# Held-out pairs are the same at every evaluation, so their log-probability has no sampling noise, and one nat
# makes a reply e times less likely. On long replies that is little, so 2 % of the start is asked as well.
DISPLACEMENT_NATS = 1.0
DISPLACEMENT_SHARE = 0.02
# Sampling noise moves mean lengths by some per cent; 30 % is far outside, and enough to sway a judge.
LENGTH_GROWTH = 0.30
# A fall below the best reward must exceed both intervals; where there are none, a tenth of its size.
OVEROPTIMISATION_DROP = 0.10
# The standard error of a share near one half is 6 points with 64 samples: ten points are rarely chance.
UNFINISHED_DROP = 0.10
# A policy that is its reference differs from it by rounding alone; another policy differs by nats.
REFERENCE_NATS = 0.1
# Held-out pairs do not change, so a rise of their loss by 5 % is none of chance.
LOSS_RISE = 0.05
# Preference training ends at hundredths to tenths of a nat per token; one nat makes every token e times less likely where it came from.
# Answers of a word or two may well change by as much.
COLLAPSE_KL = 1.0
COLLAPSE_LENGTH = 5
OF_TEXTS = ("length growth", "unfinished replies")  # nothing to check in pictures
OF_PICTURES = ("reward hacking",)
# Beyond two standard errors a change of a measure is hardly chance.
SURE = 2.0
# Pictures that lose a fifth of their variety look alike to the eye; fine detail doubles where noise or over-sharpening sets in.
VARIETY_FALL = 0.20
DETAIL_GROWTH = 2.0
# Beyond the clip a ratio teaches nothing (or in one direction only): above one half most of what was sampled and judged is lost.
CLIPPED_SHARE = 0.5
CLIPPED_STEPS = 10  # the last ones that were logged, so that the first steps of rounds, whose ratios are 1, do not decide
# Where a reward is scarce most prompts may be tied for a while, and the others teach; at one prompt in twenty nobody does.
TIED_SHARE = 0.95
TIED_ROUNDS = 3  # the last ones that were logged, or all of a shorter run

@dataclass(frozen=True)
class Alarm:
    """A warning; the explanation's second line says what to do. `anchor` is a heading of the guide."""

    name: str
    title: str
    anchor: str
    explanation: str

    @property
    def link(self) -> str:
        """Address of the installed guide, at the curves of this alarm."""
        return f"{GUIDE.as_uri()}#{self.anchor}"


class _Unchecked(Exception):
    """The rows lack what a check needs; the message names it."""


def alarms(rows: list[dict]) -> list[Alarm]:
    """The alarms of a run, from the rows of metrics.jsonl as they are. A pure function."""
    return [found for _, found in checked(rows) if isinstance(found, Alarm)]


def checked(rows: list[dict], pictures: bool = False) -> list[tuple[str, Alarm | str | None]]:
    """(what was checked, an Alarm | None for all clear | why it could not be checked). `pictures` have no length and no end."""
    train, evals, start = tidy(rows, "train"), tidy(rows, "eval"), tidy(rows, "check")
    pictures = pictures or any("pictures" in row for row in train)
    checks: list[tuple[str, Callable[[], Alarm | None]]] = [
        ("wrong reference", lambda: _reference(evals, start, "pictures" if pictures else "replies")),
        ("collapse", lambda: _collapse(train, evals, "pictures" if pictures else "language")),
        ("likelihood displacement", lambda: _displacement(train, evals, pictures)),
        ("over-optimisation", lambda: _overoptimisation(evals)),
        ("reward hacking", lambda: _hacking(train, evals)),
        ("clipped ratios", lambda: _clipped(train)),
        ("equal rewards", lambda: _tied(train)),
        ("length growth", lambda: _length_growth(evals)),
        ("unfinished replies", lambda: _unfinished(evals)),
        ("skipped steps", lambda: _skipped(train)),
        ("non-finite loss", lambda: _non_finite(rows)),
    ]
    results: list[tuple[str, Alarm | str | None]] = []
    for name, check in checks:
        if name in (OF_TEXTS if pictures else OF_PICTURES):
            continue
        try:
            results.append((name, check()))
        except _Unchecked as why:
            results.append((name, str(why)))
    return results


def _moved(evals: list[Row], key: str, what: str) -> Change:
    c = change(evals, key)
    if c is None or not c.moved:
        raise _Unchecked(f"needs {what} at two evaluations")
    return c


def _reference(evals: list[Row], start: list[Row], what: str) -> Alarm | None:
    """The policy before the first step should be what it is held against."""
    gap = start[0].get("policy_minus_reference") if start else None
    kl = evals[0].get("kl") if evals and evals[0]["step"] == 0 else None
    if gap is None and kl is None:
        raise _Unchecked("needs an objective with a reference and train.self_check=true, or KL at step 0")
    allowed = max(REFERENCE_NATS, start[0].get("allowed") or 0.0) if start else REFERENCE_NATS  # rounding of a stored reference
    if (gap or 0.0) <= allowed and abs(kl or 0.0) <= REFERENCE_NATS:
        return None
    if gap is not None and gap > allowed:
        found = f"Before the first step, log-probs of {what} under the policy and under its reference differed by up to {number(gap)} nats"
        if {"loss", "theory"} <= start[0].keys():
            found += f", and the loss was {number(start[0]['loss'], 3)} instead of {number(start[0]['theory'], 3)}"
    else:
        found = f"Before the first step, the KL of the policy to the policy the run started from was {number(kl)} nats instead of 0"
    return Alarm(
        "wrong_reference",
        "The reference is not the policy the run started from",
        "a-wrong-reference",
        f"{found}. Implicit rewards, margin and accuracy then start from an earlier training stage, and the objective pulls the policy "
        "back to its reference.\n"
        "If the run starts from an adapter that an earlier stage trained, set reference.policy=initial (base means the model without "
        "any adapter). Leave it only if you want the tie to the base model.",
    )


def _collapse(train: list[Row], evals: list[Row], what: str) -> Alarm | None:
    """Either the samples are text the initial policy would hardly write, or both losses rose (overfitting lifts the held-out one alone)."""
    start = evals[0].get("loss", 0.0) if evals else 0.0
    limit = (1 + LOSS_RISE) * start if start > 0 else math.inf  # losses of policy gradients start at 0 and need not fall
    if not any(row["step"] > 0 and ("kl" in row or "loss" in row) for row in evals):
        raise _Unchecked("needs KL or a held-out loss at two evaluations")
    since, found = 0.0, ""
    for row in evals:
        losses = [r["loss"] for r in train if since < r["step"] <= row["step"] and "loss" in r]
        kl, length = row.get("kl", 0.0), row.get("length", 0.0)
        if length >= COLLAPSE_LENGTH and kl > COLLAPSE_KL * length:
            found = f"samples have a KL of {number(kl)} nats to the initial policy, {number(kl / length)} per token"
        elif losses and min(row.get("loss", 0.0), sum(losses) / len(losses)) > limit:
            now, mean, before = (number(x, 3) for x in (row["loss"], sum(losses) / len(losses), start))
            found = f"the held-out loss is {now} and the training loss {mean}, from {before} before the first step"
        if found:
            return Alarm(
                "collapse",
                "The steps are too large",
                "a-learning-rate-too-high",
                f"After step {row['step']:.0f} {found}: the model is losing its {what} faster than it learns preferences. A later fall "
                "of the loss does not mend that.\n"
                "Lower the learning rate by a factor of 3 to 10. If a lower one does not help, the objective holds the policy too loosely: "
                "raise beta.",
            )
        since = row["step"]
    return None


def _displacement(train: list[Row], evals: list[Row], pictures: bool) -> Alarm | None:
    if any("samples" in row for row in train):
        raise _Unchecked("learns from its own samples, which were judged")
    chosen = _moved(evals, "logp/chosen", "held-out log-probabilities")
    rejected = _moved(evals, "logp/rejected", "held-out log-probabilities")
    for c in (chosen, rejected):
        if c.before - c.after <= max(DISPLACEMENT_NATS, DISPLACEMENT_SHARE * abs(c.before)):
            return None
    down, down_rejected = chosen.before - chosen.after, rejected.before - rejected.after
    faster = "Any margin grew only because rejected fell faster. " if down_rejected > down else ""
    if pictures:
        return Alarm(
            "likelihood_displacement",
            "Chosen pictures became less likely",
            "likelihood-displacement",
            f"On held-out pairs the log-probability of chosen pictures fell by {number(down)} nats (they are denoised worse than before), "
            f"that of rejected ones by {number(down_rejected)}. {faster}The model may have moved to pictures that are in neither and that "
            "nobody has judged (likelihood displacement).\n"
            "Look at the samples. If they got worse: lower the learning rate, raise beta, train fewer steps, or choose a method that holds "
            "on to chosen pictures (mapo, dspo).",
        )
    return Alarm(
        "likelihood_displacement",
        "Chosen replies became less likely",
        "likelihood-displacement",
        f"On held-out pairs the log-probability of chosen replies fell by {number(down)} nats, that of "
        f"rejected ones by {number(down_rejected)}. {faster}The probability moved to replies that are in "
        "neither and that nobody has judged (likelihood displacement).\n"
        "Read the samples. If they got worse: lower the learning rate, raise beta, train fewer steps, or add "
        "a log-likelihood term on chosen replies (the objectives cpo and orpo have one).",
    )


def _overoptimisation(evals: list[Row]) -> Alarm | None:
    last = _moved(evals, "true_reward", "a true reward").last
    rows = [row for row in evals if "true_reward" in row]
    best = max(rows, key=lambda row: row["true_reward"])
    drop = best["true_reward"] - last["true_reward"]
    low, high = best.get("true_reward_low"), last.get("true_reward_high")
    if low is not None and high is not None:
        noise = math.hypot(best["true_reward"] - low, high - last["true_reward"])
    else:
        span = best["true_reward"] - min(row["true_reward"] for row in rows)
        noise = OVEROPTIMISATION_DROP * max(abs(best["true_reward"]), span)
    if drop <= noise:
        return None
    if "reward/margin" in best and "reward/margin" in last:
        name, improved = "the held-out margin kept rising", last["reward/margin"] > best["reward/margin"]
    elif "loss" in best and "loss" in last:
        name, improved = "the held-out loss kept falling", last["loss"] < best["loss"]
    else:
        raise _Unchecked("needs a held-out margin or loss beside the true reward")
    use = "Train again" if best is rows[0] else f"Use the checkpoint near step {best['step']:.0f} if it was kept, or train again"
    return None if not improved else Alarm(
        "over_optimisation",
        "True reward fell while the objective improved",
        "reward-over-optimisation",
        f"True reward was {number(best['true_reward'])} at step {best['step']:.0f} and is "
        f"{number(last['true_reward'])} at step {last['step']:.0f}, while {name}: the policy now fits the "
        "pairs at the expense of what they stand for (over-optimisation).\n"
        f"{use} with fewer steps, a higher beta or a lower learning rate; noisy labels make this worse.",
    )  # fmt: skip


def _hacking(train: list[Row], evals: list[Row]) -> Alarm | None:
    """The reward that samples are judged by rises, and what it is to stand for does not rise with it, or the pictures lose their look."""
    key = trained_reward(train, evals)
    if key is None:
        raise _Unchecked("needs a run that learns from what a reward says of its own samples")
    c = _moved(evals, key, "the trained reward")
    rise = standard_errors(c.first, c.last, key)
    if rise is None:
        raise _Unchecked("needs the trained reward with its interval at two evaluations")
    if rise < SURE:
        return None
    found = []
    for other in held_out_rewards(evals, key):
        words = "the true reward" if other == "true_reward" else in_words(other)
        known = key == "true_reward" and other == f"{HELD_OUT}look"  # a part of what is trained on, and worth what it is there
        if not known and (shift := standard_errors(c.first, c.last, other)) is not None and shift < -SURE:
            found.append(f"{words} fell from {number(c.first[other])} to {number(c.last[other])}")
    for look, words, factor in (("variety", "variety", 1 - VARIETY_FALL), ("high_frequency", "fine detail", DETAIL_GROWTH)):
        if (before := c.first.get(look)) and (now := c.last.get(look)) is not None and (now / before - factor) * (factor - 1) > 0:
            found.append(f"{words} of samples is {100 * now / before:.0f} % of what it was")
    if not found:
        return None
    return Alarm(
        "reward_hacking",
        "The reward rose and the pictures got worse",
        "reward-hacking",
        f"The reward that is trained on rose from {number(c.before)} to {number(c.after)}, while {' and '.join(found)}: the model may have "
        "found what the reward likes beside what it stands for (reward hacking).\n"
        "Look at the grids of several evaluations, and take the checkpoint before the turn. Then raise beta, train fewer steps, or "
        "judge by several rewards.",
    )


def _clipped(train: list[Row]) -> Alarm | None:
    """Of runs that learn from their own samples through ratios in a band."""
    shares = [row["clipped"] for row in train if "clipped" in row and "rollout/reward" in row][-CLIPPED_STEPS:]
    if train and not shares:
        return None
    if len(shares) < CLIPPED_STEPS:
        raise _Unchecked(f"needs {CLIPPED_STEPS} steps")
    share = sum(shares) / len(shares)
    if share <= CLIPPED_SHARE:
        return None
    return Alarm(
        "clipped_ratios",
        "Most ratios are clipped",
        "clipped-ratios",
        f"In the last {CLIPPED_STEPS} steps {100 * share:.0f} % of the ratios lay outside the objective's band, where they teach little or "
        "nothing: the policy has moved too far from the one that its ratios compare it with.\n"
        "Lower the learning rate, take fewer steps on each round (source.epochs, a larger train.batch_size), or widen the band "
        "(algo.epsilon). Where the comparison is with a reference: train fewer rounds.",
    )


def _tied(train: list[Row]) -> Alarm | None:
    """Of runs that compare their own samples: of a prompt, or of one step of the sampler (then `rollout/kept` alone says it)."""
    rounds = {row["samples"]: max(row.get("rollout/ties", 0.0), 1 - row.get("rollout/kept", 1.0)) for row in train
              if "rollout/ties" in row or "rollout/kept" in row}
    shares = list(rounds.values())[-TIED_ROUNDS:]
    if not train:
        raise _Unchecked("needs a step")
    if not shares or (share := sum(shares) / len(shares)) < TIED_SHARE:
        return None
    return Alarm(
        "equal_rewards",
        "The reward tells no samples apart",
        "samples-that-are-worth-the-same",
        f"In the last {count(len(shares), 'round')} {100 * share:.0f} % of what was compared was worth the same: such groups have no "
        "advantage and such pairs no weight, so next to nothing is learned.\n"
        "Read samples with their rewards (rounds/ in the run's folder). If none deserves a reward, take easier prompts or a reward with "
        "degrees; if all do, harder prompts, or be content. If they are all alike, raise source.samples or let the sampler vary more.",
    )


def _length_growth(evals: list[Row]) -> Alarm | None:
    c = _moved(evals, "length", "reply lengths")
    if c.after <= (1 + LENGTH_GROWTH) * c.before or c.after <= 0:
        return None
    growth = f" ({100 * (c.after / c.before - 1):.0f} % longer)" if c.before > 0 else ""
    return Alarm(
        "length_growth",
        "Replies grew much longer",
        "length-exploitation",
        f"Samples went from {c.before:.1f} to {c.after:.1f} tokens on average{growth}. Chosen replies are "
        "often longer than rejected ones, and length is the easiest thing to learn from them.\n"
        "Compare rewards and win rates at equal length. prefopt data check prints how often the chosen reply is the longer one: if it "
        "mostly is, balance the pairs; if not, use a length-normalised objective (for example simpo).",
    )


def _unfinished(evals: list[Row]) -> Alarm | None:
    c = _moved(evals, "finished", "the share of finished samples")
    if c.before - c.after <= UNFINISHED_DROP:
        return None
    return Alarm(
        "unfinished",
        "Samples no longer end",
        "samples-no-longer-end",
        f"{100 * c.before:.0f} % of samples ended with the end-of-sequence token at the start, now "
        f"{100 * c.after:.0f} % do; the others were cut at the length limit, so their rewards mislead.\n"
        "Check that completions in the data end with that token and are not truncated; then lower the "
        "learning rate or raise the sampling limit.",
    )


def _skipped(train: list[Row]) -> Alarm | None:
    counts = [row["skipped_steps"] for row in train if "skipped_steps" in row]
    if not counts:
        raise _Unchecked("no train row has skipped_steps")
    if max(counts) <= 0:
        return None
    return Alarm(
        "skipped_steps",
        f"{count(int(max(counts)), 'optimiser step')} skipped",
        "skipped-steps",
        "A step is skipped when its gradient is not finite, so these batches taught nothing.\n"
        "One or two early on are harmless. If there are more: lower the learning rate, add warm-up, use bf16 "
        "or fp32 instead of fp16, and look for empty or extreme rows in the data.",
    )


def _non_finite(rows: list[dict]) -> Alarm | None:
    losses = [row["loss"] for row in rows if "loss" in row and row.get("split") in ("train", "eval")]
    if not losses:
        raise _Unchecked("no loss was recorded")
    bad = sum(finite(loss) is None for loss in losses)
    return None if not bad else Alarm(
        "non_finite_loss",
        "The loss was not a number",
        "a-loss-that-is-not-a-number",
        f"{bad} of {len(losses)} recorded losses are NaN, infinite or null; the curves leave them out.\n"
        "Lower the learning rate, use bf16 or fp32 instead of fp16, and look for empty or extreme data rows.",
    )  # fmt: skip


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
