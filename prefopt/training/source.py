"""Where the loop's batches come from. Offline: a fixed set of rows, in an order that (seed, epoch) decides. See also `online`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from prefopt.data.batch import MicroBatch, Row, build, split_step, step_rows


@dataclass
class OfflineSource:
    """Steps over stored rows. `rank` of `world` processes gets its share of each step as micro-batches."""

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
    waited: ClassVar = 0.0  # seconds that the last `step` spent on what is no training: none, its rows are there

    @property
    def metrics(self) -> dict[str, float]:
        """What a step's row says about where its batch came from."""
        return {}

    def steps(self, epochs: float) -> int:
        """Optimiser steps in so many passes over the rows."""
        return max(1, math.ceil(epochs * math.ceil(len(self.rows) / self.batch_size)))

    def step(self, number: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimiser step `number` (from 0)."""
        return self.micro_batches(step_rows(len(self.rows), self.batch_size, number, self.seed), self.view)

    def micro_batches(self, chosen: list[int], view: str) -> list[MicroBatch]:
        """This rank's share of the rows `chosen`; equally many micro-batches on every rank."""
        mine = split_step(self.rows, chosen, view, self.budget, self.world, self.layout, self.share)[self.rank]
        filler = min(chosen, key=lambda r: self.rows[r].size(view, self.layout, self.share))
        return [build(self.rows, part, view, self.pad, self.soft_labels, filler) for part in mine]

    def everything(self, view: str) -> list[MicroBatch]:
        """This rank's share of one pass over all rows."""
        return self.micro_batches(list(range(len(self.rows))), view)
