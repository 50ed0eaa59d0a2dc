"""Precision and memory options change cost, not what is computed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from tests.toy_runs import train

pytestmark = pytest.mark.usefixtures("tiny_lm")


def losses(run):
    return [r["loss"] for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "train"]


def weights(run):
    return load_file(checkpoint.steps(run / "checkpoints")[-1] / "weights.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_lm):
    run = tmp_path_factory.mktemp("plain") / "run"
    assert train(run, "evaluation.prompts=0") == 0
    return run


@pytest.mark.parametrize("overrides", [["model.gradient_checkpointing=true"], ["train.micro_batch_tokens=200"], ["model.attention=eager"]])
def test_options_that_change_cost_leave_the_run_as_it_is(overrides, plain, tmp_path):
    run = tmp_path / "run"
    assert train(run, "evaluation.prompts=0", *overrides) == 0
    assert losses(run) == pytest.approx(losses(plain), abs=1e-4)
    other = weights(run)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("model", ["tiny-lm", "tiny-lm-lora"])
def test_bf16_follows_fp32_and_keeps_trainable_weights_in_fp32(model, tmp_path):
    for precision in ("fp32", "bf16"):
        assert train(tmp_path / precision, f"hardware.precision={precision}", f"model={model}", "evaluation.prompts=0") == 0
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), abs=0.02)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    assert {w.dtype for w in weights(tmp_path / "bf16").values()} == {torch.float32}
    assert json.loads((tmp_path / "bf16" / "manifest.json").read_text())["precision"] == "bf16"


def test_dropout_is_off_unless_asked_for(plain, tmp_path):
    """With dropout the policy differs from its reference during training, so the first loss leaves ln 2."""
    assert losses(plain)[0] == pytest.approx(0.693147, abs=1e-5)
    assert train(tmp_path / "run", "evaluation.prompts=0", "model.dropout=0.3") == 0
    assert abs(losses(tmp_path / "run")[0] - 0.693147) > 1e-3


@pytest.mark.parametrize("model", ["tiny-lm", "tiny-lm-lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_traps_10_and_12_policy_and_reference_agree_exactly_before_the_first_step(model, precision, tmp_path):
    """Live, to the bit. Stored scores were made among other rows, so they are rounded differently."""
    for store, rounding in (("off", 0.0), ("on", {"fp32": 1e-6, "bf16": 5e-3}[precision])):
        run = tmp_path / store
        assert train(run, f"hardware.precision={precision}", f"model={model}", "evaluation.prompts=4", "sampler.max_new_tokens=8",
                     f"reference.store={store}") == 0
        start = next(r for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "eval")
        assert start["step"] == 0 and start["loss"] == pytest.approx(0.693147, abs=1e-6 + rounding)
        assert abs(start["reward/margin"]) <= rounding and (rounding or start["accuracy"] == 0.5) and start["kl"] == 0
