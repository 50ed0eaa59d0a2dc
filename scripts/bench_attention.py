"""Times the layouts and attention kernels that can score a preference step, forwards and backwards, on layers of a published shape.

    python scripts/bench_attention.py --out attention.json                # a GPU: all kernels on three mixes of lengths
    python scripts/bench_attention.py --shape tiny --budget 600 --repeats 1   # a smoke test, anywhere

Lengths of prompt, chosen and rejected are drawn around the means of a mix; every kernel gets the same pairs, in micro-batches of the same
number of tokens with prompts counted once. Kernels take turns within a repeat, so that a drift of the clock meets all of them. What cannot
run here, or gives other hidden states than padded rows, is left out of the table and named below it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefopt.data.batch import MicroBatch, Row, build
from prefopt.data.tokenise import Branch, Tokens
from prefopt.policies import packed
from prefopt.policies.layout import hidden_states

MIXES = {"ultrafeedback": (180, 300, 290), "hh": (300, 70, 70), "long-prompt": (1024, 512, 512)}  # prompt, chosen, rejected
SHAPES = {
    "llama3-8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2),
}
# name: (layout, kernel, whether prompts are shared)
WAYS = {
    "rows sdpa": ("rows", "sdpa", False), "trees sdpa": ("trees", "sdpa", True),
    "packed varlen": ("packed", "varlen", True), "packed varlen, not shared": ("packed", "varlen", False),
    "packed flex": ("packed", "flex", True),
}  # fmt: skip


def pairs(mix: str, budget: int, seed: int) -> list[Row]:
    """Pairs until `budget` tokens with prompts counted once; lengths are gamma distributed with half their mean as deviation."""
    rng, rows, tokens = random.Random(f"{mix} {seed}"), [], 0
    while not rows or tokens < budget:
        prompt, *replies = (max(1, round(rng.gammavariate(4, mean / 4))) for mean in MIXES[mix])
        ids = [[rng.randrange(1000) for _ in range(n)] for n in (prompt, *replies)]
        rows.append(Row(Tokens(ids[0], [Branch(r, [True] * len(r), True) for r in ids[1:]]), "pair"))
        tokens += sum(map(len, ids))
    return rows


def decoder(shape: str, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    packed.register()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=layers, max_position_embeddings=8192, **SHAPES[shape])
    with torch.device(device):
        return LlamaModel(config).to(dtype)


def run(model: nn.Module, micro: MicroBatch, way: str) -> torch.Tensor:
    """[N, d] states that predict the trained tokens."""
    layout, kernel, share = WAYS[way]
    model.config._attn_implementation = packed.NAMES.get(kernel, kernel)
    hidden, predict, _ = hidden_states(model, model.config, micro, 0, layout, kernel, share)
    return hidden[predict]


def step(model: nn.Module, micros: list[MicroBatch], way: str) -> None:
    for micro in micros:
        run(model, micro, way).float().pow(2).mean().backward()
        model.zero_grad(set_to_none=True)


def usable(model: nn.Module, micros: list[MicroBatch], way: str, tolerance: float) -> str | None:
    """Why a way is left out, if it is. Runs it once on everything, which also compiles what is compiled."""
    try:
        with torch.no_grad():
            wanted, made = run(model, micros[0], "rows sdpa").float(), run(model, micros[0], way).float()
        error = float((made - wanted).norm() / wanted.norm())
        if not error <= tolerance:
            return f"hidden states differ by {error:.2g} of their size"
        step(model, micros, way)
    except Exception as error:  # no such kernel, or no backward pass, on this machine
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return None


def measure(model: nn.Module, mix: str, args: argparse.Namespace, device: torch.device, tolerance: float) -> dict[str, Any]:
    batches = [pairs(mix, args.budget, seed) for seed in range(args.batches)]
    micros = [build(rows, range(len(rows)), "pairs", 0).to(device) for rows in batches]
    left_out = {way: reason for way in WAYS if (reason := usable(model, micros, way, tolerance))}
    times: dict[str, list[float]] = {way: [] for way in WAYS if way not in left_out}
    memory = {}
    for _ in range(args.repeats):
        for way, found in times.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(model, micros, way)
            if device.type == "cuda":
                torch.cuda.synchronize()
                memory[way] = torch.cuda.max_memory_allocated() / 2**30
            found.append(time.perf_counter() - start)
    count = sum(map(len, batches))
    ways = {way: {"ms": 1e3 * statistics.median(t), "pairs_per_s": count / statistics.median(t), "spread": (max(t) - min(t)) / min(t),
                  "peak_gib": memory.get(way)} for way, t in times.items()}
    lengths = {"pairs": count, "tokens": sum(m.tokens for m in micros), "tree_tokens": sum(m.tree_tokens for m in micros),
               "padded_tokens": sum(m.input_ids.numel() for m in micros)}
    return {"mix": mix, "means": MIXES[mix], **lengths, "ways": ways, "left_out": left_out}


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| mix | kernel | ms | pairs/s | over trees sdpa | peak GiB |", "|---|---|---|---|---|---|"]
    for r in results:
        base = r["ways"].get("trees sdpa", {}).get("ms")
        for way, w in r["ways"].items():
            over = f"{base / w['ms']:.2f}" if base else ""
            peak = f"{w['peak_gib']:.1f}" if w["peak_gib"] else ""
            lines.append(f"| {r['mix']} | {way} | {w['ms']:.1f} | {w['pairs_per_s']:.1f} | {over} | {peak} |")
    lines += [f"\n{r['mix']}, {way}: left out ({reason})" for r in results for way, reason in r["left_out"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--mix", choices=MIXES, action="append", help="all of them unless given")
    parser.add_argument("--budget", type=int, default=8192, help="tokens per micro-batch, prompts counted once")
    parser.add_argument("--batches", type=int, default=4, help="micro-batches per step, of different lengths")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, tolerance = (torch.bfloat16, 0.05) if device.type == "cuda" else (torch.float32, 1e-3)
    model = decoder(args.shape, args.layers, device, dtype).train()
    results = [measure(model, mix, args, device, tolerance) for mix in args.mix or MIXES]
    about = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__, "dtype": str(dtype),
             **{k: v for k, v in vars(args).items() if k not in ("out", "mix")}}
    print(table(results))
    if args.out:
        args.out.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
