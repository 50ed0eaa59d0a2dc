"""`prefopt plan`: what a composed run will take and how long, from its config and its data alone. No weights are read.

Micro-batches are cut from the real rows as the run would cut them, FLOPs are counted as the run counts them (`throughput`), and memory is
that of a step on fake tensors (`memory`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from prefopt.config.hardware import check_hardware
from prefopt.config.objective_source import read_objective
from prefopt.config.schema import TrainConfig
from prefopt.data.batch import MicroBatch, Row, split_step, step_rows
from prefopt.data.dataset import make_dataset, make_prompts
from prefopt.data.fits import VIEW_OF_KIND
from prefopt.data.sources import load_data
from prefopt.data.tokenise import Branch, Tokeniser, Tokens
from prefopt.data.transforms import apply_transforms, transform_lines
from prefopt.errors import UserError
from prefopt.objectives.base import Objective
from prefopt.policies import divergence, packed
from prefopt.policies.flops import ModelShape, shape_of
from prefopt.policies.known_configs import CHARACTERS, known_config, stand_in
from prefopt.policies.loading import context_of, load_config, load_tokeniser
from prefopt.policies.locate import locate
from prefopt.policies.teacher import live_teachers
from prefopt.training import memory
from prefopt.training.deepspeed_json import deepspeed_json
from prefopt.training.memory import Memory, Shape
from prefopt.training.online import round_rows
from prefopt.training.reference import evaluations, tree_tokens, visits
from prefopt.training.setup import Run, make_objective
from prefopt.training.sharding import layout_of, traffic
from prefopt.training.source import OfflineSource
from prefopt.training.throughput import Effort, StepKind, count, find_peak, head_products

COUNTED = 48  # steps, evenly spread over the run, whose FLOPs are counted; of large worlds fewer, at least three
LONGEST = 16  # rows whose steps are looked at for the largest micro-batch, beside those


@dataclass
class Ground:
    """What a plan stands on, whatever is then changed about memory."""

    objective: Objective
    rows: list[Row]
    held_out: list[Row]
    config: Any  # of transformers
    shape: ModelShape
    runtime: float  # bytes of the interpreter, its libraries and the rows
    tokeniser: Tokeniser
    transforms: Sequence[tuple[str, str]] = ()  # what data transforms did to the training rows
    assumed: str = ""  # what could not be read, and what is taken instead

    @property
    def reward(self) -> bool:
        return "reward" in self.objective.quantities["policy"]


@dataclass
class Plan:
    """A run's costs. Work is of one step over all ranks, on average; FLOPs count as in `throughput`."""

    cfg: TrainConfig
    ground: Ground
    device: str  # cpu or cuda
    kind: StepKind
    reference: str  # stored, adapter off, second adapter, frozen copy, none
    steps: int
    largest: Shape
    micros: int  # most micro-batches that a rank has in a step
    work: Effort
    slowest: float  # FLOPs executed by the rank that has most to do
    unshared: float  # useful FLOPs if every reply had a prompt of its own
    padded: float  # FLOPs executed if every reply were a padded row of its own
    scoring: float  # FLOPs to score every row once with the reference, over the whole run
    trainable: float
    memory: Memory
    sent: dict[str, float]  # bytes that a process sends in a step, by purpose
    capacity: float | None  # bytes of memory for one process
    peak: float | None  # FLOP/s of one device
    peak_from: str
    disk: dict[str, float]

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.memory.peak <= self.capacity

    @property
    def seconds(self) -> float | None:
        """Of one step, at the assumed share of the peak."""
        return None if self.peak is None else self.slowest / (self.peak * self.cfg.hardware.mfu)


def ground_of(cfg: TrainConfig) -> Ground:
    """Reads config, tokenizer and data. Raises `UserError` where a run could not start."""
    objective = make_objective(cfg.algo)
    tokeniser, config, assumed = _read(cfg)
    online, view = cfg.source.kind != "offline", "pairs" if objective.view == "groups" else objective.view
    train, held_out = load_data(cfg.data, cfg.trust)
    apply_transforms((train, held_out), cfg.data, cfg.seed)  # as far as that needs no model
    as_prompts = online and not all(view in VIEW_OF_KIND[e.kind] for e in held_out.examples)
    settings = (cfg.data, tokeniser, view, objective.columns, objective.mismatched, cfg.seed, iter, objective.extra)
    rows = make_prompts(train, cfg.data, tokeniser.prompt_ids).rows if online else make_dataset(train, *settings).rows
    if len(rows) < objective.min_batch:
        raise UserError(f"{len(rows)} usable training rows; {type(objective).__name__} needs at least {objective.min_batch}")
    judged = [] if as_prompts else make_dataset(held_out, *settings).rows
    return Ground(objective, [_answered(row, cfg, view) for row in rows] if online else rows, judged, config, shape_of(config),
                  memory.resident(), tokeniser, transform_lines(train), assumed)


def _read(cfg: TrainConfig) -> tuple[Tokeniser, Any, str]:
    """(tokeniser, config of transformers, what had to be assumed). A model out of reach is planned from its published config."""
    if cfg.model.path is None and cfg.model.name.startswith("tiny-lm"):
        from prefopt.policies.tiny_lm import model_config

        tokeniser = load_tokeniser(cfg.model, cfg.data, cfg.trust)
        return tokeniser, model_config(tokeniser.tokenizer), ""
    try:
        config = load_config(locate(cfg.model, weights=False), cfg.trust)
        return load_tokeniser(cfg.model, cfg.data, cfg.trust), config, ""
    except UserError:
        if (config := known_config(cfg.model.path)) is None:
            raise
    tokeniser = Tokeniser(stand_in(), cfg.data, context_of(config), "plain")
    return tokeniser, config, (f"the files of {cfg.model.path} are out of reach: its published sizes are used, and {CHARACTERS} characters "
                               "are taken as a token")


def ground_of_run(run: Run) -> Ground:
    """The same of a run that has been set up."""
    policy = run.engine.policy
    source = getattr(run.source, "batches", run.source)
    rows = source.rows or [_answered(row, run.cfg, run.engine.objective.view) for row in run.source.prompts.rows]
    held_out = run.judge.held_out.rows if run.judge.held_out else []
    return Ground(run.engine.objective, rows, held_out, policy.inner.config, shape_of(policy.inner.config), memory.LIBRARIES,
                  policy.tokeniser)


def _answered(row: Row, cfg: TrainConfig, view: str) -> Row:
    """A prompt with replies as long as they may get: an upper bound for what will be sampled."""
    groups = cfg.source.kind == "rollout"
    replies = (cfg.source.keep or cfg.source.samples) if groups or view == "ranking" or cfg.data.pairs == "all" else 2
    length = cfg.sampler.max_new_tokens
    branches = [Branch([0] * length, [True] * length, False) for _ in range(replies)]
    return Row(Tokens(row.tokens.prompt, branches), "pair", scores=[float(-i) for i in range(replies)])


def estimate(cfg: TrainConfig, ground: Ground) -> Plan:
    """The plan of a run."""
    device = torch.device("cuda" if cfg.hardware.device == "cuda" or (cfg.hardware.device == "auto" and torch.cuda.is_available())
                          else "cpu")
    kind, source = _laid_out(cfg, ground, device)
    steps = _steps(cfg, source)
    source = replace(source, total=steps)
    reference = _reference(cfg, ground, source, steps)
    kind = replace(kind, reference=kind.reference and reference != "stored")
    text = ground.config.get_text_config()

    spread = counted_steps(steps, source.world)
    work, slowest, unshared, padded = Effort(), 0.0, 0.0, 0.0
    rows = replace(source, layout="rows")
    for step in spread:
        per_rank = []
        for micros, plain in zip(source.of_all_ranks(step), rows.of_all_ranks(step), strict=True):
            per_rank.append(count(micros, kind))
            unshared += count([_apart(m) for m in micros], kind).useful
            padded += count(plain, replace(kind, layout="rows", shared=False)).executed
        work = sum(per_rank, work)
        slowest += max(e.executed for e in per_rank)
    share = 1 / len(spread)

    longest = sorted(range(len(source.rows)), key=lambda r: -tree_tokens(source.rows[r]))[:LONGEST]
    seen = {*spread, *_steps_of(longest, source, steps)}
    parts = [list(_parts(source, step)) for step in sorted(seen)]
    shapes = [_shape(source, part, kind) for ranks in parts for micros in ranks for part in micros if part]
    largest = max(shapes, key=lambda s: s.rows * s.width * (1 + s.width / 4096))
    most = max(len(micros) for ranks in parts for micros in ranks)

    lora = cfg.model.lora.enabled
    attention = kind.attention if kind.attention in ("sdpa", "eager") else "sdpa"  # packed kernels keep what flash attention keeps
    run = _dry_run(_Key(ground.config, cfg.model), cfg.hardware.precision, ground.reward, attention, largest, device.type)
    run = replace(run, working=run.working + _comparing(kind, largest, device.type))
    online = cfg.source.kind != "offline"
    reloads = cfg.evaluation.kl and not ground.reward and not (lora or cfg.reference.refresh != "never") and reference != "frozen copy"
    runtime = memory.GPU_RUNTIME if device.type == "cuda" else ground.runtime
    sampled = 0 if ground.reward or not (online or cfg.evaluation.prompts) else cfg.sampler.batch_size
    layout = layout_of(cfg.hardware, zero_settings(cfg))
    needs = memory.memory(
        run, device=device.type, layout=layout, micros=most, reloads=reloads,
        frozen_copies=_copies(cfg, ground.objective, reference), cache=_cache(cfg, text, ground, sampled),
        runtime=runtime, quantised=ground.shape.body if cfg.model.quantize else 0.0, block=memory.block_of(run, ground.shape),
    )
    has = cfg.hardware.memory_gb * 1e9 if cfg.hardware.memory_gb else memory.capacity(device.type)
    if has and device.type == "cpu":
        has /= cfg.hardware.processes
    peak, peak_from = _peak(cfg, device)
    scoring = sum(count([m], replace(kind, reference=True)).executed - count([m], replace(kind, reference=False)).executed
                  for step in spread for micros in source.of_all_ranks(step) for m in micros)
    return Plan(
        cfg, ground, device.type, kind, reference, steps, largest, most, Effort(*(share * x for x in vars(work).values())), slowest * share,
        unshared * share, padded * share, scoring * share * steps, run.trainable, needs,
        traffic(layout, run.weights, run.parameters, run.trainable, most, passes(kind, reference)), has, peak, peak_from,
        _disk(cfg, run, source, steps, reference, ground),
    )


# ---- parts of it ---------------------------------------------------------------------------------------


def _laid_out(cfg: TrainConfig, ground: Ground, device: torch.device) -> tuple[StepKind, OfflineSource]:
    """How the run would lay its micro-batches out, and the source that cuts them."""
    model, text, objective = cfg.model, ground.config.get_text_config(), ground.objective
    if device.type == "cuda" and not torch.cuda.is_available():  # a plan for another machine
        capped = getattr(text, "attn_logit_softcapping", None)
        usual = "flex" if capped else "varlen"
        packs = model.attention == "auto" and cfg.hardware.precision == "bf16" and not model.dropout
        kernel = model.attention if model.attention in packed.KERNELS else usual if packs else None
    else:
        kernel = packed.packed_kernel(text, model.attention, device, cfg.hardware.precision, model.dropout)
    fused = model.fused_head and not ground.reward
    branches = fused or ground.reward
    shared = branches and model.share_prompts
    layout = "packed" if kernel and branches else "trees" if shared else "rows"
    attention = kernel if layout == "packed" else packed.plain_attention(text, model.attention)
    kind = StepKind(
        shape=ground.shape, layout=layout, shared=shared, frozen=model.lora.enabled, scores=not ground.reward, fused=fused,
        recompute=model.recomputed, attention=attention, twice=objective.coupling == "global",
        reference="reference" in objective.quantities, compared=head_products(objective, model.lora.enabled, _teachers(cfg, objective)),
        teachers=(ground.shape,) * (_teachers(cfg, objective) + objective.followed), extra_scorers=objective.extra_scorers,
    )
    online = cfg.source.kind != "offline"
    size = min(cfg.train.batch_size, round_rows(cfg.source, objective.view, cfg.data.pairs)) if online else cfg.train.batch_size
    source = OfflineSource(ground.rows, objective.view, size, cfg.train.micro_batch_tokens, 0, "label" in objective.columns,
                           cfg.seed, 0, cfg.hardware.world, layout, shared)
    return kind, source


def counted_steps(steps: int, world: int) -> list[int]:
    """The steps whose work is counted, evenly spread over the run."""
    number = min(COUNTED, steps, max(3, 8 * COUNTED // world))
    return sorted({i * steps // number for i in range(number)})


def zero_settings(cfg: TrainConfig) -> dict[str, Any]:
    """What the DeepSpeed JSON of the run says of ZeRO; nothing without it."""
    return deepspeed_json(cfg)["zero_optimization"] if cfg.hardware.zero else {}


def passes(kind: StepKind, reference: str) -> int:
    """How often a micro-batch needs the policy's weights: forward, backward, to score a batch first, and as its own reference."""
    return 2 + kind.twice + (kind.reference and reference in ("adapter off", "second adapter"))


def _steps(cfg: TrainConfig, source: OfflineSource) -> int:
    if cfg.train.steps:
        return cfg.train.steps
    if cfg.source.kind == "offline":
        return source.steps(cfg.train.epochs)
    rounds = max(1, -(-int(cfg.train.epochs * len(source.rows)) // cfg.source.prompts))
    return rounds * cfg.source.epochs * -(-round_rows(cfg.source, source.view, cfg.data.pairs) // cfg.train.batch_size)


def _reference(cfg: TrainConfig, ground: Ground, source: OfflineSource, steps: int) -> str:
    """How the objective gets its reference's scores (`training/reference.py` decides the same way), with a store that is empty."""
    if "reference" not in ground.objective.quantities:
        return "none"
    model, settings = cfg.model, cfg.reference
    moves = settings.refresh != "never"
    if settings.store != "off" and cfg.source.kind == "offline" and not moves and "reference" not in ground.objective.states_of:
        often = visits(source, steps)
        once = sum(tree_tokens(row) for row, n in zip(source.rows, often, strict=True) if n)
        judged = sum(tree_tokens(row) for row in ground.held_out)
        live = sum(n * tree_tokens(row) for row, n in zip(source.rows, often, strict=True))
        if settings.store == "on" or not model.frozen or once + judged < live + evaluations(steps, cfg.train.eval_every) * judged:
            return "stored"
    if model.frozen and moves:
        return "second adapter"
    return "adapter off" if model.frozen and (settings.policy == "base" or not model.adapter) else "frozen copy"


def _steps_of(wanted: Sequence[int], source: OfflineSource, steps: int) -> Iterator[int]:
    """The steps in which the rows `wanted` come first, of those that come at all."""
    begin, size = 0, source.batch_size
    for rows, steps_here, seed in source.shares(steps):
        order = [rows[i] for i in step_rows(len(rows), len(rows), 0, seed)]
        places = [order.index(row) // size for row in set(wanted) & set(order)]
        yield from (begin + place for place in places if place < steps_here)
        begin += steps_here


def _copies(cfg: TrainConfig, objective: Objective, reference: str) -> int:
    """Models of the policy's size that stay in memory beside it: a frozen reference, where that moves the start for KL as well, moving
    averages (of the objective's or `train.ema`'s), the weights of the last round, teachers."""
    moves = cfg.reference.refresh != "never" and reference != "none"
    own = 0 if cfg.model.frozen else (
        len(objective.averages()) + (moves and cfg.evaluation.kl) + bool(cfg.source.extrapolate) + (cfg.train.ema is not None))
    return (reference == "frozen copy") + own + _teachers(cfg, objective)


def _comparing(kind: StepKind, shape: Shape, device: str) -> float:
    """Bytes that whole distributions take while they are compared: some ten arrays of a chunk's size in fp32, and the matrix of a teacher
    that is made of two heads."""
    if not kind.compared:
        return 0.0
    chunk = min(divergence.CHUNK[device], shape.scored * kind.shape.vocabulary)
    return 4.0 * (10 * chunk + (2 * kind.shape.head if len(kind.teachers) > 1 else 0))


def _teachers(cfg: TrainConfig, objective: Objective) -> int:
    """Frozen models beside the reference that stay in memory, each taken to be as large as the policy."""
    return live_teachers(objective, stored=cfg.reference.store != "off" and cfg.source.kind == "offline")


def _peak(cfg: TrainConfig, device: torch.device) -> tuple[float | None, str]:
    """(FLOP/s of one device, where the figure is from). None: the device is not here, and nothing says what it can do."""
    if cfg.hardware.peak_tflops:
        return cfg.hardware.peak_tflops * 1e12, "hardware.peak_tflops"
    if device.type == "cuda" and not torch.cuda.is_available():
        return None, ""
    return find_peak(cfg.hardware, device)


def _parts(source: OfflineSource, step: int) -> list[list[list[int]]]:
    chosen = source.chosen(step)
    return split_step(source.rows, chosen, source.view, source.budget, source.world, source.layout, source.share)


def _shape(source: OfflineSource, part: Sequence[int], kind: StepKind) -> Shape:
    rows = [source.rows[r] for r in part]
    if "policy" not in kind.extra_scorers:
        rows = [replace(row, extra=[]) for row in rows]
    trees = [tree for row in rows for tree in row.trees(source.view)]
    sizes = [row.size(source.view, source.layout, source.share) for row in rows]
    scored = sum(b.trained for tree in trees for b in tree.branches)
    width = max(length for _, length in sizes)
    if source.layout == "packed":
        return Shape(1, sum(n * length for n, length in sizes), scored, False)
    branching = source.layout == "trees" and any(len(tree.branches) > 1 for tree in trees)
    lengths = {len(tree.prompt) + len(b.ids) for tree in trees for b in tree.branches}
    if source.layout == "trees" and not branching:
        sizes = [row.size(source.view, "rows") for row in rows]
    start = min(len(row.tokens.prompt) for row in rows)
    count = sum(n for n, _ in sizes)
    return Shape(count, width, scored, branching or len(lengths) > 1, 0 if kind.fused or not kind.scores else width - start + 1)


def _apart(micro: MicroBatch) -> MicroBatch:
    """The same edges, each with a prompt of its own."""
    return replace(micro, tree=torch.arange(len(micro.tree)))


@dataclass(frozen=True)
class _Key:
    """A model in a cache: by its config's text and its settings."""

    config: Any
    model: Any

    def __hash__(self) -> int:
        return hash((str(self.config), str(self.model)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and hash(self) == hash(other)


@cache
def _dry_run(key: _Key, precision: str, reward: bool, attention: str, shape: Shape, device: str) -> memory.DryRun:
    return memory.dry_run(key.config, key.model, precision, reward, attention, shape, device)


def _cache(cfg: TrainConfig, text: Any, ground: Ground, batch: int) -> float:
    """Bytes of keys, values and logits while `batch` replies are sampled."""
    longest = max((len(row.tokens.prompt) for row in ground.held_out or ground.rows), default=0) + cfg.sampler.max_new_tokens
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    number = 2 if cfg.hardware.precision == "bf16" else 4
    return float(batch) * (2 * ground.shape.layers * width * longest * number + 12 * ground.shape.vocabulary)


def _disk(cfg: TrainConfig, run: memory.DryRun, source: OfflineSource, steps: int, reference: str, ground: Ground) -> dict[str, float]:
    """Bytes on disk by part. A checkpoint holds the trained weights and AdamW's moments, in fp32."""
    out = {f"checkpoints (the newest {cfg.train.keep_checkpoints})": 12 * run.trainable * cfg.train.keep_checkpoints,
           "final model": 4 * run.trainable if cfg.model.lora.enabled else run.weights}
    if reference == "stored":
        tokens = "token_logp" in ground.objective.quantities["reference"]
        often = visits(source, steps)
        rows = [row for row, n in zip(source.rows, often, strict=True) if n] + ground.held_out
        out["reference store (shared)"] = sum(20 + 4 * (b.trained if tokens else 1) for row in rows for b in row.edges("pairs"))
    return out


# ---- what would make it fit ------------------------------------------------------------------------------


def remedies(cfg: TrainConfig, ground: Ground) -> Iterator[tuple[str, TrainConfig]]:
    """Changes that take memory away, the least intrusive first; then several at once."""
    def model(**settings: Any) -> TrainConfig:
        return replace(cfg, model=replace(cfg.model, **settings))

    def budget(of: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
        longest = max(row.size(ground.objective.view, "rows")[1] for row in ground.rows)
        tokens = of.train.micro_batch_tokens // 2
        smallest = None
        while tokens >= min(longest, of.train.micro_batch_tokens // 2) > 0:
            smallest, tokens = tokens, tokens // 4
            yield f"train.micro_batch_tokens={smallest}", replace(of, train=replace(of.train, micro_batch_tokens=smallest))

    off = not cfg.model.gradient_checkpointing
    yield from divided(cfg)
    first = "model.gradient_checkpointing=true"
    if cfg.reference.store == "off" and cfg.source.kind == "offline" and not cfg.model.lora.enabled:
        yield "reference.store=auto", replace(cfg, reference=replace(cfg.reference, store="auto"))
    if not cfg.model.fused_head and not ground.reward:
        yield "model.fused_head=true", model(fused_head=True)
    if off:
        yield first, model(gradient_checkpointing=True)
    yield from budget(cfg)
    slim = model(gradient_checkpointing=True) if off else cfg
    if off:
        yield from ((f"{first} {name}", changed) for part in (divided, budget) for name, changed in part(slim))
    said = f"{first} " if off else ""
    for adapter, quantize in (("lora", None), ("qlora", "4bit")):
        if (cfg.model.lora.enabled and not quantize) or cfg.model.quantize:
            continue
        lora = replace(cfg.model.lora, enabled=True)
        if off:
            yield f"adapter={adapter}", model(lora=lora, quantize=quantize)
        small = replace(slim, model=replace(slim.model, lora=lora, quantize=quantize))
        yield f"adapter={adapter} {said}".strip(), small
        yield from ((f"adapter={adapter} {said}{name}", changed) for name, changed in budget(small))


def divided(cfg: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """More of the states split among processes, then kept in the CPU's memory. Results stay what they are."""
    hardware = cfg.hardware
    stages = [stage for stage in (1, 2, 3) if stage > hardware.zero] if hardware.world > 1 else []
    for stage in stages:
        yield f"hardware.zero={stage}", replace(cfg, hardware=replace(hardware, zero=stage))
    if hardware.device == "cpu" or hardware.world == 1 or hardware.offload == "all":
        return
    said = "" if hardware.zero == 3 else "hardware.zero=3 "
    for offload in ("optimizer", "all")[hardware.offload == "optimizer":]:
        yield f"{said}hardware.offload={offload}", replace(cfg, hardware=replace(hardware, zero=3, offload=offload))


def possible(cfg: TrainConfig) -> bool:
    """Whether the run can be divided as its hardware config says."""
    try:
        check_hardware(cfg, read_objective(cfg.algo["_target_"], cfg.trust.packages))
    except UserError:
        return False
    return True


def mend(plan: Plan) -> tuple[str, Plan] | None:
    """The first of the changes with which the run would fit, and its plan."""
    for name, cfg in remedies(plan.cfg, plan.ground):
        if possible(cfg) and (changed := estimate(cfg, plan.ground)).fits:
            return name, changed
    return None
