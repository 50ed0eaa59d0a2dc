"""What one of N processes holds and sends: under data parallelism, and under DeepSpeed's ZeRO 1, 2 and 3 (arXiv 1910.02054, section 5).

With P weights, T of them trained (all in fp32 here, AdamW), and F bytes of frozen ones, a process holds

    stage   weights    fp32 copy  moments  gradients
    0       4 T + F    none       8 T      4 T (twice with DistributedDataParallel's buckets)
    1       4 T + F    4 T/N      8 T/N    4 T
    2       4 T + F    4 T/N      8 T/N    4 T/N
    3       (4 T + F)/N 4 T/N     8 T/N    4 T/N

DeepSpeed copies the weights that a process updates also where they are fp32 already. Stages 1 to 3 have a bucket on top in which gradients
are sent, and stage 3 the weights that are gathered at a time. A ring of N moves S (N-1)/N bytes out of each process to gather S bytes or
to reduce and scatter them, and twice that to reduce them for all. DeepSpeed's stages 1 and 2 do the latter, of which each process keeps its
part; so a step of M micro-batches sends, in units of 4 T (N-1)/N (stage 3: gathers are of all weights),

    0: 2        1: 2 + 1        2: 2 M + 1        3: M (1 + 1 + 1), forward, backward and gradients

less what stage 3 may keep gathered from one pass to the next (stage3_max_live_parameters).

Tests and docs/scaling.md hold both against what DeepSpeed allocates and sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefopt.config.schema import HardwareConfig

# Bytes per second that one GPU can send, from data sheets: (NVLink, one way; its share of the machine's network cards). A100: 600 GB/s
# NVLink both ways, DGX A100 with eight 200 Gbit/s InfiniBand ports; H100 and H200: 900 GB/s and eight of 400 Gbit/s.
LINKS = {"a100": (300e9, 25e9), "h100": (450e9, 50e9), "h200": (450e9, 50e9)}
MASTER, MOMENTS, NUMBER = 4, 8, 4  # bytes of a trained weight: DeepSpeed's copy, AdamW's moments, gradient or fp32 weight


@dataclass(frozen=True)
class Layout:
    """How the states of a run lie. Buckets and limits are DeepSpeed's, in numbers."""

    world: int = 1
    stage: int = 0
    offload: str = "none"  # none | optimizer | all
    bucket: float = 0.0  # reduce_bucket_size
    buckets: int = 1  # two with overlap_comm
    live: float = 0.0  # gathered weights that may be held at a time: stage3_max_live_parameters


@dataclass(frozen=True)
class States:
    """Bytes of one process. `host`: in the CPU's memory, under offload. `gathered`: whole weights while they are needed."""

    weights: float
    optimizer: float
    gradients: float  # held from one micro-batch to the next, and at the update
    buckets: float  # in which gradients are sent
    gathered: float
    host: float


def layout_of(hardware: HardwareConfig, zero: dict[str, Any]) -> Layout:
    """`zero` is the part `zero_optimization` of the DeepSpeed JSON; what it does not say is DeepSpeed's default."""
    if not hardware.zero:
        return Layout(hardware.world)
    overlap = zero.get("overlap_comm")
    overlap = hardware.zero == 3 if overlap is None else overlap
    return Layout(hardware.world, hardware.zero, hardware.offload, float(zero.get("reduce_bucket_size", 5e8)),
                  2 if overlap and hardware.zero < 3 else 1, float(zero.get("stage3_max_live_parameters", 1e9)))


def states(layout: Layout, weights: float, parameters: float, trained: float) -> States:
    """Of a model of so many `parameters`, `trained` of them, that takes `weights` bytes whole."""
    n, stage = layout.world, layout.stage
    gradients, moments = NUMBER * trained, MOMENTS * trained
    if stage == 0:
        return States(weights, moments, gradients, gradients if n > 1 else 0.0, 0.0, 0.0)
    held = weights / n if stage == 3 else weights
    optimizer = (MASTER * trained + moments) / n
    kept = gradients if stage == 1 else gradients / n
    bucket = NUMBER * min(layout.bucket, trained) if stage < 3 else NUMBER * layout.bucket
    gathered = weights * min(layout.live / max(parameters, 1.0), 1.0) if stage == 3 else 0.0
    host = 0.0
    if layout.offload != "none":
        host, optimizer = optimizer + gradients / n, 0.0
        kept = gradients if stage == 1 else 0.0
    if layout.offload == "all":
        host, held = host + held, 0.0
    return States(held, optimizer, kept, bucket * layout.buckets, gathered, host)


def between_steps(layout: Layout, weights: float, parameters: float, trained: float) -> float:
    """Bytes of states that a process holds when a step is done, in its own memory and the CPU's. Stage 3 keeps its bucket and its part of
    the gradients, DistributedDataParallel its buckets."""
    held = states(layout, weights, parameters, trained)
    kept = {0: held.buckets, 3: held.buckets + held.gradients}.get(layout.stage, 0.0)
    return held.weights + held.optimizer + kept + held.host


def traffic(layout: Layout, weights: float, parameters: float, trained: float, micros: int, passes: int = 2) -> dict[str, float]:
    """Bytes that a process sends in a step of so many micro-batches, by what they are for. `passes`: how often a micro-batch needs the
    weights: forward and backward, and more where an objective scores twice or a reference is run along with the same weights. At each turn
    from one pass to the next, the weights that may stay gathered are not fetched again."""
    n = layout.world
    if n == 1:
        return {}
    ring, gradients = (n - 1) / n, NUMBER * trained
    if layout.stage == 3:
        turns = micros * passes
        fetched = turns - (turns - 1) * min(layout.live / max(parameters, 1.0), 1.0)
        return {"gathering weights": fetched * ring * weights, "reducing and scattering gradients": micros * ring * gradients}
    found = {"reducing gradients for all": 2 * (micros if layout.stage == 2 else 1) * ring * gradients}
    return {**found, "gathering updated weights": ring * gradients} if layout.stage else found


def bandwidth(hardware: HardwareConfig) -> tuple[float, str] | None:
    """(bytes per second out of one process, what limits it) if all links of the machine are used; None where the machine is not known.

    A ring passes each machine's network cards once, and all of them share it."""
    kind = next((name for name in LINKS if name in hardware.name), None)
    if kind is None or hardware.device == "cpu":
        return None
    nvlink, card = LINKS[kind]
    cards = card * hardware.processes
    if hardware.nodes == 1 or nvlink <= cards:
        return nvlink, f"NVLink of the {kind.upper()}, one way"
    return cards, f"{hardware.processes} InfiniBand ports of a machine with {kind.upper()}s"
