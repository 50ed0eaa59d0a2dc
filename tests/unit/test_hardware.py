"""Hardware configs: what they compose to, what DeepSpeed is told, what is refused, and the keys of a user's own DeepSpeed file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prefopt.config.catalogue import groups
from prefopt.config.compose import typed
from prefopt.errors import UserError
from prefopt.objectives.base import double, double_type
from prefopt.training import deepspeed_json as module
from prefopt.training.deepspeed_json import check_zero, deepspeed_json
from tests.unit.test_compose import composed, refusal

SNAPSHOT = Path(__file__).with_name("deepspeed.json")


def config(*words: str):
    return typed(composed(*words), "train", "dpo")


def test_every_hardware_config_composes_and_its_deepspeed_settings_are_these():
    """Write the file anew with what this test shows, after a change that is meant."""
    made = {name: deepspeed_json(config(f"hardware={name}")) for name in groups()["hardware"]}
    assert {"cpu", "mps", "1xgpu", "8xa100_zero1", "8xh100_zero3_offload", "16x8xh200_zero3", "4x8xh100_zero3_slurm", "2x8xh100_zero3_ssh",
            "64x8_zero3", "cpu2_zero3"} <= set(made)
    assert json.loads(SNAPSHOT.read_text()) == {name: settings for name, settings in made.items() if settings}
    for name in made:
        hardware = config(f"hardware={name}").hardware
        assert (made[name] is not None) == ("zero" in name) == bool(hardware.zero)
        assert hardware.name == name


@pytest.mark.parametrize(("words", "said"), [
    (["hardware=cpu", "hardware.offload=optimizer"], "hardware.offload=optimizer is for ZeRO; set hardware.zero"),
    (["hardware=cpu", "hardware.deepspeed=x.json"], "hardware.deepspeed=x.json is for ZeRO"),
    (["hardware=cpu2_zero2", "hardware.offload=all"], "set hardware.offload=optimizer, or hardware.zero=3"),
    (["hardware=cpu2_zero3", "train.ema=0.9"], "train.ema=0.9 needs whole weights"),
    (["hardware=cpu2_zero3", "algo=tr_dpo"], "needs whole weights on every process, and hardware.zero=3 splits them; set hardware.zero=2"),
    (["hardware=cpu2_zero3", "algo=gradspo", "model=tiny-diffusion"], "which follows averages of the weights, needs whole weights"),
    (["hardware=cpu2_zero3", "algo=seppo", "model=tiny-diffusion"], "reference.refresh=past needs whole weights on every process"),
    (["hardware=cpu2_zero3", "adapter=qlora"], "model.quantize=4bit needs whole weights"),
    (["hardware=cpu2_zero1", "model=bandit", "data=bandit"], "is a small table"),
    (["hardware=mps", "hardware.processes=2"], "hardware.device=mps is one GPU"),
    (["hardware=mps", "hardware.precision=bf16"], "computes in fp32 here"),
])
def test_what_cannot_be_split_is_refused_at_composition(words, said):
    assert said in refusal(*words)


THEIRS = [
    ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2 and this run has 3; set hardware.zero=2, or remove it"),
    ({"gradient_clipping": 5.0}, "set optim.max_grad_norm=5.0, or remove it"),
    ({"train_batch_size": 64}, "train_batch_size is train.batch_size in prefopt"),
    ({"gradient_accumulation_steps": 4}, "prefopt splits a step by train.micro_batch_tokens"),
    ({"optimizer": {"type": "AdamW"}}, "optimizer is set by optim in prefopt"),
    ({"fp16": {"enabled": True}}, "fp16 is set by hardware.precision in prefopt"),
    ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "set hardware.offload=all, or remove it"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights is true, and a run samples and saves with"),
    ({"zero_optimisation": {"stage": 3}}, "unknown key zero_optimisation; did you mean 'zero_optimization'?"),
]


@pytest.mark.parametrize(("theirs", "said"), THEIRS, ids=[next(iter(theirs)) + str(i) for i, (theirs, _) in enumerate(THEIRS)])
def test_a_deepspeed_file_that_contradicts_the_run_is_refused(theirs, said, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(theirs))
    with pytest.raises(UserError) as caught:
        deepspeed_json(config("hardware=cpu2_zero3", f"hardware.deepspeed={tmp_path / 'ds.json'}"))
    assert said in str(caught.value) and "ds.json" in str(caught.value)


def test_a_deepspeed_file_is_put_over_what_is_generated(tmp_path):
    theirs = {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7, "reduce_bucket_size": "auto"}, "train_batch_size": "auto",
              "bf16": {"enabled": False}, "gradient_clipping": 1.0, "comms_logger": {"enabled": True}}
    (tmp_path / "ds.json").write_text(json.dumps(theirs))
    plain, made = (deepspeed_json(config("hardware=cpu2_zero3", *more)) for more in ([], [f"hardware.deepspeed={tmp_path / 'ds.json'}"]))
    assert made.pop("comms_logger") == {"enabled": True}
    assert made["zero_optimization"].pop("stage3_prefetch_bucket_size") == 7
    plain["zero_optimization"].pop("stage3_prefetch_bucket_size")
    assert made == plain


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_a_deepspeed_file_that_cannot_be_read_is_named(text, tmp_path):
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=r"hardware.deepspeed=\S+ds.json (cannot be read|holds no JSON object)"):
        deepspeed_json(config("hardware=cpu2_zero3", f"hardware.deepspeed={tmp_path / 'ds.json'}"))


def test_without_the_package_a_run_is_refused_and_a_plan_is_not(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    cfg = config("hardware=8xh100_zero3")
    with pytest.raises(UserError, match=r'pip install "prefopt\[deepspeed\]"'):
        check_zero(cfg)
    assert deepspeed_json(cfg)["zero_optimization"]["stage"] == 3
    check_zero(config("hardware=cpu"))


def test_no_float64_on_apple_gpus():
    assert double_type(torch.device("mps")) is torch.float32 and double_type(torch.device("cuda", 0)) is torch.float64
    assert double(torch.ones(2)).dtype is torch.float64
