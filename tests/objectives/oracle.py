"""The oracle: evaluates the `formula` strings of objectives one unit at a time, in decimal arithmetic with 60 digits.

It shares no code with the objectives: no tensors, no log-sigmoid tricks. Sixty digits and an unbounded exponent make the naive
expressions exact enough at any log-ratio, and a float64 or float32 implementation is compared with the result.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from fractions import Fraction
from functools import cache

from owned_samples import degrees_of, masks_of, tree_of
from teacher_samples import STATED, stated_of

from prefopt.objectives.base import Batch
from tests.extra_samples import extra_of

EXACT = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)


def sigmoid(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def expm1(x: Decimal) -> Decimal:
    return x.exp() - 1


def mean(values) -> Decimal:
    values = list(values)
    return sum(values) / len(values)


def std(values) -> Decimal:
    """With n - 1; 0 for a single value."""
    middle = mean(values)
    return (sum((v - middle) ** 2 for v in values) / max(len(values) - 1, 1)).sqrt()


def rank(place: int, entries) -> int:
    """1-based place of an entry of a list that is sorted by log-ratio in hundredths of a nat, the largest first; ties stay in order."""
    ratios = [round(100 * (y - r)) for y, r, *_ in entries]
    return 1 + sum(x > ratios[place] or (x == ratios[place] and i < place) for i, x in enumerate(ratios))


def win_rate(place: int, entries) -> Decimal:
    """Mean over the others of the probability that this entry beats them."""
    return mean(sigmoid(entries[place][3] - v) for i, (*_, v) in enumerate(entries) if i != place)


def cosine(a, b) -> Decimal:
    """Of the angle between two vectors."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a) * sum(y * y for y in b)).sqrt()


FUNCTIONS = {
    "log": lambda x: x.ln(), "exp": lambda x: x.exp(), "expm1": expm1, "log1p": lambda x: (1 + x).ln(), "sigmoid": sigmoid,
    "sqrt": lambda x: x.sqrt(), "tanh": lambda x: 2 * sigmoid(2 * x) - 1, "abs": abs, "max": max, "min": min,
    "mean": mean, "std": std, "sg": lambda x: x,
    "zip": zip, "cos": cosine, "sum": sum, "len": len, "enumerate": enumerate, "rank": rank, "win_rate": win_rate,
}


class _Literals(ast.NodeTransformer):
    """Turns every number of a formula into a call that makes the exact decimal."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if type(node.value) not in (int, float):
            return node
        call = ast.Call(ast.Name("number", ast.Load()), [ast.Constant(repr(node.value))], [])
        return ast.copy_location(call, node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return ast.copy_location(ast.Subscript(self.visit(node.value), node.slice, node.ctx), node)  # an index stays a whole number


@cache
def _compiled(formula: str):
    return compile(ast.fix_missing_locations(_Literals().visit(ast.parse(formula, mode="eval"))), formula, "eval")


def evaluate(formula: str, names: Mapping[str, object]) -> float:
    """The value of `formula`. Floats in `names` are taken exactly; truth values and strings stay what they are."""
    with localcontext(EXACT):
        return float(eval(_compiled(formula), {"__builtins__": {}, "number": Decimal, **FUNCTIONS, **_exact(dict(names))}))


def _exact(value):
    if isinstance(value, dict):
        return {k: _exact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_exact(v) for v in value)
    return Decimal(value) if type(value) in (int, float) else value


def units(batch: Batch, unit: str) -> list[tuple[dict[str, float], float]]:
    """(the names a formula may use, weight from the data) of each unit of a batch, read from its lists one by one."""
    policy, reference = ({"logp" if name == "step_logp" else name: tensor.tolist() for name, tensor in batch.scores.get(scorer, {}).items()}
                         for scorer in ("policy", "reference"))
    lengths = batch.lengths.tolist()
    if unit == "pair":
        pairs = [_pair(policy, reference, lengths, *row) for row in _rows(batch.pairs)]
        return [(names | _moments(pairs), weight) for names, weight in pairs]
    if unit == "prompt":
        return _lists(batch.ranking, policy, reference, lengths)
    if unit == "completion" and batch.groups:
        return _grouped(batch)
    if unit == "completion":
        return _completions(batch, policy, reference, lengths)
    assert unit == "token", f"no formula is defined for the unit {unit!r}"
    rows = (
        [(edge, weight) for edge, weight in _rows(batch.demonstrations)] if batch.demonstrations
        else [(chosen, weight) for chosen, _, _, weight, _, _ in _rows(batch.pairs)]
    )
    out = []
    for token, edge in enumerate(batch.token_edge.tolist()):
        weights = [weight for e, weight in rows if e == edge]
        if weights:
            own = {"t": policy["token_logp"][token]} if "token_logp" in policy else {}
            out.append(({"y": policy["logp"][edge], "n": lengths[edge]} | own, math.fsum(weights)))
    return out


def _rows(view) -> list[tuple]:
    return list(zip(*(column.tolist() for column in vars(view).values()), strict=True))


def _pair(policy, reference, lengths, chosen, rejected, label, weight, margin, extra) -> tuple[dict[str, float], float]:
    if "reward" in policy:
        return {"a": policy["reward"][chosen], "b": policy["reward"][rejected], "p": label, "m": margin}, weight
    names = {"nw": lengths[chosen], "nl": lengths[rejected], "p": label, "m": margin}
    names |= {"w": policy["logp"][chosen], "l": policy["logp"][rejected]}
    if "logp" in reference:
        names |= {"rw": reference["logp"][chosen], "rl": reference["logp"][rejected]}
        names["h"] = (names["w"] - names["rw"]) - (names["l"] - names["rl"])
    return names, weight


def _moments(pairs: list[tuple[dict[str, float], float]]) -> dict[str, float]:
    """Mean and standard deviation over the batch, by weight, of the pairs' difference of log-ratios per token."""
    if not pairs or "rw" not in pairs[0][0]:
        return {}
    total = math.fsum(weight for _, weight in pairs)
    gaps = [((n["w"] - n["rw"]) / n["nw"] - (n["l"] - n["rl"]) / n["nl"], weight) for n, weight in pairs]
    mu = math.fsum(weight * gap for gap, weight in gaps) / total
    return {"mu": mu, "sd": math.sqrt(math.fsum(weight * (gap - mu) ** 2 for gap, weight in gaps) / total)}


def _completions(batch: Batch, policy, reference, lengths) -> list[tuple[dict[str, float], float]]:
    out, common = [], {}
    if "logp" in reference:
        drift = [policy["logp"][e] - reference["logp"][e] for e in batch.unary.mismatched.tolist()]
        common["z"] = max(0.0, math.fsum(drift) / len(drift)) if drift else 0.0
    columns = (batch.unary.edge.tolist(), batch.unary.desirable.tolist(), batch.unary.weight.tolist())
    if "logp" in reference:
        weights = columns[2]
        ratios = [policy["logp"][e] - reference["logp"][e] for e in columns[0]]
        common["zb"] = max(0.0, math.fsum(w * g for w, g in zip(weights, ratios, strict=True)) / (math.fsum(weights) or 1))
        common["mid"] = _midpoint([(policy["logp"][e] - reference["logp"][e], d, w) for e, d, w in zip(*columns, strict=True)])
    for edge, desirable, weight in zip(*columns, strict=True):
        names = {"y": policy["logp"][edge], "n": lengths[edge], "d": int(desirable)} | common
        if "logp" in reference:
            names["r"] = reference["logp"][edge]
        out.append((names, weight))
    return out


def _midpoint(rows: list[tuple[float, bool, float]]) -> float:
    """Middle of the weighted means of both classes of (value, class, weight); one that no row has weight in is left out."""
    means = []
    for kind in (True, False):
        own = [(value, weight) for value, is_good, weight in rows if is_good is kind and weight > 0]
        if own:
            means.append(math.fsum(v * w for v, w in own) / math.fsum(w for _, w in own))
    return math.fsum(means) / max(len(means), 1)


def _grouped(batch: Batch) -> list[tuple[dict[str, object], float]]:
    rows, out = _rows(batch.groups), []
    if "step_logp" in batch.scores["policy"]:
        return [({"R": reward, **transition_of(batch, edge)}, weight) for edge, _, reward, weight in rows]
    tokens = [batch.scores[scorer]["token_logp"].tolist() for scorer in ("policy", "previous", "reference")]
    for edge, group, reward, weight in rows:
        own = [numbers for e, *numbers in zip(batch.token_edge.tolist(), *tokens, strict=True) if e == edge]
        out.append(({"R": reward, "G": [r for _, g, r, _ in rows if g == group], "tokens": own}, weight))
    return out


def transition_of(batch: Batch, edge: int) -> dict[str, float]:
    """y, o, k and v of an edge that is a transition; where it has several tokens, sums of what is said of each, and the mean of v."""
    names = {"y": ("policy", "step_logp"), "o": ("previous", "step_logp"), "k": ("policy", "divergence"), "v": ("policy", "value")}
    found = {name: batch.scores[scorer][quantity].tolist() for name, (scorer, quantity) in names.items()
             if quantity in batch.scores.get(scorer, {})}
    own = [place for place, e in enumerate(batch.token_edge.tolist()) if e == edge]
    share = {"v": 1 / len(own)}
    return {name: values[edge] if name in "yo" else share.get(name, 1) * math.fsum(values[place] for place in own)
            for name, values in found.items()}


def _lists(ranking, policy, reference, lengths) -> list[tuple[dict[str, object], float]]:
    entries, out = list(zip(ranking.edge.tolist(), ranking.list.tolist(), ranking.score.tolist(), strict=True)), []
    for number, weight in enumerate(ranking.weight.tolist()):
        own = [(edge, score) for edge, place, score in entries if place == number]
        told = reference.get("logp", {e: None for e, _ in own})
        out.append(({"S": [(policy["logp"][e], told[e], lengths[e], score) for e, score in own]}, weight))
    return out


def _tokens_of_sides(batch: Batch, pairs: list[tuple[dict, float]]) -> None:
    """Adds W and L: (log-prob, that under the reference) of each token of the chosen and of the rejected reply."""
    policy, tokens = batch.scores["policy"]["token_logp"].tolist(), {}
    told = batch.scores.get("reference", {}).get("token_logp")
    reference = [0] * len(policy) if told is None else told.tolist()
    for edge, t, s in zip(batch.token_edge.tolist(), policy, reference, strict=True):
        tokens.setdefault(edge, []).append((t, s))
    for (names, _), chosen, rejected in zip(pairs, batch.pairs.chosen.tolist(), batch.pairs.rejected.tolist(), strict=True):
        names |= {"W": tokens[chosen], "L": tokens[rejected]}


def _matches(pairs: list[tuple[dict, float]], paired: bool) -> None:
    """Adds Q to each pair: mass is moved from the sorted left to the sorted right numbers, the smallest first, in exact fractions."""
    if paired:
        left, right = ([names[a] - names[b] for names, _ in pairs] for a, b in (("w", "l"), ("rw", "rl")))
    else:
        left, right = ([names[a] - names[b] for names, _ in pairs] for a, b in (("w", "rw"), ("l", "rl")))
    free = [Fraction(weight) for _, weight in pairs]
    takers = sorted(range(len(pairs)), key=right.__getitem__)
    for i in sorted(range(len(pairs)), key=left.__getitem__):
        names, weight = pairs[i]
        names["Q"], mass = [], Fraction(weight)
        while mass:
            j = takers[0]
            moved = min(mass, free[j])
            names["Q"].append((float(moved / Fraction(weight)), left[i] - right[j]))
            mass, free[j] = mass - moved, free[j] - moved
            if not free[j]:
                takers.pop(0)


def expected(objective, batch: Batch, name: str, unit: str) -> tuple[list[float], list[float]]:
    """(values, weights) of the term `name` of an objective on a batch, one per unit."""
    found, symbols = units(batch, unit), set(re.findall(r"\w+", objective.formula[name]))
    if "W" in symbols:
        _tokens_of_sides(batch, found)
    if symbols & STATED:
        for (names, _), own in zip(found, stated_of(batch, symbols), strict=True):
            names |= own
    if "Q" in symbols:
        _matches(found, objective.paired)
    if "sw" in symbols:
        slow = batch.scores["slow"]["logp"].tolist()
        for (names, _), chosen, rejected in zip(found, batch.pairs.chosen.tolist(), batch.pairs.rejected.tolist(), strict=True):
            names |= {"sw": slow[chosen], "sl": slow[rejected]}
    if "T" in symbols:
        for number, (names, _) in enumerate(found):
            names["T"] = tree_of(batch, batch.ranking.edge[batch.ranking.list == number].tolist())
    if "MW" in symbols:
        for (names, _), chosen, rejected in zip(found, batch.pairs.chosen.tolist(), batch.pairs.rejected.tolist(), strict=True):
            names |= {"MW": masks_of(batch, chosen), "ML": masks_of(batch, rejected)}
    if "ZW" in symbols:
        for pair, (names, _) in enumerate(found):
            names |= {"ZW": degrees_of(batch, pair, 0), "ZL": degrees_of(batch, pair, 1)}
    if symbols & {"X", "XS"}:
        for (names, _), extra in zip(found, extra_of(batch), strict=True):
            names |= extra
    return [evaluate(objective.formula[name], vars(objective) | names) for names, _ in found], [weight for _, weight in found]
