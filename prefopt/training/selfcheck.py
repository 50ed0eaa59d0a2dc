"""Before the first step: is the policy equal to the reference it claims to start from, and is the loss what theory says?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prefopt.errors import RunFailed
from prefopt.objectives.base import double, double_type, reduce_terms, total_weights
from prefopt.training.coupling import join
from prefopt.training.engine import Engine

# Largest policy - reference difference of a sequence log-prob, in nats. Both score the same padded rows with the same kernels, so the
# difference is 0 but for kernels that choose their order of summation at run time; bf16 leaves room for those.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.02}
# Stored scores were computed among other rows, so they are rounded differently. Measured, 8 layers: 0.005 nats in bf16 for a reply of 199
# tokens. Allowed: so much per token, adding up as independent errors do; and a few units in the last place of the fp32 sum.
ROUNDING = {"fp32": 0.0, "bf16": 0.01}
LAST_PLACES = 1e-6


def tolerance(precision: str, lengths: Tensor, logp: Tensor, stored: bool) -> Tensor:
    """[E] by how much policy and reference may differ on a reply, in nats."""
    allowed = torch.full(lengths.shape, TOLERANCE[precision], dtype=double_type(lengths.device), device=lengths.device)
    return allowed + stored * (ROUNDING[precision] * double(lengths).sqrt() + LAST_PLACES * double(logp).abs())


def scored_by_both(engine: Engine, micros: list) -> Tensor:
    """[E] bool: which edges of the micro-batches both the policy and the reference score; extra sequences may be for one of them alone."""
    all_of_it = {"policy", "reference"} <= set(engine.objective.extra_scorers)
    parts = [torch.ones(len(m.tree), dtype=torch.bool) if all_of_it or m.extra is None else ~m.extra.cpu() for m in micros]
    return torch.cat(parts)


def self_check(engine: Engine, micros: list, precision: str, reference_is_initial: bool) -> dict[str, float]:
    """Scores the first step's rows without gradient. Raises `RunFailed` with the likely cause; returns what was measured: `loss`, and
    with a reference `theory`, `policy_minus_reference` (nats, of the reply where it is largest, measured by what is `allowed` there).

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
                both = scored_by_both(engine, micros).to(batch.lengths.device)
                gaps = double((batch.logp() - batch.logp("reference")).abs()) * both
                allowed = tolerance(precision, batch.lengths, batch.logp(), any("reference" in m.stored for m in micros))
                worst = int((gaps - allowed).argmax())  # a gap that is not a number counts as the largest
                gap, limit = float(gaps[worst]), float(allowed[worst])
                policy, reference = batch.scores["policy"], batch.scores["reference"]
                shared = {"token_logp": both[batch.token_edge], "logp": both}
                same = {q: torch.where(shared[q], policy[q], t) if q in shared else t for q, t in reference.items()}
                own = replace(batch, scores={**batch.scores, "reference": same})
                theory, _ = reduce_terms(own, engine.objective(own), totals)
                measured |= {"policy_minus_reference": gap, "allowed": limit, "theory": float(theory)}
                if reference_is_initial and not gap <= limit:
                    raise RunFailed(
                        f"self-check: policy and reference differ by {gap:.3g} nats before the first step (at most "
                        f"{limit:.3g} for {precision}). Likely causes: dropout, a reference loaded differently, or an adapter "
                        "that is not the identity (then set reference.policy to what you mean). train.self_check=false skips this check."
                    )
                if reference_is_initial and not abs(loss - theory) <= 1e-3 * abs(theory) + 10 * limit:
                    raise RunFailed(f"self-check: the loss before the first step is {float(loss):.6g}, theory says {float(theory):.6g}")
    finally:
        engine.policy.train(was_training)
    return measured
