"""The cases of test_zero.py: what the ranks and the single process both have to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prefopt.data.batch import MicroBatch, Row
from prefopt.policies.causal_lm import CausalLM
from tests.toy import pair, policy, rows, save_model

STEPS, LEARNING_RATE = 3, 1e-2
LORA = {"enabled": True, "r": 2, "targets": "lm_head, q_proj"}


@dataclass(frozen=True)
class Case:
    stage: int
    tied: bool = False
    checkpointing: bool = False
    lora: bool = False


CASES = {f"stage {stage}, {'tied' if tied else 'untied'}{', checkpointing' * checkpointing}": Case(stage, tied, checkpointing)
         for stage in (1, 2, 3) for tied in (False, True) for checkpointing in (False, True)}
CASES |= {f"stage {stage}, LoRA on the head": Case(stage, lora=True) for stage in (2, 3)}


def save_models(folder: Path) -> None:
    for tied in (False, True):
        save_model(folder / str(tied), "llama", tie_word_embeddings=tied)


def made(folder: Path, case: Case) -> tuple[CausalLM, list[list[Row]]]:
    """The policy of a case, and four pairs for each step."""
    p = policy(folder / str(case.tied), lora=LORA if case.lora else None, gradient_checkpointing=case.checkpointing)
    assert p.fuse and p.share
    generator = torch.Generator().manual_seed(0)
    for name, parameter in p.named_parameters():
        if "lora_B" in name:  # not the identity, so that both factors get gradients from the first step on
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    words = "Hello there how are you today I am well thank you".split()
    texts = [" ".join(words[i % 5 : i % 5 + 2 + i % 3]) for i in range(12 * STEPS)]
    pairs = [pair(prompt=a, chosen=b + ".", rejected=c + "?") for a, b, c in zip(texts[::3], texts[1::3], texts[2::3], strict=True)]
    return p, [rows(p, *pairs[4 * step : 4 * step + 4]) for step in range(STEPS)]


def weighted(logps: Tensor, micro: MicroBatch) -> Tensor:
    """A loss that tells the tokens of a row apart and adds up over rows."""
    places = micro.trained[:, 1:].nonzero()[:, 1]
    return (logps * (places % 3 - 0.5)).sum() / 100
