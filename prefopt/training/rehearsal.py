"""`prefopt plan --dry-run`: a step of a run on machines that are not there.

torch's fake process group has as many processes as the config says, of which this one is the first; what the others would send is made up.
The model is of the run's architecture, cut to two layers and small widths, with random weights; DeepSpeed is started with the JSON of the
run, and the engine takes a step on the first rows of the data. Whatever is wrong with the config shows as it would there, but for what only
a GPU or a network can show.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prefopt.config.listing import table
from prefopt.config.schema import TrainConfig
from prefopt.data.batch import Row
from prefopt.data.tokenise import Branch, Tokens
from prefopt.errors import UserError
from prefopt.policies.load import load_policy
from prefopt.policies.reference import make_reference
from prefopt.training import timing
from prefopt.training.deepspeed_json import deepspeed_json
from prefopt.training.engine import Engine
from prefopt.training.memory import _depths, _quiet, _shallow
from prefopt.training.plan import Ground, ground_of, passes, zero_settings
from prefopt.training.plan_text import _gb, idle, machines
from prefopt.training.sharding import between_steps, layout_of, traffic
from prefopt.training.source import OfflineSource

WIDTH, WORDS = 64, 1024  # hidden size and vocabulary of the cut model
LONGEST = 64  # tokens of a prompt or reply that are kept


@dataclass
class Rehearsed:
    """What the first process did in its second step. `held`: bytes of its states between two steps. `sent`: bytes that go out of it in a
    ring, by collective operation; `calls`: how many of these there were."""

    network: str
    parameters: int
    trained: int
    weights: float  # bytes of the model, whole
    micros: int
    passes: int  # that each micro-batch makes through the weights
    held: float
    sent: dict[str, float]
    calls: int


class Sent(TorchDispatchMode):
    """Counts what collective operations send. All pass torch's dispatcher, whoever calls them."""

    def __init__(self, world: int):
        super().__init__()
        self.world, self.sent, self.calls = world, Counter(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            sizes = [t.nbytes for t in tree_iter(args) if isinstance(t, Tensor)]
            # A gather or a scatter names both the whole and the part; sums name what is summed.
            whole = max(sizes, default=0) if "gather" in name or "scatter" in name else sum(sizes)
            self.sent[name[6:].strip("_")] += (2 if "allreduce" in name else 1) * whole * (self.world - 1) / self.world
            self.calls += 1
        return func(*args, **(kwargs or {}))


def rehearsal_text(cfg: TrainConfig) -> str:
    """What `prefopt plan --dry-run` prints."""
    did, hardware = rehearse(cfg), cfg.hardware
    layout = layout_of(hardware, zero_settings(cfg))
    planned = traffic(layout, did.weights, did.parameters, did.trained, did.micros, did.passes)
    by = f"DeepSpeed {version('deepspeed')} took its JSON (ZeRO {hardware.zero})" if hardware.zero else "data parallelism was set up"
    rows = [
        ("model", f"{did.network}, cut to {did.parameters / 1e6:.2g} M weights, {did.trained / 1e6:.2g} M trained"),
        ("run", f"{by} and two steps were made, of {did.micros} micro-batch{'es' if did.micros > 1 else ''} per process"),
        ("held", f"{_gb(did.held)} between steps; planned {_gb(between_steps(layout, did.weights, did.parameters, did.trained))}"),
        ("sent", f"{_gb(sum(did.sent.values()))} in {did.calls} collective operations; planned {_gb(sum(planned.values()))}"),
        *idle(cfg, cfg.train.batch_size),
        ("not tested", "what only GPUs and networks show: kernels, NCCL, memory that is not torch's, speed"),
    ]
    return "\n".join([f"passed: {machines(cfg)}; this process was the first of {hardware.world}, the others were made up", "",
                      *table(rows, "  ")])


def rehearse(cfg: TrainConfig) -> Rehearsed:
    """Takes one step. Raises `UserError` with what went wrong."""
    if cfg.model.kind == "tabular":
        raise UserError(f"model={cfg.model.name} is a table in one process; there is nothing to rehearse")
    settings = deepspeed_json(cfg)
    with _fake_processes(cfg.hardware.world), tempfile.TemporaryDirectory() as folder, _quiet():
        try:
            accelerator = Accelerator(cpu=True)
            if cfg.model.kind == "diffusion":
                from prefopt.training.rehearsal_pictures import step_of_pictures

                return step_of_pictures(cfg, settings, accelerator)
            return _step(cfg, ground_of(cfg), settings, accelerator, folder)
        except UserError:
            raise
        except Exception as error:  # DeepSpeed asserts, raises ValueError, KeyError and others; each is about the config
            raise UserError(f"hardware={cfg.hardware.name}: a step of {cfg.hardware.world} processes fails "
                            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error


def _step(cfg: TrainConfig, ground: Ground, settings: dict[str, Any] | None, accelerator: Accelerator, folder: str) -> Rehearsed:
    model = replace(cfg.model, path=save_cut(ground, folder), start=None, revision=None, gguf_file=None, wheel=None, compile=False,
                    quantize=None, lora=replace(cfg.model.lora, adapter=None))
    quantity = "reward" if ground.reward else "token_logp"
    policy = load_policy(model, cfg.data, cfg.trust, accelerator.device, cfg.hardware.precision, cfg.seed, quantity)
    objective = ground.objective
    reference = make_reference(policy, "initial") if "reference" in objective.quantities else None
    if "teacher" in objective.quantities or objective.averages():
        raise UserError(f"{type(objective).__name__} runs other models along, which a dry run cannot; try hardware={cfg.hardware.name} "
                        "with algo=dpo")
    rows = [short(row) for row in ground.rows[: max(cfg.train.batch_size, objective.min_batch)]]
    source = OfflineSource(rows, objective.view, cfg.train.batch_size, cfg.train.micro_batch_tokens, 0, "label" in objective.columns,
                           cfg.seed, 0, cfg.hardware.world, policy.layout, policy.share)
    micros = source.step(0)
    others = storages().keys() - {p.untyped_storage()._cdata for p in (*policy.parameters(), *policy.buffers())}
    engine = Engine(policy, objective, reference, cfg.optim, accelerator, seed=cfg.seed, deepspeed=settings)
    return rehearsed(type(policy.inner).__name__, policy, lambda: engine.step(micros, cfg.optim.lr), others, len(micros),
                     passes(engine.kind, "adapter off" if cfg.model.frozen else "frozen copy"))


def rehearsed(network: str, policy: nn.Module, step: Callable[[], Any], others: set[int], micros: int,
              times: int) -> Rehearsed:
    """Takes two steps: in the first DeepSpeed learns in which order weights are needed. `others`: storages that are no states."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in policy.parameters()]
    step()
    with Sent(dist.get_world_size()) as seen:
        step()
    held = sum(size for key, size in storages().items() if key not in others)
    return Rehearsed(network, sum(n for n, _, _ in sizes), sum(n for n, _, trained in sizes if trained),
                     sum(n * size for n, size, _ in sizes), micros, times, float(held), dict(seen.sent), seen.calls)


def storages() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process has, by its address."""
    gc.collect()
    held = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.device.type == "cpu"]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}


def answer_at_once(_, bucket):  # torch reads annotations of hooks, if there are any, and wants no text
    """DistributedDataParallel waits for results, of which the fake process group has none."""
    dist.all_reduce(bucket.buffer())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def save_cut(ground: Ground, folder: str) -> str:
    """A model of the same architecture with random weights and few of them, and the tokenizer that goes with it."""
    import transformers

    text = ground.config.get_text_config()
    config = _shallow(text, _depths(text, text.num_hidden_layers)[0])
    heads, groups = 4, max(1, text.num_attention_heads // (getattr(text, "num_key_value_heads", None) or text.num_attention_heads))
    wanted = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "moe_intermediate_size": WIDTH, "num_attention_heads": heads,
              "num_key_value_heads": heads // min(groups, heads), "head_dim": WIDTH // heads, "vocab_size": WORDS, "num_local_experts": 4,
              "num_experts": 4, "num_experts_per_tok": 2}
    for name, value in wanted.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    with torch.random.fork_rng(devices=[]):
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    ground.tokeniser.tokenizer.save_pretrained(folder)
    return folder


def short(row: Row) -> Row:
    """A row with few tokens, none beyond the cut vocabulary."""
    def branch(of: Branch) -> Branch:
        ids, mask = [i % WORDS for i in of.ids[:LONGEST]], of.mask[:LONGEST]
        return replace(of, ids=ids, mask=mask if any(mask) else [True] * len(ids), steps=of.steps and of.steps[:LONGEST])

    def tokens(of: Tokens) -> Tokens:
        return replace(of, prompt=[i % WORDS for i in of.prompt[:LONGEST]], branches=[branch(b) for b in of.branches])

    return replace(row, tokens=tokens(row.tokens), extra=[tokens(t) for t in row.extra],
                   mismatched=row.mismatched and [branch(b) for b in row.mismatched])


@contextmanager
def _fake_processes(world: int) -> Iterator[None]:
    """This process as the first of `world`; nothing of it stays."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("a dry run makes processes of its own; start it outside of torchrun, srun and accelerate launch")
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost",
             "MASTER_PORT": "29500", "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    timing.exchange, exchange = answer_at_once, timing.exchange
    try:
        yield
    finally:
        timing.exchange = exchange
        dist.destroy_process_group()
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        _forget_groups()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _forget_groups() -> None:
    """DeepSpeed keeps its process groups for the life of a process."""
    if comm := sys.modules.get("deepspeed.comm.comm"):
        comm.cdb = None
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._WORLD_GROUP = None
