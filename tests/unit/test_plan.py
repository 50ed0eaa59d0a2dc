"""What a plan says of memory and work, against the same things measured."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from prefopt.config.schema import LoraConfig, ModelConfig
from prefopt.errors import RunFailed
from prefopt.policies.head import head_of
from prefopt.policies.logprob import token_logprobs
from prefopt.training import memory, plan_text
from prefopt.training.engine import Engine
from prefopt.training.memory import DryRun, Live, Shape, dry_run
from prefopt.training.sharding import Layout
from tests import toy
from tests.toy_runs import train

LORA = LoraConfig(enabled=True, r=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=6)


def really(policy, shape: Shape) -> tuple[float, float]:
    """(bytes alive after a forward pass, most bytes beyond them) of a real micro-batch of this shape, the model's own left out."""
    inner = policy.inner
    for parameter in policy.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    with Live() as live:
        for tensor in (*inner.parameters(), *inner.buffers(), *(p.grad for p in policy.trainable().values())):
            live._note(tensor.untyped_storage())  # views of what was there before count as nothing new
        start = live.now
        ids = torch.zeros(shape.rows, shape.width, dtype=torch.long)
        mask = torch.ones(shape.rows, 1, shape.width, shape.width, dtype=torch.bool).tril() if shape.masked else None
        given = {"attention_mask": mask, "position_ids": torch.zeros_like(ids)} if shape.masked else {}
        places = torch.zeros(shape.scored, dtype=torch.long)
        hidden = inner.get_decoder()(input_ids=ids, use_cache=False, **given).last_hidden_state.flatten(0, 1)[places]
        made = token_logprobs(hidden, head_of(inner), places)
        del hidden
        kept = live.now
        live.peak = live.now
        made.sum().backward()
        return kept - start, live.peak - kept


@pytest.mark.parametrize("masked", [True, False], ids=["trees", "rows"])
@pytest.mark.parametrize("lora", [None, {"enabled": True, "r": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_fake_tensors_take_what_real_ones_take(folder, masked, lora, recompute):
    """And from two depths of the model follows the third."""
    cfg = toy.model_config(folder, lora=lora, gradient_checkpointing=recompute, attention="sdpa")
    policy = toy.policy(folder, lora=lora, gradient_checkpointing=recompute, attention="sdpa")
    shape = Shape(3, 40, 50, masked)
    run = dry_run(policy.inner.config, cfg, "fp32", False, "sdpa", shape, "cpu")
    kept, worst = really(policy, shape)
    assert run.activations == pytest.approx(kept, rel=0.03)
    assert run.activations + run.working == pytest.approx(kept + worst, rel=0.03)
    assert run.parameters == sum(p.numel() for p in policy.parameters())
    assert run.trainable == sum(p.numel() for p in policy.trainable().values())
    assert run.weights == pytest.approx(sum(4 * p.numel() for p in policy.parameters()), rel=0.01)


def test_full_logits_cost_more_than_chunks_and_bf16_less_than_fp32(folder):
    config, cfg = toy.policy(folder).inner.config, ModelConfig(name="x")
    chunks = dry_run(config, cfg, "fp32", False, "sdpa", Shape(2, 60, 80, False), "cpu")
    full = dry_run(config, cfg, "fp32", False, "sdpa", Shape(2, 60, 80, False, logits=50), "cpu")
    assert full.activations - chunks.activations > 80 * config.vocab_size * 4  # at least one copy of the logits
    low = dry_run(config, replace(cfg, lora=LORA), "bf16", False, "sdpa", Shape(2, 60, 80, False), "cpu")
    high = dry_run(config, replace(cfg, lora=LORA), "fp32", False, "sdpa", Shape(2, 60, 80, False), "cpu")
    assert low.activations < high.activations
    assert low.weights < 0.7 * high.weights


def test_a_reward_model_has_no_logits(folder):
    config = toy.policy(folder).inner.config
    run = dry_run(config, ModelConfig(name="x"), "fp32", True, "sdpa", Shape(2, 30, 40, True), "cpu")
    assert run.parameters == sum(p.numel() for p in toy.policy(folder).parameters()) - config.vocab_size * 32 + 32


RUN = DryRun(weights=4000, parameters=1000, trainable=1000, activations=7000, working=500, scoring=300)


def parts(run=RUN, **changes):
    settings = dict(device="cpu", layout=Layout(), micros=1, frozen_copies=0, reloads=False, cache=0.0, runtime=100.0)
    return memory.memory(run, **{**settings, **changes})


def test_the_parts_of_a_process():
    found = parts()
    assert (found.weights, found.optimizer, found.gradients, found.reference) == (4000, 8000, 4000, 0)
    slack = memory.SLACK["cpu"] * 7500
    assert found.moments["a backward pass"] == 100 + 4000 + 8000 + 7500 + slack
    assert found.moments["an update of the weights"] == 100 + 4000 + 8000 + 4000
    assert found.moments["a checkpoint"] == 100 + 4000 + 8000 + 8000
    assert parts(micros=2).moments["a backward pass"] == pytest.approx(found.moments["a backward pass"] + 4000 + 0.2 * 4000)
    assert parts(frozen_copies=1).peak == found.peak + 4000
    assert parts(layout=Layout(2)).moments["a backward pass"] == found.moments["a backward pass"] + 4000
    assert parts(cache=50_000.0).worst == "an evaluation"
    assert parts(reloads=True).moments["an evaluation"] == found.moments["an evaluation"] + 4000
    assert "a checkpoint" not in parts(device="cuda").moments
    fourbit = parts(replace(RUN, weights=2000), quantised=900.0)
    assert fourbit.weights == pytest.approx(2000 - 900 * (2 - memory.FOURBIT))


# ---- when memory runs out ------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
], ids=["gpu", "cpu"])
def test_running_out_of_memory_shows_plan_and_fact(tmp_path, capsys, monkeypatch, tiny_lm, error):
    def fails(self, micros, lr):
        raise error

    monkeypatch.setattr(Engine, "step", fails)
    assert train(tmp_path / "run", "evaluation.prompts=0") == 1
    said = capsys.readouterr().err
    for words in ("memory ran out", "At most", "The plan was", "activations of a micro-batch", "optimiser",
                  "What would take less: model.gradient_checkpointing=true"):
        assert words in said
    assert "Traceback" not in said
    status = (tmp_path / "run" / "status.json").read_text()
    assert '"failed"' in status and "The plan was" in status


def test_other_errors_are_left_alone(tmp_path, monkeypatch, tiny_lm):
    monkeypatch.setattr(Engine, "step", lambda *a: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"), contextlib.suppress(RunFailed):
        train(tmp_path / "run", "evaluation.prompts=0")
    assert plan_text.out_of_memory(None, ValueError("no")) is None
