"""Makes docs/reading-your-run.md: healthy and sick runs on the tiny world, their figures, and the alarms they raise.

    python scripts/reading_your_run.py            runs what is not there yet, then writes the page
    python scripts/reading_your_run.py --render   writes the page from docs/reading-your-run.json alone
    python scripts/reading_your_run.py --check    writes nothing; exit code 1 if the page is not what the JSON gives

Every number and curve of the page comes from the JSON, and the JSON from runs through the command line. The page is written twice, as
Markdown for the repository and as one HTML file that is installed with the package, where alarms link to.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2

from prefopt.report.alarms import GUIDE, alarms
from prefopt.report.plots import HEIGHT, WIDTH, Series, chart, number, points, smooth, tidy

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE, IMAGES = ROOT / "docs" / "reading-your-run.json", ROOT / "docs" / "reading-your-run.md", ROOT / "docs" / "img"
TEMPLATE = Path(__file__).with_name("reading-your-run.md.j2")
RUNS = "runs/reading-your-run"

# Runs the page shows. Each sick one differs from a healthy one in as little as it takes.
SHOWN: dict[str, list[str]] = {
    "healthy": ["algo.beta=0.5"],
    "displacement": ["algo.beta=0.01"],
    "length": ["algo.beta=0.5", "data.length_bias=1"],
    "over-optimisation": ["algo.beta=0.03", "data.label_noise=0.3", "data.limit=2000", "train.epochs=4", "train.eval_every=12"],
    "sft": ["algo=sft", "model=tiny-lm-lora"],
    "right-reference": ["algo.beta=0.5", "model=tiny-lm-lora", "optim.lr=2e-4", "train.epochs=0.5", f"model.lora.adapter={RUNS}/sft/model"],
    "wrong-reference": ["algo.beta=0.5", "model=tiny-lm-lora", "optim.lr=2e-4", "train.epochs=0.5", f"model.lora.adapter={RUNS}/sft/model",
                        "reference.policy=base"],
    "learning-rate": ["algo.beta=0.5", "optim.lr=3e-3"],
}  # fmt: skip
# Further runs at the models' own settings, to see whether an alarm cries wolf (and that a known trouble is not missed).
OTHERS: dict[str, list[str]] = {
    "dpo-default": [],
    "cpo": ["algo=cpo"],
    "orpo": ["algo=orpo"],
    "simpo": ["algo=simpo"],
    "kto": ["algo=kto"],
}
KEPT = {
    "train": ("loss", "grad_norm"),
    "check": ("loss", "theory", "policy_minus_reference"),
    "eval": ("loss", "accuracy", "reward/margin", "logp/chosen", "logp/rejected", "true_reward", "true_reward_low", "true_reward_high",
             "win_rate", "kl", "length", "finished"),
}  # fmt: skip


# ---- running -------------------------------------------------------------------------------------


def make_runs(folder: Path) -> dict[str, Any]:
    """Every run that has not finished, one after the other; then what is kept of each."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # the thread count decides the bits of a CPU run
    for name, overrides in {**SHOWN, **OTHERS}.items():
        target = folder / name
        if _state(target) != "finished":
            words = [w.replace(RUNS, str(folder)) for w in overrides]
            print(f"{name}: {command(name)}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "prefopt.cli", "train", *words, f"hydra.run.dir={target}"], check=True, env=env, cwd=ROOT)
    packages = json.loads((folder / "healthy" / "manifest.json").read_text())["packages"]
    runs = {name: _kept(folder / name, overrides) for name, overrides in {**SHOWN, **OTHERS}.items()}
    return {"packages": packages, "runs": runs}


def _state(folder: Path) -> str | None:
    path = folder / "status.json"
    return json.loads(path.read_text())["state"] if path.is_file() else None


def _kept(folder: Path, overrides: list[str]) -> dict[str, Any]:
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({k: _short(row[k]) for k in ("step", "split", *KEPT[row["split"]]) if k in row})
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    last = max(s["step"] for s in samples)
    shown = [{k: s[k] for k in ("prompt", "completion", "reward")} for s in samples if s["step"] == last and s["id"] < 3]
    seconds = json.loads((folder / "status.json").read_text())["seconds"]
    return {"overrides": overrides, "seconds": round(seconds), "samples": shown, "rows": rows}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write_data(data: dict[str, Any]) -> None:
    """JSON with one line per row: small, and changes can be read."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    text = re.sub(r"\{\n\s+(\"(?:step|prompt)\"[^{}]*?)\n\s+\}", lambda m: "{" + re.sub(r"\n\s+", " ", m[1]) + "}", text)
    DATA.write_text(text + "\n", encoding="utf-8")


def command(name: str) -> str:
    """What to type for a run of the page."""
    overrides = {**SHOWN, **OTHERS}[name]
    folder = [f"hydra.run.dir={RUNS}/{name}"] if name == "sft" else []
    return shlex.join(["prefopt", "train", *overrides, *folder])


# ---- figures -------------------------------------------------------------------------------------

GAP, HEAD = 26, 24  # between panels, and above each for its title
STYLE = """
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
path,polyline{fill:none}.grid{stroke:#e6e6e2}.axis{stroke:#5d6268;stroke-width:.8}
.guide{stroke:#5d6268;stroke-dasharray:2 3;stroke-width:.9}.tick,.unit{fill:#5d6268;font-size:11px}
.title{fill:#1d1f21;font-size:14px;font-weight:600}.name{font-size:11.5px;font-weight:600}
.line{stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}.faint{stroke-width:.8;opacity:.38}
.c1{stroke:#1f5f99}.c2{stroke:#b8500c}.c3{stroke:#2f7d5b}.name.c1{fill:#1f5f99}.name.c2{fill:#b8500c}.name.c3{fill:#2f7d5b}
.band{stroke:none;opacity:.14}.band.c1{fill:#1f5f99}.band.c2{fill:#b8500c}.mark{stroke-width:1.5;fill:#fff}.name{stroke:none}
"""


class Curves:
    """Series of the runs in the JSON, by run and key."""

    def __init__(self, data: dict[str, Any]):
        self.rows = {name: run["rows"] for name, run in data["runs"].items()}

    def held_out(self, run: str, key: str, label: str, colour: int, scale: float = 1.0) -> Series:
        rows = [row for row in tidy(self.rows[run], "eval") if key in row]
        band = [(r["step"], r[f"{key}_low"] * scale, r[f"{key}_high"] * scale) for r in rows if f"{key}_low" in r]
        return Series(label, [(x, y * scale) for x, y in points(rows, key)], colour, marks=True, band=band)

    def drift(self, run: str, key: str, label: str, colour: int) -> Series:
        series = self.held_out(run, key, label, colour)
        start = series.curve[0][1]
        return Series(label, [(x, y - start) for x, y in series.curve], colour, marks=True)

    def train(self, run: str, key: str, label: str, colour: int) -> list[Series]:
        raw = points(tidy(self.rows[run], "train"), key)
        return [Series("", raw, colour, faint=True), Series(label, smooth(raw), colour)]

    def frontier(self, run: str, label: str, colour: int) -> Series:
        rows = tidy(self.rows[run], "eval")
        return Series(label, [(r["kl"], r["true_reward"]) for r in rows], colour, marks=True)


def figures(data: dict[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    c = Curves(data)

    def pair(sick: str, key: str, scale: float = 1.0, healthy: str = "healthy", labels: Sequence = ("healthy", "sick")) -> list[Series]:
        return [c.held_out(healthy, key, labels[0], 1, scale), c.held_out(sick, key, labels[1], 2, scale)]

    def drifts(sick: str) -> list[Series]:
        return [c.drift("healthy", "logp/chosen", "healthy: chosen", 1), c.drift(sick, "logp/chosen", "sick: chosen", 2),
                c.drift(sick, "logp/rejected", "sick: rejected", 3)]  # fmt: skip

    zero, chance = {"guides": [(0, "")]}, {"guides": [(50, "chance")]}
    reference = {"healthy": "right-reference", "labels": ("initial", "base")}
    panels: dict[str, list[tuple[str, list[Series], dict[str, Any]]]] = {
        "healthy": [
            ("True reward", [c.held_out("healthy", "true_reward", "", 1)], {"unit": "reward"}),
            ("Loss", [*c.train("healthy", "loss", "train", 1), c.held_out("healthy", "loss", "held-out", 3)], {"unit": "loss"}),
            ("Log-probability of the replies", [c.drift("healthy", "logp/chosen", "chosen", 1),
             c.drift("healthy", "logp/rejected", "rejected", 3)], {"unit": "nats, relative to the start", **zero}),
            ("Reward against KL", [c.frontier("healthy", "", 1)], {"unit": "reward", "x_unit": "KL to the initial policy, nats"}),
        ],
        "displacement": [
            ("Log-probability of the replies", drifts("displacement"), {"unit": "nats, relative to the start", **zero}),
            ("Accuracy", pair("displacement", "accuracy", 100), {"unit": "%", **chance}),
            ("True reward", pair("displacement", "true_reward"), {"unit": "reward"}),
            ("Reply length", pair("displacement", "length"), {"unit": "tokens"}),
        ],
        "length": [
            ("Reply length", pair("length", "length"), {"unit": "tokens"}),
            ("True reward", pair("length", "true_reward"), {"unit": "reward"}),
        ],
        "over-optimisation": [
            ("True reward", pair("over-optimisation", "true_reward"), {"unit": "reward"}),
            ("Reward margin of the sick run", [c.held_out("over-optimisation", "reward/margin", "", 2)], {"unit": "implicit reward"}),
            ("KL", pair("over-optimisation", "kl"), {"unit": "nats"}),
            ("Reward against KL", [c.frontier("healthy", "healthy", 1), c.frontier("over-optimisation", "sick", 2)],
             {"unit": "reward", "x_unit": "KL to the initial policy, nats"}),
        ],
        "reference": [
            ("Held-out loss", pair("wrong-reference", "loss", **reference), {"unit": "loss", "guides": [(math.log(2), "ln 2")]}),
            ("Accuracy", pair("wrong-reference", "accuracy", 100, **reference), {"unit": "%", **chance}),
            ("Reward margin", pair("wrong-reference", "reward/margin", **reference), {"unit": "implicit reward", **zero}),
            ("True reward", pair("wrong-reference", "true_reward", **reference), {"unit": "reward"}),
        ],
        "learning-rate": [
            ("Training loss", [*c.train("healthy", "loss", "healthy", 1), *c.train("learning-rate", "loss", "sick", 2)], {"unit": "loss"}),
            ("Gradient norm", [*c.train("healthy", "grad_norm", "healthy", 1), *c.train("learning-rate", "grad_norm", "sick", 2)],
             {"unit": "norm, logarithmic", "log": True}),
            ("KL", pair("learning-rate", "kl"), {"unit": "nats"}),
            ("True reward", pair("learning-rate", "true_reward"), {"unit": "reward"}),
        ],
    }  # fmt: skip
    return {f"reading-{name}.svg": figure(*parts) for name, parts in panels.items()}


def figure(*panels: tuple[str, list[Series], dict[str, Any]]) -> str:
    """Panels two by two as one SVG with a background of its own: it is read on light and on dark pages."""
    width = 2 * WIDTH + 3 * GAP
    row = HEIGHT + HEAD + GAP
    height = GAP + row * math.ceil(len(panels) / 2)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">']
    out.append(f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>')
    for i, (title, series, options) in enumerate(panels):
        x, y = GAP + (i % 2) * (WIDTH + GAP), GAP + (i // 2) * row
        out.append(f'<text class="title" x="{x + 12}" y="{y + 6}">{escape(title)}</text>')
        svg = chart(series, title=title, **options)
        place = f'<svg x="{x}" y="{y + HEAD - 6}" width="{WIDTH}" height="{HEIGHT}" overflow="visible"'
        out.append(svg.replace("<svg", place, 1) + "\n")
    return "\n".join(out) + "</svg>\n"


# ---- the page ------------------------------------------------------------------------------------


def page(data: dict[str, Any]) -> str:
    """The Markdown, with the numbers of the JSON put in."""
    runs = {}
    for name, run in data["runs"].items():
        evals, check = tidy(run["rows"], "eval"), tidy(run["rows"], "check")
        best = max((r for r in evals if "true_reward" in r), key=lambda r: r["true_reward"])
        runs[name] = {"evals": evals, "first": evals[0], "last": evals[-1], "best": best, "check": check[0] if check else {},
                      "alarms": {a.name: a for a in alarms(run["rows"])}, "samples": run["samples"], "seconds": run["seconds"],
                      "command": command(name), "early": _early(run["rows"])}  # fmt: skip
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters.update(number=number)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    quiet = ["healthy", "right-reference", "sft", *OTHERS]
    raised = [runs[name]["early"] for name in quiet]
    displaced = sum(titles == ["Chosen replies became less likely"] for titles in raised)
    false = sum(map(bool, raised)) - displaced
    return template.render(runs=runs, quiet=quiet, displaced=displaced, false=false, packages=data["packages"])


def _early(rows: list[dict[str, Any]]) -> list[str]:
    """Titles of the alarms that any evaluation raised, also of those that went away."""
    steps = [row["step"] for row in rows if row["split"] == "eval"]
    return list(dict.fromkeys(a.title for step in steps for a in alarms([row for row in rows if row["step"] <= step])))


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Reading your run · prefopt</title>
<style>
{style}
h2:target, h3:target {{ background: var(--raised); }}
main > p, main > ul, blockquote {{ max-width: 74ch; margin: 12px 0; }}
code, pre {{ font-family: var(--mono); font-size: 13.5px; }}
pre {{ background: var(--raised); padding: 10px 14px; overflow-x: auto; }}
table {{ border-collapse: collapse; font: 13.5px/1.5 var(--sans); margin: 16px 0; }}
th, td {{ text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }}
blockquote {{ margin-left: 0; padding-left: 14px; border-left: 3px solid var(--line); color: var(--soft); }}
img {{ width: min(940px, calc(100vw - 56px)); height: auto; }}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def html(markdown: str, images: dict[str, str]) -> str:
    """The page as one file: pictures inside, headings with GitHub's anchors. Links to other files of the repository become text."""
    from base64 import b64encode

    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(markdown)
    body = re.sub(r"<(h[1-4])>(.*?)</\1>", lambda m: f'<{m[1]} id="{slug(re.sub("<.*?>", "", m[2]))}">{m[2]}</{m[1]}>', body)
    for name, svg in images.items():
        body = body.replace(f'src="img/{name}"', f'src="data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"')
    body = re.sub(r'<a href="(?!#|https?:)[^"]*">(.*?)</a>', r"\1", body)
    style = (GUIDE.parent / "style.css").read_text(encoding="utf-8")
    return HTML.format(style=style, body=body)


def outputs(data: dict[str, Any]) -> dict[Path, str]:
    images, text = figures(data), page(data)
    return {**{IMAGES / name: svg for name, svg in images.items()}, PAGE: text, GUIDE: html(text, images)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="make no runs; write the page from the JSON")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    parser.add_argument("--runs", type=Path, default=ROOT / RUNS, help="where the runs lie or will lie")
    args = parser.parse_args(argv)
    if not (args.render or args.check):
        write_data(make_runs(args.runs.resolve()))
    stale = []
    for path, text in outputs(json.loads(DATA.read_text(encoding="utf-8"))).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not args.check:
                path.write_text(text, encoding="utf-8")
                print(f"wrote {path.relative_to(ROOT)}")
    if args.check and stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/reading_your_run.py --render", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
