"""Run under torchrun: gradients of one step of eight rows, dealt to the ranks; rank 0 writes them. Arguments: file, slugs."""

import sys

import torch
from accelerate import Accelerator

from tests.unit.test_engine import engine_of, gradients, objective_named, rows_for, source_of


def main() -> None:
    accelerator, out = Accelerator(cpu=True), {}
    for slug in sys.argv[2:]:
        objective = objective_named(slug)
        engine = engine_of(objective, accelerator)
        source = source_of(objective, rows_for(objective, 8), 40, accelerator.num_processes, accelerator.process_index)
        grads, loss = gradients(engine, source.step(0))
        result = engine.step(source.step(0), 0.0)
        out[slug] = {"grads": grads, "loss": torch.tensor(loss, dtype=torch.float64), "metrics": result.metrics}
    if accelerator.is_main_process:
        torch.save(out, sys.argv[1])


if __name__ == "__main__":
    main()
