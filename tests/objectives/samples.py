"""Registered objectives, hyper-parameters drawn for them, and synthetic batches to call them on."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import random
import typing
from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from owned_samples import derived, pinned, random_steps, steps_of
from teacher_samples import STATED, compared, random_stated, stated, taught
from torch import Tensor

from prefopt.config.mixtures import expanded
from prefopt.config.strength import SD15, in_nats
from prefopt.data.batch import Row
from prefopt.data.tokenise import Branch, Tokens
from prefopt.objectives.base import PER_TOKEN, SHAPES, Batch, Demonstrations, Groups, Objective, Pairs, Rankings, Unary
from tests.extra_samples import extra_tokens, random_extra, row_with_extra, silenced, with_extra_edges, with_sums

LIVE = ("states", "layers")  # what a scorer hands to another one, and no objective sees
ROOT = Path(__file__).resolve().parents[2]
YAML = {path.stem: path for path in sorted((ROOT / "conf" / "algo").glob("*.yaml"))}
# What a golden number or a limit may pin.
NAMES = {"w", "l", "rw", "rl", "nw", "nl", "p", "m", "y", "r", "n", "d", "z", "t", "R", "G", "S", "tokens", "a", "b", "W", "L", "mid"}
NAMES |= {"o", "k", "v", "MW", "ML", "ZW", "ZL", "T", "XS", "X", "sw", "sl"} | STATED


@cache
def _read(slug: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(YAML[slug]), resolve=True)


def settings_of(slug: str) -> tuple[type[Objective], dict]:
    """The class that a file of conf/algo names, and its settings."""
    values = copy.deepcopy(_read(slug))
    values.pop("defaults", None)  # what it chooses from other groups
    if "parts" in values:  # of a mixture
        values["parts"] = expanded(values["parts"])
    values = in_nats(values, SD15)
    module, _, name = values.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name), values


def default(slug: str) -> Objective:
    cls, values = settings_of(slug)
    return cls(**values)


def _choices(annotation) -> list | None:
    if annotation is bool:
        return [False, True]
    return list(typing.get_args(annotation)) if typing.get_origin(annotation) is typing.Literal else None


def draw(cls: type[Objective], rng: random.Random, **pinned) -> Objective:
    """An objective with random hyper-parameters that its `require` rules allow."""
    types = typing.get_type_hints(cls)
    for _ in range(1000):
        values = {}
        for f in fields(cls):
            start = None if f.default is MISSING else f.default
            if f.name in pinned:
                values[f.name] = pinned[f.name]
            elif choices := _choices(types[f.name]):
                values[f.name] = rng.choice(choices)
            elif types[f.name] is int:
                values[f.name] = (start or 0) + rng.randint(0, 2)
            elif types[f.name] is float:
                values[f.name] = start * 10 ** rng.uniform(-0.7, 0.7) if start else rng.uniform(0, 0.5)
            else:
                values[f.name] = start
        try:
            return cls(**values)
        except ValueError:
            continue
    raise AssertionError(f"no settings of {cls.__name__} satisfy {cls.require}")


def drawn_parts(values: dict, rng: random.Random) -> dict:
    """The same parts of a mixture with weights and settings of their own; nothing for other objectives."""
    out = []
    for part in values.get("parts", []):
        module, _, name = part["_target_"].rpartition(".")
        made = draw(getattr(importlib.import_module(module), name), rng)
        out.append(part | {f.name: getattr(made, f.name) for f in fields(made)} | {"weight": rng.uniform(0.1, 2)})
    return {"parts": out} if out else {}


def several(slug: str, seed: int = 0, draws: int = 3) -> list[Objective]:
    """The YAML's settings, then `draws` random ones for each combination of the switches."""
    (cls, own), rng = settings_of(slug), random.Random(f"{slug} {seed}")
    types = typing.get_type_hints(cls)
    switches = {f.name: _choices(types[f.name]) for f in fields(cls) if _choices(types[f.name])}
    combinations = [dict(zip(switches, values, strict=True)) for values in itertools.product(*switches.values())]
    return [default(slug)] + [draw(cls, rng, **pinned, **drawn_parts(own, rng)) for pinned in combinations for _ in range(draws)]


def scored(objective: Objective, layout: Batch, tokens: dict[str, Tensor]) -> Batch:
    """The layout with exactly the quantities that the objective declares, made of token log-probs [N] per scorer."""
    scores: dict[str, dict[str, Tensor]] = {}
    for scorer, quantities in objective.quantities.items():
        token_logp = silenced(objective, layout, scorer, tokens[scorer])
        total = token_logp.new_zeros(layout.lengths.shape).index_add(0, layout.token_edge, token_logp)
        made = {"logp": total, "token_logp": token_logp, "reward": total, "step_logp": total}
        made |= taught(token_logp) if scorer == "teacher" else {}
        if scorer == "policy":
            made |= derived(layout, tokens) | compared(objective, tokens) | critic(objective, token_logp)
        made |= {name: t for name, t in tokens.items() if name in PER_TOKEN or name in SHAPES}  # `tokens` may state some of them
        scores[scorer] = {quantity: made[quantity] for quantity in quantities if quantity not in LIVE}
    return replace(layout, scores=scores)


def critic(objective: Objective, token_logp: Tensor) -> dict[str, Tensor]:
    """[N] what a network of the objective's own says of transitions."""
    return {"value": 0.5 + 0.1 * token_logp.sin()} if objective.stepwise else {}


def layout_of(lengths: list[int], **views) -> Batch:
    count = torch.tensor(lengths)
    return Batch(count, torch.repeat_interleave(torch.arange(len(lengths)), count), {}, **views)


def floats(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def random_scores(rng: random.Random, count: int) -> list[float]:
    """Best first, some of them equal, never all."""
    ends = [rng.uniform(-2, 0), rng.uniform(0.1, 2)]
    return sorted(ends + [rng.choice([*ends, rng.uniform(-2, 2)]) for _ in range(count - 2)], reverse=True)


def rankings(entries: list[list[tuple[int, float]]], weight: Tensor) -> Rankings:
    """The view of lists of (edge, score)."""
    flat = [(edge, number, score) for number, own in enumerate(entries) for edge, score in own]
    edge, place = (torch.tensor([e[i] for e in flat], dtype=torch.long) for i in (0, 1))
    return Rankings(edge, place, floats(score for *_, score in flat), weight)


def random_layout(objective: Objective, rng: random.Random, units: int, edges: int = 9) -> Batch:
    """`units` units over `edges` edges of unequal lengths. Edges are shared, out of order, and some are in no unit."""
    layout = layout_of([rng.randint(1, 6) for _ in range(edges)])
    layout.step = random_steps(layout, rng) if objective.steps else None
    weight = floats(rng.uniform(0.1, 3) for _ in range(units))
    if objective.view == "pairs":
        sides = [rng.sample(range(edges - 1), 2) for _ in range(units)]
        has = objective.columns
        label = floats(rng.choice([0.0, 1.0, rng.random()]) if "label" in has else 1.0 for _ in range(units))
        margin = floats(rng.uniform(-1, 2) if "margin" in has else 0.0 for _ in range(units))
        columns = [torch.tensor([s[i] for s in sides], dtype=torch.long) for i in (0, 1)]
        layout.pairs = Pairs(*columns, label, weight, margin)
        layout = with_extra_edges(objective, layout, rng)
    elif objective.view == "unary":
        order = rng.sample(range(edges), edges)
        mismatched = torch.tensor(order[:3] if objective.mismatched else [], dtype=torch.long)
        edge = torch.tensor([rng.choice(order[3:-1]) for _ in range(units)], dtype=torch.long)
        layout.unary = Unary(edge, torch.tensor([rng.random() < 0.5 for _ in range(units)], dtype=torch.bool), weight, mismatched)
    elif objective.view == "ranking":
        lists = [rng.sample(range(edges - 1), rng.randint(2, 4)) for _ in range(units)]
        layout.ranking = rankings([list(zip(own, random_scores(rng, len(own)), strict=True)) for own in lists], weight)
    elif objective.view == "groups":
        edge = torch.tensor(rng.sample(range(edges - 1), units), dtype=torch.long)
        group = edge[[i - i % 3 for i in range(units)]]
        layout.groups = Groups(edge, group, floats(rng.uniform(-2, 2) for _ in range(units)), weight)
    else:
        edge = torch.tensor(rng.sample(range(edges - 1), units), dtype=torch.long)
        layout.demonstrations = Demonstrations(edge, weight)
    return layout


def random_tokens(objective: Objective, layout: Batch, rng: random.Random) -> dict[str, Tensor]:
    """Log-probs; those of transitions lie near the policy's, or all would be beyond where ratios are clipped."""
    tokens = {scorer: floats(-rng.uniform(0.05, 3) for _ in layout.token_edge) for scorer in objective.quantities}
    return {scorer: tokens["policy"] + t / 100 if objective.stepwise and scorer != "policy" else t for scorer, t in tokens.items()}


def one_unit(objective: Objective, names: dict[str, float]) -> Batch:
    """A batch of a single unit with the scores `names` (see `NAMES`), whose tokens share the log-prob of their edge evenly."""
    assert names.keys() <= NAMES, f"unknown names {names.keys() - NAMES}"
    if objective.view == "groups":
        return _one_of_a_group(objective, names)
    if objective.view == "ranking":
        return _one_tree(objective, names) if "T" in names else _one_list(objective, names["S"])
    get = {"p": 1, "m": 0, "nw": 1, "nl": 1, "n": 1, "d": 1, "z": 0, "w": 0, "l": 0, "y": 0, "rw": 0, "rl": 0, "r": 0} | names
    get |= {"w": names.get("a", get["w"]), "l": names.get("b", get["l"])}  # a reward takes the place of the log-prob
    one, policy, reference = floats([1]), [], []
    if objective.view == "pairs":
        edges = [(get["nw"], get["w"], get["rw"]), (get["nl"], get["l"], get["rl"])]
        extra = 2 + torch.arange(len(objective.extra))[None]
        views = {"pairs": Pairs(torch.tensor([0]), torch.tensor([1]), floats([get["p"]]), one, floats([get["m"]]), extra)}
    elif objective.view == "unary":
        edges = [(get["n"], get["y"], get["r"]), (1, get["z"], 0.0)]
        views = {"unary": Unary(torch.tensor([0]), torch.tensor([bool(get["d"])]), one, torch.tensor([1]))}
        if "mid" in names:  # a unit of the other class, which weighs next to nothing, puts the midpoint there
            edges.append((1, 2 * get["mid"] - (get["y"] - get["r"]), 0.0))
            two = torch.tensor([0, 2]), torch.tensor([bool(get["d"]), not get["d"]]), floats([1, 1e-15])
            views = {"unary": Unary(*two, torch.tensor([1]))}
    else:
        edges = [(get["n"], get.get("t", get["y"] / get["n"]) * get["n"], get["r"])]
        views = {"demonstrations": Demonstrations(torch.tensor([0]), one)}
    sides = [[(logp / length, ref / length)] * length for length, logp, ref in edges]
    if "W" in names:  # token by token
        sides = [names["W"], names["L"]]
    sides += extra_tokens(objective, names) if objective.extra else []
    for side in sides:
        policy += [t for t, _ in side]
        reference += [s for _, s in side]
    layout = layout_of([len(side) for side in sides], **views)
    tokens = {s: floats(policy if s == "policy" else reference) for s in objective.quantities}
    if "slow" in objective.quantities:
        spread = ((names.get("sw", 0), get["nw"]), (names.get("sl", 0), get["nl"]))
        tokens["slow"] = floats(logp / n for logp, n in spread for _ in range(n))
    return scored(objective, layout, tokens | pinned(layout, names) | stated(layout, names))


def _one_of_a_group(objective: Objective, names: dict[str, Any]) -> Batch:
    """The unit and the others of its group, which have a reward but no weight; of transitions one alone."""
    if objective.stepwise:
        get = {"R": 0, "y": 0, "o": 0, "r": 0} | names
        layout = layout_of([1], groups=Groups(torch.tensor([0]), torch.tensor([0]), floats([get["R"]]), floats([1])))
        given = {"policy": floats([get["y"]]), "previous": floats([get["o"]]), "reference": floats([get["r"]])}
        batch = scored(objective, layout, {s: given[s] for s in objective.quantities})
        for name, quantity in (("k", "divergence"), ("v", "value")):
            if name in names and quantity in batch.scores["policy"]:
                batch.scores["policy"][quantity] = floats([names[name]])
        return batch
    others = list(names["G"])
    others.remove(names["R"])
    count, tokens = 1 + len(others), [*names["tokens"], *([(0, 0, 0)] * len(others))]
    weight = floats([1, *(0 for _ in others)])
    groups = Groups(torch.arange(count), torch.zeros(count, dtype=torch.long), floats([names["R"], *others]), weight)
    layout = layout_of([len(names["tokens"]), *(1 for _ in others)], groups=groups)
    scores = dict(zip(("policy", "previous", "reference"), map(floats, zip(*tokens, strict=True)), strict=True))
    return scored(objective, layout, {s: scores[s] for s in objective.quantities})


def _one_list(objective: Objective, entries: list[tuple]) -> Batch:
    """The unit S, whose tokens share the log-prob of their edge evenly."""
    each = [(y / n, (r or 0) / n) for y, r, n, _ in entries for _ in range(n)]
    layout = layout_of([n for _, _, n, _ in entries], ranking=rankings([[(e, v) for e, (*_, v) in enumerate(entries)]], floats([1])))
    tokens = dict(zip(("policy", "reference"), map(floats, zip(*each, strict=True)), strict=True))
    return scored(objective, layout, {s: tokens[s] for s in objective.quantities})


def _one_tree(objective: Objective, names: dict[str, Any]) -> Batch:
    """The unit whose branches are the steps T, with the scores of S."""
    entry, step, ratio, hidden = zip(*steps_of(names), strict=True)
    ranking = rankings([[(e, v) for e, (*_, v) in enumerate(names["S"])]], floats([1]))
    layout = layout_of([entry.count(e) for e in range(len(names["T"]))], ranking=ranking, step=torch.tensor(step))
    given = {"policy": floats(ratio), "reference": 0 * floats(ratio), "hidden": torch.tensor(hidden, dtype=torch.float64)}
    return scored(objective, layout, given)


def random_names(objective: Objective, rng: random.Random) -> dict[str, float]:
    """Values for every name that a formula may use in this view."""
    if objective.view == "pairs" and "reward" in objective.quantities["policy"]:
        return {"a": rng.uniform(-3, 3), "b": rng.uniform(-3, 3), "p": rng.random(), "m": rng.uniform(-1, 2)}
    if objective.view == "pairs":
        nw, nl = rng.randint(1, 5), rng.randint(1, 5)
        logps = {k: -n * rng.uniform(0.05, 3) for k, n in (("w", nw), ("rw", nw), ("l", nl), ("rl", nl))}
        logps |= {"nw": nw, "nl": nl, "p": rng.random() if "label" in objective.columns else 1.0,
                  "m": rng.uniform(-1, 2) if "margin" in objective.columns else 0.0}
        logps |= random_extra(objective, rng, nw, nl) | random_stated(objective, rng, nw, nl)
        return logps | ({k: -rng.uniform(0.05, 9) for k in ("sw", "sl")} if "slow" in objective.quantities else {})
    if objective.view == "ranking":
        count = rng.randint(2, 4)
        lengths = [rng.randint(1, 5) for _ in range(count)]
        ends = [[-n * rng.uniform(0.05, 3) for n in lengths] for _ in range(2)]
        return {"S": list(zip(*ends, lengths, random_scores(rng, count), strict=True))}
    if objective.stepwise and objective.view == "groups":
        return {"R": rng.uniform(-7, 7)} | {name: rng.uniform(-2, 2) for name in "yov"} | {"k": rng.uniform(0, 2)}
    if objective.view == "groups":
        rewards = [rng.uniform(-2, 2) for _ in range(rng.randint(2, 4))]
        tokens = [tuple(-rng.uniform(0.05, 3) for _ in range(3)) for _ in range(rng.randint(1, 5))]
        return {"R": rng.choice(rewards), "G": rewards, "tokens": tokens}
    if objective.view == "unary":
        n = rng.randint(1, 5)
        batch = {"z": rng.uniform(0, 3)} if objective.mismatched else {"mid": rng.uniform(-3, 3)}
        return {"n": n, "y": -n * rng.uniform(0.05, 3), "r": -n * rng.uniform(0.05, 3), "d": rng.randint(0, 1)} | batch
    n = rng.randint(1, 5)
    return {"n": n, "y": -n * rng.uniform(0.05, 3)}


def with_derived(names: dict[str, float]) -> dict[str, float]:
    """The names plus h, mu and sd of a batch of one pair, and t, y and n of its chosen reply."""
    names = with_sums(names)
    if "y" in names or "r" in names:
        names = {"zb": max(0, names.get("y", 0) - names.get("r", 0))} | names  # of a batch of one
    for side, tokens in (("w", names["W"]), ("l", names["L"])) if "W" in names else ():
        given = {side: math.fsum(t for t, _ in tokens), f"r{side}": math.fsum(s for _, s in tokens), f"n{side}": len(tokens)}
        names = given | names
    if "w" in names:
        names = {"rw": 0, "rl": 0, "sw": 0, "sl": 0, "nw": 1, "nl": 1, "p": 1, "m": 0} | names
        names["h"] = (names["w"] - names["rw"]) - (names["l"] - names["rl"])
        names |= {"t": names["w"] / names["nw"], "y": names["w"], "n": names["nw"]}
        spelt = ("W w rw nw".split(), "L l rl nl".split())
        even = {side: [(names[s] / names[n], names[r] / names[n])] * names[n] for side, s, r, n in spelt}
        names = {"Q": [(1, names["h"])]} | even | names
        names["mu"], names["sd"] = (names["w"] - names["rw"]) / names["nw"] - (names["l"] - names["rl"]) / names["nl"], 0.0
    return {"p": 1, "m": 0} | names if "a" in names else names


def branch(rng: random.Random, prompt_only: int = 0) -> Branch:
    """A reply of random length; about one token in four is not trained, the last one always is."""
    count = rng.randint(1, 6)
    mask = [False] * prompt_only + [rng.random() < 0.75 for _ in range(count - 1)] + [True]
    return Branch([rng.randint(4, 99) for _ in mask], mask, True)


def random_rows(objective: Objective, rng: random.Random, count: int) -> list[Row]:
    """Tokenised rows of every kind that the objective's view reads, with the optional columns that it declares."""
    has, rows = objective.columns, []
    for i in range(count):
        extra = {"weight": rng.choice([0.5, 1.0, 2.0]) if "weight" in has else 1.0}
        replies, kind = 2, "pair"
        if objective.view == "pairs":
            if i % 3 == 2:
                replies, kind = rng.randint(3, 4), "ranking_all"
                extra["scores"] = sorted((rng.random() for _ in range(replies)), reverse=True)
            else:  # an objective without soft labels gets such a row as two weighted pairs
                extra["label"] = rng.choice([1.0, 0.75, 0.25])
            extra["margin"] = rng.uniform(0, 1) if "margin" in has else 0.0
        elif objective.view == "unary":
            if i % 2:
                replies, kind, extra["desirable"] = 1, "unary", [rng.random() < 0.5]
            else:
                extra["label"] = rng.choice([1.0, 0.75])
            if objective.mismatched:
                extra["mismatched"] = [branch(rng, prompt_only=i % 2) for _ in range(replies)]
        elif objective.view == "ranking":
            if i % 3:
                replies, kind = rng.randint(3, 4), "ranking_all"
                extra["scores"] = random_scores(rng, replies)
            else:  # a soft label makes two weighted lists of it
                extra["label"] = rng.choice([1.0, 0.75, 0.25])
        elif objective.view == "groups":
            replies, kind = rng.randint(2, 4), "group"
            extra["scores"] = [rng.uniform(-2, 2) for _ in range(replies)]
        else:
            replies, kind = rng.randint(1, 2), "demonstration"
        prompt = [rng.randint(4, 99) for _ in range(rng.randint(1, 8))]
        row = Row(Tokens(prompt, [branch(rng) for _ in range(replies)]), kind, **extra)
        rows.append(row_with_extra(objective, row, rng))
    for reply in [b for row in rows for b in row.tokens.branches] if objective.steps else []:
        reply.steps = sorted(rng.randint(0, 3) for _ in reply.ids)
    return rows
