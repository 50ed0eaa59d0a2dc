"""What docs/zoo.json becomes: the table and the plot of docs/zoo.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_report import insert, table
from reading_your_run import figure

from prefopt.report.plots import Series, duration, number

MISSING = "It has not been run yet: `make bench-zoo`."
BARS = ".bar{stroke-width:1;opacity:.35}.mark{fill:#fff}"


def span(values: Sequence[float], decimals: int = 2) -> str:
    mean, low, high = (number(v, decimals) for v in values)
    return f"{mean} ({low} to {high})"


def unbeaten(entry: dict[str, Any], others: Sequence[dict[str, Any]], condition: str) -> bool:
    """Whether no other method has both a higher reward and a lower KL."""
    reward, kl = (entry[condition][name][0] for name in ("true_reward", "kl"))
    return not any(o[condition]["true_reward"][0] > reward and o[condition]["kl"][0] < kl for o in others)


def runs(entry: dict[str, Any], conditions: Sequence[str]) -> str:
    """How many runs are behind a row: of each condition, where they differ."""
    counts = [entry.get(condition, {}).get("runs", 0) for condition in conditions]
    return f"{len(counts)} × {counts[0]}" if len(set(counts)) == 1 else " + ".join(map(str, counts))


def row(entry: dict[str, Any], conditions: Sequence[str]) -> list[str]:
    name = f"[{entry['method']}](algorithms.md)" + (" †" if entry.get("first") else "")
    if "lr" not in entry:
        failed = ", failed: " + entry["error"].replace("|", "/").replace("\n", " ") if "error" in entry else ""
        return [name, f"{entry['tuned']} of {entry['points']} tuning runs{failed}", *[""] * (4 + len(conditions))]
    strength = f", {entry['strength'][0]} {entry['strength'][1]:g}" if entry["strength"] else ""
    against = ""
    if "against" in entry:
        *values, significant = entry["against"]
        against = span(values) + (" *" if significant else "")
    first = entry.get(conditions[0])
    count = runs(entry, conditions) + (f" ({entry['failed']} failed)" if entry.get("failed") else "")
    return [
        name, f"lr {entry['lr']:g}{strength}", count, span(first["true_reward"]) if first else "", against,
        span(first["kl"], 1) if first else "", number(first["length"][0], 1) if first else "",
        *(span(entry[c]["true_reward"]) if c in entry else "" for c in conditions[1:]),
    ]


def about(result: dict[str, Any]) -> str:
    common, whole = result["common"], sum("clean" in e for e in result["methods"])
    strengths = ", ".join(f"{f:g}" for f in result["factors"])
    rates = ", ".join(f"{r:g}" for r in result["rates"])
    start = result["initial"]
    begin = f" The initial policy’s: true reward {span(start['true_reward'])}, length {number(start['length'][0], 1)}." if start else ""
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    return (
        f"{result['runs']:,} runs, {whole} of {len(result['methods'])} methods, {duration(result['seconds'])} on one core; "
        f"{result['date']}, {versions}. A run is {common['train.steps']} steps of {common['train.batch_size']} pairs out of "
        f"{common['data.limit']:,}, judged by "
        f"one sample for each of {common['evaluation.prompts']} held-out prompts. Grid: learning rate {rates}, times {strengths} of the "
        f"recommended strength, {result['tuning_seeds']} run{'s' * (result['tuning_seeds'] > 1)} each.{begin}"
    )


def tables(result: dict[str, Any]) -> str:
    conditions = list(result["conditions"])
    head = ["method", "settings found", "runs", "true reward", "minus DPO’s", "KL, nats", "length",
            *(f"true reward, {c}" for c in conditions[1:])]  # fmt: skip
    parts = [about(result), table(head, [row(e, conditions) for e in result["methods"]])]
    parts.append("In brackets 95 % intervals over seeds and prompts. * differs from DPO (paired by prompt, corrected for their number).")
    if any(e.get("first") for e in result["methods"]):
        parts[-1] += " † needs another run first (as many steps on the same rows), which is in none of the figures."
    if failed := [e for e in result["methods"] if e.get("failed") and "lr" in e]:
        parts.append("Failed: " + "; ".join(f"{e['method']}, {e['failed']} runs: {e['error'].rstrip('.')}" for e in failed) + ".")
    if result["left_out"]:
        reasons: dict[str, list[str]] = {}
        for slug, why in result["left_out"].items():
            reasons.setdefault(why, []).append(slug)
        parts.append("Not in it: " + "; ".join(f"{', '.join(slugs)} ({why})" for why, slugs in reasons.items()) + ".")
    return "\n\n".join(parts)


def plot(result: dict[str, Any]) -> str:
    """Reward against KL, a panel for each condition; methods that no other beats in both are named."""
    panels = []
    for condition in result["conditions"]:
        entries = [e for e in result["methods"] if condition in e]
        series = []
        for e in sorted(entries, key=lambda e: unbeaten(e, entries, condition)):  # the named ones on top
            best, found = unbeaten(e, entries, condition), e[condition]
            (reward, low, high), (kl, left, right) = found["true_reward"], found["kl"]
            series.append(Series(e["method"] if best else "", [(kl, reward)], 2 if best else 1, marks=True, band=[(kl, low, high)],
                                 crosses=[(reward, left, right)], notes=[f"{e['method']}: {number(reward)} at {number(kl)} nats"]))
        guides = [(result["initial"]["true_reward"][0], "initial policy")] if result["initial"] else []
        if series:
            options = {"unit": "true reward", "x_unit": "KL to the initial policy, nats", "guides": guides}
            panels.append((f"Reward against KL, {condition}", series, options))
    return figure(*panels).replace("</style>", f"{BARS}</style>", 1)


def block(docs: Path) -> str:
    """What stands between the markers of the page."""
    path = docs / "zoo.json"
    if not path.is_file():
        return MISSING
    result = json.loads(path.read_text(encoding="utf-8"))
    picture = "![reward against KL](img/zoo.svg)\n\n" if any("clean" in e for e in result["methods"]) else ""
    return f"{picture}{tables(result)}\n\nAll of it: [zoo.json](zoo.json)."


def render(docs: Path) -> None:
    """Writes the table into the page, and the plot."""
    page = docs / "zoo.md"
    page.write_text(insert(page.read_text(encoding="utf-8"), "zoo", block(docs)), encoding="utf-8")
    path = docs / "zoo.json"
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
        if any("clean" in e for e in result["methods"]):
            (docs / "img" / "zoo.svg").write_text(plot(result), encoding="utf-8")
