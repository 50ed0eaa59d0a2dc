"""What `prefopt eval` makes of judgements: figures with intervals, paired differences, what was not measured and why, and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prefopt.config.rounds import HELD_OUT
from prefopt.config.schema import PICTURE_REWARDS, TrainConfig
from prefopt.report.estimators import interval, length_controlled, paired, wins
from prefopt.rewards.pictures import PARTS
from prefopt.training.judge import AT_TIMES, COMPARABLE, SHARES, Judge, Judgement

# (measure, its name in the table, decimals); shares are shown in percent.
ON_ROWS = (
    ("loss", "loss", 4), ("log_loss", "log-loss, nats", 4), ("brier", "Brier score", 4), ("ece", "calibration error (ECE), %", 1),
    ("accuracy", "accuracy (implicit reward), %", 1),
    *((key, f"  on draws {(low := int(key.rpartition('/')[2]))} to {low + 25} % into noise, %", 1) for key in AT_TIMES),
    ("reward/margin", "implicit reward margin", 3),
    ("reward/chosen", "implicit reward, chosen", 3), ("reward/rejected", "implicit reward, rejected", 3),
    ("ranking_accuracy", "ranking accuracy, %", 1), ("ranking_accuracy_per_token", "ranking accuracy per token, %", 1),
    ("reference_ranking_accuracy", "reference ranking accuracy, %", 1),
    ("reference_ranking_accuracy_per_token", "reference, per token, %", 1), ("kendall_tau", "Kendall's tau (implicit reward)", 3),
    ("ranking_kendall_tau", "Kendall's tau (log-prob)", 3), ("logp/chosen", "log-prob of chosen, nats", 2),
    ("logp/rejected", "log-prob of rejected, nats", 2), ("log_ratio/chosen", "log-ratio to the reference, chosen, nats", 2),
    ("log_ratio/rejected", "log-ratio to the reference, rejected, nats", 2),
)  # fmt: skip
ON_SAMPLES = (
    ("true_reward", "true reward", 3), ("reward", "trained reward", 3), ("win_rate", "win rate vs initial, %", 1),
    ("lc_win_rate", "length-controlled win rate, %", 1), ("kl", "KL to initial, nats", 3),
    ("forward_kl", "KL from initial, nats", 3), ("length", "length, tokens", 1),
    ("finished", "finished, %", 1), ("distinct_2", "distinct-2, %", 1),
    ("prompt_match", "prompt match, %", 1), *((f"match/{part}", f"  {part}, %", 1) for part in PARTS),
    ("all_parts", "  all of it right, %", 1), ("variety", "variety between prompts", 3), ("saturation", "saturation, %", 1),
    ("high_frequency", "fine detail, % of contrast", 2), (f"{HELD_OUT}look", "held-out reward: the world's look", 3),
    *((f"{HELD_OUT}{kind}", f"held-out reward: {kind}", 3) for kind in PICTURE_REWARDS),
)  # fmt: skip
# What two runs of different objectives have in the same units.
COMMON = ("accuracy", "ranking_accuracy", "ranking_accuracy_per_token", "kendall_tau", "ranking_kendall_tau", *AT_TIMES,
          *(key for key, *_ in ON_SAMPLES))  # fmt: skip


def differences(after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """measure -> value, ends of the 95 % interval and whether it excludes zero, paired by prompt."""
    out = {}
    for name in after:
        if name in before and len(after[name]) == len(before[name]):
            found = paired(after[name], before[name])
            out[name] = {"value": found.mean}
            if math.isfinite(found.low):
                out[name] |= {"low": found.low, "high": found.high, "excludes_zero": found.excludes_zero}
    return out


def head_to_head(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Win rate, plain and length-controlled, of samples against another run's for the same prompts; empty without rewards."""
    if not ours or any(s["reward"] is None for s in (*ours, *theirs)):
        return {}
    won = wins([s["reward"] for s in ours], [s["reward"] for s in theirs])
    found = {"win_rate": won}
    if "tokens" in ours[0]:  # a text
        longer = np.array([a["tokens"] - b["tokens"] for a, b in zip(ours, theirs, strict=True)], dtype=float)
        found["lc_win_rate"] = length_controlled(won, longer)
    return Judgement(replies={k: v for k, v in found.items() if v is not None}).row()


def not_measured(judge: Judge, cfg: TrainConfig, after: Judgement) -> dict[str, str]:
    """What is missing -> why, in words."""
    out: dict[str, str] = {}
    rows = judge.held_out.rows if judge.held_out is not None else []
    if not rows:
        out["everything on held-out rows"] = "there are none; name some with data.eval, or hold some back with data.eval_fraction"
    elif not any(row.kind in COMPARABLE for row in rows):
        out["accuracy, ranking accuracy"] = "the held-out rows say of no completion that it is better than another"
    elif "ranking_accuracy" not in after.pairs:
        out["ranking accuracy"] = "a reward model gives no log-probabilities"
    elif judge.initial is None and (judge.engine.reference is None or judge.engine.moving_reference):
        out["reference ranking accuracy"] = "no fixed reference was in memory (evaluation.kl=false)"
    if not after.samples:
        if judge.prompts:
            out["everything on samples"] = "a reward model writes no replies"
        else:
            out["everything on samples"] = "no prompt was sampled (prompts=0, or there are no held-out prompts)"
        return out
    if not judge.rewards:
        known = "reward=none" if cfg.reward.kind == "none" else "no reward is known for this data (reward=model brings one)"
        out["true reward, win rates"] = known
    elif "lc_win_rate" not in after.replies and "tokens" in after.samples[0]:
        out["length-controlled win rate"] = "all replies are longer than the initial policy's, or all are shorter"
    if "kl" not in after.replies:
        plain = judge.sampler.temperature == judge.sampler.top_p == 1 or "image" in after.samples[0]
        if judge.draws_another:
            out["KL"] = "the policy is the negative side of guidance, and draws nothing alone (sampler.negative=policy)"
            return out
        out["KL"] = "the run was made with evaluation.kl=false" if plain else "it needs samples at temperature 1 and top_p 1"
    return out


HEADS = ("before", "after", "after - before")


def table(before: Judgement, after: Judgement, changes: Mapping[str, Any], heads: Sequence[str] = HEADS) -> str:
    """Figures in two blocks; a star marks differences whose interval excludes zero."""
    lines: list[list[str]] = []
    blocks = (("on held-out rows", ON_ROWS), ("on samples", ON_SAMPLES))
    for title, measures in blocks:
        body = [_line(key, name, decimals, before, after, changes) for key, name, decimals in measures
                if key in before.measures or key in after.measures]  # fmt: skip
        if body:
            lines += [[title, *heads] if not lines else [title], *body]
    widths = [max((len(line[i]) for line in lines if i < len(line)), default=0) for i in range(4)]
    return "\n".join("   ".join(text.ljust(w) for text, w in zip(line, widths, strict=False)).rstrip() for line in lines)


def _line(key: str, name: str, decimals: int, before: Judgement, after: Judgement, changes: Mapping[str, Any]) -> list[str]:
    scale = 100 if key in SHARES else 1
    cells = []
    for judgement in (before, after):
        values = judgement.measures.get(key)
        found = None if values is None else interval(values, key in SHARES)
        cells.append("" if found is None else span(found.mean, found.low, found.high, scale, decimals))
    change = changes.get(key)
    if change is not None:
        text = span(change["value"], change.get("low", math.nan), change.get("high", math.nan), scale, decimals, sign=True)
        cells.append(text + (" *" if change.get("excludes_zero") else ""))
    return [f"  {name}", *cells]


def span(mean: float, low: float, high: float, scale: float, decimals: int, sign: bool = False) -> str:
    """`mean [low, high]`; without ends where one prompt says nothing about them."""
    text = f"{mean * scale:{'+' if sign else ''}.{decimals}f}"
    return text if not math.isfinite(low) else f"{text} [{low * scale:.{decimals}f}, {high * scale:.{decimals}f}]"
