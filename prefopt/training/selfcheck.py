"""Before the first step: is the policy equal to the reference it claims to start from, and is the loss what theory says?"""

from __future__ import annotations

from dataclasses import replace

import torch

from prefopt.errors import RunFailed
from prefopt.objectives.base import reduce_terms, total_weights
from prefopt.training.coupling import join
from prefopt.training.engine import Engine

# Largest policy - reference difference of a sequence log-prob, in nats. Both score the same padded rows with the same kernels, so the
# difference is 0 but for kernels that choose their order of summation at run time; bf16 leaves room for those.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.02}


def self_check(engine: Engine, micros: list, precision: str, reference_is_initial: bool) -> dict[str, float]:
    """Scores the first step's rows without gradient. Raises `RunFailed` with the likely cause; returns what was measured: `loss`, and
    with a reference `theory` and `policy_minus_reference` (nats, largest over the replies).

    Theory: with policy = reference the loss depends on the data's labels alone (ln 2 for DPO, 1 / (4 tau^2) for IPO), so it must equal
    the objective's value when the reference's scores are replaced by the policy's own. A reference that is meant to be another policy
    (`reference_is_initial` false) is measured and not refused.
    """
    was_training = engine.policy.training
    engine.policy.eval()
    try:
        with torch.no_grad():
            batch = join([engine.score(m.to(engine.accelerator.device), engine.policy) for m in micros])
            totals = total_weights(engine.objective, batch)
            loss, _ = reduce_terms(batch, engine.objective(batch), totals)
            measured = {"loss": float(loss)}
            if not torch.isfinite(loss):
                raise RunFailed(f"self-check: the loss before the first step is {float(loss)}; a weight or a score is not finite")
            if "reference" in batch.scores:
                gap = (batch.logp() - batch.logp("reference")).abs().max()
                own = replace(batch, scores={**batch.scores, "reference": batch.scores["policy"]})
                theory, _ = reduce_terms(own, engine.objective(own), totals)
                measured |= {"policy_minus_reference": float(gap), "theory": float(theory)}
                if reference_is_initial and not gap <= TOLERANCE[precision]:
                    raise RunFailed(
                        f"self-check: policy and reference differ by {float(gap):.3g} nats before the first step (at most "
                        f"{TOLERANCE[precision]:g} for {precision}). Likely causes: dropout, a reference loaded differently, or an adapter "
                        "that is not the identity (then set reference.policy to what you mean). train.self_check=false skips this check."
                    )
                if reference_is_initial and not abs(loss - theory) <= 1e-3 * abs(theory) + 10 * TOLERANCE[precision]:
                    raise RunFailed(f"self-check: the loss before the first step is {float(loss):.6g}, theory says {float(theory):.6g}")
    finally:
        engine.policy.train(was_training)
    return measured
