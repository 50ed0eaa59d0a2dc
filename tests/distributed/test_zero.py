"""The chunked log-prob op with heads that DeepSpeed ZeRO partitions: two processes end where one process ends."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from prefopt.data.batch import build
from tests.distributed.launching import torchrun
from tests.distributed.zero_cases import CASES, LEARNING_RATE, made, save_models, weighted

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed; the extra `test` brings it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("zero")
    save_models(path)
    return path


@pytest.fixture(scope="module")
def two(folder):
    """What two processes come to, all cases in one go: a process takes longer to start than all of them."""
    torchrun("-m", "tests.distributed.zero_ranks", str(folder), str(folder / "out.pt"), DS_ACCELERATOR="cpu")
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_weights_after_three_steps_are_those_of_one_process(name, folder, two):
    case = CASES[name]
    policy, rows = made(folder, case)
    before = {n: p.detach().clone() for n, p in policy.trainable().items()}
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=LEARNING_RATE, eps=1e-4, weight_decay=0.0)
    for step in rows:
        micro = build(step, range(len(step)), "pairs", policy.pad)
        optimizer.zero_grad()
        weighted(policy(micro), micro).backward()
        torch.nn.utils.clip_grad_norm_(policy.trainable().values(), 1.0)
        optimizer.step()
    head = policy.inner.get_output_embeddings()
    whole = tuple(getattr(head, "base_layer", head).weight.shape)
    assert two[name]["head"] == ((0,) if case.stage == 3 else whole)  # outside of the forward pass only stage 3 has no weight
    for n, p in policy.trainable().items():
        torch.testing.assert_close(two[name]["weights"][n], p.detach(), rtol=0, atol=1e-5)
        if "head" in n or case.tied and "embed" in n:
            assert (p - before[n]).abs().max() > 1e-3
