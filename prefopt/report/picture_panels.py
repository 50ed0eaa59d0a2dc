"""The curves that only runs of pictures have."""

from __future__ import annotations

from prefopt.config.rounds import HELD_OUT
from prefopt.report.plots import Group, Row, Series, finite, interval_curve, number


def groups(train: list[Row], evals: list[Row]) -> list[Group]:
    return [board(train, evals), look(evals)]


def look(evals: list[Row]) -> Group:
    """What samples look like, and where in the process held-out pairs are told apart."""
    out = Group("Pictures", "Measured at each evaluation without any scorer.")
    match = [interval_curve(evals, "prompt_match", "all parts", 1, 100), interval_curve(evals, "all_parts", "right", 2, 100)]
    out.add(
        "Prompt match", match,
        "How far samples show what was asked for: the mean over its parts, and the share of pictures in which every part is met.",
        unit="%",
    )  # fmt: skip
    colours = [interval_curve(evals, "saturation", "saturation", 1, 100), interval_curve(evals, "high_frequency", "fine detail", 2, 100)]
    out.add(
        "Look", colours,
        "Mean saturation, and the share of contrast finer than a quarter cycle per pixel. Scorers that like colour or sharpness move them.",
        "nothing was sampled", unit="%",
    )  # fmt: skip
    out.add(
        "Variety", [interval_curve(evals, "variety")],
        "Mean distance between pictures of different prompts, in random features. It falls when all pictures become alike.",
        "nothing was sampled", unit="distance",
    )  # fmt: skip
    quarters = [interval_curve(evals, f"accuracy_at/{low}", f"{low} to {low + 25} %", 1 + low // 25, 100) for low in (0, 25, 50, 75)]
    out.add(
        "Accuracy by noise", quarters,
        "Held-out pairs at single draws: the share in which the log-ratio to the reference is higher for the chosen picture, by how far in "
        "noise the draw lies. Little noise asks about detail, much about composition.",
        "no pairs were held out, or there is no reference", unit="%", guides=[(50, "chance")],
    )  # fmt: skip
    return out


def board(train: list[Row], evals: list[Row]) -> Group:
    """What a reward that is trained on may be bought with: everything in one chart, as the change since the start."""
    out = Group("Hacking board", "Rises of the trained reward that other measures do not share are how a reward is cheated.")
    trained = trained_reward(train, evals)
    shifts = [_shift(evals, key, i) for i, key in enumerate([trained, *held_out_rewards(evals, trained)], 1) if key]
    out.add(
        "Trained reward and others, in standard errors", [s for s in shifts if s],
        "Change since the start over its standard error: beyond 2 it is hardly chance. What is trained on and what is not should rise "
        "together.",
        "needs a reward with its interval at two evaluations", unit="standard errors", guides=[(0, "start")],
    )  # fmt: skip
    looks = [s for i, (key, label) in enumerate(LOOKS.items(), 1) if (s := _relative(evals, key, label, i))]
    out.add(
        "Look, against the start", looks,
        "Variety, saturation and fine detail of samples as shares of what they were. Few scorers mind when pictures become alike, garish "
        "or grainy.",
        "nothing was sampled", unit="%", guides=[(100, "start")],
    )  # fmt: skip
    out.add(
        "Distance from the start's samples", [interval_curve(evals, "start_distance")],
        "Mean distance of a sample from the one that the policy drew for the same prompt and noise before the first step, in random "
        "features.",
        "nothing was sampled", unit="distance",
    )  # fmt: skip
    return out


LOOKS = {"variety": "variety", "saturation": "saturation", "high_frequency": "fine detail"}


def trained_reward(train: list[Row], evals: list[Row]) -> str | None:
    """The name under which evaluations have the reward that rounds are judged by; None for a run that draws nothing to learn from."""
    if not any("rollout/reward" in row for row in train):
        return None
    return next((key for key in ("reward", "true_reward") if any(key in row for row in evals)), None)


def held_out_rewards(evals: list[Row], trained: str | None) -> list[str]:
    """Names of what judges samples beside the reward that is trained on."""
    beside = sorted({key for row in evals for key in row if key.startswith(HELD_OUT) and not key.endswith(("_low", "_high"))})
    return [key for key in ("true_reward", "prompt_match", *beside) if key != trained]


def in_words(key: str) -> str:
    return key.removeprefix(HELD_OUT).replace("_", " ")


def standard_errors(first: Row, now: Row, key: str) -> float | None:
    """The change of a measure over its standard error, from the intervals of both evaluations as if they were independent (their prompts
    are the same, so it is larger rather than smaller)."""
    ends = [finite(row.get(f"{key}_{end}")) for row in (first, now) for end in ("low", "high")]
    if None in ends or finite(first.get(key)) is None or finite(now.get(key)) is None:
        return None
    error = (((ends[1] - ends[0]) ** 2 + (ends[3] - ends[2]) ** 2) ** 0.5) / (2 * 1.96)
    return (now[key] - first[key]) / error if error > 0 else None


def _shift(evals: list[Row], key: str, colour: int) -> Series | None:
    rows = [row for row in evals if key in row]
    found = [(row["step"], standard_errors(rows[0], row, key)) for row in rows]
    curve = [(step, value) for step, value in found if value is not None]
    label = in_words(key)
    notes = [f"step {step:.0f}: {label} {number(value)} standard errors" for step, value in curve]
    return Series(label, curve, colour, marks=True, notes=notes) if len(curve) > 1 else None


def _relative(evals: list[Row], key: str, label: str, colour: int) -> Series | None:
    rows = [row for row in evals if key in row]
    if len(rows) < 2 or not rows[0][key]:
        return None
    curve = [(row["step"], 100 * row[key] / rows[0][key]) for row in rows]
    return Series(label, curve, colour, marks=True, notes=[f"step {x:.0f}: {label} {number(y)} % of the start" for x, y in curve])
