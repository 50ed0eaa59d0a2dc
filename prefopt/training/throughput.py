"""How fast a run is, and how much of its speed is of use.

Two figures say how much of a device's peak is reached. *Hardware MFU* counts every product that was computed: padding, masked attention,
layers that are run again, a reference that is run along. *Useful MFU* counts only what the ideal step needs: prompts once, no padding,
nothing twice, a stored reference. A padded step can reach much of the first and little of the second (arXiv 2204.02311, appendix B).

Everything is counted from the micro-batches' layout, on the CPU and before they run, so that no device is waited for.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prefopt.config.schema import HardwareConfig, ModelConfig
from prefopt.data.batch import MicroBatch
from prefopt.objectives.base import Objective
from prefopt.policies.flops import PEAKS, ModelShape, Work, padded_work, peak_flops, shape_of, tree_work
from prefopt.policies.split import whole_shape

if TYPE_CHECKING:
    from prefopt.policies.denoiser_flops import DrawShape

RECENT = 20  # steps that the progress line and a step's row look back on
WARM_UP = 2  # first steps of a start, in which kernels are compiled and memory is taken: left out of a run's averages


@dataclass(frozen=True)
class Effort:
    """What some micro-batches ask for. `tokens`: positions with a token, of one pass over them; `slots`: positions with their padding.
    Of a policy that scores pictures both count these, each at each of its draws of noise. FLOPs are those of the whole step, 0 where they
    are unknown.
    """

    rows: float = 0.0
    tokens: float = 0.0
    slots: float = 0.0
    useful: float = 0.0
    executed: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class StepKind:
    """What decides the FLOPs of a micro-batch beside its lengths.

    shape:      of the model; None where it has none (a table) or where it cannot be counted.
    layout:     how rows are laid out: rows, trees or packed; of pictures draws. `shared`: prompts are computed once for all their replies.
    frozen:     most weights get no gradient (LoRA); `adapter` is the number of those that do.
    scores:     log-probs are asked for, so trained positions go through the head.
    fused:      logits are made in chunks, and again in the backward pass.
    recompute:  what of layers is run again in the backward pass (gradient checkpointing): nothing (""), all or cheap. All of a layer is
                counted; torch leaves out its last product where nothing else needs it, some 2 to 7 % of the step.
    attention:  transformers' name of the kernel: `eager` computes what is masked, `sdpa` where there is padding, others never.
    twice:      the objective scores its whole batch before it differentiates.
    reference:  the objective reads a reference.
    compared:   products with a head per trained token, beyond those of log-probs: whole distributions are compared.
    teachers:   shapes of the frozen models that are run along, beside the reference: teachers and slow copies.
    extra_scorers: who scores the extra sequences of pairs.
    guided:     of pictures, what guidance's prediction without a caption takes: 0 nothing, 1 a forward pass, 2 a backward pass as well.
    """

    shape: ModelShape | DrawShape | None = None
    layout: str = "rows"
    shared: bool = False
    frozen: bool = False
    adapter: int = 0
    scores: bool = True
    fused: bool = False
    recompute: str = ""
    attention: str = "sdpa"
    twice: bool = False
    reference: bool = False
    compared: int = 0
    teachers: tuple[ModelShape | DrawShape, ...] = ()
    extra_scorers: tuple[str, ...] = ("policy", "reference")
    guided: int = 0


def kind_of(policy: nn.Module, objective: Objective, teachers: Sequence[nn.Module] = ()) -> StepKind:
    """How `policy` is trained with `objective`, while `teachers` are run along."""
    layout, shared, twice = getattr(policy, "layout", "rows"), getattr(policy, "share", False), objective.coupling == "global"
    if layout == "draws":
        return _kind_of_pictures(policy, objective, teachers)
    if not hasattr(policy, "inner"):
        return StepKind(layout=layout, shared=shared, twice=twice)
    try:
        shape, beside = shape_of(policy.inner.config), tuple(shape_of(teacher.inner.config) for teacher in teachers)
    except Exception as error:  # an architecture that cannot be built without its weights; its other numbers are known
        print(f"model: its FLOPs are not counted ({type(error).__name__}: {str(error)[:200]})", file=sys.stderr)
        shape, beside = None, ()
    cfg, lora = policy.cfg, policy.cfg.lora.enabled
    adapter = sum(whole_shape(p).numel() for p in policy.trainable().values()) if lora else 0
    return StepKind(
        shape, layout, shared, lora, adapter, policy.quantity != "reward",
        getattr(policy, "fuse", False), cfg.recomputed,
        policy.inner.config.get_text_config()._attn_implementation, twice, "reference" in objective.quantities,
        head_products(objective, lora, len(teachers)), beside, objective.extra_scorers,
    )


def _kind_of_pictures(policy: nn.Module, objective: Objective, teachers: Sequence[nn.Module]) -> StepKind:
    """The same of a policy that scores pictures. What a frozen model of other weights costs is taken to be as much."""
    from prefopt.policies.denoiser_flops import shape_of_denoiser  # diffusers takes seconds to import

    cfg, lora = policy.cfg, policy.cfg.lora.enabled
    shape = shape_of_denoiser(policy.denoiser, cfg.resolution, policy.trainable() if lora else None)
    beside = tuple(shape_of_denoiser(teacher.denoiser, cfg.resolution) for teacher in teachers) if shape else ()
    sampling = getattr(policy, "sampling", None)
    return picture_kind(cfg, objective, shape, tuple(filter(None, beside)), sampling.guidance.blank_passes if sampling else 0)


def picture_kind(cfg: ModelConfig, objective: Objective, shape: DrawShape | None, teachers: tuple[DrawShape, ...] = (),
                 guided: int = 0) -> StepKind:
    """How pictures are trained on with a model of this `shape`."""
    return StepKind(
        shape, "draws", frozen=cfg.frozen, recompute=cfg.recomputed, twice=objective.coupling == "global",
        reference="reference" in objective.quantities, teachers=teachers, extra_scorers=objective.extra_scorers, guided=guided,
    )


def head_products(objective: Objective, frozen: bool, teachers: int) -> int:
    """Products with a head that whole distributions take, per trained token of a step that runs so many `teachers`. A divergence makes the
    logits of both sides forward and again backward, and the policy's gradients towards states and weight (not if that is `frozen`). Every
    head counts as the policy's.
    """
    teacher = objective.quantities.get("teacher", ())
    products = 2 * ("distance" in teacher) + ("value" in teacher and teachers > 0)
    if "divergence" in objective.quantities["policy"]:
        two = "distance" in teacher and objective.divergence_from[1] == "teacher"  # the teacher's logits are made of two heads
        products += 2 + 2 * (1 + two) + (1 if frozen else 2)
    return products


# ---- counting ------------------------------------------------------------------------------------


def count(micros: Iterable[MicroBatch], how: StepKind) -> Effort:
    """What one optimiser step asks of this rank. Micro-batches must still be on the CPU. A filler is computed and of no use."""
    return sum((_effort(m, how) for m in micros), Effort())


def _effort(micro: MicroBatch, how: StepKind) -> Effort:
    if how.layout == "draws":
        return _effort_of_pictures(micro, how)
    everything, micro = micro, micro.part("policy", how.extra_scorers)
    work, rows = computed(micro, how), float(len(micro.rows))
    tokens = 0.0 if not rows else float(micro.tree_tokens if how.shared else micro.tokens)
    if how.shape is None:
        return Effort(rows, tokens, work.tokens)
    taught = computed(micro.only(micro.gradient), how) if how.twice else work  # edges without gradient are scored the first time only
    executed = how.shape.step(taught, how.frozen) + 6 * how.adapter * taught.tokens
    if how.twice:
        executed += how.shape.forward(work) + 2 * how.adapter * work.tokens
    if how.reference and "reference" not in micro.stored:
        asked = everything.part("reference", how.extra_scorers)
        executed += how.shape.forward(work if asked is micro else computed(asked, how))
    if "teacher" not in micro.stored:
        executed += sum(teacher.forward(work) for teacher in how.teachers)
    executed += how.compared * how.shape.matrices(Work(scored=taught.scored))
    if how.recompute:
        executed += how.shape.forward(replace(taught, scored=0)) + 2 * how.adapter * taught.tokens
    if how.fused:
        executed += how.shape.matrices(Work(scored=taught.scored))
    return Effort(rows, tokens, work.tokens, useful(micro, how) if rows else 0.0, executed)


def _effort_of_pictures(micro: MicroBatch, how: StepKind) -> Effort:
    """The same of pictures: each draw is one pass through the network, or with guidance two, and nothing is padded."""
    everything, micro = micro, micro.part("policy", how.extra_scorers)
    draws, rows = float(micro.trained.sum()), float(len(micro.rows))
    taught = float(micro.trained[micro.gradient].sum())
    if how.shape is None:
        return Effort(rows, draws if rows else 0.0, draws)
    executed = how.shape.step(taught if how.twice else draws, how.frozen) + how.twice * how.shape.forward(draws)
    executed += how.shape.again(taught if how.twice else draws, how.recompute)
    blank = (0.0, how.shape.forward(draws), how.shape.step(draws, how.frozen))[how.guided]
    executed += blank + (how.guided == 2) * how.shape.again(draws, how.recompute)
    if how.reference and "reference" not in micro.stored:
        asked = float(everything.part("reference", how.extra_scorers).trained.sum())
        executed += (1 + (how.guided > 0)) * how.shape.forward(asked, adapted=False)
    if "teacher" not in micro.stored:
        executed += sum(teacher.forward(draws) for teacher in how.teachers)
    ideal = how.shape.step(taught, how.frozen) + how.shape.forward(draws - taught) + blank
    return Effort(rows, draws if rows else 0.0, draws, ideal if rows else 0.0, executed)


def useful(micro: MicroBatch, how: StepKind) -> float:
    """FLOPs of the ideal step: prompts once, replies branch off; 6 per weight and token, 4 where weights are frozen, and one forward pass
    for replies without gradient."""
    total = 0.0
    for prompt, replies in _trees(micro):
        whole = tree_work(prompt, [n for n, _, _ in replies], how.scores * sum(s for _, s, _ in replies), how.shape.window)
        taught = [(n, s) for n, s, gradient in replies if gradient]
        train = tree_work(prompt, [n for n, _ in taught], how.scores * sum(s for _, s in taught), how.shape.window)
        total += how.shape.step(train, how.frozen) + how.shape.forward(whole + -1 * train)
    return total


def computed(micro: MicroBatch, how: StepKind) -> Work:
    """What one forward pass over a micro-batch computes as it is laid out. Half-used blocks of a packed kernel are not counted."""
    edges, width = micro.input_ids.shape
    window = how.shape.window if how.shape else None
    trees = [(prompt, [n for n, _, _ in replies]) for prompt, replies in _trees(micro)]
    if not how.shared:
        trees = [(prompt, [n]) for prompt, replies in trees for n in replies]
    scored = int(micro.trained[:, 1:].sum()) if how.scores else 0
    if how.layout == "packed":
        return sum((tree_work(prompt, replies, 0, window) for prompt, replies in trees), Work(scored=scored))
    if how.layout == "trees" and len(trees) < edges:
        return padded_work(len(trees), max(prompt + sum(replies) for prompt, replies in trees), scored, dense=True, window=window)
    if how.scores and not how.fused:  # logits of all positions from the first trained one on
        scored = edges * (width - int(micro.trained[:, 1:].any(0).float().argmax()))
    dense = how.attention == "eager" or (how.attention == "sdpa" and micro.tokens < edges * width)
    return padded_work(edges, width, scored, dense, window)


def _trees(micro: MicroBatch) -> list[tuple[int, list[tuple[int, int, bool]]]]:
    """(length of the prompt, (length, scored tokens, has a gradient) of each reply) of each tree."""
    prompts, lengths = micro.prompt.tolist(), micro.attention.sum(1).tolist()
    edges = zip(micro.tree.tolist(), prompts, lengths, micro.trained[:, 1:].sum(1).tolist(), micro.gradient.tolist(), strict=True)
    return [
        (group[0][1], [(length - prompt, scored, gradient) for _, prompt, length, scored, gradient in group])
        for _, members in groupby(edges, key=lambda edge: edge[0]) if (group := list(members))
    ]


# ---- the machine ---------------------------------------------------------------------------------


def peak_memory(device: torch.device) -> int:
    """Most bytes that were held at a time since the process began: allocated on the GPU; on the CPU the whole process, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: torch.device) -> str:
    """What the device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def find_peak(hardware: HardwareConfig, device: torch.device) -> tuple[float, str]:
    """(FLOP/s that the device could do at most, where the figure is from)."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    listed = any(known in name for known, *_ in PEAKS)
    where = "hardware.peak_tflops" if hardware.peak_tflops else "its data sheet" if listed else "a measured matrix product"
    return peak_flops(hardware, name, hardware.precision), where


def unit(view: str, kinds: Iterable[str], online: bool) -> str:
    """What a row of the data is called: the unit of `rows_per_second`."""
    if online:
        return "prompts"
    if set(kinds) == {"unary"}:
        return "completions"
    return "pairs" if view != "demonstrations" and set(kinds) == {"pair"} else "rows"


# ---- rates ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Some steps over all ranks: what they asked for, how long they took, and what the devices could have done meanwhile."""

    effort: Effort = Effort()
    seconds: float = 0.0
    possible: float = 0.0  # FLOPs
    steps: int = 0

    def __add__(self, other: Span) -> Span:
        return Span(self.effort + other.effort, self.seconds + other.seconds, self.possible + other.possible, self.steps + other.steps)

    def rates(self, counted: str = "tokens") -> dict[str, float]:
        """Per second and as shares; what is not known is left out. `counted` are tokens or pictures, which are not padded."""
        did, found = self.effort, {}
        if self.seconds > 0:
            found |= {"rows_per_second": did.rows / self.seconds, f"{counted}_per_second": did.tokens / self.seconds}
        if self.possible > 0 and did.executed > 0:
            found |= {"useful_mfu": did.useful / self.possible, "hardware_mfu": did.executed / self.possible}
        if did.slots > 0 and counted == "tokens":
            found["padding"] = 1 - did.tokens / did.slots
        return found


class Speed:
    """Times the steps of a run. What is not training (evaluations, checkpoints, sampling) is kept out by `restart` and by `waited`.

    `peak` is the FLOP/s of one of `world` devices, None where FLOPs are unknown; `unit` is what a row is called,
    and `counted` what is counted of rows: tokens or pictures.
    """

    def __init__(self, peak: float | None, world: int, unit: str, counted: str = "tokens"):
        self.peak, self.world, self.unit, self.counted = peak, world, unit, counted
        self.recent: deque[Span] = deque(maxlen=RECENT)
        self.began, self.total, self.memory = Span(), Span(), 0  # the first steps of this start; all others of the run
        self.warm = True  # `recent` holds first steps
        self.restart()

    def restart(self) -> None:
        """The next step begins now."""
        self.since = time.monotonic()

    def step(self, did: Effort, memory: int, waited: float = 0.0) -> dict[str, float]:
        """A step of all ranks is done, of which `waited` seconds were no training; the rates over the last steps."""
        now = time.monotonic()
        seconds, self.since = max(now - self.since - waited, 0.0), now
        span = Span(did, seconds, (self.peak or 0.0) * self.world * seconds, 1)
        if self.began.steps < WARM_UP:
            self.began += span
        else:
            self.total += span
            if self.warm:
                self.recent.clear()
            self.warm = False
        self.recent.append(span)
        self.memory = max(self.memory, memory)
        return {**sum(self.recent, Span()).rates(self.counted), "peak_memory": self.memory}

    def averages(self) -> dict[str, Any]:
        """Of the run so far, without the first steps of each start unless there are no others."""
        span = self.total if self.total.steps else self.began
        if not span.steps:
            return {}
        rates = span.rates(self.counted)
        return {"unit": self.unit, "steps": span.steps, "seconds": round(span.seconds, 3), **rates, "peak_memory": self.memory}

    def state(self) -> dict[str, Any]:
        return {"total": asdict(self.total), "memory": self.memory}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on with what earlier starts of the run have measured."""
        total = state["total"]
        self.total, self.memory = Span(**{**total, "effort": Effort(**total["effort"])}), state["memory"]
