"""What ZeRO splits and sends, against what DeepSpeed holds and sends in a world of fake processes."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest

from prefopt.cli import main
from prefopt.config.compose import typed
from prefopt.config.schema import HardwareConfig, TrainConfig
from prefopt.errors import UserError
from prefopt.policies.denoiser_flops import meta_denoiser
from prefopt.policies.flops import shape_of
from prefopt.policies.known_configs import LANGUAGE_MODELS, PIPELINES, known_config, known_pipeline, stand_in
from prefopt.training import rehearsal
from prefopt.training.plan import ground_of, zero_settings
from prefopt.training.plan_text import idle
from prefopt.training.setup import make_objective
from prefopt.training.sharding import Layout, bandwidth, between_steps, layout_of, states, traffic
from tests import toy
from tests.unit.test_compose import composed


def config(*words: str) -> TrainConfig:
    return typed(composed("model=llama3-8b", "evaluation.kl=false", *words), "train", "dpo")


# ---- formulas ------------------------------------------------------------------------------------------

WEIGHTS, NUMBERS = 4e9, 1e9  # of a model in fp32, all trained


@pytest.mark.parametrize(("stage", "held"), [(0, (4, 8, 4)), (1, (4, 12 / 8, 4)), (2, (4, 12 / 8, 4 / 8)), (3, (4 / 8, 12 / 8, 4 / 8))])
def test_each_stage_splits_more(stage, held):
    """The table of arXiv 1910.02054, with DeepSpeed's copy of the weights."""
    found = states(Layout(8, stage, bucket=1e6, live=1e8), WEIGHTS, NUMBERS, NUMBERS)
    assert (found.weights, found.optimizer, found.gradients) == pytest.approx([1e9 * h for h in held])
    assert found.gathered == (pytest.approx(4e8) if stage == 3 else 0)
    assert found.buckets == (4e9 if stage == 0 else 4e6)


def test_offload_moves_states_to_the_cpu():
    there = states(Layout(8, 3, "all"), WEIGHTS, NUMBERS, NUMBERS)
    assert (there.weights, there.optimizer, there.gradients) == (0, 0, 0)
    assert there.host == pytest.approx(20e9 / 8)
    half = states(Layout(8, 3, "optimizer"), WEIGHTS, NUMBERS, NUMBERS)
    assert half.weights == pytest.approx(4e9 / 8) and half.host == pytest.approx(16e9 / 8)


def test_adapters_are_little_to_hold_and_to_send():
    found = states(Layout(8, 3, live=0), 2e9, 1e9, 1e6)  # frozen in bf16
    assert found.weights == 2e9 / 8 and found.optimizer == 12e6 / 8
    assert sum(traffic(Layout(8), 2e9, 1e9, 1e6, 1).values()) == pytest.approx(2 * 7 / 8 * 4e6)
    assert traffic(Layout(8, 3), 2e9, 1e9, 1e6, 2)["gathering weights"] == pytest.approx(2 * 2 * 7 / 8 * 2e9)


def test_one_process_sends_nothing_and_ten_thousand_little_more_than_eight():
    assert traffic(Layout(1), WEIGHTS, NUMBERS, NUMBERS, 3) == {}
    few, many = (sum(traffic(Layout(n), WEIGHTS, NUMBERS, NUMBERS, 3).values()) for n in (8, 10_000))
    assert few < many < 2 * 4e9 and many / few == pytest.approx(8 / 7, rel=1e-3)


def test_what_limits_a_ring():
    def found(name, **settings):
        return bandwidth(HardwareConfig(name=name, **settings))

    assert found("8xh100_zero3", processes=8)[0] == 450e9
    assert found("2x8xh100_zero3", processes=8, nodes=2)[0] == 400e9
    assert found("4x8xa100_zero3", processes=8, nodes=4)[0] == 200e9
    assert found("8xgpu", processes=8) is None and found("cpu2_h100", device="cpu") is None


# ---- against DeepSpeed ---------------------------------------------------------------------------------

TIGHT = {"zero_optimization": {"stage3_max_live_parameters": 2000, "stage3_prefetch_bucket_size": 1000, "reduce_bucket_size": 4000,
                               "stage3_max_reuse_distance": 2000, "stage3_param_persistence_threshold": 10}}
CASES = {"zero1": ["hardware=8xh100_zero1"], "zero2": ["hardware=8xh100_zero2"], "zero3": ["hardware=64x8_zero3"],
         "all stays gathered": ["hardware=8xh100_zero3_offload"],
         "lora": ["hardware=2x8xh100_zero3", "adapter=lora"], "data parallel": ["hardware=8xgpu"],
         "whole batches": ["hardware=8xh100_zero3", "algo=aot", "train.batch_size=16"]}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """What a dry run stands on, without the seconds that real data takes."""
    folder = toy.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)
    words = [f"model.path={folder}", "data.limit=32", "data.eval_limit=2", "model.chat_template=plain"]
    return ground_of(config(*words))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed; the extra `test` brings it")
@pytest.mark.parametrize("name", CASES)
def test_states_and_traffic_are_those_of_deepspeed(ground, tmp_path, monkeypatch, name):
    words = ["train.micro_batch_tokens=60", "model.gradient_checkpointing=false", *CASES[name]]
    if name not in ("all stays gathered", "data parallel"):
        (tmp_path / "tight.json").write_text(json.dumps(TIGHT))
        words.append(f"hardware.deepspeed={tmp_path / 'tight.json'}")
    cfg = config(*words)
    monkeypatch.setattr(rehearsal, "ground_of", lambda cfg: replace(ground, objective=make_objective(cfg.algo)))
    did, layout = rehearsal.rehearse(cfg), layout_of(cfg.hardware, zero_settings(cfg))
    assert did.micros > 1 or cfg.hardware.world > 64
    planned = traffic(layout, did.weights, did.parameters, did.trained, did.micros, did.passes)
    # The matrices of adapters are smaller than what DeepSpeed fetches at a time, and are fetched less often than planned.
    assert sum(did.sent.values()) == pytest.approx(sum(planned.values()), rel=0.13 if name == "lora" else 0.08)
    assert did.held == pytest.approx(between_steps(layout, did.weights, did.parameters, did.trained), rel=0.04)


def test_what_deepspeed_refuses_is_one_sentence(ground, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.json").write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": "many"}}))
    monkeypatch.setattr(rehearsal, "ground_of", lambda cfg: ground)
    capsys.readouterr()
    assert main(["plan", "--dry-run", "hardware=64x8_zero3", f"hardware.deepspeed={tmp_path / 'bad.json'}"]) == 2
    said = capsys.readouterr().err
    assert "hardware=64x8_zero3: a step of 512 processes fails" in said and "reduce_bucket_size" in said and "Traceback" not in said
    assert main(["plan", "--dry-run", "hardware=8xgpu"]) == 0  # nothing of the failed one is left
    out = capsys.readouterr().out
    assert out.startswith("passed: hardware=8xgpu (8 processes, bf16)") and "planned" in out


def test_a_table_has_nothing_to_rehearse():
    with pytest.raises(UserError, match="is a table in one process"):
        rehearsal.rehearse(typed(composed("model=bandit", "data=bandit"), "train", "dpo"))


# ---- models that are out of reach ----------------------------------------------------------------------


def test_published_sizes():
    """The numbers of weights that the model cards name."""
    sizes = {path: shape_of(known_config(path)).parameters for path in LANGUAGE_MODELS}
    assert sizes == {"meta-llama/Meta-Llama-3-8B": 8_030_261_248, "meta-llama/Meta-Llama-3-70B": 70_553_706_496}
    found = {path: sum(p.numel() for p in meta_denoiser(known_pipeline(path, None), 1024).network.parameters()) for path in PIPELINES}
    assert found == {"stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684, "black-forest-labs/FLUX.1-dev": 11_901_408_320}
    assert known_config("someone/else") is None and known_pipeline("someone/else", None) is None


def test_a_stand_in_for_a_tokenizer_counts_characters():
    out = stand_in()("preference", add_special_tokens=False, return_offsets_mapping=True)
    assert out["offset_mapping"] == [(0, 4), (4, 8), (8, 10)] and len(set(out["input_ids"])) == 3


def test_a_plan_of_a_large_model_needs_no_file(capsys, monkeypatch):
    """It names the stage with which the run would fit, and says what it has assumed."""
    monkeypatch.setattr("prefopt.training.plan.locate", unreachable)
    words = ["model=llama3-8b", "algo=simpo", "data.limit=64", "data.eval_limit=4", "evaluation.prompts=0", "evaluation.kl=false"]

    def said(*more: str) -> str:
        capsys.readouterr()
        assert main(["plan", *words, *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    whole = said("hardware=8xh100_zero1", "hardware.zero=0")
    assert whole.startswith("does not fit: ") and "it would with hardware.zero=" in whole
    split = said("hardware=8xh100_zero3")
    assert split.startswith("fits: ")
    for part in ("8,030.3 M parameters", "its published sizes are used", "weights, split 8 ways 4.0 GB", "gathering weights",
                 "NVLink of the H100, one way", "at an evaluation", '"stage3_max_live_parameters": 1000000000'):
        assert part in split
    assert "with whole weights" not in split  # of a language model no process ever holds them


def test_processes_without_rows_are_named():
    found = dict(idle(config("hardware=64x8_zero3"), 4000))
    assert "a step has 32 rows for 512 processes: 480 of them only compute fillers. Set train.batch_size=512" in found["idle"]
    assert idle(config("hardware=8xh100_zero3"), 4000) == []


def unreachable(*_: object, **__: object) -> None:
    raise UserError("the hub is out of reach")
