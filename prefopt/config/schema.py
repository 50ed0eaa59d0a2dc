"""The typed shape of every config: unknown keys fail, wrong types fail. Comments on keys live in `conf/`.

Plain dataclasses on purpose (OmegaConf makes frozen ones read-only). Imports neither torch nor Hydra.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Optional

from prefopt.config import noise, trajectory
from prefopt.config.noise import NoiseConfig
from prefopt.config.trajectory import TrajectoryConfig

REQUIRED = "???"


@dataclass
class LoraConfig:
    enabled: bool = False
    learning_rate: float = 5e-6
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = "all-linear"
    adapter: Optional[str] = None


@dataclass
class ModelConfig:
    name: str = REQUIRED
    kind: str = "causal_lm"  # causal_lm | diffusion | tabular
    path: Optional[str] = None
    revision: Optional[str] = None
    gguf_file: Optional[str] = None
    wheel: Optional[str] = None
    start: Optional[str] = None
    chat_template: Optional[str] = None
    thinking: bool = False
    learning_rate: float = 5e-7
    micro_batch_tokens: int = 4096
    attention: str = "auto"  # auto | varlen | flex | sdpa | eager | flash_attention_2
    dropout: float = 0.0
    gradient_checkpointing: bool = False
    recompute: str = "all"  # all | cheap
    share_prompts: bool = True
    fused_head: bool = True
    compile: bool = False
    quantize: Optional[str] = None  # 4bit
    resolution: Optional[int] = None
    latent: Optional[list[int]] = None  # channels, pixels per latent
    guidance: float = 1.0
    max_sequence_length: Optional[int] = None
    channels_last: bool = False
    user_width: Optional[int] = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def recomputed(self) -> str:
        """What the backward pass computes again: nothing (""), all or cheap."""
        return self.recompute if self.gradient_checkpointing else ""

    @property
    def frozen(self) -> bool:
        """Whether an adapter is trained (LoRA, or the attention to users) and all other weights stay as they are."""
        return self.lora.enabled or self.user_width is not None

    @property
    def adapter(self) -> Optional[str]:
        """The folder or file that the adapter comes from; None: it is a fresh one, which changes nothing yet."""
        return self.lora.adapter if self.user_width is None else self.start


@dataclass
class ColumnsConfig:
    prompt: Optional[str] = "prompt"
    chosen: Optional[str] = "chosen"
    rejected: Optional[str] = "rejected"
    completion: Optional[str] = "completion"
    completions: Optional[str] = "completions"
    messages: Optional[str] = "messages"
    scores: Optional[str] = "scores"
    ranks: Optional[str] = "ranks"
    label: Optional[str] = "label"
    weight: Optional[str] = "weight"
    margin: Optional[str] = "margin"
    rationale: Optional[str] = "rationale"
    user: Optional[str] = "user"
    chosen_score: Optional[str] = "chosen_score"
    rejected_score: Optional[str] = "rejected_score"
    chosen_logp: Optional[str] = None
    rejected_logp: Optional[str] = None


@dataclass
class DataConfig:
    name: str = REQUIRED
    source: str = REQUIRED  # tiny_feedback | tiny_pictures | bandit | hub | files | picture_folders | emoji
    path: Optional[str] = None
    subset: Optional[str] = None
    revision: Optional[str] = None
    train: Optional[str] = None
    eval: Optional[str] = None
    rows: Optional[str] = None  # a key of prefopt.data.known.ROWS or prefopt.data.picture_sources.ROWS
    pictures: bool = False
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    limit: Optional[int] = None
    eval_limit: Optional[int] = 256
    eval_fraction: float = 0.05
    on_bad_row: str = "stop"  # stop | skip
    render: str = "auto"  # auto | chat | text
    max_prompt_tokens: Optional[int] = None
    max_completion_tokens: Optional[int] = None
    on_long_prompt: str = "stop"  # stop | keep_end
    pairs: str = "best_worst"  # best_worst | all
    label_noise: float = 0.0
    length_bias: float = 0.0
    completions: Optional[int] = None
    buckets: Optional[int] = None
    flip: bool = False
    min_size: Optional[int] = None
    latents: str = "fp32"  # fp32 | fp16
    users: Optional[str] = None
    transforms: dict[str, Any] = field(default_factory=dict)  # name -> settings; see prefopt.data.transforms


@dataclass
class SlurmConfig:
    partition: Optional[str] = None
    account: Optional[str] = None
    time: str = "24:00:00"
    grace: int = 180
    options: list[str] = field(default_factory=list)


@dataclass
class HardwareConfig:
    name: str = REQUIRED
    device: str = "auto"  # auto | cpu | cuda | mps
    nodes: int = 1
    processes: int = 1
    precision: str = "fp32"  # fp32 | bf16
    zero: int = 0  # 0 | 1 | 2 | 3
    offload: str = "none"  # none | optimizer | all
    deepspeed: Optional[str] = None
    launcher: str = "local"  # local | ssh | slurm
    hostfile: Optional[str] = None
    rendezvous: Optional[str] = None
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    timeout: float = 1800.0
    threads: Optional[int] = None
    memory_gb: Optional[float] = None
    peak_tflops: Optional[float] = None
    mfu: float = 0.4

    @property
    def world(self) -> int:
        """Processes on all machines."""
        return self.nodes * self.processes


@dataclass
class TrackerConfig:
    mode: str = "off"  # online | offline | off
    tensorboard: bool = False
    project: str = "prefopt"
    entity: Optional[str] = None
    group: Optional[str] = None
    init_timeout: float = 20.0


@dataclass
class RewardConfig:
    kind: str = "auto"  # auto | none | model | followup | one of PICTURE_REWARDS
    path: Optional[str] = None
    photos: Optional[str] = None
    likeness: float = 0.0


@dataclass
class SamplerConfig:
    temperature: float = 1.0
    top_p: float = 1.0
    beams: int = 1
    max_new_tokens: int = 64
    batch_size: int = 64
    steps: int = 20
    guidance: Optional[float] = None
    negative: Optional[str] = None  # none | policy | a folder


@dataclass
class SourceConfig:
    kind: str = "offline"  # offline | rounds | rollout | trajectories
    writer: str = "policy"  # policy | reference
    prompts: int = 32
    samples: int = 2
    keep: Optional[int] = None
    rejection_beta: float = 0.5
    epochs: int = 1
    labels: str = "best"  # best | sampled | soft | given
    extrapolate: float = 0.0
    partner: str = "sample"  # sample | given
    judge: str = "reward"  # reward | policy
    mix: float = 1.0
    top: float = 1.0
    guidance: Optional[float] = None


@dataclass
class ReferenceConfig:
    policy: str = "initial"  # initial | base
    refresh: str = "never"  # never | round | stage | steps | past
    every: int = 512
    mix: float = 1.0
    store: str = "auto"  # auto | on | off
    store_limit_gb: Optional[float] = 20.0


@dataclass
class TeacherConfig:
    path: Optional[str] = None
    reverse: Optional[str] = None


@dataclass
class OptimConfig:
    lr: float = 5e-7
    schedule: str = "cosine"  # constant | linear | cosine
    warmup: float = 0.1
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass
class LoopConfig:
    batch_size: int = 32
    epochs: float = 1.0
    steps: Optional[int] = None
    micro_batch_tokens: int = 4096
    log_every: int = 1
    eval_every: Optional[int] = None
    save_every: Optional[int] = None
    keep_checkpoints: int = 2
    keep_best: Optional[str] = None
    ema: Optional[float] = None
    max_skipped_steps: int = 5
    self_check: bool = True


@dataclass
class EvaluationConfig:
    prompts: int = 128
    kl: bool = True
    rewards: list[str] = field(default_factory=list)  # KIND or KIND:PATH


@dataclass
class TrustConfig:
    remote_code: bool = False
    paths: bool = False
    packages: list[str] = field(default_factory=list)


@dataclass
class TrainConfig:
    algo: dict[str, Any] = REQUIRED  # type: ignore[assignment]
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    stages: dict[str, Any] = field(default_factory=dict)  # name -> settings of a run that comes first; see prefopt.config.stages
    trust: TrustConfig = field(default_factory=TrustConfig)
    seed: int = 0
    resume: str = "auto"  # auto | never
    run_dir: str = REQUIRED


PICTURE_REWARDS = ("pickscore", "hpsv2", "imagereward", "clip", "aesthetic", "harmonic", "brisque")  # see prefopt.rewards.scorers

# Values a text key may take; anything else is refused at composition.
CHOICES: dict[str, tuple[str, ...]] = {
    "model.kind": ("causal_lm", "diffusion", "tabular"),
    "model.quantize": ("4bit",),
    "model.recompute": ("all", "cheap"),
    "model.attention": ("auto", "varlen", "flex", "sdpa", "eager", "flash_attention_2"),
    "data.source": ("tiny_feedback", "tiny_pictures", "bandit", "hub", "files", "picture_folders", "emoji"),
    "data.rows": ("helpsteer2", "hpdv2", "hpdv3", "hpdv3-soft", "imagereward", "nectar", "pickapic", "pickapic-soft", "pku-better",
                  "pku-safer", "shp", "ultrafeedback"),
    "data.latents": ("fp32", "fp16"),
    "data.on_bad_row": ("stop", "skip"),
    "data.render": ("auto", "chat", "text"),
    "data.on_long_prompt": ("stop", "keep_end"),
    "data.pairs": ("best_worst", "all"),
    "hardware.device": ("auto", "cpu", "cuda", "mps"),
    "hardware.offload": ("none", "optimizer", "all"),
    "hardware.launcher": ("local", "ssh", "slurm"),
    "hardware.precision": ("fp32", "bf16"),
    "tracker.mode": ("online", "offline", "off"),
    "reward.kind": ("auto", "none", "model", "followup", *PICTURE_REWARDS),
    "source.kind": ("offline", "rounds", "rollout", "trajectories"),
    "source.writer": ("policy", "reference"),
    "source.labels": ("best", "sampled", "soft", "given"),
    "source.partner": ("sample", "given"),
    "source.judge": ("reward", "policy"),
    **trajectory.CHOICES,
    **noise.CHOICES,
    "reference.policy": ("initial", "base"),
    "reference.refresh": ("never", "round", "stage", "steps", "past"),
    "reference.store": ("auto", "on", "off"),
    "optim.schedule": ("constant", "linear", "cosine"),
    "resume": ("auto", "never"),
    "split": ("train", "eval"),
    "labels": ("hard", "soft"),
}

# (key, test, what it must be): bounds that the types cannot say.
BOUNDS: tuple[tuple[str, str, str], ...] = (
    ("model.lora.learning_rate", "x > 0", "above 0"),
    ("model.lora.r", "x >= 1", "at least 1"),
    ("model.lora.dropout", "0 <= x < 1", "in [0, 1)"),
    ("model.dropout", "0 <= x < 1", "in [0, 1)"),
    ("model.learning_rate", "x > 0", "above 0"),
    ("model.micro_batch_tokens", "x >= 1", "at least 1"),
    ("model.guidance", "x >= 0", "0 or more"),
    ("model.max_sequence_length", "x is None or x >= 1", "at least 1 token, or null"),
    ("model.resolution", "x is None or x >= 8", "at least 8 pixels, or null"),
    ("model.user_width", "x is None or x >= 0", "at least 1, or null"),
    ("model.latent", "x is None or (len(x) == 2 and all(n >= 1 for n in x))", "[channels, pixels per latent], or null"),
    ("data.limit", "x is None or x >= 1", "at least 1, or null"),
    ("data.eval_limit", "x is None or x >= 1", "at least 1, or null"),
    ("data.eval_fraction", "0 <= x < 1", "in [0, 1)"),
    ("data.max_prompt_tokens", "x is None or x >= 1", "at least 1, or null"),
    ("data.max_completion_tokens", "x is None or x >= 1", "at least 1, or null"),
    ("data.label_noise", "0 <= x <= 0.5", "in [0, 0.5]"),
    ("data.completions", "x is None or x >= 2", "at least 2, or null"),
    ("data.buckets", "x is None or x >= 1", "at least 1, or null"),
    ("data.min_size", "x is None or x >= 1", "at least 1, or null"),
    ("reward.likeness", "0 <= x <= 1", "in [0, 1]"),
    ("source.prompts", "x >= 1", "at least 1"),
    ("source.samples", "x >= 1", "at least 1"),
    ("source.keep", "x is None or (x >= 2 and x % 2 == 0)", "at least 2 and even, or null: kept replies meet in pairs"),
    ("source.rejection_beta", "x >= 0", "0 or more"),
    ("source.epochs", "x >= 1", "at least 1"),
    ("source.extrapolate", "0 <= x < 1", "in [0, 1)"),
    ("source.mix", "0 <= x <= 1", "in [0, 1]"),
    ("source.top", "0 < x <= 1", "in (0, 1]"),
    *trajectory.BOUNDS,
    *noise.BOUNDS,
    ("hardware.nodes", "x >= 1", "at least 1"),
    ("hardware.processes", "x >= 1", "at least 1"),
    ("hardware.zero", "0 <= x <= 3", "in [0, 3]: a ZeRO stage, or 0 for plain data parallelism"),
    ("hardware.timeout", "x > 0", "above 0 seconds"),
    ("hardware.slurm.grace", "x >= 0", "0 or more seconds"),
    ("hardware.threads", "x is None or x >= 1", "at least 1, or null"),
    ("hardware.memory_gb", "x is None or x > 0", "above 0, or null"),
    ("hardware.peak_tflops", "x is None or x > 0", "above 0, or null"),
    ("hardware.mfu", "0 < x <= 1", "a share of the peak, in (0, 1]"),
    ("tracker.init_timeout", "x > 0", "above 0"),
    ("sampler.temperature", "x >= 0", "0 (greedy) or more"),
    ("sampler.top_p", "0 < x <= 1", "in (0, 1]"),
    ("sampler.beams", "x >= 1", "at least 1"),
    ("sampler.max_new_tokens", "x >= 1", "at least 1"),
    ("sampler.batch_size", "x >= 1", "at least 1"),
    ("sampler.steps", "x >= 1", "at least 1"),
    ("sampler.guidance", "x is None or x >= 0", "0 or more, or null"),
    ("reference.every", "x >= 1", "at least 1"),
    ("reference.mix", "0 < x <= 1", "a share, in (0, 1]"),
    ("reference.store_limit_gb", "x is None or x >= 0", "0 or more, or null"),
    ("optim.lr", "x > 0", "above 0"),
    ("optim.warmup", "0 <= x < 1", "a share of the steps, in [0, 1)"),
    ("optim.weight_decay", "x >= 0", "0 or more"),
    ("optim.eps", "x > 0", "above 0"),
    ("optim.betas", "len(x) == 2 and all(0 <= b < 1 for b in x)", "two numbers in [0, 1)"),
    ("optim.max_grad_norm", "x > 0", "above 0"),
    ("train.batch_size", "x >= 1", "at least 1"),
    ("train.epochs", "x > 0", "above 0"),
    ("train.steps", "x is None or x >= 1", "at least 1, or null"),
    ("train.micro_batch_tokens", "x >= 1", "at least 1"),
    ("train.log_every", "x >= 1", "at least 1"),
    ("train.eval_every", "x is None or x >= 1", "at least 1, or null"),
    ("train.save_every", "x is None or x >= 1", "at least 1, or null"),
    ("train.keep_checkpoints", "x >= 1", "at least 1"),
    ("train.ema", "x is None or 0 < x < 1", "in (0, 1), or null"),
    ("train.max_skipped_steps", "x >= 0", "0 or more"),
    ("evaluation.prompts", "x >= 0", "0 or more"),
    ("revise", "x >= 0", "0 or more"),
)


@dataclass
class EvalConfig:
    run: str = REQUIRED
    against: Optional[str] = None
    prompts: int = 256
    seed: int = 0
    tokens: bool = False
    output: Optional[str] = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass
class SampleConfig:
    run: str = REQUIRED
    prompt: Optional[str] = None
    user: Any = None  # a name or a list of numbers
    count: int = 4
    revise: int = 0
    seed: int = 0
    output: Optional[str] = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass
class DataCheckConfig:
    algo: dict[str, Any] = REQUIRED  # type: ignore[assignment]
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    trust: TrustConfig = field(default_factory=TrustConfig)
    example: int = 0
    sheet: Optional[str] = "contact-sheet.png"


@dataclass
class LabelConfig:
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    trust: TrustConfig = field(default_factory=TrustConfig)
    split: str = "train"  # train | eval
    labels: str = "hard"  # hard | soft
    output: str = REQUIRED


COMMANDS = {"train": TrainConfig, "plan": TrainConfig, "launch": TrainConfig, "eval": EvalConfig, "sample": SampleConfig,
            "data_check": DataCheckConfig, "label": LabelConfig}  # fmt: skip


def config_of(command: str) -> str:
    """The file in `conf/` that a command is composed from."""
    return "train" if command in ("plan", "launch") else command


def nested(f: Field) -> type | None:
    """The dataclass that a field holds, if it holds one."""
    return f.default_factory if f.default_factory is not MISSING and is_dataclass(f.default_factory) else None


def all_keys(schema: type, prefix: str = "") -> list[str]:
    """Full names of all keys of a dataclass tree."""
    out = []
    for f in fields(schema):
        block = nested(f)
        out += [prefix + f.name, *(all_keys(block, f"{prefix}{f.name}.") if block else ())]
    return out
