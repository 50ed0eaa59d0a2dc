"""Run under torchrun: gradients of one step of eight rows, dealt to the ranks, and the beta that each finds; rank 0 writes them.
Arguments: file, slugs."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from prefopt.data.latents import patient
from prefopt.training.auto_beta import find_beta
from tests.unit.test_engine import engine_of, gradients, objective_named, rows_for, source_of


def main() -> None:
    accelerator, out = Accelerator(cpu=True), {}
    for slug in sys.argv[2:]:
        objective = objective_named(slug)
        engine = engine_of(objective, accelerator)
        source = source_of(objective, rows_for(objective, 8), 40, accelerator.num_processes, accelerator.process_index)
        grads, loss = gradients(engine, source.step(0))
        result = engine.step(source.step(0), 0.0)
        out[slug] = {"grads": grads, "loss": torch.tensor(loss, dtype=torch.float64), "metrics": result.metrics, "norm": result.grad_norm}
    objective = objective_named("dpo")
    source = source_of(objective, rows_for(objective, 16), 40, accelerator.num_processes, accelerator.process_index)
    betas = gather_object([find_beta(engine_of(objective, accelerator), source.step(0), source.step(1), 0.45)[0]])
    out["betas"] = torch.tensor(betas, dtype=torch.float64)
    patient(accelerator.num_processes)()  # how ranks wait while pictures are encoded
    if accelerator.is_main_process:
        torch.save(out, sys.argv[1])


if __name__ == "__main__":
    main()
