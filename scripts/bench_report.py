"""From docs/bench-*.json to the tables of docs/performance.md, between markers, and to docs/img/bench-*.svg. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from prefopt.report.plots import number

DOCS = Path(__file__).resolve().parent.parent / "docs"
MODES = ("cpu", "gpu", "ablate")
MISSING = {
    "cpu": "It has not been run yet: `make bench-cpu`.",
    "gpu": "It has not been run yet, for want of a GPU: `make bench-gpu`.",
    "ablate": "It has not been run yet: `make bench-ablate`.",
}


@dataclass(frozen=True)
class Target:
    """A bound on a ratio. `side` "best" is TRL's fastest; `key` is speedup (ours over theirs), memory (ours of theirs), useful_mfu or,
    in the sweep, ratio (our time of theirs).
    """

    what: str
    bound: float
    at_least: bool
    cell: str
    side: str
    key: str

    def value(self, result: dict[str, Any]) -> float | None:
        """The ratio, or None where it was not measured."""
        if self.cell == "sweep":
            return (result.get("sweep") or {}).get("ratios", {}).get(self.side)
        cell = next((c for c in result["cells"] if c["name"] == self.cell), None)
        if cell is None:
            return None
        theirs = [row for name, row in cell["sides"].items() if name.startswith("TRL")]
        if self.side == "best":
            return min((row[self.key] for row in theirs), default=None)
        row = cell["sides"].get(self.side)
        return row and row[self.key]


# ---- tables ------------------------------------------------------------------------------------------


def spread(values: dict[str, float], scale: float = 1.0, decimals: int = 2) -> str:
    """Median, and the range where there is one."""
    shown = [f"{values[k] / scale:.{decimals}f}" for k in ("median", "low", "high")]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]} to {shown[2]})"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, align, *rows))


def settings(side: str, cell: dict[str, Any]) -> str:
    """A side's name, with the micro-batch that was found for it."""
    micro = cell["settings"].get(side, {}).get("micro")
    return f"{side} (micro-batch {micro})" if micro else side


def cell_table(cell: dict[str, Any]) -> str:
    rows = [
        [settings(name, cell), spread(row["pairs_per_second"], decimals=3), f"{row['speedup']:.2f}", spread(row["peak_bytes"], 1e9),
         f"{row['memory']:.2f}", spread(row["first_step_seconds"], decimals=1), share(row["useful_mfu"])]
        for name, row in cell["sides"].items()
    ]  # fmt: skip
    rows += [[name, reason.strip().splitlines()[-1][:60], "", "", "", "", ""] for name, reason in cell["failed"].items()]
    head = ["", "pairs/s", "prefopt is faster by", "peak memory, GB", "prefopt takes of it", "first step after, s", "useful MFU"]
    return table(head, rows)


def sweep_table(sweep: dict[str, Any]) -> str:
    head = ["six objectives, one epoch", "reference and steps, s", "prefopt's share", "with start-up and loading, s", "peak memory, GB"]
    rows = [
        [name, f"{way['training_seconds']:.1f}", f"{sweep['ratios'][name]:.2f}", f"{way['total_seconds']:.1f}",
         f"{way['peak_bytes'] / 1e9:.2f}"]
        for name, way in sweep["ways"].items()
    ]  # fmt: skip
    return table(head, rows)


def fits_table(fits: dict[str, Any]) -> str:
    how = "LoRA" if fits["lora"] else "full fine-tuning"
    head = [f"{fits['shape']}, {how}", "most pairs of 1,024 tokens at once", "longest pair, tokens"]
    return table(head, [[name, f"{f['pairs']:,}", f"{f['context']:,}"] for name, f in fits["sides"].items()])


def target_table(targets: Sequence[dict[str, Any]]) -> str:
    rows = [[t["what"], f"{'at least' if t['at_least'] else 'at most'} {t['bound']:g}", f"{t['measured']:.2f}",
             "met" if t["met"] else "not met"] for t in targets]  # fmt: skip
    return table(["target", "", "measured", ""], rows)


def heading(cell: dict[str, Any]) -> str:
    words = {"dpo": "DPO", "simpo": "SimPO", "hh": "HH mix", "ultrafeedback": "UltraFeedback mix", "long": "long-prompt mix"}
    how, runs = "LoRA" if cell["lora"] else "full fine-tuning", len(next(iter(cell["raw"].values())))
    return (f"**{words[cell['objective']['name']]}, {words[cell['mix']]}**, {cell['shape']}, {how}, {cell['batch']} pairs a step, "
            f"{runs} run{'s' * (runs > 1)} of {cell['steps']} steps; largest relative difference of loss and log-probs "
            f"{cell['largest_difference']:.0e}")


def about(result: dict[str, Any]) -> str:
    e = result["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in e["versions"].items() if v)
    where = e["gpu"] or f"{e['cpu']}, {e['cores']} cores"
    return (f"{e['date']}, {where}, {e['threads']} threads, {e['precision']}; {versions}. "
            "Medians, with the range where there are several runs.")


def tables(result: dict[str, Any]) -> str:
    """Everything a result says, as Markdown."""
    parts = [about(result)]
    for cell in result["cells"]:
        parts += [heading(cell), cell_table(cell)]
    parts += [fits_table(fits) for fits in result.get("fits", [])]
    if result["sweep"]:
        sweep = result["sweep"]
        parts += [f"**A sweep of six**: DPO with beta 0.05, 0.1, 0.5 and IPO with tau 0.05, 0.1, 0.5, {sweep['pairs']} pairs each",
                  sweep_table(sweep)]  # fmt: skip
    if result["targets"]:
        parts.append(target_table(result["targets"]))
    return "\n\n".join(parts)


# ---- plot --------------------------------------------------------------------------------------------

STYLE = """
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-size:12px;fill:#1d1f21}
.title{font-weight:600;font-size:13px}.value{fill:#5d6268}.ours{fill:#1f5f99}.theirs{fill:#b9bdc2}.range{stroke:#1d1f21;stroke-width:1}
"""
LEFT, BAR, WIDTH, LINE = 290, 320, 880, 22


def plot(result: dict[str, Any]) -> str:
    """Pairs per second of every side, as bars with their ranges; each comparison on a scale of its own."""
    out, y = [], 10
    for cell in result["cells"]:
        label = heading(cell).split(", ", 2)
        out.append(f'<text class="title" x="10" y="{y + 16}">{escape(", ".join(label[:2]).replace("**", ""))}, {cell["shape"]}</text>')
        y += 26
        top = max(row["pairs_per_second"]["high"] for row in cell["sides"].values())
        for name, row in cell["sides"].items():
            value = row["pairs_per_second"]
            low, high, size = (LEFT + BAR * value["low"] / top, LEFT + BAR * value["high"] / top, BAR * value["median"] / top)
            kind = "ours" if name == "prefopt" else "theirs"
            text = f"{number(value['median'])} pairs/s" + ("" if name == "prefopt" else f", prefopt {row['speedup']:.2f} times as fast")
            out += [
                f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(settings(name, cell))}</text>',
                f'<rect class="{kind}" x="{LEFT}" y="{y + 2}" width="{size:.1f}" height="{LINE - 6}"/>',
                f'<path class="range" d="M{low:.1f} {y + LINE / 2 - 1:.1f}H{high:.1f}"/>',
                f'<text class="value" x="{LEFT + size + 8:.1f}" y="{y + 14}">{escape(text)}</text>',
            ]
            y += LINE
        y += 12
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">\n<style>{STYLE}</style>'
            f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>\n' + "\n".join(out) + "\n</svg>\n")


# ---- into the page -----------------------------------------------------------------------------------


def insert(page: str, name: str, content: str) -> str:
    """`page` with `content` between the markers of `name`. Raises `ValueError` where there is not exactly one pair of them."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page has no single {begin} ... {end}")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}\n{content}\n{end}", page, flags=re.DOTALL)


def block(docs: Path, mode: str) -> str:
    """What stands between the markers of a mode."""
    path = docs / f"bench-{mode}.json"
    if not path.is_file():
        return MISSING[mode]
    result = json.loads(path.read_text(encoding="utf-8"))
    return f"![pairs per second](img/bench-{mode}.svg)\n\n{tables(result)}\n\nAll of it: [bench-{mode}.json](bench-{mode}.json)."


def head_block(docs: Path) -> str:
    """What stands between the markers of the log-prob op."""
    path = docs / "bench-head.json"
    if not path.is_file():
        return "It has not been measured yet: `python scripts/bench_head.py`."
    out = []
    for result in json.loads(path.read_text(encoding="utf-8")).values():
        machine = result["machine"]
        named = ", ".join(f"{machine[key]} threads" if key == "threads" else f"{key} {machine[key]}" if key in ("python", "torch")
                          else str(machine[key]) for key in machine)
        out.append(f"{result['date']}, {named}; medians of {result['repeats']}.")
        for found in result["tables"]:
            rows = [(name, f"{way['seconds']:.2f}", f"{way['cpu_seconds']:.2f}" if "cpu_seconds" in way else "", f"{way['gigabytes']:.2f}",
                     f"{way['gap_logps']:.0e}") for name, way in found["ways"].items()]
            out.append(f"**{found['shape']}**, {found['tokens']} tokens, width {found['hidden']}, {found['vocabulary']} words, "
                       f"{found['type']}, {found['head']} head")
            out.append(table(("forward and backward", "s", "CPU s", "memory, GB", "log-probs differ by"), rows))
            out += [f"{name} was left out: {why}." for name, why in found.get("left_out", {}).items()]
    return "\n\n".join([*out, "All of it: [bench-head.json](bench-head.json)."])


def pictures_block(docs: Path, where: str) -> str:
    """What stands between the markers of the benchmark on pictures."""
    path = docs / f"bench-diffusion-{where}.json"
    if not path.is_file():
        return f"It has not been run yet: `make bench-diffusion-{where}`."
    result = json.loads(path.read_text(encoding="utf-8"))
    out, targets = [about(result)], []
    for cell in result["cells"]:
        found = [("faster", "times as fast", cell["speedup"], True), ("share", "of its peak memory", cell["memory"], False)]
        targets += [[f"{cell['name']}: {what}", f"{'at least' if more else 'at most'} {bound:g}", f"{cell[key]:.2f}",
                     "met" if (cell[key] >= bound if more else cell[key] <= bound) else "not met"] for key, what, bound, more in found]
        repeats = cell.get("repeats", result["repeats"])
        out.append(f"**{cell['name']}**: {cell['what']}, {cell['batch']} pairs a step, {cell['micro']} at once"
                   f"{', gradient checkpointing' * cell['checkpointing']}, {repeats} run{'s' * (repeats > 1)} of "
                   f"{cell['steps']} steps; largest relative difference of loss and log-probs {cell['largest_difference']:.0e}")
        rows = [[{"prefopt": f"prefopt (reference: {cell['reference'].split(' (')[0]})", "baseline": "plain loop"}[side],
                 spread(row["pairs_per_second"], decimals=3), spread(row["peak_bytes"], 1e9), spread(row["ready_seconds"], decimals=1)]
                for side, row in cell["sides"].items()]
        out.append(table(["", "pairs/s", "peak memory, GB", "first step begins after, s"], rows))
    out.append(table(["prefopt beside the plain loop", "target", "measured", ""], targets))
    return "\n\n".join([*out, f"All of it: [{path.name}]({path.name})."])


def rollout_block(docs: Path, end: str) -> str:
    """What stands between the markers of the benchmark on rollouts; `end` of its names: nothing, or -gpu."""
    path = docs / f"bench-diffusion-rollout{end}.json"
    if not path.is_file():
        return f"It has not been run yet: `make bench-diffusion-rollout{end}`."
    result = json.loads(path.read_text(encoding="utf-8"))
    out, load = [about(result)], result["environment"]["load_before"]
    if load > 1:
        out.append(f"The machine was busy with other work (a load of {load:.0f} when it began), so these times are rough: drawing takes "
                   "both sides the same number of passes.")
    for cell in result["cells"]:
        gaps = ", ".join(f"{what} {gap:.0e}" for what, gap in cell["largest_difference"].items())
        out.append(f"**{cell['name']}**: {cell['what']}, guidance {cell['guidance']:g}; a round of {cell['prompts']} prompts with "
                   f"{cell['samples']} pictures each, {cell['drawn_at_once']} at once, in {cell['sampling_steps']} steps, and "
                   f"{cell['prompts'] // cell['step_prompts']} optimiser steps of {cell['samples'] * cell['step_prompts']} pictures, "
                   f"{cell['micro']} transitions at once{', gradient checkpointing' * cell['checkpointing']}; {result['repeats']} "
                   f"run{'s' * (result['repeats'] > 1)} of {cell['rounds']} rounds, without the first; largest differences: {gaps}")
        rows = [[{"prefopt": f"prefopt (reference: {cell['reference']})", "baseline": "plain loop"}[side],
                 *(spread(row[key], decimals=3) for key in ("drawn_per_second", "pictures_per_second", "decode_seconds")),
                 spread(row["step_seconds"]), spread(row["peak_bytes"], 1e9)] for side, row in cell["sides"].items()]
        out.append(table(["", "pictures/s drawn", "pictures/s with training", "s to decode one", "s an optimiser step",
                          "peak memory, GB"], rows))
        found = (("faster", "pictures/s with training, times the plain loop's", "at least"),
                 ("step", "time of an optimiser step, of the plain loop's", "at most"),
                 ("memory", "peak memory, of the plain loop's", "at most"))
        rows = [[what, f"{side} {cell[key]:g}", f"{(value := cell['shares'][key]):.2f}",
                 "met" if (value >= cell[key] if side == "at least" else value <= cell[key]) else "not met"] for key, what, side in found]
        out.append(table(["prefopt beside the plain loop", "target", "measured", ""], rows))
    return "\n\n".join([*out, f"All of it: [{path.name}]({path.name})."])


def render(docs: Path) -> None:
    """Writes the plots and the tables of all results that are there."""
    page = docs / "performance.md"
    text = page.read_text(encoding="utf-8")
    for mode in MODES:
        text = insert(text, f"bench-{mode}", block(docs, mode))
        path = docs / f"bench-{mode}.json"
        if path.is_file():
            (docs / "img" / f"bench-{mode}.svg").write_text(plot(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    text = insert(text, "bench-head", head_block(docs))
    for where in ("cpu", "gpu"):
        text = insert(text, f"bench-diffusion-{where}", pictures_block(docs, where))
    for end in ("", "-gpu"):
        text = insert(text, f"bench-diffusion-rollout{end}", rollout_block(docs, end))
    page.write_text(text, encoding="utf-8")
