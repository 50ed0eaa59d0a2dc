"""Compares the memory that `prefopt plan` expects with what runs take, and writes docs/plan.json.

    python scripts/check_plan.py [--device cuda] [--output FILE] [--only NAME]

Each setting is planned, then trained for two steps, each in a process of its own. On the CPU the measure is the most that the process had
resident, from its start to its end (evaluations and checkpoints included); on a GPU the most that torch had allocated in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

MARKS = ("<!-- plan.json -->", "<!-- /plan.json -->")  # around the table in docs/plan.md
COMMON = ["train.steps=2", "evaluation.prompts=0", "evaluation.kl=false", "train.self_check=false", "data.eval_limit=4",
          "train.eval_every=2", "hardware.threads=1"]
TINY = ["model=tiny-lm", "data.limit=400", "train.batch_size=64"]
SMOL = ["model=smollm2-135m", "data.limit=64", "train.batch_size=8"]
PLAIN = ["model.share_prompts=false", "model.fused_head=false"]
SETTINGS: dict[str, list[str]] = {
    "tiny-lm, full": TINY,
    "tiny-lm, full, plain rows and full logits": [*TINY, *PLAIN],
    "tiny-lm, full, recomputed": [*TINY, "model.gradient_checkpointing=true"],
    "tiny-lm, LoRA": [*TINY, "adapter=lora"],
    "smollm2-135m, full": SMOL,
    "smollm2-135m, full, 256 tokens": [*SMOL, "train.micro_batch_tokens=256"],
    "smollm2-135m, full, recomputed": [*SMOL, "model.gradient_checkpointing=true"],
    "smollm2-135m, full, frozen copy": [*SMOL, "reference.store=off", "train.micro_batch_tokens=512"],
    "smollm2-135m, full, plain rows and full logits": [*SMOL, *PLAIN],
    "smollm2-135m, LoRA": [*SMOL, "adapter=lora"],
    "smollm2-135m, LoRA, recomputed": [*SMOL, "adapter=lora", "model.gradient_checkpointing=true"],
}


def planned(words: list[str]) -> dict[str, float]:
    """The parts of the plan, bytes; runs in a process of its own."""
    from dataclasses import asdict

    from prefopt.launch import app
    from prefopt.training.plan import estimate, ground_of

    app.TASKS["plan"] = lambda cfg: estimate(cfg, ground_of(cfg)).memory
    found = app.run("plan", words)
    return {**{k: v for k, v in asdict(found).items() if k != "moments"}, "peak": found.peak, "worst": found.worst}


def measured(words: list[str], device: str) -> float:
    """Bytes that a run takes at most."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, "-m", "prefopt.cli", "train", *words, f"hydra.run.dir={folder}/run"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "PREFOPT_STORE": f"{folder}/store"})
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"prefopt train {' '.join(words)} failed:\n{said[-2000:]}")
        if device == "cuda":
            rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
            return max(row.get("peak_memory", 0) for row in rows)
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(out: dict) -> str:
    """The settings as Markdown."""
    lines = [f"| run ({out['device']}) | planned | measured | error | worst moment |", "|---|---|---|---|---|"]
    lines += [f"| {s['name']} | {s['planned']['peak'] / 1e9:.2f} GB | {s['measured'] / 1e9:.2f} GB | {100 * s['error']:+.1f} % | "
              f"{s['planned']['worst']} |" for s in out["settings"]]
    return "\n".join(lines)


def write(out: dict, output: Path) -> None:
    """The JSON, and the page beside it that quotes it."""
    output.write_text(json.dumps(out, indent=1) + "\n")
    page = output.with_suffix(".md")
    if page.exists():
        head, _, rest = page.read_text().partition(MARKS[0])
        page.write_text(f"{head}{MARKS[0]}\n{table(out)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", default=Path(__file__).resolve().parents[1] / "docs" / "plan.json", type=Path)
    parser.add_argument("--only", help="settings whose name holds this")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(planned(args.one)))
        return
    hardware = ["hardware=cpu" if args.device == "cpu" else "hardware=1xgpu"]
    out = {"machine": platform.platform(), "device": args.device, "settings": []}
    for name, words in SETTINGS.items():
        if args.only and args.only not in name:
            continue
        words = [*words, *COMMON, *hardware]
        made = subprocess.run([sys.executable, __file__, "--one", *words], capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(f"prefopt plan {' '.join(words)} failed:\n{made.stderr[-2000:]}")
        plan = json.loads(made.stdout.splitlines()[-1])
        if args.device == "cuda":  # torch counts neither the context nor what its allocator keeps in reserve
            plan["peak"] -= plan["runtime"] + plan["slack"]
        found = measured(words, args.device)
        error = plan["peak"] / found - 1
        out["settings"].append({"name": name, "overrides": words, "planned": plan, "measured": found, "error": round(error, 4)})
        print(f"{name:50s} planned {plan['peak'] / 1e9:6.2f} GB, measured {found / 1e9:6.2f} GB, {100 * error:+5.1f} %", flush=True)
        write(out, args.output)


if __name__ == "__main__":
    main()
