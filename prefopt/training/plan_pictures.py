"""`prefopt plan` of a run on pictures: from its config, its data and the configs of the pipeline. No weights and no pictures are read.

FLOPs are counted as the run counts them. Memory is that of a step on fake tensors, as for texts (`memory`), whatever the architecture; what
a micro-batch takes grows in proportion to it, so two small ones are run. Torch's tensors are counted: workspaces of convolutions are not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from prefopt.config.listing import table
from prefopt.config.schema import ModelConfig, TrainConfig
from prefopt.data.batch import Row
from prefopt.data.dataset import make_dataset, make_prompts
from prefopt.data.extra import captions_of
from prefopt.data.fits import VIEW_OF_KIND
from prefopt.data.pictures import name_of
from prefopt.data.records import Example, Message
from prefopt.data.sources import load_data
from prefopt.data.tokenise import Tokens
from prefopt.data.transforms import apply_transforms
from prefopt.errors import UserError
from prefopt.objectives.base import Objective
from prefopt.policies.denoiser_flops import DrawShape, caption_shapes, counted, low_rank, meta_denoiser
from prefopt.policies.known_configs import KnownPipeline, known_pipeline
from prefopt.policies.lora_export import add_lora
from prefopt.policies.noise import Draws, address
from prefopt.policies.pipeline import locate_pipeline
from prefopt.policies.pipeline_folder import NEEDED, PipelineFolder
from prefopt.policies.recompute import checkpoint_blocks
from prefopt.policies.user_branch import add_user_branch
from prefopt.training import memory, plan
from prefopt.training.memory import DryRun, Live, Memory
from prefopt.training.picture_rounds import asks_for_given
from prefopt.training.plan_encoders import numbers_of, vae_flops, vae_needs
from prefopt.training.plan_text import _flops, _gb, _time, communication_lines, deepspeed_lines, idle, machines, memory_lines, more_devices
from prefopt.training.plan_trajectories import Rounds, rounds_of
from prefopt.training.setup import make_objective
from prefopt.training.sharding import Layout, layout_of, traffic
from prefopt.training.source import OfflineSource
from prefopt.training.throughput import Effort, count, picture_kind

ENCODER_NUMBER = {"cpu": 4, "cuda": 2}  # bytes of a text encoder's weight under bf16: on a CPU they stay in fp32


@dataclass
class Scene:
    """What a plan stands on, whatever is then changed about memory. `wanted`: distinct pictures and captions that are encoded."""

    objective: Objective
    folder: PipelineFolder
    rows: list[Row]
    held_out: list[Row]
    pictures: int
    captions: int
    caption_numbers: int
    shape: DrawShape
    runtime: float  # bytes of the interpreter, its libraries and the rows
    vae: tuple[float, float, float]  # bytes of it, and of what encoding and decoding take beside
    texts: int  # weights of the text encoders
    rounds: Rounds | None = None  # of source=trajectories


@dataclass
class PicturePlan:
    """A run's costs. Work is of one step over all ranks, on average."""

    cfg: TrainConfig
    scene: Scene
    device: str
    reference: str
    steps: int
    draws: int  # in the largest micro-batch
    micros: int
    work: Effort
    slowest: float
    run: DryRun
    unknown: str  # why the activations are not known; empty where they are
    memory: Memory
    sent: dict[str, float]  # bytes that a process sends in a step, by purpose
    capacity: float | None
    peak: float | None
    peak_from: str
    disk: dict[str, float]
    drawn: float = 0.0  # FLOPs of drawing a round of trajectories and decoding it, over all ranks

    @property
    def seconds(self) -> float | None:
        """Of one step, at the assumed share of the peak."""
        return None if self.peak is None else self.slowest / (self.peak * self.cfg.hardware.mfu)

    @property
    def fits(self) -> bool | None:
        if self.capacity is None or (self.unknown and self.memory.peak <= self.capacity):
            return None
        return self.memory.peak <= self.capacity


def picture_plan_text(cfg: TrainConfig) -> str:
    """What `prefopt plan` prints. Raises `UserError` where a run could not start."""
    made = estimate(cfg, scene_of(cfg))
    parts = [[verdict(made)], table(_about(made), "  "), _memory(made), communication_lines(cfg, made.sent, made.seconds), _work(made),
             deepspeed_lines(cfg)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def scene_of(cfg: TrainConfig) -> Scene:
    """Reads configs and data."""
    objective, folder = make_objective(cfg.algo), folder_of(cfg.model)
    channels, factor = folder.latent
    if cfg.model.latent != [channels, factor]:
        raise UserError(f"model.latent={cfg.model.latent}: {folder.path} has [{channels},{factor}]")
    train, held_out = load_data(cfg.data, cfg.trust)
    apply_transforms((train, held_out), cfg.data, cfg.seed)  # as far as that needs no model
    draws, known = Draws(cfg.noise, cfg.seed), {"pictures": set(), "captions": {""}}

    def tokenise(example: Example, judged: bool = False) -> Tokens:
        """The same rows as those of the run, under made-up addresses: what pictures hold does not matter here."""
        names = [repr(sorted((name_of(c.picture), *c.picture.get("ops", ())))) for c in example.completions]
        texts = [c.text if c.text.strip() else example.prompt_text for c in example.completions]
        known["pictures"].update(names)
        known["captions"].update((*texts, example.prompt_text))
        group, numbers = address(*names, example.prompt_text), draws.numbers(judged)
        branches = [draws.branch(address(name), address(text), group, numbers) for name, text in zip(names, texts, strict=True)]
        return Tokens([address(example.prompt_text)], branches, 0, [0] * len(branches))

    def ids_of(prompt: list[Message], _: bool) -> list[int]:
        known["captions"].add(text := "\n".join(m.text for m in prompt))
        return [address(text)]

    view, stepwise = "pairs" if objective.view == "groups" else objective.view, cfg.source.kind == "trajectories"
    settings = (view, objective.columns, objective.mismatched, cfg.seed, iter, objective.extra)
    teaches = stepwise and cfg.trajectory.candidates and cfg.trajectory.scorer == "step_aware"  # the data's pairs, a scorer
    prompts = make_prompts(train, cfg.data, ids_of).rows if stepwise else []
    rows = prompts if stepwise and not teaches else make_dataset(train, cfg.data, tokenise, *settings).rows
    if len(rows) < objective.min_batch:
        raise UserError(f"{len(rows)} usable training rows; {type(objective).__name__} needs at least {objective.min_batch}")
    if cfg.source.kind == "rounds" and not asks_for_given(cfg.source):
        known["pictures"].clear()  # only their captions are read
    as_prompts = stepwise and not all(view in VIEW_OF_KIND[e.kind] for e in held_out.examples)
    judged = [] if as_prompts else make_dataset(held_out, cfg.data, lambda e: tokenise(e, True), *settings).rows
    for example in (*held_out.examples, *captions_of(held_out.examples, objective.extra)):
        tokenise(example, True)  # of held-out rankings all pictures are encoded: prefopt eval judges them whole
    denoiser = meta_denoiser(folder, cfg.model.resolution)
    numbers = sum(torch.Size(shape).numel() for shape in caption_shapes(denoiser).values())
    pictures = len(known["pictures"]) * (2 if cfg.data.flip else 1)
    shape = adapted(counted(denoiser, cfg.model.resolution), cfg.model, folder)
    texts = sum(numbers_of(folder, part) for part in folder.parts if part.startswith("text_encoder"))
    return Scene(objective, folder, prompts or rows, judged, pictures, len(known["captions"]), numbers, shape, memory.resident(),
                 vae_needs(folder, cfg.model.resolution), texts, rounds_of(cfg, len(prompts), denoiser.process))


def adapted(found: tuple[DrawShape, dict[str, float]], model: ModelConfig, folder: PipelineFolder) -> DrawShape:
    """The shape with the adapter that `model` asks for."""
    shape, places = found
    if not model.lora.enabled:
        return shape
    trained = {name: p for name, p in build(folder, model, "fp32").network.named_parameters() if p.requires_grad}
    return replace(shape, adapter=low_rank(trained, places))


def folder_of(model: ModelConfig) -> PipelineFolder:
    """The pipeline's folder, of which only the configs need be there; of some that are out of reach, what was published of them."""
    try:
        path = Path(locate_pipeline(model, weights=False).folder)
    except UserError:
        if known := known_pipeline(model.path, model.max_sequence_length):
            return known
        raise
    try:
        index = json.loads((path / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no model_index.json that can be read; it is not a folder of a diffusers pipeline") from error
    if (name := index.get("_class_name", "")) not in NEEDED:
        raise UserError(f"{path} is a {name or 'pipeline without a name'}, which prefopt does not know; it trains {', '.join(NEEDED)}")
    return PipelineFolder(path, name, index, model.max_sequence_length)


def estimate(cfg: TrainConfig, scene: Scene) -> PicturePlan:
    """The plan of a run."""
    device = torch.device("cuda" if cfg.hardware.device == "cuda" or (cfg.hardware.device == "auto" and torch.cuda.is_available())
                          else "cpu")
    objective, rounds = scene.objective, scene.rounds and replace(scene.rounds, cfg=cfg)
    rows = rounds.rows(objective.view) if rounds else scene.rows
    source = OfflineSource(rows, objective.view, len(rows) if rounds else cfg.train.batch_size, cfg.train.micro_batch_tokens, 0,
                           "label" in objective.columns, cfg.seed, 0, cfg.hardware.world, "draws", False,
                           draws=None if rounds else Draws(cfg.noise, cfg.seed))
    steps = rounds.total if rounds else plan._steps(cfg, source)
    source = replace(source, total=steps)
    reference = _reference(cfg, scene, source, steps)
    teachers = plan._teachers(cfg, objective) + objective.followed
    guided = rounds.guidance.blank_passes if rounds else 0
    kind = picture_kind(cfg.model, objective, scene.shape, (scene.shape,) * teachers, guided)
    kind = replace(kind, reference=kind.reference and reference != "stored")

    spread = [0] if rounds else plan.counted_steps(steps, source.world)
    work, slowest, draws, micros = Effort(), 0.0, 1, 1
    for step in spread:
        ranks = source.of_all_ranks(step)
        efforts = [count(mine, kind) for mine in ranks]
        work, slowest = sum(efforts, work), slowest + max(e.executed for e in efforts)
        draws = max([draws, *(int(m.trained.sum()) for mine in ranks for m in mine)])
        micros = max([micros, *(len(mine) for mine in ranks)])
    run, unknown = dry_run(scene.folder, cfg, draws)
    if guided:  # two predictions make one, of one call unless only one of them has a graph
        both = dry_run(scene.folder, cfg, 2 * draws)[0]
        run = both if guided == 2 else replace(run, scoring=both.scoring)
    layout = layout_of(cfg.hardware, plan.zero_settings(cfg))
    needs = _needs(cfg, scene, run, device.type, reference, micros, layout)
    sent = traffic(layout, run.weights, run.parameters, run.trainable, micros, plan.passes(kind, reference))
    has = cfg.hardware.memory_gb * 1e9 if cfg.hardware.memory_gb else memory.capacity(device.type)
    if has and device.type == "cpu":
        has /= cfg.hardware.processes
    share, drawn = 1 / len(spread), 0.0
    if rounds:
        drawn = rounds.drawing(scene.shape) + rounds.decoded * vae_flops(scene.folder, cfg.model.resolution, "decode")
    return PicturePlan(cfg, replace(scene, rounds=rounds), device.type, reference, steps, draws, micros,
                       Effort(*(share * x for x in vars(work).values())), slowest * share, run, unknown, needs, sent, has,
                       *plan._peak(cfg, device), _disk(cfg, scene, run, reference), drawn)


def _reference(cfg: TrainConfig, scene: Scene, source: OfflineSource, steps: int) -> str:
    """How the objective gets its reference's scores, with a store that is empty."""
    if not cfg.noise.pool:  # new draws at each visit: nothing can be kept
        cfg = replace(cfg, reference=replace(cfg.reference, store="off"))
    found = plan._reference(cfg, scene, source, steps)
    return "frozen copy" if found == "second adapter" else found


# ---- memory --------------------------------------------------------------------------------------------


def _needs(cfg: TrainConfig, scene: Scene, run: DryRun, device: str, reference: str, micros: int, layout: Layout) -> Memory:
    """The parts of a process. VAE and text encoders are there while rows are encoded, and the VAE stays once pictures were sampled."""
    vae, encoding, decoding = scene.vae
    rounds = scene.rounds and replace(scene.rounds, cfg=cfg)
    sampled = bool(cfg.evaluation.prompts or rounds)
    reloads = cfg.evaluation.kl and not cfg.model.frozen and cfg.reference.refresh == "never" and reference != "frozen copy"
    runtime = (memory.GPU_RUNTIME if device == "cuda" else scene.runtime) + vae * sampled
    needs = memory.memory(
        run, device=device, layout=layout, micros=micros, reloads=reloads, runtime=runtime,
        frozen_copies=plan._copies(cfg, scene.objective, reference), cache=decoding if sampled else 0.0,
    )
    number = ENCODER_NUMBER[device] if cfg.hardware.precision == "bf16" else 4
    encoded = max(vae * (not sampled) + encoding, float(number * scene.texts))
    moments = {**needs.moments, "the encoding of pictures and captions": runtime + needs.weights + encoded}
    if rounds:
        called, kept = dry_run(scene.folder, cfg, rounds.at_once)[0].scoring, _latents(cfg, scene) * (device == "cpu")
        moments["the drawing of a round"] = runtime + needs.weights + needs.optimizer + needs.reference + max(called, decoding) + kept
    return replace(needs, moments=moments)


def _latents(cfg: TrainConfig, scene: Scene) -> float:
    """Bytes of what a round of trajectories keeps, on the CPU."""
    channels, factor = scene.folder.latent
    return 4.0 * scene.rounds.latents * channels * (cfg.model.resolution // factor) ** 2


def build(folder: PipelineFolder, model: ModelConfig, precision: str) -> Any:
    """The denoiser that a run would train, on the meta device."""
    denoiser = meta_denoiser(folder, model.resolution)
    if precision == "bf16" and model.frozen:
        denoiser.network.to(torch.bfloat16)
    if model.gradient_checkpointing:
        checkpoint_blocks(denoiser.network, model.recompute)
    if model.lora.enabled:
        with torch.device("meta"):
            add_lora(denoiser, replace(model.lora, adapter=None), 0)
    elif model.user_width is not None:
        add_user_branch(denoiser, model.user_width, 0)
    denoiser.network.train()
    return denoiser


def dry_run(folder: PipelineFolder, cfg: TrainConfig, draws: int) -> tuple[DryRun, str]:
    """(what a micro-batch of so many draws takes, why its activations are not known)."""
    precision = cfg.hardware.precision
    try:
        one, two = (_run(_Key(folder, cfg.model), precision, n) for n in (1, 2))
    except Exception as error:  # a code path that wants numbers
        network = build(folder, cfg.model, precision).network
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        return DryRun(weights, sum(p.numel() for p in network.parameters()), trained, 0.0, 0.0, 0.0), said
    more = {name: getattr(one, name) + (draws - 1) * max(getattr(two, name) - getattr(one, name), 0)
            for name in ("activations", "working", "scoring")}
    return replace(one, **more), ""


@dataclass(frozen=True)
class _Key:
    """A model in a cache: by its folder and its settings."""

    folder: PipelineFolder
    model: ModelConfig

    def __hash__(self) -> int:
        return hash((str(self.folder.path), str(self.model)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and (self.folder.path, self.model) == (other.folder.path, other.model)


@cache
def _run(key: _Key, precision: str, draws: int) -> DryRun:
    """A forward and a backward pass over so many draws, as the policy makes them, on fake tensors."""
    with memory._quiet():
        denoiser = build(key.folder, key.model, precision)
    network, side = denoiser.network, key.model.resolution // denoiser.factor
    with FakeTensorMode(), Live() as live, memory._quiet():
        memory._fake(network)
        held, trained = live.now, [p for p in network.parameters() if p.requires_grad]
        x, target = (torch.zeros(draws, denoiser.latent_channels, side, side) for _ in range(2))
        t = torch.zeros(draws) if denoiser.process.kind == "flow" else torch.zeros(draws, dtype=torch.long)
        cond = {name: torch.zeros(draws, *shape) for name, shape in caption_shapes(denoiser).items()}
        if key.model.user_width is not None:
            cond["user"] = torch.zeros(draws, 1, key.model.user_width)

        def score() -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
                prediction = denoiser.predict(x, t, cond).float()
            return (prediction - target).flatten(1).square().sum()

        with torch.no_grad():
            live.peak = live.now
            score()
            scoring = live.peak - held
        for parameter in trained:  # as from the second micro-batch on
            parameter.grad = torch.zeros_like(parameter)
        base = live.peak = live.now
        made = score()
        activations = live.now - base
        made.backward()
        numbers = sum(p.numel() for p in network.parameters()), sum(p.numel() for p in trained)
        return DryRun(held, *numbers, activations, live.peak - base - activations, scoring)


def _disk(cfg: TrainConfig, scene: Scene, run: DryRun, reference: str) -> dict[str, float]:
    """Bytes on disk by part. A checkpoint holds the trained weights and AdamW's moments in fp32; latents are a mean and a deviation."""
    number, (channels, factor), keep = 2 if cfg.data.latents == "fp16" else 4, scene.folder.latent, cfg.train.keep_checkpoints
    side = cfg.model.resolution // factor
    out = {f"checkpoints (the newest {keep})": 12 * run.trainable * keep, "final model": 4 * run.trainable,
           f"stored latents ({cfg.data.latents})": number * 2.0 * scene.pictures * channels * side * side,
           f"stored captions ({cfg.data.latents})": number * float(scene.captions) * scene.caption_numbers}
    if scene.rounds and scene.rounds.steps > 1:
        out["latents of a round"] = _latents(cfg, scene)
    if reference == "stored":
        out["reference store (shared)"] = sum(20 + 4.0 * b.trained for row in scene.rows + scene.held_out for b in row.edges("pairs"))
    return out


# ---- what would make it fit ------------------------------------------------------------------------------


def remedies(cfg: TrainConfig, widest: int) -> Iterator[tuple[str, TrainConfig]]:
    """Changes that take memory away, the least intrusive first; then several at once. `widest`: draws of a row."""
    def smaller(of: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
        draws = of.train.micro_batch_tokens // 2
        while draws >= max(widest, 1):
            yield f"train.micro_batch_tokens={draws}", replace(of, train=replace(of.train, micro_batch_tokens=draws))
            draws //= 2

    if cfg.reference.store == "off" and cfg.noise.pool and not cfg.model.frozen:
        yield "reference.store=auto", replace(cfg, reference=replace(cfg.reference, store="auto"))
    at_once = cfg.sampler.batch_size // 2
    while cfg.source.kind == "trajectories" and at_once:
        yield f"sampler.batch_size={at_once}", replace(cfg, sampler=replace(cfg.sampler, batch_size=at_once))
        at_once //= 2
    yield from plan.divided(cfg)
    yield from smaller(cfg)
    said, slim = "", cfg
    if not cfg.model.gradient_checkpointing:
        said, slim = "model.gradient_checkpointing=true", replace(cfg, model=replace(cfg.model, gradient_checkpointing=True))
        yield said, slim
        yield from ((f"{said} {name}", changed) for part in (plan.divided, smaller) for name, changed in part(slim))
    if not cfg.model.frozen:
        for name, of in (("adapter=lora", cfg), (f"adapter=lora {said}".strip(), slim)):
            small = replace(of, model=replace(of.model, lora=replace(of.model.lora, enabled=True)))
            yield name, small
            yield from ((f"{name} {more}", changed) for more, changed in smaller(small))


def mend(made: PicturePlan) -> tuple[str, PicturePlan] | None:
    """The first of the changes with which the run would fit, and its plan. A pool of draws, with which no copy of the model is needed,
    changes what is trained and is left to people."""
    rounds, view = made.scene.rounds, made.scene.objective.view
    widest = max(row.size(view, "draws")[1] for row in (rounds.rows(view) if rounds else made.scene.rows))
    widest = widest if rounds else widest * made.cfg.noise.draws // (made.cfg.noise.pool or made.cfg.noise.draws)
    for name, cfg in remedies(made.cfg, widest):
        if plan.possible(cfg) and (changed := estimate(cfg, made.scene)).fits:
            return name, changed
    return None


# ---- in words --------------------------------------------------------------------------------------------


def verdict(made: PicturePlan) -> str:
    """Whether it fits, and if not, what would make it fit."""
    needs, of, cfg = _gb(made.memory.peak), "GPU" if made.device == "cuda" else "process", made.cfg
    if made.unknown:
        return (f"needs more than {needs} per {of}: what activations take could not be measured on fake tensors ({made.unknown}), and is "
                "left out")
    if made.capacity is None:
        return f"needs {needs} per {of}; there is no GPU here to compare with (hardware.memory_gb=... says what there will be)"
    if made.fits:
        return f"fits: {needs} of {_gb(made.capacity)} per {of}"
    said = f"does not fit: {needs} of {_gb(made.capacity)} per {of}"
    if (found := mend(made)) is None:
        return f"{said}; no change of checkpointing, micro-batch, adapter or ZeRO would make it fit{more_devices(cfg)}"
    return f"{said}; it would with {found[0]} ({_gb(found[1].memory.peak)})"


def _about(made: PicturePlan) -> list[tuple[str, str]]:
    cfg, scene, noise, rounds = made.cfg, made.scene, made.cfg.noise, made.scene.rounds
    pool = f"a pool of {noise.pool} for each row" if noise.pool else "new ones at each visit of a row"
    what, unit, size = "transitions" if rounds else "pictures", "prompts" if rounds else "rows", cfg.train.batch_size
    return [
        ("run", f"algo={cfg.algo.get('name', '')} model={cfg.model.name} data={cfg.data.name} {machines(cfg)}"),
        *([("assumed", f"the files of {cfg.model.path} are out of reach: its published sizes are used")]
          if isinstance(scene.folder, KnownPipeline) else []),
        ("model", f"{made.run.parameters / 1e6:,.2f} M parameters, {made.run.trainable / 1e6:,.2f} M trained "
                  f"({100 * made.run.trainable / made.run.parameters:.3g} %), {cfg.model.resolution} pixels a side"),
        ("data", f"{len(scene.rows):,} {unit}; {scene.pictures:,} pictures and {scene.captions:,} captions to encode, once"),
        *(rounds.about() if rounds else []),
        ("steps", f"{made.steps:,} of {min(size, cfg.source.prompts) if rounds else size} {unit}; {made.work.tokens:,.0f} {what} each; "
                  f"micro-batches per process: at most {made.micros}, of at most {made.draws} {what}"),
        *idle(cfg, len(scene.rows)),
        *([] if rounds else [("noise", f"{noise.draws} draw{'s' if noise.draws > 1 else ''} a visit, {pool}")]),
        ("reference", {"stored": "computed once and stored", "none": "none is read"}.get(made.reference, made.reference)),
        *([("sampled", "drawing the pictures of a round and judging them is not counted")] if cfg.source.kind == "rounds" else []),
    ]


def _memory(made: PicturePlan) -> list[str]:
    lines = memory_lines(made.memory, made.cfg, "what comes and goes within a step")
    if made.unknown:
        return [line for line in lines if not line.strip().startswith(("activations", "what comes"))]
    return [*lines, "  torch's own tensors are counted; workspaces of convolutions are not"]


def _work(made: PicturePlan) -> list[str]:
    work, mfu, cfg, rounds = made.work, made.cfg.hardware.mfu, made.cfg, made.scene.rounds
    rows = [("one picture", f"{_flops(made.scene.shape.forward(1))} forward"),
            ("ideal", f"{_flops(work.useful)} (nothing computed again, no reference)"),
            ("executed", f"{_flops(work.executed)}, {work.executed / work.useful:.2f} times the ideal" if work.useful else "0")]
    if made.reference not in ("stored", "none"):
        live = work.tokens * made.scene.shape.forward(1 + (rounds is not None and rounds.guidance.on), adapted=False)
        rows.append(("reference", f"{100 * live / work.executed:.0f} % of that"
                                  f"{'' if rounds else '; noise=pool would compute it once and keep it'}"))
    lines = ["FLOPs per step", *table(rows, "  "), ""]
    if rounds:
        whole = made.drawn + rounds.steps * work.executed
        found = [("drawing", f"{_flops(made.drawn)}, {100 * made.drawn / whole:.0f} % of the round: {rounds.pictures:,} pictures, "
                             f"{rounds.calls} forward passes each, and {rounds.decoded:,} decoded"),
                 ("steps", f"{_flops(rounds.steps * work.executed)}"), ("all", _flops(whole))]
        lines += ["FLOPs per round (the reward is not counted)", *table(found, "  "), ""]
    encoding = vae_flops(made.scene.folder, cfg.model.resolution, "encode") * made.scene.pictures
    if made.peak is None:
        lines.append("time: the peak of that GPU is not known here; set hardware.peak_tflops=... (H100 and H200: 989, A100: 312 in bf16)")
    else:
        rate, seconds = made.peak * mfu * cfg.hardware.world, made.seconds
        once, total = f"{_time(seconds)} per step", seconds * made.steps
        if rounds:
            total += made.drawn / rate * math.ceil(made.steps / rounds.steps)
            once = f"{_time(made.drawn / rate + rounds.steps * seconds)} per round, {_time(made.drawn / rate)} of it drawing"
        lines.append(f"time: {once}, {_time(total)} for {made.steps:,} steps, at {100 * mfu:.0f} % "
                     f"(hardware.mfu) of {made.peak / 1e12:.4g} TFLOP/s ({made.peak_from}). Evaluations come on top, and once "
                     f"{_time(encoding / rate)} for the VAE to encode the pictures ({_flops(encoding)}) and what the captions take.")
    return [*lines, "disk: " + ", ".join(f"{name} {_gb(size)}" for name, size in made.disk.items())]
