"""Before the first step: does a stored transition have the probability again that it was drawn with?"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from accelerate.utils import gather_object

from prefopt.data.batch import MicroBatch
from prefopt.errors import RunFailed
from prefopt.training.engine import Engine

# Largest |ratio - 1| of a stored transition, with log-probs that are means over latent dims. Both are computed in fp32 from the network's
# prediction, which other micro-batches round differently; a bf16 network does so far more.
BOUND = {"fp32": 1e-5, "bf16": 2e-2}


def replay_check(engine: Engine, micros: list[MicroBatch], precision: str) -> dict[str, float]:
    """Scores the first step's transitions as training will, and compares with what was stored when they were drawn. Returns the largest
    |ratio - 1| of all processes as `replay`; all of them raise `RunFailed` with the likely cause where it is above the bound. Nothing for
    other sources."""
    sampling = getattr(engine.policy, "sampling", None)
    if sampling is None:
        return {}
    bound = BOUND[precision] * (1 if sampling.reduction == "mean" else math.prod(engine.policy.encodings.shape) ** 0.5)
    was_training, mine = engine.policy.training, []
    for training in (True, False):
        engine.policy.train(training)
        mine.append(max(_gap(engine, micro) for micro in micros))
    mine.append(max((_gap(engine, micro.only(torch.arange(len(micro.tree)) == 0)) for micro in micros[:1]), default=0.0))
    engine.policy.train(was_training)
    gap, resting, singly = map(max, zip(*(gather_object([mine]) if engine.world > 1 else [mine]), strict=True))
    if gap <= bound:
        return {"replay": gap}
    if resting <= bound:
        cause = "the network drops out parts of itself while it trains; set model.dropout=0 and model.lora.dropout=0"
    elif singly <= bound:
        cause = "the network's answer depends on the size of its batch; set sampler.batch_size and train.micro_batch_tokens alike"
    else:
        cause = "the latents that were stored are not those that were drawn, or guidance or weights have changed since"
    raise RunFailed(f"replay check: a stored transition has a probability ratio of 1 {gap:+.3g} under the very weights that drew it (at "
                    f"most {bound:.3g} for {precision}). Likely cause: {cause}. train.self_check=false skips this check.")


@torch.no_grad()
def _gap(engine: Engine, micro: MicroBatch) -> float:
    """The largest |ratio - 1|; infinite where it is not a number."""
    micro = replace(micro, made=None).to(engine.accelerator.device)
    ratio = (engine.policy(micro)["step_logp"] - micro.stored["previous"]["token_logp"]).exp()
    return float((ratio - 1).abs().nan_to_num(nan=float("inf")).max())
