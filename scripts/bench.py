"""Measures prefopt and TRL side by side: `python scripts/bench.py cpu|gpu|ablate [--quick]`; results go to docs/bench-*.json and, as
tables and plots, into docs/performance.md.

Both sides train the same weights on the same rows in the same order, in the same precision, with the same batch, optimiser and learning
rate, each in a process of its own, in turn. That both compute the same losses is checked before any number is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from bench_data import MIXES, SHAPES, pairs, save_model, write_rows
from bench_report import DOCS, Target, render

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("prefopt", "torch", "transformers", "trl", "accelerate", "peft", "liger-kernel", "triton", "flash-attn")
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}  # relative difference of losses and mean log-probs between the sides

DPO, SIMPO = {"name": "dpo", "beta": 0.1}, {"name": "simpo", "beta": 2.0, "gamma": 1.0}
# Six settings that read the reference; TRL's `ipo` divides by the number of tokens, so ours is told to.
SWEEP = [
    *({"name": "dpo", "beta": beta} for beta in (0.05, 0.1, 0.5)),
    *({"name": "ipo", "tau": tau, "length_normalize": True} for tau in (0.05, 0.1, 0.5)),
]

# What TRL is asked for beside its defaults. `micro` "fastest": its micro-batch is searched for.
TUNED = {"gradient_checkpointing": False, "micro": "fastest"}
TRL_SIDES: dict[str, dict[str, Any]] = {
    "TRL default": {},
    "TRL precomputed": {"precompute_ref_log_probs": True},
    "TRL tuned": TUNED,
    "TRL tuned, precomputed": {**TUNED, "precompute_ref_log_probs": True},
    "TRL Liger": {**TUNED, "precompute_ref_log_probs": True, "use_liger_kernel": True},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "prefopt": {},
    "prompts repeated": {"overrides": ["model.share_prompts=false"]},
    "all logits at once": {"overrides": ["model.fused_head=false", "model.share_prompts=false"]},
    "live reference": {"overrides": ["reference.store=off"]},
    "pairs in data order": {"pairs_per_micro": 8},
    "all four off": {"overrides": ["model.fused_head=false", "model.share_prompts=false", "reference.store=off"], "pairs_per_micro": 8},
}


@dataclass(frozen=True)
class Cell:
    """One comparison: an objective on a length mix, and who takes part."""

    objective: dict[str, Any]
    mix: str
    sides: tuple[str, ...]
    batch: int
    steps: int
    repeats: int
    shape: str = "smollm2-135m"
    lora: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "/".join([self.shape, *(["lora"] if self.lora else []), self.objective["name"], self.mix])


@dataclass
class Bench:
    """Where things are, and what all jobs have in common."""

    work: Path
    device: str
    precision: str
    threads: int
    tuned: dict[str, int] = field(default_factory=dict)  # mix and shape -> TRL's fastest micro-batch

    def model(self, shape: str) -> Path:
        folder = self.work / "models" / shape
        if not (folder / "config.json").exists():
            say(f"making {shape} with random weights")
            save_model(folder, SHAPES[shape])
        return folder

    def rows(self, mix: str, steps: int, batch: int) -> dict[str, str]:
        return write_rows(self.work, f"{mix}-{steps}x{batch}", pairs(MIXES[mix], steps, batch, seed=0), batch)

    def job(self, label: str, side: str, cell: Cell, objectives: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Runs one side; what its process measured. In a work folder that is kept, a job that was done before is not done again."""
        folder = self.work / re.sub(r"[^a-z0-9.]+", "-", f"job {cell.name} {label}".lower())
        folder.mkdir(exist_ok=True)
        job = {
            "side": side, "objectives": list(objectives), "model": str(self.model(cell.shape)), "shape_model": SHAPES[cell.shape].model,
            "rows": self.rows(cell.mix, cell.steps, cell.batch), "batch": cell.batch, "steps": cell.steps, "device": self.device,
            "precision": self.precision, "threads": self.threads, "lr": 1e-5, "work": str(folder), "out": str(folder / "out.json"),
            "lora": cell.lora, "trl": {}, "overrides": [], **more,
        }  # fmt: skip
        # A store and a cache of its own: no process finds what another has computed.
        env = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PREFOPT_STORE": str(folder / "store"), "TQDM_DISABLE": "1",
               "HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        if (done := folder / "out.json").exists():
            before = json.loads((folder / "job.json").read_text())
            before.pop("started")
            if before == json.loads(json.dumps(job)):
                return json.loads(done.read_text())
            shutil.rmtree(folder)
            folder.mkdir()
        job["started"] = time.time()
        (folder / "job.json").write_text(json.dumps(job))
        worker = Path(__file__).with_name("bench_worker.py")
        with open(folder / "log", "w") as log:
            code = subprocess.run([sys.executable, str(worker), str(folder / "job.json")], env=env, stdout=log, stderr=log).returncode
        if code or not (folder / "out.json").exists():
            tail = (folder / "log").read_text(errors="replace")[-1500:]
            return {"failed": "out of memory" if code == -9 or "out of memory" in tail else tail}
        return json.loads((folder / "out.json").read_text())

    def fastest(self, cell: Cell) -> int:
        """TRL's best micro-batch for a mix, found with precomputed references and without recomputing activations."""
        key = f"{cell.shape}/{cell.lora}/{cell.mix}"
        if key not in self.tuned:
            # A CPU is busy with one pair already: larger micro-batches than four only take longer there.
            once = replace(cell, steps=1, batch=min(cell.batch, 4) if self.device == "cpu" else cell.batch, objective=DPO)
            trl = {"gradient_checkpointing": False, "precompute_ref_log_probs": False}
            found = self.job(f"search {once.batch}", "search", once, [DPO], trl=trl)
            if "failed" in found or not found["search"]:
                raise SystemExit(f"the search for TRL's micro-batch failed: {found}")
            seconds = {int(size): value for size, value in found["search"].items()}
            say(f"  TRL's micro-batch: {', '.join(f'{s}: {t:.1f} s' for s, t in seconds.items())}")
            self.tuned[key] = min(seconds, key=seconds.__getitem__)
        return self.tuned[key]

    def side(self, name: str, cell: Cell, objectives: Sequence[dict[str, Any]], turn: str = "", **more: Any) -> dict[str, Any]:
        """One process of a named side; `turn` tells it from its others."""
        if name in TRL_SIDES:
            trl = dict(TRL_SIDES[name])
            if trl.get("micro") == "fastest":
                trl["micro"] = self.fastest(cell)
            return self.job(f"{name} {turn}", "trl", cell, objectives, trl=trl, **more)
        change = ABLATIONS.get(name, {})
        overrides = [*cell.overrides, *(["adapter=lora"] if cell.lora else []), *change.get("overrides", [])]
        return self.job(f"{name} {turn}", "prefopt", cell, objectives, overrides=overrides, pairs_per_micro=change.get("pairs_per_micro"),
                        **more)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- from raw times to results ----------------------------------------------------------------------


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def measured(out: dict[str, Any], batch: int) -> dict[str, Any]:
    """A process's numbers: seconds from its start to the end of the first step, pairs per second over the steps after it, bytes."""
    run = out["runs"][0]
    ends = run["ends"]
    return {
        "first_step_seconds": ends[0], "pairs_per_second": batch * (len(ends) - 1) / (ends[-1] - ends[0]),
        **{k: v for k, v in out.items() if k.endswith("_bytes")},
        **{k: v for k, v in run.items() if k != "steps_begin"},
    }  # fmt: skip


def check_equal(name: str, sides: dict[str, list[dict[str, Any]]], precision: str) -> float:
    """Largest relative difference of the sides' losses and mean log-probs from prefopt's, over the first two steps. Exits when it is too
    large: then the sides do not train the same thing, and their times do not compare.
    """
    ours, worst = sides["prefopt"][0], 0.0
    for side, repeats in sides.items():
        for theirs in repeats:
            losses = zip(ours["losses"][:2], theirs["losses"][:2], strict=True)
            compared = [(f"loss of step {number}", a, b) for number, (a, b) in enumerate(losses, 1)]
            compared += [(f"log-prob of the {k} replies", ours["logps"][k], v) for k, v in theirs["logps"].items()]
            for what, a, b in compared:
                gap = abs(a - b) / max(abs(a), 1e-12)
                worst = max(worst, gap)
                if not gap <= TOLERANCE[precision]:
                    raise SystemExit(f"{name}: the {what} is {b:.6g} for {side} and {a:.6g} for prefopt; the sides do not compute the same")
    return worst


def useful_work(repeats: Sequence[dict[str, Any]], batch: int) -> tuple[float | None, float]:
    """(the device's peak in FLOP/s, useful FLOPs of a pair in the steps after the first), as prefopt counts them: prompts once, no padding,
    nothing twice, a stored reference. A side's useful MFU follows from its pairs per second.
    """
    peaks = [r["manifest"]["peak"]["tflops"] for r in repeats if r.get("manifest", {}).get("peak")]
    if not peaks:
        return None, 0.0
    steady = repeats[0]["efforts"][1:]
    return max(peaks) * 1e12, sum(e["useful"] for e in steady) / (batch * len(steady))


def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """All sides of a comparison in turn, as often as asked; the order rotates so that none always comes first."""
    sides: dict[str, list[dict[str, Any]]] = {name: [] for name in cell.sides}
    failed: dict[str, str] = {}
    for repeat in range(cell.repeats):
        turn = repeat % len(cell.sides)
        for name in (*cell.sides[turn:], *cell.sides[:turn]):
            if name in failed:
                continue
            out = bench.side(name, cell, [cell.objective], turn=str(repeat))
            if "failed" in out:
                failed[name] = out["failed"]
                say(f"  {cell.name} {name}: {out['failed']}")
                if name == "prefopt":
                    raise SystemExit(f"{cell.name}: prefopt failed: {out['failed']}")
                continue
            found = measured(out, cell.batch)
            sides[name].append(found)
            say(f"  {cell.name} {name}: {found['pairs_per_second']:.3f} pairs/s, first step after {found['first_step_seconds']:.1f} s, "
                f"{found['peak_bytes'] / 1e9:.2f} GB, losses {[round(x, 4) for x in found['losses'][:2]]}")
    sides = {name: repeats for name, repeats in sides.items() if repeats}
    gap = check_equal(cell.name, sides, bench.precision)
    keys = ("pairs_per_second", "first_step_seconds", "peak_bytes", "reference_seconds")
    table = {name: {key: summary([r[key] for r in repeats]) for key in keys} for name, repeats in sides.items()}
    ours = table["prefopt"]
    peak, useful = useful_work(sides["prefopt"], cell.batch)
    for row in table.values():
        row["useful_mfu"] = useful * row["pairs_per_second"]["median"] / peak if peak else None
        row["speedup"] = ours["pairs_per_second"]["median"] / row["pairs_per_second"]["median"]
        row["memory"] = ours["peak_bytes"]["median"] / row["peak_bytes"]["median"]
    settings = {name: {**TRL_SIDES[name], **({"micro": bench.tuned[f"{cell.shape}/{cell.lora}/{cell.mix}"]} if
                       TRL_SIDES[name].get("micro") else {})} for name in sides if name in TRL_SIDES}  # fmt: skip
    return {
        "name": cell.name, "objective": cell.objective, "mix": cell.mix, "shape": cell.shape, "lora": cell.lora, "batch": cell.batch,
        "steps": cell.steps, "settings": settings, "largest_difference": gap, "sides": table, "failed": failed, "raw": sides,
    }  # fmt: skip


def run_sweep(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Six objectives for one epoch on one model: with the store, with a live reference in each, and in TRL. One process for each way, in
    which the runs follow one another; `training` is the reference and the steps alone, `total` has imports and loading as well.
    """
    ways = {}
    for name in cell.sides:
        out = bench.side(name, cell, SWEEP, turn="sweep")
        if "failed" in out:
            raise SystemExit(f"sweep, {name}: {out['failed']}")
        runs = out["runs"]
        ways[name] = {
            "training_seconds": sum(r["reference_seconds"] + r["ends"][-1] - r["steps_begin"] for r in runs),
            "total_seconds": sum(r["ends"][-1] for r in runs),
            "peak_bytes": out["peak_bytes"], "losses": [r["losses"][0] for r in runs], "raw": runs,
        }  # fmt: skip
        say(f"  sweep {name}: {ways[name]['training_seconds']:.1f} s of training, {ways[name]['total_seconds']:.1f} s in all")
    for name, way in ways.items():
        for i, (a, b) in enumerate(zip(ways["prefopt"]["losses"], way["losses"], strict=True)):
            if abs(a - b) > TOLERANCE[bench.precision] * abs(a):
                raise SystemExit(f"sweep: the first loss of {SWEEP[i]} is {b:.6g} for {name} and {a:.6g} for prefopt")
    ours = ways["prefopt"]["training_seconds"]
    ratios = {name: ours / way["training_seconds"] for name, way in ways.items()}
    return {"objectives": SWEEP, "pairs": cell.batch * cell.steps, "batch": cell.batch, "mix": cell.mix, "ways": ways, "ratios": ratios}


FITS = {"pairs": 4096, "context": 1 << 19}  # no more is tried


def run_fits(bench: Bench, cell: Cell) -> dict[str, Any]:
    """The largest micro-batch and the longest pair that one forward and backward pass of each side holds."""
    once, found = replace(cell, batch=8, steps=1), {}
    for name in cell.sides:
        out = bench.side(name, once, [cell.objective], turn="fit", fit=FITS)
        found[name] = out["runs"][0]["fit"] if "runs" in out else {"pairs": 0, "context": 0}
        say(f"  {cell.shape} {name}: {found[name]}")
    return {"shape": cell.shape, "lora": cell.lora, "sides": found}


def reached(targets: Sequence[Target], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with what was measured; those whose measurement is not part of the result are left out."""
    out = []
    for target in targets:
        if (value := target.value(result)) is not None:
            met = value >= target.bound if target.at_least else value <= target.bound
            out.append({"what": target.what, "bound": target.bound, "at_least": target.at_least, "measured": value, "met": met})
    return out


HH, ULTRAFEEDBACK = "smollm2-135m/dpo/hh", "smollm2-135m/dpo/ultrafeedback"
CPU_TARGETS = (
    Target("pairs/s, DPO on the HH mix, over TRL default", 4.0, True, HH, "TRL default", "speedup"),
    Target("pairs/s, DPO on the HH mix, over TRL precomputed", 3.0, True, HH, "TRL precomputed", "speedup"),
    Target("pairs/s, DPO on the UltraFeedback mix, over TRL default", 2.5, True, ULTRAFEEDBACK, "TRL default", "speedup"),
    Target("peak memory, DPO on the HH mix, of TRL default's", 0.5, False, HH, "TRL default", "memory"),
    Target("peak memory, DPO on the UltraFeedback mix, of TRL default's", 0.5, False, ULTRAFEEDBACK, "TRL default", "memory"),
    Target("time of a sweep of six, of six runs with a live reference", 0.82, False, "sweep", "live reference", "ratio"),
)
GPU_TARGETS = tuple(
    target
    for shape in ("llama-1.2b/dpo", "llama3-8b/lora/dpo")
    for mix in MIXES
    for target in (Target(f"pairs/s, {shape}/{mix}, over TRL's best", 2.0, True, f"{shape}/{mix}", "best", "speedup"),
                   Target(f"useful MFU, {shape}/{mix}", 0.5, True, f"{shape}/{mix}", "prefopt", "useful_mfu"))
)  # fmt: skip


# ---- the plans ---------------------------------------------------------------------------------------


def plan(mode: str, quick: bool, repeats: int) -> tuple[list[Cell], Cell | None]:
    """The comparisons of a mode, and the sweep. The CPU plan takes about an hour a repeat on two cores."""
    best = "TRL tuned, precomputed"
    every = ("TRL default", "TRL precomputed", best)
    if mode == "cpu" and quick:
        size = {"batch": 2, "steps": 2, "repeats": 1}
        return [Cell(DPO, "hh", ("prefopt", "TRL default", "TRL precomputed"), **size),
                Cell(SIMPO, "hh", ("prefopt", "TRL default"), **size)], None  # fmt: skip
    if mode == "cpu":
        short = {"batch": 2, "steps": 2, "repeats": repeats}
        return [
            Cell(DPO, "hh", ("prefopt", *every), batch=4, steps=3, repeats=repeats),
            Cell(DPO, "ultrafeedback", ("prefopt", "TRL default", best), batch=4, steps=2, repeats=repeats),
            Cell(SIMPO, "hh", ("prefopt", "TRL default", "TRL tuned"), **short),
            Cell(SIMPO, "ultrafeedback", ("prefopt", "TRL default", "TRL tuned"), **short),
        ], Cell(DPO, "hh", ("prefopt", "live reference", best), batch=8, steps=2, repeats=1)
    if mode == "ablate":
        size = {"batch": 2, "steps": 2, "repeats": 1} if quick else {"batch": 8, "steps": 2, "repeats": repeats}
        return [Cell(DPO, "hh", tuple(ABLATIONS), **size)], None
    size = {"batch": 32, "steps": 2 if quick else 6, "repeats": 1 if quick else repeats}
    sides = ("prefopt", *every, "TRL Liger")
    shapes = (("llama-1.2b", False), ("llama3-8b", True))
    cells = [Cell(DPO, mix, sides, shape=shape, lora=lora, **size) for shape, lora in shapes for mix in MIXES]
    return cells + [Cell(SIMPO, "hh", ("prefopt", "TRL default", "TRL tuned"), shape="llama-1.2b", **size)], None


def environment(bench: Bench) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    gpu = None
    if bench.device == "cuda":
        import torch

        gpu = torch.cuda.get_device_name()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu, "cores": os.cpu_count(), "threads": bench.threads, "gpu": gpu,
        "precision": bench.precision, "python": platform.python_version(), "versions": versions, "commit": commit or None,
        "load_before": os.getloadavg()[0],
    }  # fmt: skip


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A result of some cells put into an earlier one of the same machine, where they take the place of those of their names."""
    for key in ("cpu", "cores", "threads", "gpu", "precision", "versions"):
        before, now = old["environment"][key], new["environment"][key]
        if before != now:
            raise SystemExit(f"the earlier result was measured with {key} {before}, this one with {now}; they do not belong in one table: "
                             "choose another --out")
    again = {c["name"] for c in new["cells"]}
    shapes = {(f["shape"], f["lora"]) for f in new["fits"]}
    return {
        **new, "cells": [c for c in old["cells"] if c["name"] not in again] + new["cells"], "sweep": new["sweep"] or old["sweep"],
        "fits": [f for f in old["fits"] if (f["shape"], f["lora"]) not in shapes] + new["fits"],
        "seconds": old["seconds"] + new["seconds"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("cpu", "gpu", "ablate", "docs"), help="docs: write tables and plots anew from the JSON files")
    parser.add_argument("--quick", action="store_true", help="two or three minutes: does it run, and does the order of magnitude hold?")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", help="cells whose name contains this, or sweep; with --out they are put into that file")
    parser.add_argument("--shape", choices=SHAPES, help="another model for all cells")
    parser.add_argument("--work", type=Path, help="a folder to keep jobs in: an interrupted benchmark goes on from there")
    parser.add_argument("--out", type=Path, help="JSON file; docs/bench-MODE.json, whose tables go into docs/performance.md, if not given")
    args = parser.parse_args()
    if args.mode == "docs":
        return render(DOCS)
    began = time.time()
    cells, sweep = plan(args.mode, args.quick, args.repeats)
    if args.shape:
        cells, sweep = [replace(c, shape=args.shape) for c in cells], sweep and replace(sweep, shape=args.shape)
    if args.only:
        cells, sweep = [c for c in cells if args.only in c.name], sweep if args.only in "sweep" else None
    device = "cuda" if args.mode == "gpu" else "cpu"
    out = args.out or (None if args.quick or args.only or args.shape else DOCS / f"bench-{args.mode}.json")
    with tempfile.TemporaryDirectory(prefix="prefopt-bench-") if not args.work else nullcontext(args.work) as work:
        bench = Bench(Path(work), device, "bf16" if device == "cuda" else "fp32", args.threads)
        result: dict[str, Any] = {"mode": args.mode, "environment": environment(bench), "cells": [], "fits": [], "sweep": None}
        for cell in cells:
            result["cells"].append(run_cell(bench, cell))
        if args.mode == "gpu" and not args.quick:  # what fits does not depend on the mix
            result["fits"] = [run_fits(bench, cell) for cell in cells if cell.mix == "hh" and cell.objective == DPO]
        if sweep:
            result["sweep"] = run_sweep(bench, sweep)
        result["seconds"] = round(time.time() - began)
    if args.only and out and out.exists():
        result = merged(json.loads(out.read_text(encoding="utf-8")), result)
    result["targets"] = reached({"cpu": CPU_TARGETS, "gpu": GPU_TARGETS}.get(args.mode, ()), result)
    text = json.dumps(result, indent=1)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
        say(f"{out}, after {result['seconds']} s")
        if out.resolve().parent == DOCS:
            render(DOCS)
    else:
        from bench_report import tables

        print(tables(result))


if __name__ == "__main__":
    main()
