"""From tokenised examples to steps and micro-batches of edges.

A *step* is an ordered list of row numbers, fixed before any split by (seed, epoch). It is dealt out to ranks and cut into micro-batches
of a token budget; neither changes the loss, because every term is normalised over the whole step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.data.tokenise import Branch, Tokens
from prefopt.errors import RunFailed, UserError
from prefopt.objectives.base import Batch, Demonstrations, Groups, Pairs, Rankings, Unary


@dataclass
class Row:
    """A tokenised example with what its views need. `mismatched` is another row's reply under this prompt. `stored` holds what a scorer
    once said of each reply, the mismatched ones last, for scorers that are not asked again: log-probs of its trained tokens, nats, or one
    number for their sum.
    """

    tokens: Tokens
    kind: str
    label: float = 1.0
    weight: float = 1.0
    margin: float = 0.0
    scores: list[float] | None = None
    desirable: list[bool] | None = None
    mismatched: list[Branch] | None = None
    stored: dict[str, list[Sequence[float] | float]] = field(default_factory=dict)
    extra: list[Tokens] = field(default_factory=list)  # of each of its `pairs` the extra sequences, each a prompt and one branch
    stage: int = 0  # stages are trained on in order

    def branches(self, view: str) -> list[Branch]:
        """The completions that `view` reads."""
        return self.tokens.branches[:1] if view == "demonstrations" else self.tokens.branches

    def edges(self, view: str) -> list[Branch]:
        """The completions that are scored: those of `view`, the mismatched ones, the extra sequences of pairs."""
        return [branch for tree in self.trees(view) for branch in tree.branches]

    def trees(self, view: str) -> list[Tokens]:
        """The same with their prompts; those that follow one another under one prompt stand together."""
        found = [Tokens(self.tokens.prompt, self.branches(view) + (self.mismatched or []))]
        for made in self.extra if view == "pairs" else ():
            if made.prompt == found[-1].prompt:
                found[-1].branches = found[-1].branches + made.branches
            else:
                found.append(Tokens(made.prompt, made.branches))
        return found

    def everything(self) -> list[tuple[list[int], Branch]]:
        """All that may be scored and its prompt, in the order of `stored`."""
        every = [(self.tokens.prompt, branch) for branch in (*self.tokens.branches, *(self.mismatched or ()))]
        return every + [(made.prompt, branch) for made in self.extra for branch in made.branches]

    def pairs(self) -> list[tuple[int, int]]:
        """Numbers of the better and of the worse completion of each pair that it makes (of a `pair` the first is the better one)."""
        if self.kind != "ranking_all":
            return [(0, len(self.tokens.branches) - 1)]
        n, ids = len(self.scores), [b.ids for b in self.tokens.branches]
        return [(i, j) for i in range(n) for j in range(i + 1, n) if self.scores[i] > self.scores[j] and ids[i] != ids[j]]

    def size(self, view: str, layout: str, share: bool = True) -> tuple[int, int]:
        """(sequences, tokens of the longest): in `rows` each edge is a sequence, in `trees` and `packed` all under one prompt are one and
        may `share` it; what is packed counts as one of all its tokens. Extra sequences count, whoever scores them. Of pictures in
        `draws` each draw counts as a token."""
        if layout == "draws":  # pictures: each draw is one pass through the network
            return 1, sum(branch.trained for branch in self.edges(view))
        trees = [(len(tree.prompt), [len(b.ids) for b in tree.branches]) for tree in self.trees(view)]
        if layout == "rows":
            return sum(len(edges) for _, edges in trees), max(prompt + max(edges) for prompt, edges in trees)
        tokens = [prompt * (1 if share else len(edges)) + sum(edges) for prompt, edges in trees]
        return (1, sum(tokens)) if layout == "packed" else (len(tokens), max(tokens))


@dataclass
class MicroBatch:
    """E edges as padded rows. `trained` marks the tokens whose log-prob is asked for; `layout` holds the objective's views.

    Edges of one `tree` follow one another and begin with the same `prompt` tokens, which a policy need compute only once.
    """

    input_ids: Tensor  # [E, T]
    attention: Tensor  # [E, T] bool, right padded
    trained: Tensor  # [E, T] bool
    layout: Batch  # without scores
    gradient: Tensor  # [E] bool: edges whose scores may carry a gradient
    rows: list[int]
    tree: Tensor  # [E]
    prompt: Tensor  # [E]
    extra: Tensor | None = None  # [E] bool: extra sequences of pairs; None: there are none
    # scorer -> what need not be computed of it, by quantity: `token_logp` [N], or `logp` [E]
    stored: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    made: Any = None  # what the policy has made of it that the reference needs too

    @property
    def tokens(self) -> int:
        """Tokens of all edges."""
        return int(self.attention.sum())

    @property
    def tree_tokens(self) -> int:
        """The same where edges of one tree share their prompt."""
        again = torch.zeros_like(self.tree, dtype=torch.bool)
        again[1:] = self.tree[1:] == self.tree[:-1]
        return self.tokens - int(self.prompt[again].sum())

    def only(self, keep: Tensor) -> MicroBatch:
        """The edges where `keep` [E] is true, without views: for a second pass over part of the batch."""
        if bool(keep.all()):
            return self
        trained, lengths = self.trained[keep], self.layout.lengths[keep]
        token_edge = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), trained.sum(1))
        layout, tokens = Batch(lengths, token_edge, {}), keep[self.layout.token_edge]
        stored = {s: {q: t[tokens if q == "token_logp" else keep] for q, t in qs.items()} for s, qs in self.stored.items()}
        extra = None if self.extra is None else self.extra[keep]
        return MicroBatch(self.input_ids[keep], self.attention[keep], trained, layout, self.gradient[keep], self.rows, self.tree[keep],
                          self.prompt[keep], extra, stored)

    def part(self, scorer: str, extra_scorers: Collection[str]) -> MicroBatch:
        """What `scorer` is asked about: all edges, or those that are no extra sequences (without views, and no wider than need be)."""
        if self.extra is None or scorer in extra_scorers:
            return self
        part = self.only(~self.extra)
        width = int(part.attention.sum(1).max())
        return replace(part, input_ids=part.input_ids[:, :width], attention=part.attention[:, :width], trained=part.trained[:, :width])

    def to(self, device: torch.device | str) -> MicroBatch:
        step = None if self.layout.step is None else self.layout.step.to(device)
        layout = Batch(self.layout.lengths.to(device), self.layout.token_edge.to(device), {}, step=step,
                       **self.layout.views(lambda _, t: t.to(device)))
        stored = {scorer: {q: t.to(device) for q, t in qs.items()} for scorer, qs in self.stored.items()}
        tensors = (self.input_ids, self.attention, self.trained)
        extra = None if self.extra is None else self.extra.to(device)
        return MicroBatch(*(t.to(device) for t in tensors), layout, self.gradient.to(device), self.rows, self.tree.to(device),
                          self.prompt.to(device), extra, stored)


def derangement(prompts: Sequence[Hashable], seed: int) -> list[int]:
    """For each row, given by its prompt, the number of another one with another prompt, seeded.

    Rows stand prompt by prompt, and each is sent on by as many places as the most frequent prompt has rows: a permutation, unless that
    prompt has more than half of the rows, which then share the others.
    Raises `UserError` where all have one prompt.
    """
    of: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        of.setdefault(prompt, []).append(row)
    groups = list(of.values())
    if len(groups) < 2:
        raise UserError("this algorithm estimates a KL divergence from each prompt with the reply to another one, and all rows that it is "
                        "given have one prompt; add rows with other prompts, or use algo=bco")
    random.Random(f"derangement {seed}").shuffle(groups)
    order, most = [row for group in groups for row in group], max(map(len, groups))
    out, end = [0] * len(order), 0
    for group in groups:
        end += len(group)
        for place, row in enumerate(group):
            out[row] = order[(end + (place + most - len(group)) % (len(order) - len(group))) % len(order)]
    return out


def step_rows(total: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Row numbers of optimiser step `step` (from 0). Each epoch is a fresh permutation; its last step may be shorter."""
    per_epoch = -(-total // batch_size)
    epoch, place = divmod(step, per_epoch)
    order = list(range(total))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order[place * batch_size : (place + 1) * batch_size]


def split_step(
    rows: Sequence[Row], chosen: Sequence[int], view: str, budget: int, world: int, layout: str = "rows", share: bool = True
) -> list[list[list[int]]]:
    """[rank][micro-batch] -> row numbers. All ranks get the same number of micro-batches; an empty one is a filler.

    Rows go, the longest first, to the rank that has the least to do. A rank's rows are cut into as few micro-batches of at most `budget`
    tokens as their lengths allow, and these are made as equal as they can be. Tokens are what is computed: padding counts in the layouts
    that pad. A single row over the budget gets a micro-batch of its own.
    """
    sizes = {r: rows[r].size(view, layout, share) for r in chosen}
    by_length = sorted(chosen, key=lambda r: (-sizes[r][1], r))
    ranks: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for row in by_length:
        least = load.index(min(load))
        ranks[least].append(row)
        load[least] += math.prod(sizes[row])
    cut = [[part for same in _by_frame(rows, mine) for part in _cut_evenly(same, sizes, budget, layout in ("packed", "draws"))]
           for mine in ranks]
    most = max(len(micro) for micro in cut)
    return [micro + [[] for _ in range(most - len(micro))] for micro in cut]


def _by_frame(rows: Sequence[Row], chosen: list[int]) -> list[list[int]]:
    """Pictures of different shapes are computed apart; texts are all of one."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row in chosen:
        found.setdefault(rows[row].tokens.frame, []).append(row)
    return [found[frame] for frame in sorted(found)] or [[]]


def _cut_evenly(rows: list[int], sizes: dict[int, tuple[int, int]], budget: int, packed: bool) -> list[list[int]]:
    """The parts that `budget` allows, under the smallest limit that needs no more of them."""
    best = _cut(rows, sizes, budget, packed)
    low, high = 0, budget
    while low < high:
        middle = (low + high) // 2
        parts = _cut(rows, sizes, middle, packed)
        if len(parts) > len(best):
            low = middle + 1
        else:
            best, high = parts, middle
    return best


def _cut(rows: list[int], sizes: dict[int, tuple[int, int]], limit: int, packed: bool) -> list[list[int]]:
    """Cuts a list, in its order, wherever the tokens would pass `limit`."""
    parts: list[list[int]] = []
    sequences = longest = held = 0
    for row in rows:
        count, length = sizes[row]
        sequences, longest, held = sequences + count, max(longest, length), held + count * length
        if not parts or (held if packed else sequences * longest) > limit:
            parts.append([])
            sequences, longest, held = count, length, count * length
        parts[-1].append(row)
    return parts


def build(rows: Sequence[Row], chosen: Sequence[int], view: str, pad: int, soft_labels: bool = True, filler: int = 0) -> MicroBatch:
    """The micro-batch of the rows `chosen`. An empty list gives a filler: row `filler`'s edges, with views that hold nothing.

    Without `soft_labels` a pair with label p counts as two pairs of weight p and 1 - p, in both directions: the same expectation.
    """
    edges: list[tuple[list[int], Branch, bool]] = []
    tree: list[int] = []
    pairs: list[tuple[int, int, float, float, float]] = []
    unary: list[tuple[int, bool, float]] = []
    mismatched: list[int] = []
    demonstrations: list[tuple[int, float]] = []
    groups: list[tuple[int, int, float, float]] = []
    ranked: list[tuple[int, int, float]] = []
    ranked_weight: list[float] = []
    extra: list[list[int]] = []
    further: list[int] = []  # the edges that are extra sequences, of which a pair has `each`
    each = 0
    for number in chosen or [filler]:
        row = rows[number]
        first = len(edges)
        edges += [(row.tokens.prompt, b, True) for b in row.branches(view)]
        if row.mismatched:
            mismatched += range(len(edges), len(edges) + len(row.mismatched))
            edges += [(row.tokens.prompt, b, False) for b in row.mismatched]
        for planted in row.trees(view):
            tree += [len(tree)] * len(planted.branches)
        if view == "pairs":
            pairs += _pairs(row, first, soft_labels)
            if row.extra:
                assert soft_labels, "extra sequences are made for a pair as it stands and not for its opposite"
                here, each = range(len(edges), len(edges) + len(row.extra)), len(row.extra) // len(row.pairs())
                edges += [(made.prompt, made.branches[0], True) for made in row.extra]
                further += here
                extra += [list(here[i : i + each]) for i in range(0, len(here), each)]
        elif view == "unary":
            unary += _unary(row, first)
        elif view == "ranking":
            for entries, weight in _lists(row, first):
                ranked += [(edge, len(ranked_weight), score) for edge, score in entries]
                ranked_weight.append(weight)
        elif view == "groups":
            groups += [(first + i, first, reward, row.weight) for i, reward in enumerate(row.scores)]
        else:
            demonstrations.append((first, row.weight))
    if not chosen:
        pairs, extra, unary, mismatched, demonstrations, groups, ranked, ranked_weight = [], [], [], [], [], [], [], []

    width = max(len(p) + len(b.ids) for p, b, _ in edges)
    input_ids = torch.full((len(edges), width), pad)
    attention, trained = torch.zeros(len(edges), width, dtype=torch.bool), torch.zeros(len(edges), width, dtype=torch.bool)
    for e, (prompt, branch, _) in enumerate(edges):
        n, full = len(prompt), len(prompt) + len(branch.ids)
        input_ids[e, :full] = torch.tensor(prompt + branch.ids)
        attention[e, :full] = True
        trained[e, n:full] = torch.tensor(branch.mask)
    lengths = trained.sum(1)
    layout = Batch(lengths, torch.repeat_interleave(torch.arange(len(edges)), lengths), {})
    if any(b.steps for _, b, _ in edges):
        layout.step = _long([step for _, b, _ in edges for step in _steps(b)])
    if view == "pairs":
        c, r, p, w, m = zip(*pairs, strict=True) if pairs else ((),) * 5
        layout.pairs = Pairs(_long(c), _long(r), _float(p), _float(w), _float(m), _long(extra).view(len(pairs), each))
    elif view == "unary":
        e, d, w = zip(*unary, strict=True) if unary else ((),) * 3
        layout.unary = Unary(_long(e), torch.tensor(d, dtype=torch.bool), _float(w), _long(mismatched))
    elif view == "ranking":
        e, k, s = zip(*ranked, strict=True) if ranked else ((),) * 3
        layout.ranking = Rankings(_long(e), _long(k), _float(s), _float(ranked_weight))
    elif view == "groups":
        e, g, r, w = zip(*groups, strict=True) if groups else ((),) * 4
        layout.groups = Groups(_long(e), _long(g), _float(r), _float(w))
    else:
        e, w = zip(*demonstrations, strict=True) if demonstrations else ((),) * 2
        layout.demonstrations = Demonstrations(_long(e), _float(w))
    gradient = torch.tensor([g for _, _, g in edges])
    of = [(number, rows[number]) for number in chosen or [filler]]
    stored = {scorer: _stored(of, scorer, view, lengths) for scorer in sorted({s for _, row in of for s in row.stored})}
    prompt = _long([len(p) for p, _, _ in edges])
    apart = torch.zeros(len(edges), dtype=torch.bool).index_fill(0, _long(further), True) if further else None
    return MicroBatch(input_ids, attention, trained, layout, gradient, list(chosen), _long(tree), prompt, apart, stored)


def _steps(branch: Branch) -> list[int]:
    """The steps of the trained tokens, numbered from 0 without gaps."""
    own = [step for step, trained in zip(branch.steps or [0] * len(branch.mask), branch.mask, strict=True) if trained]
    number = {step: i for i, step in enumerate(sorted(set(own)))}
    return [number[step] for step in own]


def _pairs(row: Row, first: int, soft_labels: bool) -> list[tuple[int, int, float, float, float]]:
    last = first + len(row.tokens.branches) - 1
    if row.kind == "ranking_all":
        found = row.pairs()
        # A row counts once, however many pairs its ranking holds.
        return [(first + i, first + j, 1.0, row.weight / len(found), row.margin) for i, j in found]
    if soft_labels or row.label in (0.0, 1.0):
        if row.label > 0 or soft_labels:
            return [(first, last, row.label if soft_labels else 1.0, row.weight, row.margin)]
        return [(last, first, 1.0, row.weight, -row.margin)]
    return [(first, last, 1.0, row.weight * row.label, row.margin), (last, first, 1.0, row.weight * (1 - row.label), -row.margin)]


def _unary(row: Row, first: int) -> list[tuple[int, bool, float]]:
    if row.desirable is not None:
        return [(first + i, good, row.weight) for i, good in enumerate(row.desirable)]
    last = first + len(row.tokens.branches) - 1
    out = [(first, True, row.weight * row.label), (last, False, row.weight * row.label)]
    if row.label < 1:
        out += [(first, False, row.weight * (1 - row.label)), (last, True, row.weight * (1 - row.label))]
    return out


def _lists(row: Row, first: int) -> list[tuple[list[tuple[int, float]], float]]:
    """[(edge and score of each completion, best first), weight] of each list. A pair is a list of two with the scores 1 and 0; with a soft
    label p it is two lists of weight p and 1 - p, in both orders.
    """
    if row.kind != "pair":
        return [([(first + i, score) for i, score in enumerate(row.scores)], row.weight)]
    last = first + len(row.tokens.branches) - 1
    orders = ((first, last, row.label), (last, first, 1 - row.label))
    return [([(better, 1.0), (worse, 0.0)], row.weight * share) for better, worse, share in orders if share > 0]


def _stored(rows: Sequence[tuple[int, Row]], scorer: str, view: str, lengths: Tensor) -> dict[str, Tensor]:
    """What a scorer once said of these rows' edges. Every reply must be there: what is missing is never made up or computed anew."""
    replies: list[Sequence[float] | float] = []
    for number, row in rows:
        known, every = row.stored.get(scorer, ()), len(row.everything())
        if len(known) != every:
            raise RunFailed(f"row {number} has stored scores of `{scorer}` for {len(known)} of its {every} replies")
        end = every if view == "pairs" else every - len(row.extra)
        replies += [*known[: len(row.branches(view))], *known[len(row.tokens.branches) : end]]
    if isinstance(replies[0], float):
        return {"logp": _float(replies)}
    counts = [len(reply) for reply in replies]
    if counts != lengths.tolist():
        raise RunFailed(f"rows {[number for number, _ in rows]} have stored scores of `{scorer}` for other tokens than they train")
    return {"token_logp": torch.from_numpy(np.concatenate([np.asarray(reply, dtype=np.float32) for reply in replies]))}


def _long(values) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def _float(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
