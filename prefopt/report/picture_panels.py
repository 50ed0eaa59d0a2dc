"""The curves that only runs of pictures have."""

from __future__ import annotations

from prefopt.report.plots import Group, Row, interval_curve


def group(evals: list[Row]) -> Group:
    """What samples look like, and where in the process held-out pairs are told apart."""
    out = Group("Pictures", "Measured at each evaluation without any scorer.")
    match = [interval_curve(evals, "prompt_match", "all parts", 1, 100), interval_curve(evals, "all_parts", "right", 2, 100)]
    out.add(
        "Prompt match", match,
        "How far samples show what was asked for: the mean over its parts, and the share of pictures in which every part is met.",
        unit="%",
    )  # fmt: skip
    look = [interval_curve(evals, "saturation", "saturation", 1, 100), interval_curve(evals, "high_frequency", "fine detail", 2, 100)]
    out.add(
        "Look", look,
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
