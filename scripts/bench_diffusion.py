"""Diffusion-DPO by prefopt and by the plain loop of the public scripts: `python scripts/bench_diffusion.py cpu|gpu|docs`.

Both sides train the same random weights on the same random pictures with the same times and noises, in the same precision, with the same
batch, micro-batch, AdamW and number of threads; the sides take turns, each in a process of its own with an empty store, and losses and
log-probs must agree at every step, or nothing is written. Results go into docs/bench-diffusion-<cpu|gpu>.json and docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import environment, say, summary
from bench_report import DOCS, render

# Relative differences, between the sides, of a step's loss and of its mean log-probs. A loss is a small difference of large numbers. In
# bf16 the public loop's frozen copy and its VAE are rounded, and prefopt's are not.
TOLERANCE = {"fp32": (2e-3, 1e-5), "bf16": (1e-1, 2e-2)}
SIDES = ("prefopt", "baseline")


@dataclass(frozen=True)
class Cell:
    """A comparison. `stored`: prefopt's reference is computed once, too; else it is the adapter switched off. `micro`: pairs at once.
    `cheap`: prefopt's side, which has speed to spare, keeps convolutions and attentions alone (model.recompute=cheap)."""

    name: str
    what: str
    shape: str
    resolution: int
    lora: bool
    stored: bool
    batch: int
    micro: int
    steps: int
    checkpointing: bool = False
    cheap: bool = False
    lr: float = 1e-6
    beta: float = 5000.0  # for the mean over latent dims
    speedup: float = 1.5  # what is aimed at
    memory: float = 0.7


HALF = "SD1.5's architecture at half its widths, 256 pixels"
CELLS = {
    "cpu": (
        Cell("full", f"{HALF}, full fine-tuning, everything stored", "sd15-half", 256, False, True, 2, 2, 4),
        Cell("full slim", f"{HALF}, full fine-tuning, everything stored, prefopt with model.recompute=cheap", "sd15-half", 256, False,
             True, 2, 2, 4, cheap=True),
        Cell("lora", f"{HALF}, LoRA, reference by switching the adapter off", "sd15-half", 256, True, False, 2, 2, 4, lr=1e-5, speedup=1.2),
    ),
    "gpu": (
        Cell("sd15 full", "SD1.5, 512 pixels, full fine-tuning, everything stored", "sd15", 512, False, True, 32, 8, 12),
        Cell("sd15 full slim", "SD1.5, 512 pixels, full fine-tuning, everything stored, prefopt with model.recompute=cheap", "sd15", 512,
             False, True, 32, 8, 12, cheap=True),
        Cell("sd15 lora", "SD1.5, 512 pixels, LoRA, reference by switching the adapter off", "sd15", 512, True, False, 32, 8, 12, lr=1e-5,
             speedup=1.2),
        Cell("sdxl full", "SDXL, 1024 pixels, full fine-tuning, everything stored", "sdxl", 1024, False, True, 8, 2, 8, True),
        Cell("sdxl lora", "SDXL, 1024 pixels, LoRA, reference by switching the adapter off", "sdxl", 1024, True, False, 8, 2, 8, True,
             lr=1e-5, speedup=1.2),
    ),
}  # fmt: skip


def tiny(cell: Cell) -> Cell:
    """The same at a size that only shows that everything holds together."""
    return replace(cell, shape="tiny-sdxl" if cell.shape == "sdxl" else "tiny", resolution=64, batch=2, micro=1, steps=2, beta=500.0)


@dataclass
class Bench:
    """Where processes run, and on what."""

    root: Path
    device: str
    precision: str
    threads: int
    worker: str = "bench_diffusion_worker.py"

    def job(self, kind: str, cell: Cell, folder: Path, **more: Any) -> Any:
        """What a process of its own has written. Raises `SystemExit` with the end of what it said where it failed."""
        folder.mkdir(parents=True)
        out, shared = folder / "out.json", self.root / cell.name
        job = {**asdict(cell), "kind": kind, "out": str(out), "work": str(folder), "cuda": self.device == "cuda", "threads": self.threads,
               "precision": self.precision, "model": str(self.model(cell)), "rows": str(shared / "rows.jsonl"), **more}
        (folder / "job.json").write_text(json.dumps(job))
        env = {**os.environ, "PREFOPT_STORE": str(folder / "store"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(self.threads)}
        worker = Path(__file__).with_name(self.worker)
        with open(folder / "log", "w") as log:
            code = subprocess.run([sys.executable, str(worker), str(folder / "job.json")], env=env, stdout=log, stderr=log).returncode
        if code or not out.exists():
            raise SystemExit(f"{cell.name}, {kind}: exit code {code}\n{(folder / 'log').read_text(errors='replace')[-2000:]}")
        return json.loads(out.read_text())

    def model(self, cell: Cell) -> Path:
        return self.root / f"model {cell.shape} {cell.resolution}"


def write_rows(folder: Path, cell: Cell) -> None:
    """Pairs of random pictures with random captions: smooth noise, so that no picture is like another."""
    import numpy as np
    from bench_diffusion_worker import WORDS
    from PIL import Image

    folder.mkdir(parents=True)
    words, numbers, rows = random.Random(0), np.random.default_rng(0), []
    for row in range(cell.batch * cell.steps):
        for side in ("chosen", "rejected"):
            coarse = numbers.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((cell.resolution,) * 2, Image.Resampling.BICUBIC).save(folder / f"{row}-{side}.png")
        rows.append({"prompt": " ".join(words.choices(WORDS, k=12)), "chosen": {"image": f"{row}-chosen.png"},
                     "rejected": {"image": f"{row}-rejected.png"}})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measured(out: dict[str, Any], batch: int) -> dict[str, Any]:
    """Of one process: pairs per second after the first step, and what came before it."""
    first, last = out["ends"][0], out["ends"][-1]
    return {"pairs_per_second": batch * (len(out["ends"]) - 1) / (last - first), "ready_seconds": out["steps_begin"],
            "peak_bytes": out["peak_bytes"], "losses": out["losses"], "logps": out["logps"], "reference": out.get("reference")}


def check_equal(name: str, ours: dict[str, Any], theirs: dict[str, Any], precision: str) -> float:
    """The largest relative difference of loss and mean log-probs of any step. Raises `SystemExit` where the sides train something else."""
    largest = 0.0
    for step, (a, b) in enumerate(zip(ours["losses"], theirs["losses"], strict=True)):
        pairs = [("loss", a, b), *zip(("log-prob of the chosen", "log-prob of the rejected"), ours["logps"][step], theirs["logps"][step],
                                      strict=True)]  # fmt: skip
        for what, x, y in pairs:
            gap = abs(x - y) / max(abs(x), abs(y), 1e-9)
            if not gap <= TOLERANCE[precision][what != "loss"]:
                raise SystemExit(f"{name}: {what} of step {step + 1} is {x:.6g} and {y:.6g}: the sides do not train the same, so their "
                                 "times do not compare")
            largest = max(largest, gap)
    return largest


def run_cell(bench: Bench, cell: Cell, repeats: int) -> dict[str, Any]:
    """Both sides in turn, `repeats` times."""
    shared = bench.root / cell.name
    write_rows(shared, cell)
    if not bench.model(cell).exists():
        say(f"{cell.name}: making the model")
        bench.job("make", cell, shared / "make")
    bench.job("sites", cell, shared / "sites")
    raw: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    gaps = []
    for repeat in range(repeats):
        for side in SIDES[:: 1 if repeat % 2 == 0 else -1]:
            folder = shared / f"{side} {repeat}"
            raw[side].append(measured(bench.job(side, cell, folder, sites=str(shared / "sites" / "out.json")), cell.batch))
            shutil.rmtree(folder)
            say(f"{cell.name}, {side}, {repeat + 1}/{repeats}: {raw[side][-1]['pairs_per_second']:.3f} pairs/s, "
                f"{raw[side][-1]['peak_bytes'] / 1e9:.2f} GB")
        gaps.append(check_equal(cell.name, raw["prefopt"][-1], raw["baseline"][-1], bench.precision))
    sides = {side: {key: summary([m[key] for m in made]) for key in ("pairs_per_second", "ready_seconds", "peak_bytes")}
             for side, made in raw.items()}
    (own, other) = (sides[side] for side in SIDES)
    return {**asdict(cell), "repeats": repeats, "sides": sides,
            "reference": raw["prefopt"][0]["reference"], "largest_difference": max(gaps), "raw": raw,
            "faster": own["pairs_per_second"]["median"] / other["pairs_per_second"]["median"],
            "share": own["peak_bytes"]["median"] / other["peak_bytes"]["median"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("cpu", "gpu", "docs"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cells", nargs="*", help="names of cells; all by default")
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights and two steps: to see that it runs; nothing is written "
                                                            "unless --out is given")
    parser.add_argument("--work", type=Path, help="folder for models, pictures and stores; a temporary one by default")
    parser.add_argument("--out", type=Path, help="JSON file; docs/bench-diffusion-<mode>.json by default")
    args = parser.parse_args()
    if args.mode == "docs":
        render(DOCS)
        return
    device = "cuda" if args.mode == "gpu" else "cpu"
    cells = [cell for cell in CELLS[args.mode] if not args.cells or cell.name in args.cells]
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="prefopt-bench-", dir=args.work) as root:
        bench = Bench(Path(root), device, "bf16" if device == "cuda" else "fp32", args.threads)
        about = environment(bench)
        about["versions"] |= {"diffusers": __import__("importlib.metadata").metadata.version("diffusers")}
        found = [run_cell(bench, tiny(cell) if args.tiny else cell, args.repeats) for cell in cells]
    result = {"mode": args.mode, "environment": about, "repeats": args.repeats, "seconds": round(time.time() - began), "cells": found}
    if args.tiny and not args.out:
        shown = ("faster", "share", "largest_difference", "reference")
        print(json.dumps({cell["name"]: {key: cell[key] for key in shown} for cell in found}))
        return
    (args.out or DOCS / f"bench-diffusion-{args.mode}.json").write_text(json.dumps(result, indent=1) + "\n")
    if not args.out:
        render(DOCS)


if __name__ == "__main__":
    main()
