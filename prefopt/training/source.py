"""Where the loop's batches come from. Offline: a fixed set of rows, in an order that (seed, epoch) decides. See also `online`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from prefopt.data.batch import MicroBatch, Row, build, split_step, step_rows
from prefopt.errors import UserError


@dataclass
class OfflineSource:
    """Steps over stored rows. `rank` of `world` processes gets its share of each step as micro-batches.

    Rows may stand in stages (`Row.stage`): these are gone through in order, and within a stage rows are shuffled as they are otherwise.
    The steps of the run are shared out to the stages in proportion to how many each needs for one pass over its rows, at least one.
    """

    rows: list[Row]
    view: str
    batch_size: int
    budget: int
    pad: int
    soft_labels: bool
    seed: int | str
    rank: int = 0
    world: int = 1
    layout: str = "rows"  # how the policy lays a micro-batch out, and whether it computes a shared prompt once
    share: bool = True
    total: int | None = None  # steps of the run, which stages share; None: one pass over the rows
    draws: Any = None  # of a policy that scores pictures: at which draws (`policies/noise.py`), new ones at each visit of a row
    waited: ClassVar = 0.0  # seconds that the last `step` spent on what is no training: none, its rows are there

    @property
    def metrics(self) -> dict[str, float]:
        """What a step's row says about where its batch came from."""
        return {}

    @cached_property
    def stages(self) -> list[list[int]]:
        """Row numbers of each stage, in order; all of them, if there is one stage only. Found once."""
        found: dict[int, list[int]] = {}
        for number, row in enumerate(self.rows):
            found.setdefault(row.stage, []).append(number)
        return [found[stage] for stage in sorted(found)]

    def steps(self, epochs: float) -> int:
        """Optimiser steps in so many passes over the rows. No step mixes stages, so each stage ends with a step that may be shorter."""
        stages = self.stages
        return max(1, len(stages), math.ceil(epochs * sum(-(-len(rows) // self.batch_size) for rows in stages)))

    def shares(self, total: int | None = None) -> list[tuple[list[int], int, int | str]]:
        """(row numbers, steps, seed) of each stage, of `total` steps in all. Raises `UserError` where there are fewer steps than stages."""
        stages = self.stages
        if len(stages) == 1:
            return [(stages[0], total or self.steps(1), self.seed)]
        sizes, end, out = [-(-len(rows) // self.batch_size) for rows in stages], 0, []
        total = total or sum(sizes)
        if total < len(stages):
            raise UserError(f"train.steps={total} is less than the {len(stages)} stages of the data; each needs at least one step")
        for i, rows in enumerate(stages):
            begin, left = end, len(stages) - 1 - i  # every later stage keeps a step
            end = min(max(begin + 1, round(total * sum(sizes[: i + 1]) / sum(sizes))), total - left)
            out.append((rows, end - begin, f"{self.seed} stage {i}"))
        return out

    def chosen(self, number: int) -> list[int]:
        """Row numbers of optimiser step `number` (from 0). Beyond the last stage's share it goes on with that stage."""
        return self._place(number)[0]

    def _place(self, number: int) -> tuple[list[int], int]:
        """(row numbers of optimiser step `number`, how often each was in a step of its stage before)."""
        shares = self.shares(self.total)
        stage = 0
        while stage < len(shares) - 1 and number >= shares[stage][1]:
            number, stage = number - shares[stage][1], stage + 1
        rows, _, seed = shares[stage]
        visit = number // -(-len(rows) // self.batch_size)
        return [rows[i] for i in step_rows(len(rows), self.batch_size, number, seed)], visit

    def begins(self, number: int) -> bool:
        """Whether optimiser step `number` is the first one of a stage."""
        shares = self.shares(self.total)
        return number in {sum(steps for _, steps, _ in shares[:i]) for i in range(len(shares))}

    def step(self, number: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimiser step `number` (from 0)."""
        return self.micro_batches(*self._place(number))

    def micro_batches(self, chosen: list[int], visit: int | None = None, view: str = "") -> list[MicroBatch]:
        """This rank's share of the rows `chosen`; equally many micro-batches on every rank. Pictures are scored at the draws of this
        `visit`, or at all that their rows hold."""
        return next(self._shared_out(chosen, visit, view or self.view, [self.rank]))

    def of_all_ranks(self, number: int) -> list[list[MicroBatch]]:
        """Every rank's micro-batches of optimiser step `number`."""
        return list(self._shared_out(*self._place(number), self.view, range(self.world)))

    def _shared_out(self, chosen: list[int], visit: int | None, view: str, ranks: Iterable[int]) -> Iterator[list[MicroBatch]]:
        rows = self.rows
        if self.draws is not None and visit is not None:
            rows = {r: self.draws.at(self.rows[r], visit) for r in chosen}
        parts = split_step(rows, chosen, view, self.budget, self.world, self.layout, self.share)
        filler = min(chosen, key=lambda r: rows[r].size(view, self.layout, self.share))
        for rank in ranks:
            micros = [build(rows, part, view, self.pad, self.soft_labels, filler) for part in parts[rank]]
            if self.draws is not None:
                for micro in micros:  # whatever is meant per token is meant per picture: more draws are a better look at the same one
                    micro.layout.lengths = torch.ones_like(micro.layout.lengths)
            yield micros

    def everything(self, view: str) -> list[MicroBatch]:
        """This rank's share of one pass over all rows."""
        return self.micro_batches(list(range(len(self.rows))), view=view)
