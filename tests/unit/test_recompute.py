"""Gradient checkpointing of pictures hands freed memory back to the system on the CPU, and the C library really lets go of it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from prefopt.policies import recompute
from prefopt.policies.denoisers import open_denoiser
from tests.tiny_pipelines import PROMPT, condition, folders, noisy

HAS_TRIM = hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_goes_back_before_a_forward_pass_and_within_the_backward_pass(tmp_path_factory, monkeypatch, family, checkpointing):
    given, phase = [], "forward"
    monkeypatch.setattr(recompute, "_hand_back", lambda *_: given.append(phase))
    monkeypatch.setattr(recompute, "HAND_BACK_EVERY", 2)
    folder = folders(tmp_path_factory)(family)
    denoiser = open_denoiser(folder, gradient_checkpointing=checkpointing)
    (x, t), cond = noisy(denoiser), condition(folder, PROMPT, "")
    with torch.no_grad():
        denoiser.predict(x, t, cond)
    assert given == [], "nothing is kept of a pass without gradients"
    loss, phase = denoiser.predict(x, t, cond).square().sum(), "backward"
    loss.backward()
    if not checkpointing:
        assert given == []
    else:
        assert given[:2] == ["forward", "backward"] and given.count("forward") == 1


@pytest.mark.skipif(not HAS_TRIM, reason="this C library has no malloc_trim")
def test_what_is_handed_back_is_no_longer_the_process_s():
    """Every other one of many blocks is freed: the C library keeps such holes, until it is asked."""
    code = """
import ctypes
from prefopt.policies.recompute import _hand_back
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
held = [libc.malloc(65536) for _ in range(4000)]
for place in held:
    ctypes.memset(place, 1, 65536)
for place in held[::2]:
    libc.free(place)
before = resident()
_hand_back()
print(before - resident())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) > 60_000, "kB, of 128,000 that were free but for the first and last page of each hole"
