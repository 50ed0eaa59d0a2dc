"""The chunked log-prob op with heads that DeepSpeed ZeRO partitions: two processes end where one process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from prefopt.data.batch import build
from tests.distributed.zero_cases import CASES, LEARNING_RATE, made, save_models, weighted

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed; the extra `test` brings it")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("zero")
    save_models(path)
    return path


@pytest.fixture(scope="module")
def two(folder):
    """What two processes come to, all cases in one go: a process takes longer to start than all of them."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.distributed.zero_ranks"]
    command += [str(folder), str(folder / "out.pt")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        said = process.communicate(timeout=240)[1]
    finally:
        process.terminate()  # and not kill: it ends its workers
    assert process.returncode == 0, said[-4000:]
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
