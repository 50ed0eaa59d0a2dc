"""How much memory a step takes, found by taking it without any numbers: on fake tensors, which have shapes and types but no storage.

The model is built from its config alone. A dispatch mode adds up the storages that are alive, as an allocator would, through a forward and
a backward pass over one micro-batch; so whatever the architecture, LoRA, autocast and gradient checkpointing keep alive is counted, and not
a formula's idea of it. Layers are alike: two depths are run and the rest is extrapolated.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prefopt.config.schema import ModelConfig
from prefopt.policies import logprob
from prefopt.policies.flops import ModelShape, layer_kinds
from prefopt.policies.head import head_of
from prefopt.policies.loading import add_lora
from prefopt.training.sharding import MOMENTS, NUMBER, Layout, states

FOURBIT = 0.516  # bytes of a weight in nf4 with doubly quantised scales: 4 + 8/64 + 32/(64 x 256) bits (arXiv 2305.14314, section 3)
LIBRARIES = 0.5e9  # bytes that a process has after its imports, where it cannot be told any more
GPU_RUNTIME = 0.6e9  # bytes that a CUDA context and the workspaces of its libraries take
# What the allocator holds beyond what is alive, as a share of what comes and goes within a step; docs/plan.md says how far off.
SLACK = {"cpu": 0.20, "cuda": 0.05}


@dataclass(frozen=True)
class Shape:
    """A micro-batch as it is computed: `rows` x `width` positions, of which `scored` predict a trained token. `masked`: attention gets a
    mask. `logits`: positions of each row whose logits are made all at once (0: in chunks).
    """

    rows: int
    width: int
    scored: int
    masked: bool
    logits: int = 0


@dataclass(frozen=True)
class DryRun:
    """What a forward and backward pass over one micro-batch of a model takes, in bytes; counts in numbers."""

    weights: float  # as they are stored
    parameters: float  # adapters included
    trainable: float
    activations: float  # alive when the forward pass is done
    working: float  # beyond them at the worst moment of the pass
    scoring: float  # a pass without gradients, at its worst moment


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by part; `peak` is that of the worst of `moments`. `host` is the CPU memory that offload takes."""

    runtime: float  # the interpreter, its libraries and the rows; on a GPU its context
    weights: float
    reference: float
    optimizer: float
    gradients: float
    activations: float
    working: float
    slack: float
    moments: dict[str, float]
    gathered: float = 0.0
    host: float = 0.0

    @property
    def peak(self) -> float:
        return max(self.moments.values())

    @property
    def worst(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive: `now`, and the most since `peak` was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def gone(_: Any) -> None:
            del self.seen[key]
            self.now -= size

        self.seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def dry_run(config: Any, cfg: ModelConfig, precision: str, reward: bool, attention: str, shape: Shape, device: str) -> DryRun:
    """For a model of this transformers config and `cfg`. `attention` is transformers' name of the kernel; `device` is cpu or cuda."""
    total = len(layer_kinds(config.get_text_config())[0])
    few, many = _depths(config.get_text_config(), total)
    if many >= total:
        return _at_depth(config, total, cfg, precision, reward, attention, shape, device)
    low, high = (astuple(_at_depth(config, n, cfg, precision, reward, attention, shape, device)) for n in (few, many))
    return DryRun(*(a + (b - a) * (total - few) / (many - few) for a, b in zip(low, high, strict=True)))


def _depths(config: Any, total: int) -> tuple[int, int]:
    """Two numbers of layers that hold every kind of layer in the right proportion."""
    kinds = layer_kinds(config)[0]
    period = next(n for n in range(1, total + 1) if all(kinds[i] == kinds[i % n] for i in range(total)))
    few = period * -(-2 // period)
    return few, 2 * few


def _at_depth(config: Any, layers: int, cfg: ModelConfig, precision: str, reward: bool, attention: str, shape: Shape,
              device: str) -> DryRun:
    with _quiet():
        model = build(_shallow(config, layers), cfg, precision, reward, attention)
    with FakeTensorMode(), Live() as live, _quiet(), _chunks_of(device):
        _fake(model)
        inner = model.get_base_model() if cfg.lora.enabled else model
        held, trained = live.now, [p for p in model.parameters() if p.requires_grad]

        def score() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
                return _score(model, inner, shape, reward)

        with torch.no_grad():
            live.peak = live.now
            score()
            scoring = live.peak - held
        for parameter in trained:  # as from the second micro-batch on
            parameter.grad = torch.zeros_like(parameter)
        base = live.peak = live.now
        made = score()
        activations = live.now - base
        made.sum().backward()
        return DryRun(
            held, sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained), activations,
            live.peak - base - activations, scoring,
        )


def build(config: Any, cfg: ModelConfig, precision: str, reward: bool, attention: str) -> nn.Module:
    """The model that a run would train, on the meta device: shapes and types only."""
    import transformers

    dtype = torch.bfloat16 if precision == "bf16" and cfg.lora.enabled else torch.float32
    auto = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(config, attn_implementation=attention, dtype=dtype)
        if cfg.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if cfg.lora.enabled:
            model = add_lora(model, replace(cfg, lora=_without_weights(cfg.lora)), 0, "SEQ_CLS" if reward else "CAUSAL_LM")
    return model.train()


def _fake(model: nn.Module) -> None:
    """Moves a model from the meta device to the CPU's fake tensors, on which autocast works. Tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                module._parameters[name] = made[id(p)]
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else torch.empty(b.shape, dtype=b.dtype)


def _without_weights(lora: Any) -> Any:
    """The settings of a saved adapter, to be made anew."""
    if not lora.adapter:
        return lora
    import json

    saved = json.loads((Path(lora.adapter).expanduser() / "adapter_config.json").read_text())
    targets = saved.get("target_modules") or "all-linear"
    return replace(lora, adapter=None, r=saved["r"], targets=targets if isinstance(targets, str) else ",".join(sorted(targets)))


def _shallow(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:layers]
    config.num_labels = 1
    return config


def _score(model: nn.Module, inner: nn.Module, shape: Shape, reward: bool) -> Tensor:
    """What the policy's forward pass makes of a micro-batch of this shape."""
    if not shape.masked and (text := inner.config.get_text_config())._attn_implementation == "sdpa":
        text._attn_implementation = inner.config._attn_implementation = _causal()  # transformers gives fake tensors a mask otherwise
    inputs: dict[str, Any] = {"input_ids": torch.zeros(shape.rows, shape.width, dtype=torch.long), "use_cache": False}
    if shape.masked:
        mask = torch.ones(shape.rows, 1, shape.width, shape.width, dtype=torch.bool)
        if inner.config.get_text_config()._attn_implementation == "eager":
            mask = torch.zeros(mask.shape)
        kinds = set(getattr(inner.config.get_text_config(), "layer_types", None) or ())
        inputs["attention_mask"] = mask if kinds <= {"full_attention"} else {
            kind: mask if kind == "full_attention" else mask.clone() for kind in sorted(kinds)}
        inputs["position_ids"] = torch.zeros(shape.rows, shape.width, dtype=torch.long)
    places = torch.zeros(shape.scored, dtype=torch.long)
    if reward:
        hidden = inner.base_model(**inputs).last_hidden_state[:, -1]
        return inner.score(hidden.float()).squeeze(-1)
    if shape.logits:
        logits = model(**inputs, logits_to_keep=shape.logits).logits.flatten(0, 1)[places].float()
        return logits.gather(-1, places[:, None]).squeeze(-1) - logits.logsumexp(-1)
    hidden = inner.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)[places]
    return logprob.token_logprobs(hidden, head_of(inner), places)


def _causal() -> str:
    """transformers' name for its sdpa attention under which it makes no mask."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("prefopt_causal", sdpa_attention_forward)
    return "prefopt_causal"


@contextlib.contextmanager
def _chunks_of(device: str) -> Iterator[None]:
    """Fake tensors say that they are on the CPU; chunks of logits shall be those of the device."""
    own = logprob.CHUNK["cpu"]
    logprob.CHUNK["cpu"] = logprob.CHUNK[device]
    try:
        yield
    finally:
        logprob.CHUNK["cpu"] = own


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def memory(run: DryRun, *, device: str, layout: Layout, micros: int, frozen_copies: int, reloads: bool, cache: float, runtime: float,
           quantised: float = 0.0, block: float | None = None) -> Memory:
    """Adds up the parts of a process.

    layout:      how states are split among processes.
    micros:      most micro-batches in a step; gradients are held through all but the first.
    frozen_copies: models that stay in memory beside the policy: a reference, teachers. `reloads`: one is loaded for each evaluation.
    cache:       bytes that sampling takes (keys and values, logits). `quantised`: weights stored in 4 bits, in numbers.
    block:       bytes of the largest part of a model that is split while it is read, and gathered part by part (`policies/split.py`); None
                 for models that are whole when they are read.
    """
    weights = run.weights - quantised * ((2 if run.weights < 3 * run.parameters else 4) - FOURBIT)
    held = states(layout, weights, run.parameters, run.trainable)
    together = layout.stage == 3 and block is not None
    copy = weights / layout.world if together else weights  # of a second model
    at_a_time = max(held.gathered, 2 * block) if together else held.gathered  # what all have sent, and weights made of it
    reference = frozen_copies * copy
    base = runtime + held.weights + held.optimizer + reference
    whole = NUMBER * run.trainable  # gradients as backward passes leave them
    working = max(run.working, run.scoring) if frozen_copies else run.working
    if layout.stage == 0:
        kept, at_update = whole if micros > 1 else 0.0, whole + held.buckets
    else:
        at_update = whole / layout.world if layout.offload == "none" else 0.0
        # With one micro-batch stage 1 sends gradients as they come, too, and keeps its part.
        kept = held.gradients if layout.stage > 1 or micros > 1 else at_update
    slack = SLACK[device] * (run.activations + working + kept)
    moments = {
        "a backward pass": base + held.buckets + kept + held.gathered + run.activations + working + slack,
        "an update of the weights": base + at_update,  # the fused AdamW makes no tensors
        "an evaluation": base + (copy if reloads else 0.0) + at_a_time + max(cache, run.scoring),
    }
    if layout.stage == 3 and not together:  # they are split after they were loaded
        moments["the start and the end, with whole weights"] = base - held.weights + weights + cache
    if device == "cpu":  # safetensors copies what it is given before it writes
        moments["a checkpoint"] = base + MOMENTS * run.trainable
        if layout.offload != "none":  # it is the same memory
            moments = {name: size + held.host for name, size in moments.items()}
    return Memory(runtime, held.weights, reference, held.optimizer, held.gradients + held.buckets, run.activations, working, slack, moments,
                  held.gathered, held.host)


def block_of(run: DryRun, shape: ModelShape) -> float:
    """Bytes of the largest part that a language model is gathered by: a layer, or the matrix of its vocabulary."""
    layer = (shape.parameters - shape.head) / shape.layers
    return max(shape.head, layer) * run.weights / run.parameters


def resident() -> float:
    """Bytes that this process holds in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def capacity(device: str) -> float | None:
    """Bytes of memory that one GPU, or this machine for all of its processes, has. None: there is no such GPU here."""
    if device == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # a container may have less
        total = min(total, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
