"""One self-contained HTML page per run directory.

`write_report(run_dir)` reads config.yaml, manifest.json, status.json, metrics.jsonl and samples.jsonl and
writes report.html beside them. Whatever is missing or broken costs its own panel, never the page.
In train rows `tokens` and `skipped_steps` are running totals.
"""

from __future__ import annotations

import json
import math
import shlex
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import NormalDist, mean, median, stdev
from typing import Any

import yaml

from prefopt.errors import UserError
from prefopt.report import picture_grid, picture_panels, speed
from prefopt.report.alarms import GUIDE, Alarm, alarms, checked, count
from prefopt.report.page import render, write_page
from prefopt.report.plots import Row, change, compact, duration, finite, groups, number, tidy
from prefopt.tracking.redact import redact

FIRST_SAMPLES = 12
PARTS = ("algo", "model", "data")
LONG_TEXT = 900  # characters of a sample shown before the rest is folded away
Span = tuple[float, float]
Z95 = NormalDist().inv_cdf(0.975)


# ---- reading -------------------------------------------------------------------------------------


def _read_lines(path: Path, problems: list[str]) -> list[dict]:
    """The rows that can be read: a kill in mid-write leaves half a line."""
    if not path.is_file():
        problems.append(f"{path.name} is missing.")
        return []
    rows, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = broken = broken + 1
        if isinstance(row, dict):
            rows.append(row)
    if broken:
        problems.append(f"{path.name}: {count(broken, 'line')} could not be read (killed while writing?).")
    return rows


def _read_mapping(path: Path, problems: list[str]) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing.")
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        problems.append(f"{path.name} could not be read.")
        return {}
    return data if isinstance(data, dict) else {}


def _dig(data: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


# ---- before and after ----------------------------------------------------------------------------


def difference_interval(evals: list[Row], key: str, samples: list | None = None) -> Span | None:
    """95 % interval of after - before.

    Paired by prompt where the samples are those the metrics were made from (their means agree); else from the
    two intervals as if independent, which is wider because the prompts are the same.
    """
    c = change(evals, key)
    if c is None or not c.moved:
        return None
    delta = c.after - c.before
    if samples and key == "true_reward":
        replies = _by_step(samples)
        old, new = (replies.get(row["step"], {}) for row in (c.first, c.last))
        pairs = [[finite(r[i].get("reward")) for r in (old, new)] for i in old.keys() & new.keys()]
        gains = [b - a for a, b in pairs if a is not None and b is not None]
        if len(gains) >= 5 and abs(mean(gains) - delta) <= 1e-3 * max(1.0, abs(delta)):
            half = _student(len(gains) - 1) * stdev(gains) / math.sqrt(len(gains))
            return delta - half, delta + half
    widths = [row[f"{key}_high"] - row[f"{key}_low"] for row in (c.first, c.last) if f"{key}_high" in row]
    if len(widths) < 2 or not all(f"{key}_low" in row for row in (c.first, c.last)):
        return None
    half = math.hypot(*widths) / 2
    return delta - half, delta + half


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t (Cornish-Fisher; within 2 % from four degrees of freedom on)."""
    z = Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


# ---- the words and figures at the top ------------------------------------------------------------


def _cost(train: list[Row], evals: list[Row], status: dict) -> dict[str, float]:
    """Seconds, tokens (or pictures) and how many per second, those that are known."""
    seconds = finite(status.get("seconds"))
    if seconds is None:  # no status: the last time stamp
        seconds = max((row["seconds"] for row in train + evals if "seconds" in row), default=None)
    found = {"seconds": seconds}
    for what in speed.COUNTED:
        if (count := max((row[what] for row in train if what in row), default=None)) is not None:
            speeds = [row[f"{what}_per_second"] for row in train if f"{what}_per_second" in row]
            found |= {what: count, "speed": speed.averages(status).get(f"{what}_per_second", median(speeds) if speeds else None)}
    return {key: value for key, value in found.items() if value is not None}


# What the verdict is about: the first of these that was measured. (key, words, scale, unit, decimals)
_HEADLINES = (
    ("true_reward", "True reward", 1, "", 2),
    ("win_rate", "The win rate against the initial policy", 100, " %", 0),
    ("accuracy", "Held-out accuracy", 100, " %", 0),
    ("loss", "Held-out loss", 1, "", 3),
)


def verdict(rows: list[dict], status: dict, samples: list[dict] | None = None) -> str:
    """What happened, in a sentence or two of plain words and numbers."""
    train, evals = tidy(rows, "train"), tidy(rows, "eval")
    parts = []
    headline = next((h for h in _HEADLINES if any(h[0] in row for row in evals)), None)
    if headline:
        parts.append(_movement(evals, samples, *headline))
    elif losses := [row for row in train if "loss" in row]:
        start, end = number(losses[0]["loss"], 3), number(losses[-1]["loss"], 3)
        parts.append(f"Training loss went from {start} to {end}; nothing was evaluated")
    else:
        parts.append("No measurements yet")
    length = change(evals, "length")
    if length and length.moved:
        old, new = number(length.before, 1), number(length.after, 1)
        word = "grew" if length.after > length.before else "shrank"
        how = f"stayed at {old}" if old == new else f"{word} from {old} to {new}"
        parts.append(f"replies {how} tokens")
    cost = _cost(train, evals, status)
    spent = [duration(cost["seconds"])] if "seconds" in cost else []
    spent += [f"{compact(cost[what])} {what}" for what in speed.COUNTED if what in cost]
    parts += [", ".join(spent)] if spent else []
    return f"{_ending(status)}{'; '.join(parts)}."


def _ending(status: dict) -> str:
    """A run that is not over, or ended early, says so first."""
    state, step, total = (status.get(key) for key in ("state", "step", "total_steps"))
    where = f" at step {step}" + (f" of {total}" if total is not None else "") if step is not None else ""
    words = {"running": "Still running", "stopped": "Stopped early", "failed": "Failed"}.get(str(state))
    return f"{words}{where}. " if words else ""


def _movement(evals, samples, key: str, words: str, scale: float, unit: str, decimals: int) -> str:
    c = change(evals, key)
    old, new = number(c.before * scale, decimals), number(c.after * scale, decimals)
    if not c.moved:
        return f"{words} was {new}{unit} at step {c.last['step']:.0f}; there is no evaluation to compare with"
    interval = difference_interval(evals, key, samples)
    flat = old == new or interval and interval[0] <= 0 <= interval[1]
    verb = "stayed level within noise, from" if flat else "rose from" if c.after > c.before else "fell from"
    text = f"{words} {verb} {old}{unit} to {new}{unit}"
    if interval:
        low, high = (number(end * scale, decimals) for end in interval)
        text += f" (95 % interval of the difference {low} to {high}{' points' if unit else ''})"
    kl = change(evals, "kl")
    return text + (f" at a KL of {number(kl.after, 1)} nats" if kl and kl.moved else "")


# (key, title, scale, unit, decimals)
_FIGURES = (
    ("true_reward", "True reward", 1, "", 2),
    ("reward", "Reward", 1, "", 2),
    ("win_rate", "Win rate", 100, "%", 0),
    ("kl", "KL to the start", 1, "nats", 1),
    ("length", "Reply length", 1, "tokens", 1),
    ("prompt_match", "Prompt match", 100, "%", 0),
    ("accuracy", "Held-out accuracy", 100, "%", 0),
    ("finished", "Finished replies", 100, "%", 0),
)


def figures(rows: list[dict], status: dict) -> list[dict[str, str]]:
    """The tiles: title, before (may be empty), after, unit, note."""
    train, evals = tidy(rows, "train"), tidy(rows, "eval")
    out = []
    for key, title, scale, unit, decimals in _FIGURES:
        c = change(evals, key)
        if c is None:
            continue
        note = "" if c.moved else f"step {c.last['step']:.0f} only"
        if c.moved and (interval := c.interval(scale)):
            note = "95 %: {} to {}".format(*(number(end, decimals) for end in interval))
        before = number(c.before * scale, decimals) if c.moved else ""
        out.append(_figure(title, number(c.after * scale, decimals), note, before, unit))
    cost = _cost(train, evals, status)
    if "seconds" in cost:
        out.append(_figure("Time", duration(cost["seconds"]), "evaluation included"))
    for what in (w for w in speed.COUNTED if w in cost):
        show = compact if what == "tokens" else number
        note = f"{show(cost['speed'])} {what}/s while training" if "speed" in cost else ""
        out.append(_figure(f"{what.capitalize()} trained on", compact(cost[what]), note))
    return out


def _figure(title: str, after: str, note: str, before: str = "", unit: str = "") -> dict[str, str]:
    return {"title": title, "before": before, "after": after, "unit": unit, "note": note}


# ---- samples -------------------------------------------------------------------------------------


def _by_step(samples: list[dict]) -> dict[float, dict[Any, dict]]:
    """step -> prompt id -> row; of rows written twice the last wins."""
    out: dict[float, dict[Any, dict]] = {}
    for row in samples:
        step, key = finite(row.get("step")), row.get("id")
        if step is not None and isinstance(key, (int, str)):
            out.setdefault(step, {})[key] = row
    return out


def sample_cards(samples: list[dict]) -> dict[str, Any]:
    """Replies of the first and the last evaluation to the same prompts: the first ids and both extremes."""
    steps = _by_step(samples)
    if not steps:
        return {"cards": [], "extremes": [], "pictures": False, "strips": []}
    first, last = min(steps), max(steps)
    shared = steps[first].keys() & steps[last].keys()
    cards = []
    for key in sorted(shared, key=lambda k: (isinstance(k, str), k)):
        replies = [_reply(steps[step][key]) for step in dict.fromkeys((first, last))]
        rewards = [reply["reward"] for reply in replies]
        gain = rewards[-1] - rewards[0] if len(rewards) == 2 and None not in rewards else None
        prompt = str(steps[last][key].get("prompt") or "")
        cards.append({"id": key, "prompt": prompt, "replies": replies, "gain": gain})
    rated = [card for card in cards if card["gain"] is not None]
    gain = itemgetter("gain")
    best, worst = max(rated, key=gain, default=None), min(rated, key=gain, default=None)
    extremes = [("Largest gain", best)] if best and best["gain"] > 0 else []
    extremes += [("Largest loss", worst)] if worst and worst["gain"] < 0 else []
    return {
        "first": first, "last": last, "cards": cards[:FIRST_SAMPLES], "total": len(cards),
        "rated": len(rated), "extremes": extremes, "no_loss": bool(rated) and worst["gain"] >= 0,
        "pictures": _pictures(samples), "strips": picture_grid.over_training(steps),
    }  # fmt: skip


def _reply(row: dict) -> dict[str, Any]:
    image = picture_grid.of_row(row)  # a picture has no tokens
    found = {"text": str(row.get("completion") or ""), "image": image, "cut": row.get("finished") is False and not image}
    return found | {"reward": finite(row.get("reward")), "tokens": None if image else finite(row.get("tokens"))}


def _pictures(samples: list[dict]) -> bool:
    """Whether the policy makes pictures."""
    return any(picture_grid.of_row(row) for row in samples)


# ---- the page ------------------------------------------------------------------------------------


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory; return its path. The same contents give the same bytes."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a run directory; give the folder that `prefopt train` wrote")
    problems: list[str] = []
    names = ("config.yaml", "manifest.json", "status.json")
    config, manifest, status = (redact(_read_mapping(run_dir / name, problems)) for name in names)
    rows = _read_lines(run_dir / "metrics.jsonl", problems)
    samples = _read_lines(run_dir / "samples.jsonl", problems)
    html = _render(config, manifest, status, rows, samples, problems, run_dir)
    if alarms(rows):  # they link to it; a copy beside the report goes where the folder goes
        write_page(run_dir / GUIDE.name, GUIDE.read_text(encoding="utf-8"))
    return write_page(run_dir / "report.html", html)


def _render(config: dict, manifest: dict, status: dict, rows: list, samples: list, problems: list, folder: Path) -> str:
    pictures = _pictures(samples)
    checks = checked(rows, pictures)
    return render(
        "page.html.j2",
        names={part: str(_dig(config, f"{part}.name") or f"unknown {part}") for part in PARTS},
        setup=_setup(config, manifest, status),
        state=str(status.get("state") or "state unknown"),
        message=str(status.get("message") or ""),
        verdict=verdict(rows, status, samples),
        figures=figures(rows, status) + speed.figures(status, manifest),
        groups=[*groups(tidy(rows, "train"), tidy(rows, "eval"), pictures),
                *(picture_panels.groups(tidy(rows, "train"), tidy(rows, "eval")) if pictures else []),
                speed.group(tidy(rows, "train"), status, manifest)],
        alarms=[found for _, found in checks if isinstance(found, Alarm)],
        guide=GUIDE.name,
        clear=[name for name, found in checks if found is None],
        unchecked=[(name, found) for name, found in checks if isinstance(found, str)],
        samples=sample_cards(samples),
        picture=partial(picture_grid.data_uri, folder),
        long_text=LONG_TEXT,
        problems=problems,
        dumps=[("Resolved config", _dump(config)), ("Manifest", _dump(manifest))],
        command=_command(manifest.get("command")),
    )


def _setup(config: dict, manifest: dict, status: dict) -> list[tuple[str, str]]:
    """What a reader wants to know first about how the run was made; only what is known."""
    algo = config.get("algo") if isinstance(config.get("algo"), dict) else {}
    found = [("seed", config.get("seed")), ("beta, found by the run", manifest.get("beta"))]
    found += [(key, value) for key, value in algo.items() if finite(value) is not None][:6]
    found += [("learning rate", _dig(config, "optim.lr")), ("batch", _dig(config, "train.batch_size"))]
    found += [("steps", status.get("total_steps") or _dig(config, "train.steps"))]
    found += [("started", str(manifest.get("started") or "")[:16].replace("T", " "))]
    known = [(name, f"{x:g}" if isinstance(x, float) else str(x)) for name, x in found if x not in (None, "")]
    return [(name, text.replace("e-0", "e-")) for name, text in known]


def _dump(data: dict) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100) if data else ""


def _command(command: Any) -> str:
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")
