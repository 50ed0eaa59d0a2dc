"""Run under torchrun: three steps with DeepSpeed for each case, weights before and after. Arguments: folder of models, file to write."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from prefopt.data.batch import build
from tests.distributed.launching import leave_together
from tests.distributed.zero_cases import CASES, LEARNING_RATE, STEPS, made, weighted


def main() -> None:
    # It would build its own shared-memory transport, for which a machine needs a compiler and a minute; gloo's does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank, world, out = dist.get_rank(), dist.get_world_size(), {}
    for name, case in CASES.items():
        policy, rows = made(Path(sys.argv[1]), case)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            # Persistent parameters are never partitioned, and by default these small ones would all be.
            "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "eps": 1e-4, "weight_decay": 0.0, "torch_adam": True}},
        }
        parameters = [p for p in policy.parameters() if p.requires_grad]
        engine = deepspeed.initialize(model=policy, model_parameters=parameters, config=settings)[0]
        head = policy.inner.get_output_embeddings()
        shape = tuple(getattr(head, "base_layer", head).weight.shape)
        for step in range(STEPS):
            mine = rows[step][rank::world]
            micro = build(mine, range(len(mine)), "pairs", policy.pad)
            engine.backward(weighted(engine(micro), micro) * world)
            engine.step()
        with deepspeed.zero.GatheredParameters(list(policy.parameters()), enabled=case.stage == 3):
            out[name] = {"head": shape, "weights": {n: p.detach().clone() for n, p in policy.trainable().items()}}
        engine.destroy()
    if rank == 0:
        torch.save(out, sys.argv[2])
    leave_together()


if __name__ == "__main__":
    main()
