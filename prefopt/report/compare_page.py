"""What a comparison looks like: the table for the terminal, the page and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt.report import speed
from prefopt.report.alarms import alarms
from prefopt.report.compare_caveats import caveats, count, hardware_line
from prefopt.report.compare_results import COSTS, MEASURES, OF_PICTURES, OF_TEXTS, SPEEDS, Measure, Results
from prefopt.report.compare_runs import SAMPLED, Method, Run, dig
from prefopt.report.compare_stats import MOST_RESAMPLES, RESAMPLES, RESAMPLES_PER_PAIR, Difference, Estimate, mean_interval
from prefopt.report.page import render
from prefopt.report.plots import Group, Series, compact, duration, number

SHORT_LABEL = 16  # longer labels leave no room for a picture beside them
MOST_BANDS = 5  # more bands than this cover each other
PAIR_LINES = 15  # pairs listed one by one in the terminal
COMPACT = 7  # with more methods the cells of a matrix leave out their intervals
COLOURS = 8
# What stands side by side in a terminal.
BLOCKS = (
    ("true_reward", "win_rate", "lc_win_rate", "kl"), ("accuracy", "ranking_accuracy", "length", "finished"), tuple(m.key for m in COSTS),
    tuple(m.key for m in SPEEDS),
)  # fmt: skip


# ---- the table -----------------------------------------------------------------------------------


@dataclass
class Cell:
    """A figure, what stands under it, and the marks of its footnotes."""

    text: str
    under: str = ""
    marks: str = ""


@dataclass
class Table:
    columns: list[Measure]
    rows: list[tuple[Method | None, str, list[Cell]]] = field(default_factory=list)  # no method: the initial policy
    footnotes: dict[str, str] = field(default_factory=dict)  # text -> mark
    left_out: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        if text not in self.footnotes:
            self.footnotes[text] = chr(ord("a") + len(self.footnotes) % 26) * (1 + len(self.footnotes) // 26)
        return self.footnotes[text]


def make_table(results: Results) -> Table:
    columns = [m for m in (*MEASURES, *COSTS, *SPEEDS) if results.known(m.key)]
    table = Table(columns)
    timed = SPEEDS if any(m in SPEEDS for m in columns) else ()  # runs of earlier versions have no speeds
    needless = {"samples", *(OF_TEXTS if results.known("pictures") else OF_PICTURES)}  # offline runs sample none, and nobody misses it
    for measure in (*MEASURES, *COSTS, *timed):
        if measure not in columns and measure.key not in needless:
            reasons = list(dict.fromkeys(run.why_missing(measure.key) for run in results.runs))
            table.left_out.append(f"{measure.title} ({'; '.join(reasons)})")
    if results.initial:
        cells = [_cell(m, results.initial[m.key]) if m.key in results.initial else Cell("") for m in columns]
        table.rows.append((None, "initial policy", cells))
    for method, estimates in zip(results.methods, results.estimates, strict=True):
        cells = []
        for m in columns:
            cell = _cell(m, estimates[m.key])
            cell.marks = _missing_mark(table, method, m, estimates[m.key])
            counted = sorted({speed.unit(run.status) for run in method.runs} - {"pairs"})
            if m.key == "rows_per_second" and estimates[m.key] and counted:
                cell.marks = " ".join(filter(None, [cell.marks, table.mark(f"{m.title}: counted are {' or '.join(counted)}, not pairs.")]))
            cells.append(cell)
        table.rows.append((method, method.label, cells))
    return table


def _cell(measure: Measure, estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell("–")
    show = formatter(measure)
    text, ends = show(estimate.mean), [show(end) for end in (estimate.low, estimate.high) if end is not None]
    if measure in (*COSTS, *SPEEDS):  # a range, left out where it says nothing
        return Cell(text, f"{ends[0]} to {ends[1]}" if len(set(ends)) > 1 else "")
    return Cell(text, f"{ends[0]} to {ends[1]}" if ends else "")


def formatter(measure: Measure) -> Callable[[float], str]:
    if measure.key == "seconds":
        return duration
    if measure.key in ("tokens", "pictures", "samples"):
        return compact
    if measure.key == "flops":
        return lambda value: f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return lambda value: number(value * measure.scale, measure.decimals)


def _missing_mark(table: Table, method: Method, measure: Measure, estimate: Estimate | None) -> str:
    """A footnote wherever a figure is missing, or is not made from all runs of the method."""
    lacking = [run for run in method.runs if _lacks(run, measure.key)]
    if not lacking:
        return ""
    reasons = "; ".join(dict.fromkeys(run.why_missing(measure.key) for run in lacking))
    if estimate is None:
        return table.mark(f"{measure.title}: {reasons}.")
    return table.mark(f"{measure.title} of {len(method.runs) - len(lacking)} of {len(method.runs)} runs; in the others, {reasons}.")


def _lacks(run: Run, key: str) -> bool:
    return (run.values(key) if key in SAMPLED else run.figure(key)) is None


# ---- the table in a terminal ---------------------------------------------------------------------


def table(results: Results) -> str:
    """Figures and costs in blocks, so that 100 columns are enough; then what is significant."""
    made = make_table(results)
    blocks = []
    for keys in BLOCKS:
        wanted = [m for m in made.columns if m.key in keys]
        if wanted:
            blocks.append(_block(made, wanted, with_seeds=wanted[0] in MEASURES))
    notes = [f"{mark}: {text}" for text, mark in made.footnotes.items()]
    notes += [f"left out: {text}" for text in made.left_out]
    brackets = "[95 % interval over seeds and prompts; with one seed over prompts only]" if any(m in MEASURES for m in made.columns) else ""
    figures = len(blocks) - any(m in COSTS for m in made.columns) - any(m in SPEEDS for m in made.columns)
    if any(m in SPEEDS for m in made.columns):
        blocks[-1] += f"\nspeeds are averages over training steps; {hardware_line(results)}"
    parts = [*blocks[:figures], "\n".join(filter(None, [brackets, *notes])), *blocks[figures:], *_pair_lines(results)]
    warnings = caveats(results)
    parts += ["\n".join(["caveats:", *(f"  - {line}" for line in warnings)])] if warnings else []
    return "\n\n".join(filter(None, parts))


def _block(made: Table, columns: Sequence[Measure], with_seeds: bool) -> str:
    head = ["", "method", *(["seeds"] if with_seeds else []), *(m.short for m in columns)]
    lines = [head]
    for method, label, cells in made.rows:
        chosen = [c for m, c in zip(made.columns, cells, strict=True) if m in columns]
        if method is None and not any(c.text for c in chosen):
            continue
        seeds = [str(len(method.seeds)) if method else ""] if with_seeds else []
        lines.append([method.letter if method else "", label, *seeds, *map(_plain_cell, chosen)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = ([text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def _plain_cell(cell: Cell) -> str:
    under = f" [{cell.under.replace(' to ', ', ')}]" if cell.under else ""
    return f"{cell.text}{under}{f' ({cell.marks})' if cell.marks else ''}"


def _pair_lines(results: Results) -> list[str]:
    out = []
    for title, tests, scale, unit in (
        ("difference in true reward", results.rewards, 1, ""), ("head-to-head win rate", results.wins, 100, " %"),
    ):  # fmt: skip
        if tests:
            lines = [_pair_line(results, d, scale, unit) for d in tests] if len(tests) <= PAIR_LINES else _told_apart(results, tests)
            out.append("\n".join([f"{title} (p after Holm over {count(len(tests), 'pair')}):", *(f"  {line}" for line in lines)]))
    return out


def _pair_line(results: Results, d: Difference, scale: float, unit: str) -> str:
    a, b = (results.methods[i].letter for i in (d.a, d.b))
    value, low, high = (number(x * scale, 0 if unit else 2) for x in (d.value, d.low, d.high))
    sure = "" if d.significant else ", not significant"
    return f"{a} {'against' if unit else 'minus'} {b}: {value}{unit} [{low}, {high}], {p_text(d.adjusted)}{sure}"


def _told_apart(results: Results, tests: Sequence[Difference]) -> list[str]:
    """Too many pairs to list: for each method those it is significantly above, and those it cannot be told from."""
    lines = []
    for i, method in enumerate(results.methods):
        seen = [d if d.a == i else turned(d) for d in tests if i in (d.a, d.b)]
        above = [results.methods[d.b].letter for d in seen if d.significant and d.value > d.null]
        unsure = [results.methods[d.b].letter for d in seen if not d.significant]
        words = [f"above {' '.join(above)}"] if above else []
        words += [f"not told apart from {' '.join(unsure)}"] if unsure else []
        if seen:
            lines.append(f"{method.letter}: {'; '.join(words) or 'below all others'}")
    return lines


def p_text(p: float) -> str:
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.4f}" if 0.0495 <= p < 0.0505 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


# ---- significance --------------------------------------------------------------------------------


def matrix(results: Results, tests: Sequence[Difference], scale: float, decimals: int, sign: bool) -> list[dict[str, Any]]:
    """One row per method: cells against every other method, read as row minus (or against) column."""
    shown = sorted({i for d in tests for i in (d.a, d.b)})
    known = {(d.a, d.b): d for d in tests} | {(d.b, d.a): turned(d) for d in tests}
    rows = []
    for a in shown:
        cells = []
        for b in shown:
            d = known.get((a, b))
            if d is None:
                cells.append(None)
                continue
            value, low, high = (number(x * scale, decimals) for x in (d.value, d.low, d.high))
            plus = "+" if sign and d.value > 0 else ""
            cells.append({"value": plus + value, "interval": f"{low} to {high}", "p": p_text(d.adjusted), "significant": d.significant})
        rows.append({"method": results.methods[a], "cells": cells})
    return rows


def turned(d: Difference) -> Difference:
    """The same comparison seen from the other side."""
    mirror = 2 * d.null
    return Difference(d.b, d.a, mirror - d.value, mirror - d.high, mirror - d.low, d.p, d.adjusted, d.null)


def verdict(results: Results) -> str:
    """The best method, and from which of the others the data can tell it."""
    rated = [(m, e["true_reward"]) for m, e in zip(results.methods, results.estimates, strict=True) if e["true_reward"]]
    if not rated:
        return "No true reward is known, so the methods are put side by side and not ranked."
    best, estimate = rated[0]
    said = f"{best.label} has the highest true reward, {number(estimate.mean, 2)}"
    said += f" (95 % interval {number(estimate.low, 2)} to {number(estimate.high, 2)})"
    if len(rated) == 1:
        return f"{said}; there is no other method with a reward to test it against."
    against = [d for d in results.rewards if 0 in (d.a, d.b)]
    equal = [results.methods[max(d.a, d.b)].label for d in against if not d.significant]
    lower = len(against) - len(equal)
    # A test over the prompts of single runs does not say that the method is better.
    scope = " for these runs (see below: one seed)" if any(len(m.seeds) == 1 for m, _ in rated) else ""
    if not equal:
        others = "the other method" if lower == 1 else f"each of the {lower} other methods"
        return f"{said}; the difference to {others} is significant{scope}."
    names = _listed(equal) if len(equal) <= 3 else f"{len(equal)} other methods"
    rest = f"; it is significantly above {'the other one' if lower == 1 else f'the other {lower}'}{scope}" if lower else ""
    return f"{said}, but the data cannot tell it from {names}{rest}."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


# ---- pictures ------------------------------------------------------------------------------------


def figures(results: Results) -> Group:
    group = Group("Paths", "Each method at every evaluation, mean over its seeds.")
    bars = "Bars at the end points: 95 % intervals over seeds and prompts."
    no_reward = "no true reward is known"
    known = results.initial.get("true_reward")
    group.add(
        "True reward against KL",
        [_path(results, i, "kl") for i in range(len(results.methods))],
        f"Up is better; further left is closer to the initial policy. {bars}",
        "needs true reward and KL at two evaluations",
        unit="true reward", x_unit="KL to the initial policy, nats",
    )  # fmt: skip
    if results.known("pictures"):
        seen = [_seen(method) for method in results.methods]
        common = min((max(of.values()) for of in seen if of), default=0.0)
        group.add(
            "True reward against KL, at equal numbers of pictures",
            [_until(_path(results, i, "kl"), seen[i], common) for i in range(len(results.methods))],
            f"The same paths, each cut where {compact(common)} pictures had been trained on, given or drawn by the policy; between two "
            "evaluations the end lies on a straight line.",
            "needs true reward and KL at two evaluations",
            unit="true reward", x_unit="KL to the initial policy, nats",
        )  # fmt: skip
    group.add(
        "True reward",
        [_curve(results, i, "true_reward") for i in range(len(results.methods))],
        f"Mean true reward of samples. {_bands(results)}",
        no_reward, unit="true reward", guides=[(known.mean, "initial policy")] if known else (),
    )  # fmt: skip
    group.add(
        "Cost",
        [_path(results, i, "seconds") for i in range(len(results.methods))],
        f"True reward against the time spent, evaluations included. {bars}",
        no_reward, unit="true reward", x_unit="seconds",
    )  # fmt: skip
    if results.known("pictures"):
        return group
    start = results.initial.get("length")
    group.add(
        "Reply length",
        [_curve(results, i, "length") for i in range(len(results.methods))],
        f"Mean length of samples. {_bands(results)}",
        "nothing was sampled", unit="tokens", guides=[(start.mean, "initial policy")] if start else (),
    )  # fmt: skip
    return group


def name(results: Results, i: int) -> str:
    """What a method is called in pictures: its label, or its letter where labels are long or many."""
    short = len(results.methods) <= 6 and all(len(m.label) <= SHORT_LABEL for m in results.methods)
    return results.methods[i].label if short else results.methods[i].letter


def colour(i: int) -> int:
    return i % COLOURS + 1


def _bands(results: Results) -> str:
    what = "Bands" if len(results.methods) <= MOST_BANDS else "Bars at the end points"
    return f"{what}: 95 % intervals over seeds and prompts; they may overlap where a difference is significant, since prompts are shared."


def _at(method: Method, key: str, steps: Sequence[float]) -> list[tuple[float, Estimate]]:
    """(step, estimate) at each of these evaluations that measured it."""
    grids = [(step, method.grid(key, step)) for step in steps]
    return [(step, mean_interval(grid, share=False)) for step, grid in grids if grid is not None]


def _curve(results: Results, i: int, key: str) -> Series:
    method = results.methods[i]
    found = _at(method, key, method.steps(key))
    curve = [(step, e.mean) for step, e in found]
    band = [(step, e.low, e.high) for step, e in found]
    notes = [f"{method.label}, step {step:.0f}: {number(e.mean)} (95 % {number(e.low)} to {number(e.high)})" for step, e in found]
    series = Series(name(results, i), curve, colour(i), marks=True, notes=notes)
    if len(results.methods) <= MOST_BANDS:
        series.band = band
    elif band:  # a cross without width is a bar
        series.band, series.crosses = band[-1:], [(curve[-1][1], curve[-1][0], curve[-1][0])]
    return series


def _path(results: Results, i: int, x: str) -> Series:
    """True reward over another quantity, from evaluation to evaluation."""
    method = results.methods[i]
    rewards = dict(_at(method, "true_reward", method.steps("true_reward")))
    if x == "kl":
        across = dict(_at(method, "kl", method.steps("kl")))
    else:
        runs = method.with_values("true_reward")
        times = {s: [row.get("seconds") for run in runs for row in run.evals if row["step"] == s] for s in rewards}
        across = {s: Estimate(sum(t) / len(t)) for s, t in times.items() if t and None not in t}
    steps = [s for s in rewards if s in across]
    curve = [(across[s].mean, rewards[s].mean) for s in steps]
    notes = [f"{method.label}, step {s:.0f}: {number(rewards[s].mean)} at {number(across[s].mean)}" for s in steps]
    # Names at the right edge do not cover each other; beyond eight methods colours repeat, and the end point itself needs the name.
    at_edge = len(results.methods) <= COLOURS
    series = Series(name(results, i) if at_edge else "", curve, colour(i), marks=True, notes=notes)
    if steps:
        (last_x, last_y), last = curve[-1], steps[-1]
        ends = across[last].low, across[last].high
        series.tags = {} if at_edge else {len(curve) - 1: name(results, i)}
        series.band = [(last_x, rewards[last].low, rewards[last].high)]
        series.crosses = [(last_y, *(ends if None not in ends else (last_x, last_x)))]
    return series


def _seen(method: Method) -> dict[float, float]:
    """Pictures trained on up to each evaluation that `_path` shows, mean over runs."""
    runs = method.with_values("kl")
    steps = sorted(set(method.steps("true_reward")) & set(method.steps("kl")))
    return {s: sum(max((r["pictures"] for r in run.train if r["step"] <= s and "pictures" in r), default=0) for run in runs) / len(runs)
            for s in steps}


def _until(path: Series, seen: dict[float, float], common: float) -> Series:
    """The path up to where so many pictures had been trained on."""
    counts, curve, notes = list(seen.values()), [], []
    for k, (now, point) in enumerate(zip(counts, path.curve, strict=True)):
        if now > common:
            share = (common - counts[k - 1]) / (now - counts[k - 1])
            x, y = (a + share * (b - a) for a, b in zip(path.curve[k - 1], point, strict=True))
            curve.append((x, y))
            notes.append(f"{path.label}, {number(common)} pictures, between two evaluations: {number(y)} at {number(x)}")
            break
        curve.append(point)
        notes.append(path.notes[k])
    tags = {len(curve) - 1: tag for tag in path.tags.values()} if curve else {}
    whole = len(curve) == len(path.curve) and counts[-1:] == [common]
    return Series(path.label, curve, path.colour, marks=True, notes=notes, tags=tags, band=path.band if whole else [],
                  crosses=path.crosses if whole else [])


# ---- the page ------------------------------------------------------------------------------------


def page(results: Results) -> str:
    made = make_table(results)
    methods = list(enumerate(results.methods))
    return render(
        "compare.html.j2",
        title=_title(results),
        verdict=verdict(results),
        setup=_setup(results),
        caveats=caveats(results),
        table=made,
        has=lambda key: any(m.key == key for m in made.columns),
        measured=[m for m in made.columns if m in MEASURES],
        costs=[m for m in made.columns if m in COSTS],
        speeds=[m for m in made.columns if m in SPEEDS],
        hardware=hardware_line(results),
        swatches={m.letter: colour(i) for i, m in methods},
        rewards=matrix(results, results.rewards, 1, 2, sign=True),
        wins=matrix(results, results.wins, 100, 0, sign=False),
        pairs=len(results.rewards),
        paired=results.paired,
        figures=figures(results),
        lettered=bool(methods) and name(results, 0) == results.methods[0].letter,
        runs=[_run_row(m, run) for m in results.methods for run in m.runs],
        one_seed=any(len(m.seeds) == 1 for m in results.methods),
        compact=len(results.methods) > COMPACT,
        resamples=RESAMPLES,
        test_resamples=min(MOST_RESAMPLES, max(RESAMPLES, RESAMPLES_PER_PAIR * len(results.rewards))),
        latex=latex(made),
    )


def _title(results: Results) -> dict[str, str]:
    def common(part: str) -> str:
        names = {str(dig(run.config, f"{part}.name") or f"unknown {part}") for run in results.runs}
        return names.pop() if len(names) == 1 else f"{len(names)} {part}s" if part == "model" else "different data"

    return {"methods": count(len(results.methods), "method"), "model": common("model"), "data": common("data")}


def _setup(results: Results) -> list[tuple[str, str]]:
    counts = sorted({len(m.seeds) for m in results.methods})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    steps = sorted({run.step for run in results.runs})
    judged = f"step {steps[0]:.0f}" if len(steps) == 1 else f"each run’s last evaluation (steps {steps[0]:.0f} to {steps[-1]:.0f})"
    prompts = [("held-out prompts", str(results.prompts))] if results.prompts else []
    return [("runs", str(len(results.runs))), ("seeds per method", seeds), *prompts, ("judged at", judged)]


def _run_row(method: Method, run: Run) -> dict[str, str]:
    reward, seconds = run.values("true_reward"), run.figure("seconds")
    total = run.status.get("total_steps")
    return {
        "letter": method.letter, "label": method.label, "name": run.name, "seed": str(run.seed), "state": run.state,
        "step": f"{run.step:.0f}{f' of {total}' if total is not None else ''}",
        "reward": "–" if reward is None else number(float(reward[: method.limit].mean()), 2),
        "time": "–" if seconds is None else duration(seconds),
        "alarms": "; ".join(alarm.title for alarm in alarms(run.rows)) or "none",
    }  # fmt: skip


def latex(made: Table) -> str:
    """The table for a paper (needs booktabs)."""
    def escaped(text: str) -> str:
        special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": r"$-$", "–": "--"}
        return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)

    def cell(c: Cell) -> str:
        return escaped(c.text) + (rf" {{\scriptsize [{escaped(c.under.replace(' to ', ', '))}]}}" if c.under else "")

    shown = [i for i, m in enumerate(made.columns) if m not in SPEEDS]
    heads = ["Method", "Seeds", *(f"{m.title}{f' ({m.unit})' if m.unit else ''}" for m in (made.columns[i] for i in shown))]
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", " & ".join(map(escaped, heads)) + r" \\", r"\midrule"]
    for method, label, cells in made.rows:
        lines.append(" & ".join([escaped(label), str(len(method.seeds)) if method else "", *(cell(cells[i]) for i in shown)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])
