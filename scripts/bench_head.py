"""Times ways to get per-token log-probs and their gradients from hidden states and a head: `python scripts/bench_head.py`.

The op of prefopt, plain logits, torch's linear_cross_entropy (with and without its chunked path) and, on a GPU and where they are
installed, the Triton kernels of Liger and of cut-cross-entropy. Every way runs in a process of its own, the ways take turns, and each
process checks its log-probs and gradients against the op's before it is timed. Each token has a gradient of its own, as in every
preference loss. Medians over the repeats go into docs/bench-head.json with hardware and versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from prefopt.policies.logprob import Head, token_logprobs

OUT = Path(__file__).resolve().parent.parent / "docs" / "bench-head.json"
SHAPES = {  # tokens, hidden, vocabulary, type
    "cpu": {"SmolLM2-135M": (2048, 576, 49152, "float32")},
    "cuda": {"SmolLM2-135M": (2048, 576, 49152, "bfloat16"), "Llama-3-8B": (4096, 4096, 128256, "bfloat16")},
}


def own(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(hidden, Head(weight), targets)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def torch_whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none")


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def cut(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "prefopt": own, "plain logits": plain, "torch linear_cross_entropy": torch_whole, "torch linear_cross_entropy, chunked": torch_chunked,
    "Liger": liger, "cut-cross-entropy": cut,
}  # fmt: skip
TRITON = ("Liger", "cut-cross-entropy")
PACKAGES = {"Liger": "liger-kernel", "cut-cross-entropy": "cut-cross-entropy"}


def measure(way: str, shape: tuple[int, int, int, str], frozen: bool, device: str) -> dict[str, float]:
    """Seconds of a forward and backward pass, memory at its peak beyond the inputs, and the largest differences from prefopt's op."""
    tokens, width, words, dtype = shape
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(words, width, device=device).div_(width**0.5).to(getattr(torch, dtype)).requires_grad_(not frozen)
    targets = torch.randint(words, (tokens,), device=device)
    upstream = torch.randn(tokens, device=device)
    leaves = [hidden] if frozen else [hidden, weight]

    def step() -> tuple[Tensor, ...]:
        made = WAYS[way](hidden, weight, targets)
        return made.detach(), *torch.autograd.grad(made, leaves, upstream.to(made.dtype))

    if device == "cuda":
        for _ in range(3):  # kernels are compiled and tuned
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = rss()  # nothing was made and thrown away so far: the peak will be that of the step
    clock, cpu = time.perf_counter(), time.process_time()
    results = step()
    if device == "cuda":
        torch.cuda.synchronize()
    measured = {"seconds": time.perf_counter() - clock}
    if device == "cuda":
        measured["gigabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    else:
        measured |= {"cpu_seconds": time.process_time() - cpu, "gigabytes": (peak_rss() - before) / 1e9}
    made = own(hidden, weight, targets)
    wanted = (made, *torch.autograd.grad(made, leaves, upstream))
    for name, ours, theirs in zip(("logps", "d_hidden", "d_weight"), wanted, results, strict=False):  # gradients: as a share of the largest
        gap = (ours.float() - theirs.float()).abs().max()
        measured[f"gap_{name}"] = float(gap if name == "logps" else gap / ours.float().abs().max())
    return measured


def rss() -> float:
    """Bytes of this process in memory now (Linux)."""
    return float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def in_a_process(way: str, name: str, device: str, frozen: bool, threads: int) -> dict[str, float] | str:
    """What `measure` returns, or why there is nothing."""
    command = [sys.executable, __file__, "--one", way, "--shape", name, "--device", device, "--threads", str(threads)]
    done = subprocess.run(command + ["--frozen"] * frozen, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    return json.loads(done.stdout.splitlines()[-1])


def skipped(way: str, device: str) -> str | None:
    if way in TRITON and device != "cuda":
        return "needs a GPU"
    if way in PACKAGES and version(PACKAGES[way]) is None:
        return f"{PACKAGES[way]} is not installed"
    return None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: str, threads: int) -> dict[str, object]:
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    packages = ("torch", "triton", *PACKAGES.values())
    return {"device": name, "threads": threads, "python": platform.python_version(), **{p: version(p) for p in packages if version(p)}}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(device: str, name: str, frozen: bool, threads: int, repeats: int) -> dict[str, object]:
    ways = {way: skipped(way, device) for way in WAYS}
    runs: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        for way in (way for way, reason in ways.items() if reason is None):
            made = in_a_process(way, name, device, frozen, threads)
            if isinstance(made, str):
                ways[way] = made
            else:
                runs.setdefault(way, []).append(made)
                print(f"{name}{', frozen head' * frozen}, {way}, {repeat + 1}/{repeats}: {made['seconds']:.3f} s", file=sys.stderr)
    tokens, width, words, dtype = SHAPES[device][name]
    medians = {way: {key: float(f"{statistics.median(m[key] for m in made):.4g}") for key in made[0]} for way, made in runs.items()}
    return {"shape": name, "tokens": tokens, "hidden": width, "vocabulary": words, "type": dtype, "head": "frozen" if frozen else "trained",
            "ways": medians, "left_out": {way: reason for way, reason in ways.items() if reason}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file; other devices' results in it stay")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", help="only this one")
    parser.add_argument("--frozen", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.one, SHAPES[args.device][args.shape], args.frozen, args.device)))
        return
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results[args.device] = {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine(args.device, args.threads), "repeats": args.repeats,
        "tables": [table(args.device, name, frozen, args.threads, args.repeats) for name in SHAPES[args.device]
                   if args.shape in (None, name) for frozen in (False, True)],
    }
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results[args.device], indent=2))


if __name__ == "__main__":
    main()
