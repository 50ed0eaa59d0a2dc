"""What an objective reads and returns. Imports nothing from the rest of prefopt.

Shapes: E edges (one scored completion under one prompt), N trained tokens of all edges, P pairs, U labelled completions.
Log-probs are in nats, in fp32 (float64 in the oracles).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass
class Pairs:
    """Edges compared two by two. All tensors are [P]."""

    chosen: Tensor
    rejected: Tensor
    label: Tensor  # probability that `chosen` is the better one; 1 unless the data carries soft labels
    weight: Tensor
    margin: Tensor  # by how much `chosen` should win, in units of the objective's logit; 0 by default


@dataclass
class Unary:
    """Completions with a thumbs-up or thumbs-down. `edge`, `desirable`, `weight` are [U]."""

    edge: Tensor
    desirable: Tensor
    weight: Tensor
    mismatched: Tensor  # [M] edges that pair a prompt with another row's completion (KTO's KL estimate)


@dataclass
class Demonstrations:
    """Completions to imitate: `edge`, `weight` are [C]."""

    edge: Tensor
    weight: Tensor


@dataclass
class Groups:
    """Completions sampled for the same prompts and what each was worth. All tensors are [S]."""

    edge: Tensor
    group: Tensor  # the first edge of the group that a completion belongs to
    reward: Tensor
    weight: Tensor


VIEWS = ("pairs", "unary", "demonstrations", "groups")


@dataclass
class Batch:
    """Scores of a set of edges and the views an objective reads them through.

    `scores[scorer][quantity]`: `logp` (token sum) and `reward` are [E], `token_logp` is [N]. `token_edge` [N] names each token's edge.
    """

    lengths: Tensor  # [E] number of trained tokens
    token_edge: Tensor  # [N]
    scores: dict[str, dict[str, Tensor]]
    pairs: Pairs | None = None
    unary: Unary | None = None
    demonstrations: Demonstrations | None = None
    groups: Groups | None = None

    def views(self, change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """The views that are there, with every tensor replaced by `change(field, tensor)`."""
        found = {name: view for name in VIEWS if (view := getattr(self, name)) is not None}
        return {name: type(view)(**{f: change(f, t) for f, t in vars(view).items()}) for name, view in found.items()}

    def logp(self, scorer: str = "policy") -> Tensor:
        """[E] log-prob of each completion, summed over its trained tokens."""
        return self.scores[scorer]["logp"]

    def avg_logp(self, scorer: str = "policy") -> Tensor:
        """[E] log-prob per trained token."""
        return self.logp(scorer) / self.lengths

    def log_ratio(self, scorer: str = "policy", against: str = "reference") -> Tensor:
        """[E] log pi - log pi_ref, nats. No gradient reaches `against`."""
        return self.logp(scorer) - self.logp(against).detach()

    def tokens_of(self, edges: Tensor) -> Tensor:
        """[N] bool: the tokens that belong to `edges`."""
        member = torch.zeros_like(self.lengths, dtype=torch.bool)
        member[edges] = True
        return member[self.token_edge]


@dataclass
class Term:
    """One summand of a loss: `weight` times the mean of `values` over the whole global batch, weighted by the data's row weights.

    The engine supplies the denominator, so splitting a batch over micro-batches or ranks never changes a gradient.
    How many values there are may depend on the batch's layout, never on its scores.
    """

    name: str
    values: Tensor
    unit: str  # pair | completion | token
    weight: float = 1.0


@dataclass
class Terms:
    terms: list[Term]
    metrics: dict[str, Tensor] = field(default_factory=dict)  # detached scalars or per-unit values, averaged for logs


@dataclass
class Objective:
    """A preference-optimisation objective: fields are the paper's hyper-parameters under the paper's names.

    Class attributes tell the rest of prefopt, which reads them from source without importing torch:
    `formula` is the value of each term for one unit, in plain arithmetic: w, l (sequence log-probs of chosen and rejected), rw, rl
    (the same under the reference), nw, nl (their token counts), h = (w-rw)-(l-rl), p (soft label), m (margin); of a reward model a, b
    (rewards of both); unary: y, r, n, d (1 if desirable), z (KL estimate); t (one token's log-prob); groups: R (the completion's
    reward), G (rewards of its group), tokens (of each token t, o under the policy that sampled it, s under the reference). Tests
    evaluate it as the oracle, the docs print it.
    `golden` lists (settings and scores, value); `limits` lists (settings and scores to pin, formula that must then hold).
    """

    view: ClassVar[str] = "pairs"
    quantities: ClassVar[dict[str, tuple[str, ...]]] = {"policy": ("logp",), "reference": ("logp",)}
    coupling: ClassVar[str] = "local"  # "global": the loss needs the scores of the whole global batch at once
    columns: ClassVar[tuple[str, ...]] = ("weight",)  # optional data columns this objective makes use of
    proper_likelihood: ClassVar[bool] = False  # needs log-probs of a normalised distribution (refused on diffusion)
    mismatched: ClassVar[bool] = False  # also scores each prompt with another row's reply
    min_batch: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    require: ClassVar[tuple[str, ...]] = ()
    formula: ClassVar[dict[str, str]] = {}
    golden: ClassVar[tuple] = ()
    limits: ClassVar[tuple] = ()

    def __post_init__(self):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for rule in self.require:
            if not holds(rule, values):
                raise ValueError(f"{type(self).__name__}: {rule} does not hold for {values}")

    def __call__(self, batch: Batch) -> Terms:
        raise TypeError(f"{type(self).__name__} defines no __call__")

    def rewards(self, batch: Batch) -> Tensor:
        """[E] implicit reward of each edge, detached, in the objective's own logit units; used for margins and accuracy."""
        raise TypeError(f"{type(self).__name__} defines no rewards")


def holds(rule: str, values: Mapping[str, object]) -> bool:
    """Whether a `require` rule such as "0 <= label_smoothing < 0.5" is true. Rules are constants of objective classes."""
    return bool(eval(rule, {"__builtins__": {}, "isinstance": isinstance, "int": int, "float": float}, dict(values)))


def unit_weight(batch: Batch, term: Term) -> Tensor:
    """Weight of each of a term's values, from the data; 1 where the data has none."""
    if term.unit == "token":  # tokens of the demonstrations, or of the chosen sides; an edge weighs as much as the rows it stands in
        view = batch.demonstrations or batch.pairs
        edge = view.chosen if view is batch.pairs else view.edge
        per_edge = torch.zeros(batch.lengths.shape, dtype=term.values.dtype, device=term.values.device)
        per_edge.index_add_(0, edge, view.weight.to(per_edge.dtype))
        return per_edge[batch.token_edge[batch.tokens_of(edge)]]
    view = batch.pairs if term.unit == "pair" else batch.unary or batch.groups
    return view.weight.to(term.values.dtype)


def total_weights(objective: Objective, batch: Batch) -> dict[str, float]:
    """Total weight of each term's values, from the layout alone: the objective is called on zero scores, no model is run."""
    blank = {
        scorer: {q: torch.zeros_like(batch.token_edge if q == "token_logp" else batch.lengths, dtype=torch.float64) for q in quantities}
        for scorer, quantities in objective.quantities.items()
    }
    layout = replace(batch, scores=blank)
    with torch.no_grad():
        return {t.name: float(unit_weight(layout, t).sum()) for t in objective(layout).terms}


def reduce_terms(batch: Batch, terms: Terms, totals: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """This batch's share of the loss, normalised by the global `totals`, and each term's share by name."""
    shares = {t.name: t.weight * (t.values * unit_weight(batch, t)).sum() / max(totals[t.name], 1e-12) for t in terms.terms}
    return sum(shares.values()), shares
