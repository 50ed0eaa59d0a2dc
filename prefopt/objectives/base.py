"""What an objective reads and returns. Imports nothing from the rest of prefopt.

Shapes: E edges (one scored completion under one prompt), N trained tokens of all edges, P pairs, U labelled completions, R ranked lists
with S entries in all.
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
    """Edges compared two by two. All tensors but `extra` are [P]."""

    chosen: Tensor
    rejected: Tensor
    label: Tensor  # probability that `chosen` is the better one; 1 unless the data carries soft labels
    weight: Tensor
    margin: Tensor  # by how much `chosen` should win, in units of the objective's logit; 0 by default
    extra: Tensor | None = None  # [P, A] edges of each pair's extra sequences, in the order of `Objective.extra`; [P, 0] if there are none

    def __post_init__(self):
        if self.extra is None:
            self.extra = self.chosen.new_zeros(len(self.chosen), 0)


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
    """Completions sampled for the same prompts and what each was worth (of transitions: by how much more than its baseline). All tensors
    are [S]."""

    edge: Tensor
    group: Tensor  # the first edge of the group that a completion belongs to
    reward: Tensor
    weight: Tensor


@dataclass
class Rankings:
    """Lists of completions of one prompt, each with a score. Entries of a list follow one another, best first; a list has two or more.

    `edge`, `list`, `score` are [S], `weight` is [R]. A *place* is a number from 0 to S-1.
    """

    edge: Tensor
    list: Tensor  # which list an entry belongs to, from 0 to R-1
    score: Tensor
    weight: Tensor

    @property
    def sizes(self) -> Tensor:
        """[R] entries of each list."""
        return torch.bincount(self.list, minlength=len(self.weight))

    @property
    def best(self) -> Tensor:
        """[R] place of each list's first entry."""
        return self.worst + 1 - self.sizes

    @property
    def worst(self) -> Tensor:
        """[R] place of each list's last entry."""
        return self.sizes.cumsum(0) - 1

    def couples(self) -> tuple[Tensor, Tensor]:
        """Places [C] of every two different entries of one list, in both orders; the first of them are sorted."""
        count = self.sizes[self.list]
        first = torch.arange(len(count), device=count.device).repeat_interleave(count)
        within = torch.arange(len(first), device=count.device) - (count.cumsum(0) - count).repeat_interleave(count)
        second = self.best[self.list][first] + within
        return first[first != second], second[first != second]

    def compared(self) -> tuple[Tensor, Tensor]:
        """Places [C] of the better and of the worse entry of every two whose scores differ; the better ones are sorted."""
        first, second = self.couples()
        better = self.score[first] > self.score[second]
        return first[better], second[better]


VIEWS = ("pairs", "unary", "demonstrations", "ranking", "groups")
# Quantities with a number for each token: its log-prob; of a picture's draw the mean squared `error`; of the policy the `divergence` of its
# distribution from another scorer's; of a teacher the soft `value` before it, and the `distance` from a second teacher. Then the policy's
# last hidden state, and SparsePO's masks.
PER_TOKEN = ("token_logp", "error", "divergence", "value", "distance", "hidden", "mask_reward", "mask_kl")
SHAPES: dict[str, tuple[int, ...]] = {"hidden": (1,), "degree_logits": (2, 3)}  # of what is more than a number


@dataclass
class Batch:
    """Scores of a set of edges and the views an objective reads them through.

    `scores[scorer][quantity]`: `logp` (token sum), `reward` and `step_logp` (of a completion that is one transition of a sampler) are [E],
    those of `PER_TOKEN` [N]. `token_edge` [N] names each token's edge.
    """

    lengths: Tensor  # [E] number of trained tokens
    token_edge: Tensor  # [N]
    scores: dict[str, dict[str, Tensor]]
    pairs: Pairs | None = None
    unary: Unary | None = None
    demonstrations: Demonstrations | None = None
    ranking: Rankings | None = None
    groups: Groups | None = None
    step: Tensor | None = None  # [N] the reasoning step that a token is part of, from 0 without gaps in each edge; None: all 0

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

    def edge_sum(self, values: Tensor) -> Tensor:
        """[E, ...] sum of `values` [N, ...] over each edge's tokens."""
        return values.new_zeros(len(self.lengths), *values.shape[1:]).index_add(0, self.token_edge, values)

    def log_ratio(self, scorer: str = "policy", against: str = "reference") -> Tensor:
        """[E] log pi - log pi_ref, nats. No gradient reaches `against`."""
        return self.logp(scorer) - self.logp(against).detach()

    def tokens_of(self, edges: Tensor) -> Tensor:
        """[N] bool: the tokens that belong to `edges`."""
        member = torch.zeros_like(self.lengths, dtype=torch.bool)
        member[edges] = True
        return member[self.token_edge]

    def token_places(self, edges: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the first `counts` [P] trained tokens of each of `edges` [P], one edge after the other, and the place in `edges` that
        each belongs to. An edge's tokens follow one another."""
        which = torch.arange(len(edges), device=edges.device).repeat_interleave(counts)
        within = torch.arange(len(which), device=edges.device) - (counts.cumsum(0) - counts)[which]
        start = self.lengths.cumsum(0) - self.lengths
        return start[edges][which] + within, which

    def prefix_sum(self, edges: Tensor, counts: Tensor, scorer: str = "policy") -> Tensor:
        """[P] log-prob of the first `counts` [P] trained tokens of each of `edges` [P]."""
        places, which = self.token_places(edges, counts)
        taken = self.scores[scorer]["token_logp"][places]
        return taken.new_zeros(edges.shape).index_add(0, which, taken)


@dataclass
class Term:
    """One summand of a loss: `weight` times the mean of `values` over the whole global batch, weighted by the data's row weights.

    The engine supplies the denominator, so splitting a batch over micro-batches or ranks never changes a gradient.
    How many values there are may depend on the batch's layout, never on its scores.
    """

    name: str
    values: Tensor
    unit: str  # pair | completion | prompt | token
    weight: float = 1.0
    batch: Batch | None = None  # whose views hold its units, where these are not the views of the batch that was scored (mixtures)


@dataclass
class Terms:
    terms: list[Term]
    metrics: dict[str, Tensor] = field(default_factory=dict)  # detached scalars or per-unit values, averaged for logs


@dataclass(frozen=True)
class About:
    """What a module that an objective brings along may know of its policy: how wide its hidden states are, and how many layers it has."""

    hidden: int
    layers: int


@dataclass
class Objective:
    """A preference-optimisation objective: fields are the paper's hyper-parameters under the paper's names.

    Class attributes tell the rest of prefopt, which reads them from source without importing torch:
    `formula` is the value of each term for one unit, in plain arithmetic: w, l (sequence log-probs of chosen and rejected), rw, rl
    (the same under the reference), nw, nl (their token counts), h = (w-rw)-(l-rl), p (soft label), m (margin), W, L (lists of t, s of
    each token of chosen and rejected), Q (c, g: shares and gaps of a pair in AOT's coupling of the batch), mu, sd (mean and deviation
    over the batch of the pairs' differences of log-ratios per token), XS (y, r, n of each extra sequence of the pair), X (of each of them
    the list of t, s of its tokens);
    of the same tokens DW, DL (divergence), TW, TL (log-prob under the teacher), VW, VL (the teacher's soft value before them), DIST (of
    the chosen ones: how far both teachers are apart), MW, ML (u, d: SparsePO's masks), and ZW, ZL (logits of the degrees of
    degradation, of each version of chosen and rejected); of a reward model a, b
    (rewards of both); unary: y, r, n, d (1 if desirable), z (KL estimate), mid (midpoint of the mean y-r of both classes); t (one token's
    log-prob), s (the same under the reference), zb (mean of y-r over the batch, at least 0); groups: R (the completion's reward), G
    (rewards of its group), tokens (of each token t, o
    under the policy that sampled it, s under the reference); lists: S (y, r,
    n and the score v of each completion, best first; rank(i, S): place by y - r, win_rate(i, S): mean sigmoid(v - other v)), T
    (h, x: summed hidden state and log-ratio of each step of each completion). sg(x) is x held constant in the gradient. Tests evaluate it
    as the oracle, the docs print it.
    `golden` lists (settings and scores, value); `limits` lists (settings and scores to pin, formula that must then hold).
    """

    view: ClassVar[str] = "pairs"
    quantities: ClassVar[dict[str, tuple[str, ...]]] = {"policy": ("logp",), "reference": ("logp",)}
    coupling: ClassVar[str] = "local"  # "global": the loss needs the scores of the whole global batch at once
    # What the policy's quantity `divergence` is: (kind, scorer); kinds: policies/divergence.py. Gradients reach the policy alone.
    divergence_from: ClassVar[tuple[str, str]] = ("forward", "reference")
    # Optional data columns this objective makes use of: weight, label, margin; logp: `scores["writer"]["logp"]` where rows have it, not a
    # number for the rows that do not.
    columns: ClassVar[tuple[str, ...]] = ("weight",)
    proper_likelihood: ClassVar[bool] = False  # needs log-probs of a normalised distribution (refused on diffusion)
    pictures: ClassVar[bool] = False  # reads what only pictures have, or is made for their errors (refused on texts)
    mismatched: ClassVar[bool] = False  # also scores each prompt with another row's reply
    extra: ClassVar[tuple[str, ...]] = ()  # further sequences of each pair, under prompts of their own: names of data/extra.py
    extra_scorers: ClassVar[tuple[str, ...]] = ("policy", "reference")  # who scores them; of the others they have scores of 0
    steps: ClassVar[bool] = False  # completions are cut into reasoning steps, for `Batch.step`
    min_batch: ClassVar[int] = 1
    starts_level: ClassVar[bool] = True  # where policy = reference, every row has the same loss and every reward is 0
    # From policy = reference, a step moves the sides of a pair "apart", widens only their "gap", or may go "astray".
    first_step: ClassVar[str] = "apart"
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

    def averages(self) -> dict[str, float]:
        """Scorers that are moving averages of the policy's weights -> the share of the policy that goes into each after every step. They
        start where the policy does, and no gradient reaches them. One that is named `writer` draws what is learned from."""
        return {}

    def pull(self) -> float | None:
        """Of steps whose candidates are compared: how far the noise that is to be predicted is moved along what makes the better candidate,
        where that is learned from; None where the candidates themselves are."""
        return None

    def build(self, about: About) -> Any:
        """The `nn.Module` that this objective trains beside the policy, or None. `module(layout, hidden [N, d], layers [N, L, d] or None)`,
        the hidden states of the policy and those of all layers of the reference, gives quantities of the policy by name. Its attribute
        `weight_decay`, if it has one, is its own; with it, `rate` makes its learning rate so many times the policy's."""
        return None

    def __call__(self, batch: Batch) -> Terms:
        raise TypeError(f"{type(self).__name__} defines no __call__")

    def rewards(self, batch: Batch) -> Tensor:
        """[E] implicit reward of each edge, detached, in the objective's own logit units; used for margins and accuracy.

        Without a definition of its own: DPO's reward beta (log pi - log ref), for classes with a field `beta` that read both.
        """
        if not hasattr(self, "beta") or any("logp" not in self.quantities.get(s, ()) for s in ("policy", "reference")):
            raise TypeError(f"{type(self).__name__} defines no rewards, and without beta and a reference there is no default")
        return self.beta * batch.log_ratio().detach()

    @property
    def stepwise(self) -> bool:
        """Whether its completions are transitions of a sampler, with the quantity `step_logp`."""
        return "step_logp" in self.quantities["policy"]

    @property
    def followed(self) -> int:
        """How many averages of the policy's weights score what is trained on; others only draw it."""
        return sum(name in self.quantities for name in self.averages())

    @property
    def states_of(self) -> tuple[str, ...]:
        """Frozen scorers that must be there while the policy is trained: log-probs that were kept do not do. They are those that the
        policy's divergence is taken from, and those with the quantity `states` or `layers` (which are no numbers: the objective sees
        neither)."""
        compared = self.divergence_from[1] if "divergence" in self.quantities["policy"] else None
        return tuple(scorer for scorer, wanted in self.quantities.items() if scorer == compared or {"states", "layers"} & set(wanted))


def holds(rule: str, values: Mapping[str, object]) -> bool:
    """Whether a `require` rule such as "0 <= label_smoothing < 0.5" is true. Rules are constants of objective classes."""
    return bool(eval(rule, {"__builtins__": {}, "isinstance": isinstance, "int": int, "float": float}, dict(values)))


def unit_weight(batch: Batch, term: Term) -> Tensor:
    """Weight of each of a term's values, from the data; 1 where the data has none."""
    batch = term.batch or batch
    if term.unit == "token":  # tokens of the demonstrations, or of the chosen sides; an edge weighs as much as the rows it stands in
        view = batch.demonstrations or batch.pairs
        edge = view.chosen if view is batch.pairs else view.edge
        per_edge = torch.zeros(batch.lengths.shape, dtype=term.values.dtype, device=term.values.device)
        per_edge.index_add_(0, edge, view.weight.to(per_edge.dtype))
        return per_edge[batch.token_edge[batch.tokens_of(edge)]]
    view = {"pair": batch.pairs, "prompt": batch.ranking}.get(term.unit) or batch.unary or batch.groups
    return view.weight.to(term.values.dtype)


def double_type(device: torch.device) -> torch.dtype:
    """The widest type that a device has: float64, and on Apple's GPUs float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def double(tensor: Tensor) -> Tensor:
    """For long sums: in the widest type that its device has."""
    return tensor.to(double_type(tensor.device))


def total_weights(objective: Objective, batch: Batch) -> dict[str, float]:
    """Total weight of each term's values, from the layout alone: the objective is called on zero scores, no model is run."""
    def blank(quantity: str) -> Tensor:
        rows = batch.token_edge if quantity in PER_TOKEN else batch.lengths
        return torch.zeros(len(rows), *SHAPES.get(quantity, ()), dtype=double_type(rows.device), device=rows.device)

    layout = replace(batch, scores={s: {q: blank(q) for q in quantities} for s, quantities in objective.quantities.items()})
    with torch.no_grad():
        return {t.name: float(unit_weight(layout, t).sum()) for t in objective(layout).terms}


def reduce_terms(batch: Batch, terms: Terms, totals: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """This batch's share of the loss, normalised by the global `totals`, and each term's share by name."""
    shares = {t.name: t.weight * (t.values * unit_weight(batch, t)).sum() / max(totals[t.name], 1e-12) for t in terms.terms}
    return sum(shares.values()), shares
