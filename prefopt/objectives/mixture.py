"""Several objectives at once, each with a weight."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefopt.objectives.base import Batch, Demonstrations, Objective, Term, Terms, Unary


@dataclass
class Part:
    """An objective of a mixture. Its terms and metrics are called PART_..."""

    name: str
    objective: Objective
    weight: float


@dataclass
class Mixture(Objective):
    """Mixture: a weighted sum of objectives on the same rows, such as multimodal MPO's (arXiv 2411.10442).

    L = sum over parts of weight_i L_i; each part keeps its terms, its means and its denominators
    `parts` lists {algo: NAME, weight: w, and settings of that algo}. Where the rows are pairs, a part on single replies takes the chosen
    ones as good and the rejected ones as bad, and one on demonstrations takes the chosen ones; where a pair has the soft label p, that
    holds with the weight p, and the other way round with 1 - p.
    MPO is 0.8 DPO + 0.2 BCO + SFT. Its BCO is a sum over both replies of a pair, so twice our mean, which is why our weight is 0.4; its
    shift is a moving average of rewards, ours (logged as bco_delta) the midpoint of the step; TRL has none in `bco_pair`. Its SFT is a
    mean per reply; ours one over all tokens, as TRL has it. Rewards: those of the first part. Ranges: the loss starts at the weighted sum
    of what the parts start at; each term is logged as loss/PART_TERM. When: one method cures what another lacks, as SFT does DPO's falling
    likelihoods. Limits: parts can pull against each other; those that need more than log-probs of the rows' own replies are refused.
    """

    parts: list = field(default_factory=list)

    paper: ClassVar = "2411.10442"
    formula: ClassVar = {}
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "nw": 4, "parts": [
            {"_target_": "prefopt.objectives.pairwise.DPO", "weight": 0.8, "beta": 0.1},
            {"_target_": "prefopt.objectives.unary.SFT", "weight": 0.5},
        ]}, {"dpo_preference": 0.496766, "sft_nll": 1.25}),
    )  # fmt: skip

    def __post_init__(self):
        self.mixed = parts_of(self.parts)
        for name, value in united([part.objective for part in self.mixed]).items():
            setattr(self, name, value)  # over what the class says
        self.formula = {f"{part.name}_{term}": f"{part.weight!r} * ({filled(text, part.objective)})"
                        for part in self.mixed for term, text in part.objective.formula.items()}

    def __call__(self, batch: Batch) -> Terms:
        terms, metrics = [], {}
        for part in self.mixed:
            seen = read_as(batch, part.objective.view, self.view)
            made = part.objective(seen)
            terms += [Term(f"{part.name}_{t.name}", t.values, t.unit, part.weight * t.weight, seen) for t in made.terms]
            metrics |= {f"{part.name}_{name}": value for name, value in made.metrics.items()}
        return Terms(terms, metrics)

    def rewards(self, batch: Batch) -> Tensor:
        return self.mixed[0].objective.rewards(batch)


def parts_of(specs: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The parts that `{_target_: class, weight: 1.0, algo: name, settings}` describe. Without `algo` a part is called by its class."""
    out: list[Part] = []
    for spec in specs:
        settings = {key: value for key, value in spec.items() if key not in ("_target_", "weight", "algo")}
        module, _, cls = spec["_target_"].rpartition(".")
        name = spec.get("algo") or cls.lower()
        count = sum(part.name.rstrip("0123456789") == name.rstrip("0123456789") for part in out)
        made = getattr(importlib.import_module(module), cls)(**settings)
        out.append(Part(f"{name}{count + 1}" if count else name, made, float(spec.get("weight", 1.0))))
    if not out:
        raise ValueError("a mixture needs parts, such as parts=[{algo: dpo, weight: 0.8}, {algo: sft, weight: 0.2}]")
    return out


def united(parts: Sequence[Objective]) -> dict[str, Any]:
    """What a mixture declares, from what its parts do. `config.objective_source` says the same of classes that are not imported."""
    view = next(v for v in ("pairs", "unary", "demonstrations", "ranking", "groups") if any(p.view == v for p in parts))
    quantities: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for scorer, wanted in part.quantities.items():
            quantities[scorer] = tuple(dict.fromkeys((*quantities.get(scorer, ()), *wanted)))
    own = [p for p in parts if p.view == view]
    further = next((p for p in parts if p.extra), parts[0])  # at most one has extra sequences
    steps = {p.first_step for p in parts}
    return {
        "view": view, "quantities": quantities, "coupling": "global" if any(p.coupling == "global" for p in parts) else "local",
        # A column must be made use of by each part that reads the rows as they are.
        "columns": tuple(c for c in own[0].columns if all(c in p.columns for p in own)),
        "proper_likelihood": any(p.proper_likelihood for p in parts), "mismatched": any(p.mismatched for p in parts),
        "extra": further.extra, "extra_scorers": further.extra_scorers,
        "min_batch": max(p.min_batch for p in parts), "starts_level": all(p.starts_level and "reference" in p.quantities for p in parts),
        "first_step": next(s for s in ("astray", "gap", "apart") if s in steps),
    }  # fmt: skip


def read_as(batch: Batch, view: str, rows: str) -> Batch:
    """The batch as an objective with this `view` reads it, where its rows were laid out as `rows`.

    A pair with the soft label p is two good and two bad replies, of weights p and 1 - p, or two demonstrations: the first reply with the
    weight p, the second with 1 - p. ValueError where there is no such reading.
    """
    if view == rows:
        return batch
    if (rows, view) == ("pairs", "unary"):
        pairs = batch.pairs
        edge, good = torch.cat([pairs.chosen, pairs.rejected] * 2), torch.ones_like(pairs.chosen, dtype=torch.bool)
        sure, other = pairs.weight * pairs.label, pairs.weight * (1 - pairs.label)
        unary = Unary(edge, torch.cat([good, ~good, ~good, good]), torch.cat([sure, sure, other, other]), edge[:0])
        return replace(batch, pairs=None, unary=unary)
    if (rows, view) == ("pairs", "demonstrations"):
        pairs = batch.pairs
        edge, weight = torch.cat([pairs.chosen, pairs.rejected]), torch.cat([pairs.weight * pairs.label, pairs.weight * (1 - pairs.label)])
        return replace(batch, pairs=None, demonstrations=Demonstrations(edge, weight))
    if (rows, view) == ("unary", "demonstrations"):
        unary = batch.unary
        return replace(batch, unary=None, demonstrations=Demonstrations(unary.edge, unary.weight * unary.desirable))
    raise ValueError(f"{rows} cannot be read as {view}")


def filled(formula: str, objective: Objective) -> str:
    """A formula with the objective's settings in the place of their names."""
    for f in fields(objective):
        value = getattr(objective, f.name)
        text = f"({value!r})" if isinstance(value, (int, float)) and value < 0 else repr(value)
        formula = re.sub(rf"\b{re.escape(f.name)}\b", lambda _, text=text: text, formula)
    return formula
