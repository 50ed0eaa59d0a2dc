"""Run under torchrun: gradients of one step of seven pairs of pictures, dealt to the ranks; rank 0 writes them. Arguments: file, slugs."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator

from prefopt.config.catalogue import load_yaml
from prefopt.config.schema import OptimConfig
from prefopt.config.strength import in_nats
from prefopt.policies.reference import make_reference
from prefopt.training.engine import Engine
from prefopt.training.setup import make_objective
from tests.toy_pictures import picture_policy, picture_source, pictured, rows_of
from tests.toy_runs import gradients


def graded(slug: str, accelerator: Accelerator, budget: int) -> dict[str, Any]:
    """Gradient, loss and metrics of the step, from this rank's share of it in micro-batches of `budget` draws."""
    policy, objective = picture_policy(draws=2, dropout=0.3), make_objective(in_nats(load_yaml("algo", slug), 2))
    reference = make_reference(policy, "initial") if "reference" in objective.quantities else None
    with torch.no_grad():
        policy.network.layers[0].weight += 0.1
    examples = [pictured(f"caption {i % 3}", f"good.{i}", f"bad.{i}") for i in range(7)]
    engine = Engine(policy, objective, reference, OptimConfig(max_grad_norm=1e9), accelerator)
    source = picture_source(policy, objective, rows_of(policy, objective, examples), budget, None, accelerator.process_index,
                            accelerator.num_processes)
    grads, loss = gradients(engine, source.step(0))
    return {"grads": grads, "loss": loss, "metrics": engine.step(source.step(0), 0.0).metrics}


def main() -> None:
    accelerator = Accelerator(cpu=True)
    out = {slug: graded(slug, accelerator, 6) for slug in sys.argv[2:]}
    if accelerator.is_main_process:
        torch.save(out, sys.argv[1])


if __name__ == "__main__":
    main()
