"""`algo.beta: auto`: a beta that follows from how far a step of this run moves its pairs.

With h the difference of a pair's two log-ratios, the gradient of DPO's loss is -beta sigmoid(-beta h) grad h. The factor sigmoid(-beta h)
is 1/2 at the start, whatever beta is, and falls as pairs are learnt; how soon is what beta decides. Here it is chosen so that a typical
pair has the factor F after a step:

    s    = sqrt(sum_i w_i (change of h_i)^2 / sum_i w_i)        nats, over the pairs i of the second global batch and their row weights
                                                                w_i, by a step at the full rate optim.lr on the first one
    beta = log(1/F - 1) / s,   so that sigmoid(-beta s) = F

`auto` is F = 0.45, `auto:F` any other between 0 and 1/2; nearer to 1/2 is a weaker tie to the reference. The trial step is made with beta 1
and taken back. That is no circle: the loss is a function of beta h alone, so at h = 0 its gradient is beta times a vector that does not
depend on beta, and AdamW's first step does not depend on the length of its gradient. It is looked at on pairs that it was not made for,
since most runs meet a pair once or a few times. s follows from global batches, whatever processes and micro-batches they are divided among.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prefopt.data.batch import MicroBatch
from prefopt.errors import UserError
from prefopt.objectives.base import double
from prefopt.training.engine import Engine


def find_beta(engine: Engine, first: Sequence[MicroBatch], second: Sequence[MicroBatch], factor: float) -> tuple[float, float]:
    """(beta, s) for the gradient factor `factor`, from this rank's micro-batches of the `first` step, which is made, and of the `second`
    one, which is looked at; the same on all ranks. Policy and optimiser are left as they were. Raises `UserError` where the step moves
    nothing, or cannot be made."""
    device = engine.accelerator.device
    second = [micro.to(device) for micro in second]  # once: what they are scored at must be the same before and after
    kept = engine.parallel.state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        before, weight = _margins(engine, second)
        result = engine.step(first, engine.cfg.lr)
        change = _margins(engine, second)[0] - before
    engine.parallel.load(kept)
    squares, total = engine.sum_over_ranks(torch.stack([(weight * change**2).sum(), weight.sum()])).tolist()
    spread = math.sqrt(squares / total) if total else 0.0
    if result.skipped or not 0 < spread < math.inf:
        what = "its loss or gradient is not finite" if result.skipped else f"it moves pairs by {spread:g} nats"
        raise UserError(f"algo.beta=auto looks at a step at optim.lr={engine.cfg.lr:g}, and {what}; give algo.beta a number")
    return math.log(1 / factor - 1) / spread, spread


@torch.no_grad()
def _margins(engine: Engine, micros: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
    """(log-prob of chosen - that of rejected, row weight) of all pairs, fp64. What the reference says cancels in a change."""
    margins, weights = [], []
    was_training = engine.policy.training
    engine.policy.eval()
    try:
        for micro in micros:
            batch = engine.score(micro, engine.policy)
            logp = double(batch.logp())
            margins.append(logp[batch.pairs.chosen] - logp[batch.pairs.rejected])
            weights.append(double(batch.pairs.weight))
    finally:
        engine.policy.train(was_training)
    return torch.cat(margins), torch.cat(weights)
