"""One process against two, and ZeRO's stages side by side, on this machine's CPU: docs/bench-scale.json, a table and a plot.

    python scripts/bench_scale.py [--quick]      # or: make bench-scale

Weak scaling gives each process the same work, strong scaling the whole run the same work. Every process has one thread. The ideal line is
that of one process: half the time per step (strong), or the same time (weak). Settings alternate, so that a busy machine is unkind to all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from scale_tables import DOCS, write_between  # noqa: E402

BATCH = 32
CASES = {  # name -> (config of the hardware, rows per step as a multiple of BATCH)
    "1 process": ("cpu", 1), "2, strong": ("2xcpu", 1), "2, weak": ("2xcpu", 2), "2, strong, ZeRO 1": ("cpu2_zero1", 1),
    "2, strong, ZeRO 2": ("cpu2_zero2", 1), "2, strong, ZeRO 3": ("cpu2_zero3", 1),
}
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#9c6b4e")


def run(name: str, steps: int) -> dict[str, Any]:
    """Seconds per step of each process by part, of a run of the tiny world."""
    hardware, share = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        words = [f"hardware={hardware}", "hardware.threads=1", f"train.batch_size={BATCH * share}", f"train.steps={steps}",
                 "evaluation.prompts=0", "evaluation.kl=false", "train.self_check=false", f"train.eval_every={steps}",
                 "data.limit=1024", "data.eval_limit=4", "reference.store=off",
                 f"hydra.run.dir={folder}/run"]
        done = subprocess.run([sys.executable, "-m", "prefopt.cli", "train", *words], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"prefopt train {' '.join(words)} failed:\n{done.stderr[-2000:]}")
        times = json.loads((Path(folder) / "run" / "status.json").read_text())["times"]
    return {"parts": times["parts"], "seconds": times["seconds"], "step": max(sum(s) for s in times["seconds"])}


def ideal(name: str, alone: float) -> float:
    """Seconds of a step if two processes lost nothing against one."""
    hardware, share = CASES[name]
    return alone * share / (1 if hardware == "cpu" else 2)


def table(out: dict[str, Any]) -> str:
    lines = ["| run | rows per step | " + " | ".join(out["parts"]) + " | step | ideal | of the ideal |",
             "|" + "---|" * (len(out["parts"]) + 5)]
    for name, case in out["cases"].items():
        split = " | ".join(f"{1000 * s:.0f} ms" for s in case["split"])
        lines.append(f"| {name} | {case['rows']} | {split} | {1000 * case['step']:.0f} ms | {1000 * case['ideal']:.0f} ms | "
                     f"{100 * case['ideal'] / case['step']:.0f} % |")
    return "\n".join(lines)


def plot(out: dict[str, Any]) -> str:
    """Stacked bars, one for each run, with a tick where the ideal lies."""
    left, width, bar = 130, 520, 26
    scale = (width - 20) / max(case["step"] for case in out["cases"].values())
    rows, height = [], 34 + bar * len(out["cases"])
    for i, (name, case) in enumerate(out["cases"].items()):
        y, x = 8 + bar * i, float(left)
        rows.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{name}</text>')
        for colour, seconds in zip(COLOURS, case["split"], strict=True):
            rows.append(f'<rect x="{x:.1f}" y="{y}" width="{scale * seconds:.1f}" height="18" fill="{colour}"/>')
            x += scale * seconds
        at = left + scale * case["ideal"]
        rows.append(f'<path d="M{at:.1f} {y - 3}v24" stroke="#000" stroke-width="2"/>')
    for i, (colour, part) in enumerate(zip(COLOURS, out["parts"], strict=True)):
        rows.append(f'<text x="{8 + 108 * i}" y="{height - 6}" fill="{colour}">{part}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width} {height}" width="{left + width}" height="{height}" '
            f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(rows) + "\n</svg>\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="see that it runs: few steps, once, written nowhere")
    args = parser.parse_args()
    steps, rounds = (6, 1) if args.quick else (60, 3)
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name in CASES:
            seen[name].append(run(name, steps))
            print(f"{name:20s} {1000 * seen[name][-1]['step']:6.0f} ms per step", flush=True)
    alone = median(r["step"] for r in seen["1 process"])
    out: dict[str, Any] = {"cores": os.cpu_count(), "steps": steps, "rounds": rounds, "parts": seen["1 process"][0]["parts"], "cases": {}}
    for name, runs in seen.items():
        middle = sorted(runs, key=lambda r: r["step"])[len(runs) // 2]
        out["cases"][name] = {"rows": BATCH * CASES[name][1], "step": middle["step"], "ideal": ideal(name, alone),
                              "all": [r["step"] for r in runs], "split": [mean(column) for column in zip(*middle["seconds"], strict=True)]}
    print(table(out))
    if args.quick:
        return
    (DOCS / "bench-scale.json").write_text(json.dumps(out, indent=1) + "\n")
    (DOCS / "img" / "bench-scale.svg").write_text(plot(out))
    said = (f"The tiny language model (0.6 M weights), DPO with a live reference, one thread for each process, {rounds} alternating runs "
            f"of {steps} steps, the middle one shown; {out['cores']} cores. Two processes share the caches and the memory of one machine "
            "and talk over gloo on its loopback: what a network costs is not in it, and with a model this small every exchange is mostly "
            "latency. The black "
            "tick is the ideal.")
    write_between(DOCS / "scaling.md", "bench-scale", f"{said}\n\n![milliseconds of a step](img/bench-scale.svg)\n\n{table(out)}")


if __name__ == "__main__":
    main()
