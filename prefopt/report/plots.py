"""From rows of metrics to numbers in words and to curves as inline SVG.

The pictures are drawn by hand rather than by a plotting library: the colours are CSS classes, so that one
picture follows light, dark and print, the text stays text, and writing a report needs no heavy import.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

Point = tuple[float, float]
Row = dict[str, float]

WIDTH, HEIGHT = 430, 240  # viewBox units; the page scales the picture to its column
TOP, BOTTOM = 26, 38
LETTER = 6.0  # mean width of a label's letter at the 11-unit type size used in the page
MAX_BUCKETS = 200  # a curve is some 350 units wide: finer detail cannot be seen
LABEL_GAP = 13.5  # least distance of two labels at the right edge
LARGEST = 1e30  # beyond this a number is as good as infinite, and would break the axes
LOG_RATIO = 50  # gradient norms that span more than this are shown on a logarithmic axis


# ---- numbers as text -----------------------------------------------------------------------------


def number(value: float, decimals: int | None = None) -> str:
    """About three significant digits with a true minus sign; `decimals` fixes the places instead."""
    size = abs(value)
    if decimals is not None:
        text = f"{value:.{decimals}f}"
    elif size >= 1e4:
        return compact(value)
    elif size < 1e-3:
        text = f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e") if size else "0"
    else:
        text = f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3}f}"
    if text.startswith("-") and not text.strip("-0."):
        text = text[1:]  # no "minus zero"
    return text.replace("-", "−")


def compact(value: float) -> str:
    """12345 -> 12.3k, 4200000 -> 4.2M; whole numbers below ten thousand stay as they are."""
    sizes = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
    letter = next((x for x, size in sizes.items() if abs(value) >= max(size * 0.9995, 1e4)), "")
    short = value / sizes.get(letter, 1)
    text = f"{short:.0f}" if abs(short) >= 99.95 or not letter else f"{short:.1f}".removesuffix(".0")
    return text.replace("-", "−") + letter


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_text(values: Sequence[float]) -> list[str]:
    """Labels of one axis: all with the same number of places."""
    largest = max((abs(v) for v in values), default=0.0)
    if largest >= 1e4:
        return [compact(v) if v else "0" for v in values]
    if 0 < largest < 1e-2:  # one power of ten for the whole axis
        power = math.floor(math.log10(largest) + 1e-9)
        return [f"{v / 10.0**power:.3g}e{power}".replace("-", "−") if v else "0" for v in values]
    gap = min((b - a for a, b in pairwise(values)), default=largest)
    return [number(v, max(0, -math.floor(math.log10(gap) + 1e-9))) for v in values]


# ---- rows of metrics -----------------------------------------------------------------------------


def finite(value: Any) -> float | None:
    """The number, or None for null, NaN, infinities, texts and truth values."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -LARGEST < value < LARGEST else None


def tidy(rows: Iterable[dict], split: str) -> list[Row]:
    """Finite numbers only, by step; of rows with the same step (a resumed run repeats some) the last wins."""
    by_step: dict[float, Row] = {}
    for row in rows:
        step = finite(row.get("step"))
        if row.get("split") == split and step is not None:
            kept = {key: n for key, value in row.items() if (n := finite(value)) is not None}
            by_step.setdefault(step, {}).update(kept)
    return [by_step[step] for step in sorted(by_step)]


@dataclass
class Change:
    """A quantity at the first and at the last evaluation that measured it."""

    first: Row
    last: Row
    key: str

    @property
    def before(self) -> float:
        return self.first[self.key]

    @property
    def after(self) -> float:
        return self.last[self.key]

    @property
    def moved(self) -> bool:
        return self.last["step"] > self.first["step"]

    def interval(self, scale: float = 1.0) -> tuple[float, float] | None:
        ends = self.last.get(f"{self.key}_low"), self.last.get(f"{self.key}_high")
        return None if None in ends else (ends[0] * scale, ends[1] * scale)


def change(evals: list[Row], key: str) -> Change | None:
    rows = [row for row in evals if key in row]
    return Change(rows[0], rows[-1], key) if rows else None


# ---- curves --------------------------------------------------------------------------------------


def points(rows: Sequence[Row], key: str) -> list[Point]:
    """(step, value) of the rows that have this key."""
    return [(row["step"], row[key]) for row in rows if key in row]


def smooth(curve: Sequence[Point]) -> list[Point]:
    """Centred moving mean over about a twentieth of the curve; unlike an exponential mean it does not lag."""
    half = len(curve) // 40
    if half == 0:
        return list(curve)
    sums = [0.0]
    for _, y in curve:
        sums.append(sums[-1] + y)
    out = []
    for i, (x, _) in enumerate(curve):
        start, end = max(0, i - half), min(len(curve), i + half + 1)
        out.append((x, (sums[end] - sums[start]) / (end - start)))
    return out


def thin(curve: Sequence[Point]) -> list[Point]:
    """At most two points per bucket, its lowest and its highest: spikes survive, a mean would hide them."""
    if len(curve) <= 2 * MAX_BUCKETS:
        return list(curve)
    out = [curve[0]]
    for bucket in range(MAX_BUCKETS):
        part = curve[bucket * len(curve) // MAX_BUCKETS : (bucket + 1) * len(curve) // MAX_BUCKETS]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        out += sorted(p for p in ends if p != out[-1])
    return out if out[-1] == curve[-1] else [*out, curve[-1]]


@dataclass
class Series:
    """One curve. `band` holds (x, low, high); `crosses` are intervals
    along x; `faint` is a raw curve behind its smoothed self."""

    label: str
    curve: list[Point]
    colour: int = 1
    faint: bool = False
    marks: bool = False
    band: list[tuple[float, float, float]] = field(default_factory=list)
    crosses: list[tuple[float, float, float]] = field(default_factory=list)  # (y, x low, x high)
    notes: list[str] = field(default_factory=list)  # one per mark, shown when hovered
    tags: dict[int, str] = field(default_factory=dict)  # mark index -> text beside it


def chart(
    series: Sequence[Series],
    *,
    title: str,
    unit: str,
    x_unit: str = "step",
    guides: Sequence[tuple[float, str]] = (),
    y_range: tuple[float, float] | None = None,
    log: bool = False,
) -> str:
    """One picture. Curves are named at their right end; `guides` are dashed horizontal lines with a text."""
    xs = [x for s in series for x, _ in s.curve] + [x for s in series for _, *ends in s.crosses for x in ends]
    ys = [y for s in series for _, y in s.curve] + [y for s in series for _, *ends in s.band for y in ends]
    ys += [y for y, _ in guides]
    log = log and min(ys) > 0
    to_axis = math.log10 if log else float
    x0, x1 = _span(0.0 if 0 < min(xs) < 0.05 * max(xs) else min(xs), max(xs), 0.0)
    y0, y1 = y_range or _span(to_axis(min(ys)), to_axis(max(ys)), 0.07)
    y_ticks = _log_ticks(y0, y1) if log else ticks(y0, y1)
    y_names = _tick_text(y_ticks) if not log else [f"{t:g}".replace("-", "−") for t in y_ticks]
    left = 12 + LETTER * max((len(n) for n in y_names), default=1)
    named = [s for s in series if s.label and len(s.curve) > 1]
    right = WIDTH - (12 + LETTER * max(len(s.label) for s in named) if named else 16)

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (right - left)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (to_axis(y) - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)

    floor = HEIGHT - BOTTOM
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value, name in zip(y_ticks, y_names, strict=True):
        y = py(value)
        out.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        out.append(f'<text class="tick" x="{left - 6:.1f}" y="{y + 3.8:.1f}" text-anchor="end">{name}</text>')
    out.append(f'<path class="axis" d="M{left:.1f} {floor}H{right:.1f}"/>')
    x_ticks = [t for t in ticks(x0, x1) if x_unit != "step" or abs(t - round(t)) < 1e-9]
    for value, name in zip(x_ticks, _tick_text(x_ticks), strict=True):
        x = px(value)
        out.append(f'<path class="axis" d="M{x:.1f} {floor}v4"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{name}</text>')
    out.append(f'<text class="unit" x="{left:.1f}" y="12">{escape(unit)}</text>')
    out.append(
        f'<text class="unit" x="{right:.1f}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_unit)}</text>'
    )
    for value, name in guides:
        y = py(value)
        out.append(f'<path class="guide" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        place = f'x="{right:.1f}" y="{y - 4:.1f}" text-anchor="end"'
        out.append(f'<text class="tick" {place}>{escape(name)}</text>')
    for s in series:
        out += _draw(s, px, py)
    out += _end_labels(named, py, right)
    return "".join(out) + "</svg>"


def _draw(s: Series, px, py) -> list[str]:
    out = []
    if s.band and not s.crosses:
        upper = " ".join(f"{px(x):.1f},{py(high):.1f}" for x, _, high in s.band)
        lower = " ".join(f"{px(x):.1f},{py(low):.1f}" for x, low, _ in reversed(s.band))
        out.append(f'<polygon class="band c{s.colour}" points="{upper} {lower}"/>')
    elif s.band:
        bars = "".join(f"M{px(x):.1f} {py(low):.1f}V{py(high):.1f}" for x, low, high in s.band)
        bars += "".join(f"M{px(low):.1f} {py(y):.1f}H{px(high):.1f}" for y, low, high in s.crosses)
        out.append(f'<path class="bar c{s.colour}" d="{bars}"/>')
    line = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in thin(s.curve))
    out.append(f'<polyline class="{"faint" if s.faint else "line"} c{s.colour}" points="{line}"/>')
    if s.marks or len(s.curve) == 1:
        for i, (x, y) in enumerate(s.curve):
            note = s.notes[i] if s.notes else f"step {x:.0f}: {number(y)}"
            out.append(f'<circle class="mark c{s.colour}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.8">')
            out.append(f"<title>{escape(note)}</title></circle>")
            if tag := s.tags.get(i) or (s.label if len(s.curve) == 1 else ""):
                near = s.curve[i - 1 if i else min(1, len(s.curve) - 1)][1]
                away = -8 if near < y else 14  # the curve leaves on the other side
                side = 'text-anchor="end"' if px(x) > WIDTH - 70 else ""
                place = f'x="{px(x) + (-6 if side else 6):.1f}" y="{py(y) + away:.1f}" {side}'
                out.append(f'<text class="tick" {place}>{escape(tag)}</text>')
    return out


def _end_labels(named: Sequence[Series], py, right: float) -> list[str]:
    """Names at the right edge, moved apart where curves end close together."""
    order = sorted(named, key=lambda s: py(s.curve[-1][1]))
    places: list[float] = []
    for s in order:
        y = py(s.curve[-1][1]) + 3.8
        places.append(max(y, places[-1] + LABEL_GAP) if places else y)
    lowest = HEIGHT - BOTTOM + 4.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], lowest)
        lowest = places[i] - LABEL_GAP
    return [
        f'<text class="name c{s.colour}" x="{right + 7:.1f}" y="{y:.1f}">{escape(s.label)}</text>'
        for s, y in zip(order, places, strict=True)
    ]


def _span(low: float, high: float, pad: float) -> tuple[float, float]:
    """A range with some air; a constant gets room on both sides."""
    size = high - low
    if size <= 1e-9 * max(abs(low), abs(high)):
        size = abs(high) * 0.2 or 1.0
        return low - size / 2, high + size / 2
    floor = low - pad * size
    return 0.0 if floor < 0 <= low and pad else floor, high + pad * size


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there are few."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**d for d in decades for m in factors if low <= d + math.log10(m) <= high]
        if len(found) >= 3:
            break
    return found[:: max(1, len(found) // 6)]


# ---- the panels of a run -------------------------------------------------------------------------


@dataclass
class Panel:
    title: str
    svg: str
    caption: str


@dataclass
class Group:
    title: str
    intro: str
    panels: list[Panel] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)  # reason -> titles

    def add(self, title: str, series: list[Series], caption: str, why_missing: str = "", **options) -> None:
        """A picture, or a sentence saying why there is none; one measurement is no curve."""
        series = [s for s in series if s.curve]
        if not any(len(s.curve) > 1 for s in series):
            if why_missing:
                if series:
                    why_missing = f"only step {series[0].curve[0][0]:.0f} was measured, and a curve needs two"
                self.missing.setdefault(why_missing, []).append(title)
            return
        self.panels.append(Panel(title, chart(series, title=title, **options), caption))


def groups(train: list[Row], evals: list[Row], pictures: bool = False) -> list[Group]:
    """Every curve the rows allow, in the order in which a reader asks: samples, pairs, optimiser. `pictures` have no length."""
    return [_samples_group(evals, pictures), _pairs_group(train, evals, "picture" if pictures else "reply"), _optimiser_group(train)]


def interval_curve(evals: list[Row], key: str, label: str = "", colour: int = 1, scale: float = 1.0) -> Series:
    """An evaluation quantity with its interval."""
    rows = [row for row in evals if key in row]
    limits = [row for row in rows if f"{key}_low" in row and f"{key}_high" in row]
    band = [(r["step"], r[f"{key}_low"] * scale, r[f"{key}_high"] * scale) for r in limits]
    notes = []
    for row in rows:
        interval = ""
        if row in limits:
            low, high = (number(row[f"{key}_{end}"] * scale) for end in ("low", "high"))
            interval = f" (95 % interval {low} to {high})"
        notes.append(f"step {row['step']:.0f}: {number(row[key] * scale)}{interval}")
    curve = [(x, y * scale) for x, y in points(rows, key)]
    return Series(label, curve, colour, marks=True, band=band if len(band) > 1 else [], notes=notes)


def _train_and_eval(train: list[Row], evals: list[Row], key: str, scale: float = 1.0) -> list[Series]:
    raw = [(x, y * scale) for x, y in points(train, key)]
    held_out = interval_curve(evals, key, "held-out", 2, scale)
    if len(raw) < 40:  # too few to smooth: the raw curve is the curve
        return [Series("train", raw), held_out]
    return [Series("", raw, faint=True), Series("train", smooth(raw)), held_out]


def _samples_group(evals: list[Row], pictures: bool) -> Group:
    made = "The pictures that the model makes" if pictures else "What the model writes"
    group = Group("Samples on held-out prompts", f"{made}, judged at each evaluation.")
    group.add(
        "True reward",
        [interval_curve(evals, "true_reward")],
        "Mean true reward of samples; the band is a 95 % interval.",
        "no true reward is known for this data, or no evaluation was made",
        unit="reward",
    )
    rewards, caption = [interval_curve(evals, "reward")], "Mean reward of samples by the chosen scorer; the band is a 95 % interval."
    group.add("Reward", rewards, caption, unit="reward")
    group.add(
        "Win rate",
        [interval_curve(evals, "win_rate", scale=100)],
        "Share of prompts whose sample beats the initial policy’s; a tie counts half.",
        "the evaluation rows hold no win rate",
        unit="%",
        guides=[(50, "as good as the start")],
    )
    known = any("true_reward" in row for row in evals)
    group.add(
        "Reward against KL" if known else "Win rate against KL",
        [_frontier(evals, "true_reward") if known else _frontier(evals, "win_rate", 100)],
        "The path of the run: the gain (up) for how far the policy moved (right). Bars: 95 % intervals.",
        "needs KL together with a reward or a win rate",
        unit="reward" if known else "win rate, %",
        x_unit="KL to the initial policy, nats",
    )
    if pictures:
        return group
    lengths = interval_curve(evals, "length")
    group.add(
        "Reply length",
        [lengths],
        "Mean length of samples. Growth without better replies is a common way to please a judge.",
        "the evaluation rows hold no lengths",
        unit="tokens",
        guides=[(lengths.curve[0][1], "start")] if lengths.curve else [],
    )
    return group


def _frontier(evals: list[Row], key: str, scale: float = 1.0) -> Series:
    rows = [row for row in evals if key in row and "kl" in row]
    low, high = f"{key}_low", f"{key}_high"
    bars = [(r["kl"], r[low] * scale, r[high] * scale) for r in rows if low in r and high in r]
    crosses = [(r[key] * scale, r["kl_low"], r["kl_high"]) for r in rows if "kl_low" in r and "kl_high" in r]
    notes = [f"step {r['step']:.0f}: {number(r[key] * scale)} at {number(r['kl'])} nats" for r in rows]
    tags = {i: f"step {compact(rows[i]['step'])}" for i in (0, len(rows) - 1) if rows}
    curve = [(row["kl"], row[key] * scale) for row in rows]
    return Series("", curve, marks=True, band=bars, crosses=crosses, notes=notes, tags=tags)


def _pairs_group(train: list[Row], evals: list[Row], made: str) -> Group:
    group = Group(
        "Objective and preference pairs",
        "What the optimiser sees. Thin lines are single steps, thick ones a moving mean.",
    )
    no_pairs = "this objective reports no pairs"
    curves = _train_and_eval(train, evals, "loss")
    group.add("Loss", curves, "What is minimised: the mean over units.", "no loss was recorded", unit="loss")
    names = sorted({key for row in train for key in row if key.startswith("loss/")})[:4]
    if len(names) > 1:
        curves = [Series(n[5:], smooth(points(train, n)), i) for i, n in enumerate(names, 1)]
        group.add("Loss by term", curves, "The parts whose weighted sum is the loss.", unit="loss")
    group.add(
        "Reward margin",
        _train_and_eval(train, evals, "reward/margin"),
        f"Implicit reward of the chosen {made} minus that of the rejected one.",
        no_pairs,
        unit="implicit reward",
        guides=[(0, "")],
    )
    group.add(
        "Accuracy",
        _train_and_eval(train, evals, "accuracy", 100),
        f"Share of pairs in which the chosen {made} has the higher implicit reward.",
        no_pairs,
        unit="%",
        guides=[(50, "chance")],
        y_range=_accuracy_range(train, evals),
    )
    measured = evals if len(points(evals, "logp/chosen")) > 1 else train
    where = "held-out pairs" if measured is evals else "training batches (noisy: each holds other pairs)"
    group.add(
        "Log-probability of the pictures" if made == "picture" else "Log-probability of the replies",
        [_drift(measured, "logp/chosen", "chosen", 1), _drift(measured, "logp/rejected", "rejected", 2)],
        f"Change since the start, mean over {where}. Chosen should not fall along with rejected.",
        no_pairs,
        unit="nats, relative to the start",
        guides=[(0, "")],
    )
    return group


def _accuracy_range(train: list[Row], evals: list[Row]) -> tuple[float, float]:
    """Up to 100 %, and down as far as the data goes: a stretched axis would make noise look like progress."""
    return min([45.0] + [100 * row["accuracy"] - 3 for row in train + evals if "accuracy" in row]), 101.0


def _drift(rows: list[Row], key: str, label: str, colour: int) -> Series:
    curve = smooth(points(rows, key))
    start = curve[0][1] if curve else 0.0
    return Series(label, [(x, y - start) for x, y in curve], colour, marks=len(curve) <= 30)


def _optimiser_group(train: list[Row]) -> Group:
    group = Group("Optimiser", "Whether the steps themselves were sound.")
    norms = points(train, "grad_norm")
    wide = bool(norms) and max(y for _, y in norms) > LOG_RATIO * max(min(y for _, y in norms), 1e-12)
    group.add(
        "Gradient norm",
        [Series("", norms, faint=len(norms) >= 40), Series("", smooth(norms))],
        "Before clipping. Single spikes are normal; a steady climb is not.",
        "no gradient norm was recorded",
        unit="norm, logarithmic" if wide else "norm",
        log=wide,
    )
    rates = [Series("", points(train, "lr"))]
    group.add("Learning rate", rates, "The schedule.", "none was recorded", unit="learning rate")
    estimate = [Series("", smooth(points(train, "kl_estimate")))]
    group.add("KL estimate", estimate, "As the objective itself estimates it.", unit="nats")
    return group
