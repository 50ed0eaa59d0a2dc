"""A plan as text for people, and the comparison of plan and fact when memory runs out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from prefopt.config.listing import table
from prefopt.config.schema import TrainConfig
from prefopt.errors import UserError
from prefopt.training.deepspeed_json import deepspeed_json
from prefopt.training.memory import Memory
from prefopt.training.plan import Plan, estimate, ground_of, ground_of_run, mend
from prefopt.training.setup import Run
from prefopt.training.sharding import bandwidth
from prefopt.training.throughput import peak_memory

OUT_OF_MEMORY = ("can't allocate memory", "DefaultCPUAllocator", "not enough memory")  # how torch says it on the CPU, where it has no type


def plan_text(cfg: TrainConfig) -> str:
    """What `prefopt plan` prints. Raises `UserError` where a run could not start."""
    if cfg.model.kind == "tabular":
        from prefopt.data.sources import load_data
        from prefopt.data.transforms import apply_transforms

        train = load_data(cfg.data, cfg.trust)[0]
        apply_transforms([train], cfg.data, cfg.seed)
        rows = len(train.examples)
        steps = cfg.train.steps or max(1, -(-int(cfg.train.epochs * rows) // cfg.train.batch_size))
        return f"fits: model={cfg.model.name} is a table of a few numbers; {steps:,} steps over {rows:,} rows take seconds and no memory " \
               "to speak of"
    if cfg.model.kind == "diffusion":
        from prefopt.training.plan_pictures import picture_plan_text

        return picture_plan_text(cfg)
    plan = estimate(cfg, ground_of(cfg))
    parts = [[verdict(plan)], table(_about(plan), "  "), memory_lines(plan.memory, cfg), communication_lines(cfg, plan.sent, plan.seconds),
             _work_lines(plan), deepspeed_lines(cfg)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def verdict(plan: Plan) -> str:
    """Whether it fits, and if not, what would make it fit."""
    needs, of, cfg = _gb(plan.memory.peak), "GPU" if plan.device == "cuda" else "process", plan.cfg
    if plan.capacity is None:
        return f"needs {needs} per {of}; there is no GPU here to compare with (hardware.memory_gb=... says what there will be)"
    if plan.fits:
        return f"fits: {needs} of {_gb(plan.capacity)} per {of}"
    said = f"does not fit: {needs} of {_gb(plan.capacity)} per {of}"
    found = mend(plan)
    if found is None:
        return f"{said}; no change of checkpointing, micro-batch, adapter or ZeRO would make it fit{more_devices(cfg)}"
    return f"{said}; it would with {found[0]} ({_gb(found[1].memory.peak)})"


def _about(plan: Plan) -> list[tuple[str, str]]:
    cfg, ground, work = plan.cfg, plan.ground, plan.work
    view, shape = ground.objective.view, ground.shape
    prompts = [len(row.tokens.prompt) for row in ground.rows]
    replies = [len(b.ids) for row in ground.rows for b in row.edges(view)]
    layout = {"rows": "padded rows, one for each reply", "trees": "padded rows, one for each prompt with its replies",
              "packed": "one packed row without padding"}[plan.kind.layout]
    out = [
        ("run", f"algo={cfg.algo.get('name', '')} model={cfg.model.name} data={cfg.data.name} {machines(cfg)}"),
        *([("assumed", ground.assumed)] if ground.assumed else []),
        ("model", f"{shape.parameters / 1e6:,.1f} M parameters, {plan.trainable / 1e6:,.2f} M trained "
                  f"({100 * plan.trainable / shape.parameters:.3g} %)"),
        ("data", f"{len(ground.rows):,} rows; prompts of {_mean(prompts)} and replies of {_mean(replies)} tokens on average, the longest "
                 f"{max(prompts, default=0):,} and {max(replies, default=0):,}"),
        *((f"transform {name}", done) for name, done in ground.transforms),
        ("steps", f"{plan.steps:,} of {cfg.train.batch_size} rows; {work.tokens:,.0f} tokens each; micro-batches per process: at most "
                  f"{plan.micros}"),
        *idle(cfg, len(ground.rows)),
        ("layout", f"{layout} ({plan.kind.attention}); the largest micro-batch is {plan.largest.rows} x {plan.largest.width:,} positions"),
        ("reference", {"stored": "computed once and stored", "none": "none is read"}.get(plan.reference, plan.reference)),
    ]
    if cfg.source.kind != "offline":
        out.append(("sampled", f"replies are taken to be as long as they may get ({cfg.sampler.max_new_tokens} tokens); writing and "
                               "judging them is not counted"))
    return out


def memory_lines(needs: Memory, cfg: TrainConfig, working: str = "chunk of logits, gradients on their way") -> list[str]:
    """The parts of one process, and its worst moment."""
    stage = cfg.hardware.zero
    kept = "AdamW's moments and a copy of the weights" if stage else "AdamW's moments"
    rows = [
        (f"weights{split(cfg, 3)}", needs.weights), (f"optimiser ({kept}{split(cfg, 1, ', ')})", needs.optimizer),
        (f"gradients{split(cfg, 2)}, with the buckets they are sent in" if cfg.hardware.world > 1 else "gradients", needs.gradients),
        *([("weights gathered at a time", needs.gathered)] if stage == 3 else []),
        ("reference", needs.reference),
        (f"activations of a micro-batch{' (layers recomputed)' if cfg.model.recomputed else ''}", needs.activations),
        (working, needs.working), ("allocator's slack", needs.slack),
        ("libraries and data", needs.runtime),
    ]
    lines = table([(name, _gb(value)) for name, value in rows], "  ")
    moments = ", ".join(f"{_gb(value)} at {moment}" for moment, value in sorted(needs.moments.items(), key=lambda m: -m[1]))
    if needs.host:
        lines.append(f"  and in the CPU's memory of each machine, for its {cfg.hardware.processes} processes: "
                     f"{_gb(needs.host * cfg.hardware.processes)}")
    return ["memory per process", *lines, f"  most is held at {needs.worst}: {moments}"]


def machines(cfg: TrainConfig) -> str:
    """The hardware in a few words."""
    hardware = cfg.hardware
    nodes = f"{hardware.nodes} machines with " if hardware.nodes > 1 else ""
    zero = f", ZeRO {hardware.zero}" if hardware.zero else ""
    return (f"hardware={hardware.name} ({nodes}{hardware.processes} process{'es' if hardware.processes > 1 else ''}, "
            f"{hardware.precision}{zero})")


def split(cfg: TrainConfig, stage: int, lead: str = ", ") -> str:
    """Whether what ZeRO splits from `stage` on is split here."""
    return f"{lead}split {cfg.hardware.world} ways" if cfg.hardware.zero >= stage and cfg.hardware.world > 1 else ""


def more_devices(cfg: TrainConfig) -> str:
    """What is left to people where nothing else helps."""
    return "; more GPUs would take a smaller part each" if cfg.hardware.world > 1 else "; with several processes ZeRO could split it"


def idle(cfg: TrainConfig, rows: int) -> list[tuple[str, str]]:
    """Says that processes get no rows."""
    world, batch = cfg.hardware.world, min(cfg.train.batch_size, rows)
    if batch >= world or cfg.source.kind != "offline":
        return []
    return [("idle", f"a step has {batch} rows for {world} processes: {world - batch} of them only compute fillers. "
                     f"Set train.batch_size={world} or a multiple of it")]


def communication_lines(cfg: TrainConfig, sent: dict[str, float], seconds: float | None) -> list[str]:
    """What a process sends in a step, and how long that takes over links that reach their data sheet."""
    if not sent:
        return []
    total, found = sum(sent.values()), bandwidth(cfg.hardware)
    lines = ["communication per process and step", *table([(name, _gb(size)) for name, size in sent.items()], "  ")]
    if found is None:
        return [*lines, f"  {_gb(total)} in all; how long that takes depends on links that are not known here"]
    speed, where = found
    share = f", beside {_time(seconds)} of computing, which hides what overlaps with it" if seconds else ""
    return [*lines, f"  {_gb(total)} in all: {_time(total / speed)} at {speed / 1e9:.0f} GB/s ({where}, data sheet){share}"]


def deepspeed_lines(cfg: TrainConfig) -> list[str]:
    """The DeepSpeed JSON of the run."""
    if not cfg.hardware.zero:
        return []
    merged = f", with {cfg.hardware.deepspeed} merged over it" if cfg.hardware.deepspeed else ""
    return [f"DeepSpeed's JSON, generated from hardware={cfg.hardware.name}{merged}", json.dumps(deepspeed_json(cfg), indent=2)]


def _work_lines(plan: Plan) -> list[str]:
    work, mfu = plan.work, plan.cfg.hardware.mfu
    rows = [
        ("ideal", f"{_flops(work.useful)} (prompts once, no padding, nothing computed again, no reference)"),
        ("executed", f"{_flops(work.executed)}, {work.executed / work.useful:.2f} times the ideal" if work.useful else "0"),
        ("padding", f"{100 * (1 - work.tokens / work.slots):.1f} % of the positions that are computed"),
        ("sharing prompts", f"with a prompt for each reply the ideal would be {plan.unshared / work.useful:.2f} times as much"),
        ("not as padded rows", f"one for each reply, they would execute {plan.padded / work.executed:.2f} times as much"),
    ]
    each = plan.scoring / plan.steps
    if plan.reference == "stored":
        rows.append(("reference store", f"a live reference would execute {(work.executed + each) / work.executed:.2f} times as much; "
                                        "filling the store takes one forward pass over the rows"))
    elif plan.reference != "none":
        rows.append(("reference store", f"would take {100 * each / work.executed:.0f} % off, after one forward pass over the rows"))
    lines = ["FLOPs per step", *table(rows, "  "), ""]
    if plan.seconds is None:
        lines.append("time: the peak of that GPU is not known here; set hardware.peak_tflops=... (H100 and H200: 989, A100: 312 in bf16)")
    else:
        useful = mfu * work.useful / max(work.executed, 1.0)
        lines.append(f"time: {_time(plan.seconds)} per step, {_time(plan.seconds * plan.steps)} for {plan.steps:,} steps, at "
                     f"{100 * mfu:.0f} % (hardware.mfu) of {plan.peak / 1e12:.4g} TFLOP/s ({plan.peak_from}); useful MFU "
                     f"{100 * useful:.0f} %. Evaluations come on top.")
    disk = ", ".join(f"{name} {_gb(size)}" for name, size in plan.disk.items())
    return [*lines, f"disk: {disk}"]


def out_of_memory(run: Run, error: BaseException) -> str | None:
    """Plan against fact, if `error` says that memory ran out."""
    if not (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)):
        return None
    held = peak_memory(run.engine.accelerator.device)
    said = f"memory ran out ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__}). At most {_gb(held)} were held."
    if not hasattr(run.engine.policy, "inner"):
        return f"{said} prefopt plan, with the same words, says what would take less." if run.cfg.model.kind == "diffusion" else said
    try:
        plan = estimate(run.cfg, ground_of_run(run))
        found = mend(tighter(plan, held))
    except (UserError, RuntimeError, MemoryError) as failed:  # there may be too little memory left to think
        return f"{said} The plan cannot be made any more ({type(failed).__name__})."
    change = f"What would take less: {found[0]} ({_gb(found[1].memory.peak)})." if found else \
        "No change of checkpointing, micro-batch, adapter or ZeRO takes less."
    return "\n".join([said, f"The plan was {_gb(plan.memory.peak)}:", *memory_lines(plan.memory, run.cfg), change])


def tighter(plan: Plan, held: float) -> Plan:
    """The plan on a machine with as much memory as could be had, or as the plan itself needs, whichever is less."""
    limit = min(held, plan.capacity or held, 0.999 * plan.memory.peak)
    hardware = replace(plan.cfg.hardware, memory_gb=limit * plan.cfg.hardware.processes / 1e9)
    return replace(plan, cfg=replace(plan.cfg, hardware=hardware), capacity=limit)


# ---- units ---------------------------------------------------------------------------------------------


def _gb(value: float) -> str:
    return f"{value / 1e9:,.1f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB" if value >= 1e5 else f"{value / 1e3:,.1f} kB"


def _flops(value: float) -> str:
    power, name = next(((p, n) for p, n in ((15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP")) if value >= 10**p), (6, "MFLOP"))
    return f"{value / 10**power:,.3g} {name}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.2g} s" if seconds < 10 else f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _mean(values: list[Any]) -> str:
    return f"{sum(values) / max(len(values), 1):,.0f}"
