"""What `prefopt eval` says of a reward model beside its measures: a reliability table, and how near it is to a known true reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prefopt.report.calibration import calibration, compared, reliability, reliability_text
from prefopt.training.setup import Run


def judge_rewards(run: Run) -> tuple[list[str], dict[str, Any]]:
    """(lines to print, figures) on the held-out rows; nothing where they compare no replies."""
    rewards = run.judge.rewards_of_rows()
    pairs, logits, labels = compared(run.judge.held_out.rows, rewards)
    if not pairs:
        return [], {}
    figures: dict[str, Any] = {"pairs": len(pairs), "reliability": reliability(logits, labels)}
    lines = ["reliability: how often the side thought better was preferred", reliability_text(figures["reliability"])]
    if known := run.judge.rewards.get("true_reward"):
        examples = run.held_out.examples
        flat = [replace(e, completions=[c], kind="demonstration") for e in examples for c in e.completions]
        values = iter(known(flat))
        truth = {number: [next(values) for _ in e.completions] for number, e in enumerate(examples)}
        figures["true_reward"] = true = against_truth(pairs, logits, truth)
        lines += [
            f"against the true reward: correlation {true['correlation']:.3f} within pairs; accuracy on labels drawn from it cannot pass "
            f"{100 * true['best_accuracy']:.1f} % in expectation, this model's would be {100 * true['expected_accuracy']:.1f} %",
            f"calibration error against its exact probabilities {100 * true['ece']:.1f} %, log-loss {true['log_loss']:.4f} nats "
            f"(at best {true['best_log_loss']:.4f})",
            reliability_text(true["reliability"]),
        ]
    return lines, figures


def against_truth(pairs: Sequence[tuple[int, int, int]], logits: np.ndarray, truth: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """Figures against Bradley-Terry's exact probabilities p under the true reward.

    best_accuracy = mean of max(p, 1 - p), what the true reward itself would get on labels drawn from p; best_log_loss is their entropy.
    correlation is Pearson's, between the differences of the two rewards in each pair, both ways round: a reward is defined up to a
    constant per prompt only.
    """
    true_logits = np.array([truth[r][i] - truth[r][j] for r, i, j in pairs])
    p = 1 / (1 + np.exp(-true_logits))
    measures = {name: float(values.mean()) for name, values in calibration(logits, p).items()}
    best = {name: float(values.mean()) for name, values in calibration(true_logits, p).items()}
    norm = np.sqrt((logits**2).sum() * (true_logits**2).sum())
    right = np.where(logits > 0, p, np.where(logits < 0, 1 - p, 0.5))
    return {
        **measures, "best_log_loss": best["log_loss"], "best_brier": best["brier"], "best_accuracy": float(np.maximum(p, 1 - p).mean()),
        "expected_accuracy": float(right.mean()), "correlation": float((logits * true_logits).sum() / norm) if norm else 0.0,
        "reliability": reliability(logits, p),
    }  # fmt: skip
