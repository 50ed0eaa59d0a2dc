"""One optimiser step: score, objective, backward, clip, update. The same for every objective and modality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from prefopt.config.schema import OptimConfig
from prefopt.data.batch import MicroBatch
from prefopt.objectives.base import PER_TOKEN, Batch, Objective, double_type, reduce_terms, total_weights
from prefopt.policies.asked import Asked
from prefopt.policies.owned import PREFIX, give_module
from prefopt.policies.reference import Provider
from prefopt.policies.split import whole_shape
from prefopt.policies.teacher import Teacher
from prefopt.training.coupling import gather_batches, join
from prefopt.training.metrics import Averages, batch_metrics
from prefopt.training.parallel import Replicated
from prefopt.training.throughput import Effort, StepKind, count, kind_of, peak_memory
from prefopt.training.timing import PARTS, Clock, watch


@dataclass
class StepResult:
    """What a step did, over all ranks. `memory`: most bytes that a rank has held so far. `times`: of every rank, where the time since the
    step before the last one went (`timing.PARTS`, seconds)."""

    loss: float
    grad_norm: float
    skipped: bool
    metrics: dict[str, float]
    effort: Effort
    memory: int
    times: list[list[float]] = field(default_factory=list)


def learning_rate(step: int, total: int, cfg: OptimConfig) -> float:
    """Rate of optimiser step `step` (from 0) of `total`: linear warm-up, then constant, linear or cosine to 0."""
    warmup = math.ceil(cfg.warmup * total)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.schedule]
    return cfg.lr * decay


def parameter_groups(policy: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What the optimiser is given: matrices decay and other weights do not; the objective's module may have a decay of its own for all,
    and a learning rate of `rate` times the policy's."""
    owned = getattr(policy, "owned", None)
    own, rate = getattr(owned, "weight_decay", None), getattr(owned, "rate", 1.0)
    matrices, others, apart = [], [], []
    for name, parameter in policy.trainable().items():
        group = matrices if len(whole_shape(parameter)) >= 2 else others
        (apart if own is not None and name.startswith(PREFIX) else group).append(parameter)
    groups = zip((matrices, others, apart), (weight_decay, 0.0, own), (1.0, 1.0, rate), strict=True)
    return [{"params": parameters, "weight_decay": decay, "rate": times} for parameters, decay, times in groups if parameters]


class Engine:
    """Owns the policy, its optimiser and the processes. The gradient it steps along never depends on how a step is split."""

    def __init__(self, policy: nn.Module, objective: Objective, reference: Provider | None, cfg: OptimConfig, accelerator: Accelerator,
                 moving_reference: bool = False, teacher: Teacher | None = None, seed: int = 0, deepspeed: dict[str, Any] | None = None):
        # What else has weights that change on the way, by name (`training/moving.py`); the checkpoints hold them.
        self.beside: dict[str, Any] = {"reference": reference} if moving_reference else {}
        self.teacher = teacher
        self.policy, self.objective, self.reference, self.cfg, self.accelerator = policy, objective, reference, cfg, accelerator
        give_module(policy, objective, seed)
        groups = parameter_groups(policy, cfg.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps, fused=True)
        if deepspeed:
            from prefopt.training.zero import Zero

            self.parallel: Any = Zero(policy, optimizer, deepspeed, accelerator)
        else:
            self.parallel = Replicated(policy, optimizer, accelerator)
        self.model, self.optimizer, self.parameters = self.parallel.model, self.parallel.optimizer, self.parallel.parameters
        self.clock, self.lap = Clock(accelerator.device), [0.0] * len(PARTS)
        watch(self.model, self.clock)

    @property
    def moving_reference(self) -> bool:
        """Whether the reference is refreshed on the way."""
        return "reference" in self.beside

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @cached_property
    def kind(self) -> StepKind:
        """What decides the FLOPs of a step, beside its batch."""
        frozen = self.teacher.models if self.teacher else []
        return kind_of(self.policy, self.objective, [*frozen, *[self.policy] * self.objective.followed])

    def score(self, micro: MicroBatch, model: nn.Module | None = None) -> Batch:
        """The quantities that the objective reads, for the edges of a micro-batch."""
        kind, layout = self.policy.quantity, micro.layout
        self._prepare(micro)
        asked, scores = self._asked(micro)
        own = micro.part("policy", self.objective.extra_scorers)
        scores["policy"] = spread(quantities((model or self.model)(own, *asked), own.layout, kind), own, micro)
        for scorer, wanted in self.objective.quantities.items():
            if scorer in scores or not wanted:  # of which nothing is read: it decides where others are asked
                continue
            if scorer in micro.stored:  # token by token, or their sums
                known = micro.stored[scorer]
                if self.objective.quantities[scorer] in (("value",), ("step_logp",)):
                    known = {self.objective.quantities[scorer][0]: known[kind]}
                scores[scorer] = quantities(known[kind], layout, kind) if kind in known else known
            elif scorer == "previous":  # nothing was stored: the policy has not moved since it wrote these replies
                scores[scorer] = {name: t.detach() for name, t in scores["policy"].items()}
            elif scorer == "reference":
                own = micro.part(scorer, self.objective.extra_scorers)
                scores[scorer] = spread(quantities(self.reference(own), own.layout, kind), own, micro)
            elif scorer == "slow":
                scores[scorer] = quantities(self.beside["slow"](micro), layout, kind)
            elif scorer == "teacher":
                scores[scorer] = quantities(self.teacher(micro)[0], layout)
        if "writer" in micro.stored:  # of the data, for objectives with the column `logp`
            scores["writer"] = micro.stored["writer"]
        return replace(layout, scores=scores)

    def _prepare(self, micro: MicroBatch) -> None:
        """Lets a policy decide where pictures are scored, for all scorers, before any of them is asked."""
        if hasattr(self.policy, "prepare"):
            self.policy.prepare(micro, self.reference)

    def _asked(self, micro: MicroBatch) -> tuple[list[Asked], dict[str, dict[str, Tensor]]]:
        """(what the policy is asked beside log-probs: one thing or nothing; what the frozen scorers have said that had to run first)."""
        wanted, said, states = self.objective.quantities["policy"], {}, {}
        for scorer in self.objective.states_of:
            if scorer == "teacher":
                made, states[scorer] = self.teacher(micro)
            else:
                made = self.reference(micro, Asked(states=True, layers="layers" in self.objective.quantities[scorer]))
                states[scorer] = made.pop("states")
            said[scorer] = quantities(made, micro.layout)
        kind, other = self.objective.divergence_from
        divergence = (kind, states[other]) if "divergence" in wanted else None
        module, given = hasattr(self.policy, "owned"), getattr(states.get("reference"), "layers", None)
        asked = Asked(hidden="hidden" in wanted, divergence=divergence, module=module, given=given)
        return [asked] if asked.hidden or asked.divergence or asked.module else [], said

    def step(self, micros: Sequence[MicroBatch], lr: float) -> StepResult:
        """One update on this rank's micro-batches of a global step. All ranks must bring equally many."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        averages, effort = Averages(), count(micros, self.kind)  # counted before anything runs: nothing waits for the device
        backward = self._backward_coupled if self.objective.coupling == "global" else self._backward_local
        loss = backward(micros, averages)
        with self.clock("optimizer"):
            norm = self.parallel.clip(self.cfg.max_grad_norm)
        # All that the host must know is read here, at once; it then prepares the next step while the device runs the update.
        ranks = torch.zeros(self.world, 1 + len(PARTS), dtype=loss.dtype)
        ranks[self.accelerator.process_index] = torch.tensor([peak_memory(self.accelerator.device), *self.lap])
        known = torch.cat([torch.tensor(astuple(effort), dtype=loss.dtype), ranks.flatten()]).to(loss.device)
        metrics = averages.reduce(self.sum_over_ranks)
        sums = self.sum_over_ranks(torch.cat([loss.reshape(1), known]))
        norm, loss, *known = torch.cat([norm.reshape(1), sums]).tolist()
        self.lap = list(self.clock.lap().values())
        finite = math.isfinite(loss) and math.isfinite(norm)
        with self.clock("optimizer"):
            if finite:
                self.parallel.update()
            self.parallel.clear()
        count_of, width = len(astuple(effort)), 1 + len(PARTS)
        effort, everyone = Effort(*known[:count_of]), [known[i : i + width] for i in range(count_of, len(known), width)]
        return StepResult(loss, norm, not finite, metrics, effort, int(max(held for held, *_ in everyone)), [lap for _, *lap in everyone])

    def _backward_local(self, micros: list[MicroBatch], averages: Averages) -> Tensor:
        """Micro-batches one after the other: an objective that is a sum over units."""
        totals = self.global_totals(micros)  # of micro-batches on the CPU, as all lengths are
        loss = torch.zeros((), dtype=double_type(self.accelerator.device), device=self.accelerator.device)
        for i, micro in enumerate(micros):
            with self.parallel.synced(last=i == len(micros) - 1):
                with self.clock("forward"):
                    batch = self.score(micro.to(self.accelerator.device))
                    terms = self.objective(batch)
                    share, shares = reduce_terms(batch, terms, totals)
                with self.clock("backward"):
                    self.parallel.backward(share * self.world)  # data parallelism averages gradients over ranks
            batch_metrics(self.objective, batch, terms, shares, averages)
            loss += share.detach()
        return loss

    def _backward_coupled(self, micros: list[MicroBatch], averages: Averages) -> Tensor:
        """An objective that needs all scores at once: score without gradient, differentiate the loss with respect to the scores,
        then run each micro-batch again with dL/dscore as the upstream gradient."""
        with torch.no_grad(), self.clock("forward"):
            scored = [self.score(m.to(self.accelerator.device)) for m in micros]
        local = join(scored)
        with self.clock("communication"):
            everyone = gather_batches(local, self.world)
        whole = join(everyone)
        leaves = {q: t.detach().requires_grad_() for q, t in whole.scores["policy"].items()}
        whole.scores["policy"] = leaves
        terms = self.objective(whole)
        loss, shares = reduce_terms(whole, terms, total_weights(self.objective, whole))
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        upstream = {q: g for q, g in zip(leaves, grads, strict=True) if g is not None}
        before = everyone[: self.accelerator.process_index]
        edge, token = sum(len(b.lengths) for b in before), sum(len(b.token_edge) for b in before)
        for i, micro in enumerate(micros):
            taught = micro.gradient
            if micro.extra is not None and "policy" not in self.objective.extra_scorers:
                taught = taught & ~micro.extra
            keep = micro.only(taught).to(self.accelerator.device)
            self._prepare(keep)
            kept_tokens = taught[micro.layout.token_edge]
            with self.parallel.synced(last=i == len(micros) - 1):
                with self.clock("forward"):
                    live = quantities(self.model(keep, *self._asked(keep)[0]), keep.layout, self.policy.quantity)
                replay = torch.zeros((), device=self.accelerator.device)
                for q, g in upstream.items():
                    if q in PER_TOKEN:
                        replay = replay + (live[q] * g[token : token + len(kept_tokens)][kept_tokens]).sum()
                    else:
                        replay = replay + (live[q] * g[edge : edge + len(taught)][taught]).sum()
                with self.clock("backward"):
                    self.parallel.backward(replay * self.world)
            edge, token = edge + len(taught), token + len(kept_tokens)
        # Every rank holds the whole loss; its share is what the sum over ranks expects.
        detached = {name: share.detach() / self.world for name, share in shares.items()}
        with torch.no_grad():
            batch_metrics(self.objective, whole, terms, detached, averages)
        return loss.detach() / self.world

    def global_totals(self, micros: Sequence[MicroBatch]) -> dict[str, float]:
        """Each term's denominator: its total weight over all micro-batches of all ranks, known before any is scored."""
        mine = [total_weights(self.objective, m.layout) for m in micros]
        names = sorted(mine[0])
        sums = self.sum_over_ranks(torch.tensor([sum(t[n] for t in mine) for n in names], dtype=torch.float64))
        return dict(zip(names, sums.tolist(), strict=True))

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        if self.world > 1:
            value = value.to(self.accelerator.device)
            with self.clock("communication"):
                dist.all_reduce(value)
        return value


def quantities(made: Tensor | dict[str, Tensor], layout: Batch, kind: str = "token_logp") -> dict[str, Tensor]:
    """What a scorer made, by name: `reward` [E] of a reward model, or `token_logp` [N], its sum per edge `logp` [E], and what else a
    scorer answered that was asked for more.

    Sums are fp32 (or float64), whatever the model computes in.
    """
    if kind == "reward":
        return {"reward": made}
    made = made if isinstance(made, dict) else {"token_logp": made}
    token = made["token_logp"]
    logp = torch.zeros(layout.lengths.shape, dtype=token.dtype, device=token.device)
    return {**made, "logp": logp.index_add(0, layout.token_edge, token)}


def spread(scores: dict[str, Tensor], part: MicroBatch, micro: MicroBatch) -> dict[str, Tensor]:
    """The scores of a `part` of a micro-batch among zeros for its extra sequences, which that scorer was not asked about."""
    if part is micro:
        return scores
    edges = ~micro.extra
    tokens, out = edges[micro.layout.token_edge], {}
    for name, values in scores.items():
        kept = tokens if name in PER_TOKEN else edges
        out[name] = values.new_zeros(len(kept), *values.shape[1:]).index_put((kept,), values)
    return out
