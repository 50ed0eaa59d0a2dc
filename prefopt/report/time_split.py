"""Where the time of a step went, process by process, from what `status.json` says of the run's last start."""

from __future__ import annotations

from html import escape
from typing import Any

from prefopt.report.plots import LETTER, WIDTH, Group, Panel, finite, number, ticks

SHOWN = 16  # processes; of more, those with the most work of their own and the one with the least
BAR, TOP, LEGEND = 18, 6, 20  # heights
WAITED = ("communication", "checkpoint")


def read(status: dict) -> tuple[list[str], list[list[float]], list[int]]:
    """(parts, seconds per step of each process, processes that keep the others waiting); empty where nothing is known."""
    found = status.get("times")
    found = found if isinstance(found, dict) else {}
    parts, ranks = found.get("parts") or [], found.get("seconds") or []
    fits = all(isinstance(row, list) and len(row) == len(parts) and all(finite(s) is not None for s in row) for row in ranks)
    return ([str(p) for p in parts], ranks, [r for r in found.get("stragglers") or [] if r in range(len(ranks))]) if fits else ([], [], [])


def add(group: Group, status: dict) -> None:
    """The picture, with a sentence about each straggler."""
    if not status.get("times"):  # a run that ended before its first steps, or of an earlier version
        return
    parts, ranks, named = read(status)
    if not ranks:
        group.missing.setdefault("its times could not be read", []).append("Where a step’s time goes")
        return
    own = [sum(s for part, s in zip(parts, row, strict=True) if part not in WAITED) for row in ranks]
    order = sorted(range(len(ranks)), key=lambda r: -own[r])
    shown = sorted(order if len(order) <= SHOWN else [*order[: SHOWN - 1], order[-1]])
    said = [f"Process {r} takes {number(own[r] / max(_middle([own[o] for o in range(len(own)) if o != r]), 1e-12))} times as long as the "
            "others for its own work; they wait for it." for r in named]
    if len(shown) < len(ranks):
        said.append(f"Of {len(ranks)} processes the {SHOWN - 1} with most work of their own are shown, and the one with least.")
    said.append("Communication is the time for which a process did nothing else, waiting for slower ones included.")
    group.panels.append(Panel("Where a step’s time goes", _bars(parts, ranks, shown), " ".join(said)))


def _middle(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2 if ordered else 0.0


def _bars(parts: list[str], ranks: list[list[Any]], shown: list[int]) -> str:
    """Stacked bars, one for each process, over a legend."""
    longest = max(sum(ranks[r]) for r in shown) or 1.0
    names = [f"process {r}" for r in shown]
    left, right = 12 + LETTER * max(map(len, names)), WIDTH - 16
    scale, floor = (right - left) / longest, TOP + BAR * len(shown)
    height = floor + 2 * LEGEND + 4
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="seconds of a step by part, for each process">']
    for row, (rank, name) in enumerate(zip(shown, names, strict=True)):
        y, x = TOP + BAR * row + BAR / 2, float(left)
        out.append(f'<text class="tick" x="{left - 6:.1f}" y="{y + 3.8:.1f}" text-anchor="end">{name}</text>')
        for colour, (part, seconds) in enumerate(zip(parts, ranks[rank], strict=True), 1):
            if seconds > 0:
                said = escape(f"{name}, {part}: {number(1000 * seconds)} ms")
                out.append(f'<g><title>{said}</title><path class="stack c{colour}" d="M{x:.1f} {y:.1f}h{scale * seconds:.2f}"/></g>')
            x += scale * max(seconds, 0.0)
    for value in ticks(0.0, 1000 * longest):
        x = left + scale * value / 1000
        out.append(f'<text class="tick" x="{x:.1f}" y="{floor + 14}" text-anchor="middle">{number(value)}</text>')
    out.append(f'<text class="unit" x="{WIDTH:.1f}" y="{floor + 14}" text-anchor="end">ms</text>')
    x = float(left)
    for colour, part in enumerate(parts, 1):
        out.append(f'<text class="name c{colour}" x="{x:.1f}" y="{height - 4}">{escape(part)}</text>')
        x += LETTER * (len(part) + 2)
    return "".join(out) + "</svg>"
