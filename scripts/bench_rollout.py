"""Online training of a diffusion model by prefopt and by the plain loop of public scripts: `python scripts/bench_rollout.py [cpu|gpu]`.

Both sides start from the same random weights, draw pictures for the same captions with the same noise, give them the same reward, and learn
by Flow-GRPO's objective (arXiv 2505.05470) on DDIM's steps, in the same precision, with the same batches, AdamW and number of threads. The
sides take turns, each in a process of its own. Log-probs, ratios, KLs and losses of the first round's steps must agree, and so must the
rewards of that round and of the next, or nothing is written; from there on AdamW, whose first updates know only the sign of a gradient,
turns what is rounded differently into other weights. Results go into docs/bench-diffusion-rollout.json (gpu: -rollout-gpu.json) and
docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import environment, say, summary
from bench_diffusion import SIDES, Bench
from bench_report import DOCS, render

# The largest difference in fp32 and in bf16, relative to the value but to no less than the third number. Ratios are measured by the clip; a
# loss is a small difference of large advantages.
COMPARED = {"reward": (1e-4, 1e-2, 1.0), "logp": (1e-5, 2e-2, 1.0), "ratio": (1e-2, 1.0, 1e-4), "kl": (1e-2, 1.0, 1e-5),
            "loss": (1e-2, 1.0, 1e-4)}


@dataclass(frozen=True)
class Cell:
    """A comparison. A round draws `samples` pictures for each of `prompts`, `drawn_at_once` of them together; an optimiser step takes those
    of `step_prompts`, `micro` transitions at once. Of `sampling_steps` all but the last are trained: it has no noise."""

    name: str
    what: str
    shape: str
    resolution: int
    prompts: int
    samples: int
    step_prompts: int
    drawn_at_once: int
    micro: int
    sampling_steps: int
    rounds: int
    guidance: float = 4.5
    beta: float = 0.004
    lr: float = 3e-4
    checkpointing: bool = False
    faster: float = 1.1  # what is aimed at: pictures per second over all, seconds of a step (5 passes of 6), peak memory
    step: float = 0.85
    memory: float = 0.7


CELLS = {
    "cpu": (Cell("lora", "SD1.5's architecture at 0.3 times its widths, 128 pixels, LoRA", "sd15-third", 128, 2, 4, 1, 8, 4, 5, 3),),
    "gpu": (Cell("lora", "SD1.5, 512 pixels, LoRA", "sd15", 512, 8, 8, 4, 16, 16, 10, 4),),
}


def tiny(cell: Cell) -> Cell:
    """The same at a size that only shows that everything holds together."""
    return replace(cell, shape="tiny", resolution=64, samples=2, drawn_at_once=4, micro=2, sampling_steps=4, rounds=2)


def write_captions(file: Path, count: int) -> None:
    """Captions of random words."""
    from bench_diffusion_worker import WORDS

    words = random.Random(0)
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps({"prompt": " ".join(words.choices(WORDS, k=12))}) + "\n" for _ in range(count)))


def measured(out: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """Of one process, after its first round: pictures per second while drawing, seconds of an optimiser step, pictures per second over
    both; of the whole of it seconds of decoding a picture and peak memory."""
    pictures, steps = cell.prompts * cell.samples, cell.prompts // cell.step_prompts
    drawing, training = out["drawing"][1:], out["training"][steps:]
    drawn, trained = sum(end - begin for begin, end in drawing), sum(end - begin for begin, end in training)
    return {"drawn_per_second": len(drawing) * pictures / drawn, "step_seconds": trained / len(training),
            "pictures_per_second": len(drawing) * pictures / (drawn + trained),
            "decode_seconds": out["decoding"] / (len(out["drawing"]) * pictures), **out}


def check_equal(name: str, ours: dict[str, Any], theirs: dict[str, Any], precision: str, first: int) -> dict[str, float]:
    """The largest difference of each of `COMPARED`, over the `first` steps and the rewards of two rounds. Raises `SystemExit` where the
    sides draw or train something else."""
    largest = dict.fromkeys(COMPARED, 0.0)

    def compare(what: str, where: str, a: float, b: float) -> None:
        *allowed, scale = COMPARED[what]
        gap = abs(a - b) / max(abs(a), abs(b), scale)
        if not gap <= allowed[precision == "bf16"]:
            raise SystemExit(f"{name}: {what} {where} is {a:.6g} and {b:.6g}: the sides do not train the same, so their times do not "
                             "compare")
        largest[what] = max(largest[what], gap)

    for number, sides in enumerate(zip(ours["rewards"][:2], theirs["rewards"][:2], strict=True), 1):
        for place, pair in enumerate(zip(*sides, strict=True), 1):
            compare("reward", f"of picture {place} of round {number}", *pair)
    for number, (a, b) in enumerate(zip(ours["steps"][:first], theirs["steps"][:first], strict=True), 1):
        for what in a:
            compare(what, f"of step {number}", a[what], b[what])
    return largest


def run_cell(bench: Bench, cell: Cell, repeats: int) -> dict[str, Any]:
    """Both sides in turn, `repeats` times."""
    shared = bench.root / cell.name
    write_captions(shared / "rows.jsonl", cell.prompts * cell.rounds)
    say(f"{cell.name}: making the model")
    bench.job("make", cell, shared / "make")
    raw: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    gaps = []
    for repeat in range(repeats):
        for side in SIDES[:: 1 if repeat % 2 == 0 else -1]:
            folder = shared / f"{side} {repeat}"
            raw[side].append(found := measured(bench.job(side, cell, folder), cell))
            shutil.rmtree(folder)
            say(f"{cell.name}, {side}, {repeat + 1}/{repeats}: {found['drawn_per_second']:.3f} pictures/s drawn, "
                f"{found['step_seconds']:.2f} s a step, {found['pictures_per_second']:.3f} pictures/s, {found['peak_bytes'] / 1e9:.2f} GB")
        gaps.append(check_equal(cell.name, raw["prefopt"][-1], raw["baseline"][-1], bench.precision, cell.prompts // cell.step_prompts))
    keys = ("drawn_per_second", "step_seconds", "pictures_per_second", "decode_seconds", "peak_bytes")
    sides = {side: {key: summary([m[key] for m in made]) for key in keys} for side, made in raw.items()}

    def share(key: str) -> float:
        own, other = (sides[side][key]["median"] for side in SIDES)
        return own / other

    return {**asdict(cell), "sides": sides, "reference": raw["prefopt"][0]["reference"], "raw": raw,
            "largest_difference": {what: max(found[what] for found in gaps) for what in COMPARED},
            "shares": {"faster": share("pictures_per_second"), "step": share("step_seconds"), "memory": share("peak_bytes")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights and two rounds: to see that it runs; nothing is "
                                                            "written unless --out is given")
    parser.add_argument("--work", type=Path, help="folder for models and runs; a temporary one by default")
    parser.add_argument("--out", type=Path, help="JSON file; docs/bench-diffusion-rollout.json by default")
    args = parser.parse_args()
    device, began = "cuda" if args.mode == "gpu" else "cpu", time.time()
    with tempfile.TemporaryDirectory(prefix="prefopt-bench-", dir=args.work) as root:
        bench = Bench(Path(root), device, "bf16" if device == "cuda" else "fp32", args.threads, "bench_rollout_worker.py")
        about = environment(bench)
        about["versions"] |= {"diffusers": version("diffusers")}
        found = [run_cell(bench, tiny(cell) if args.tiny else cell, args.repeats) for cell in CELLS[args.mode]]
    result = {"mode": args.mode, "environment": about, "repeats": args.repeats, "seconds": round(time.time() - began), "cells": found}
    if args.tiny and not args.out:
        print(json.dumps({cell["name"]: {key: cell[key] for key in ("shares", "largest_difference", "reference")} for cell in found}))
        return
    (args.out or DOCS / f"bench-diffusion-rollout{'-gpu' * (args.mode == 'gpu')}.json").write_text(json.dumps(result, indent=1) + "\n")
    if not args.out:
        render(DOCS)


if __name__ == "__main__":
    main()
