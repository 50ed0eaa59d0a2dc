"""Two processes over gloo compute of pictures what one does."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launching import torchrun
from tests.distributed.picture_ranks import graded
from tests.toy_runs import fresh_accelerator

SLUGS = ("diffusion_dpo", "diffusion_kto", "dspo", "abc_diffusion")  # a plain one, one that couples the batch, states, extra sequences


def test_trap_4_21_pairs_dealt_unevenly_to_two_processes(tmp_path):
    torchrun("-m", "tests.distributed.picture_ranks", str(tmp_path / "out.pt"), *SLUGS)
    two = torch.load(tmp_path / "out.pt", weights_only=True)
    for slug in SLUGS:
        with fresh_accelerator() as accelerator:
            one = graded(slug, accelerator, 10**6)
        assert two[slug]["loss"] == pytest.approx(one["loss"], rel=1e-6), slug
        assert two[slug]["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6), slug
        largest = max(float(grad.abs().max()) for grad in one["grads"].values())
        assert largest > 0
        for name, grad in one["grads"].items():
            torch.testing.assert_close(two[slug]["grads"][name], grad, rtol=1e-4, atol=1e-5 * largest)
