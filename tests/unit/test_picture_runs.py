"""Whole runs of diffusion models, in process: resumed to the same bits, the reference's scores stored, started from another run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.engine import Engine
from prefopt.training.moving import WeightAverage
from tests import toy_denoising as toy
from tests.tiny_pipelines import save
from tests.toy_runs import train
from tests.unit.test_diffusion_policy import LORA, moved
from tests.unit.test_moving_reference import weights

COMMON = ["model=tiny-diffusion", "model.resolution=16", "model.latent=[4,2]", "data=tiny-pictures", "data.limit=12", "data.eval_limit=4",
          "train.batch_size=4", "train.steps=5", "train.eval_every=5", "train.save_every=1", "evaluation.prompts=0", "optim.warmup=0"]
LORA_WORDS = ["adapter=lora", "model.lora.r=2", "model.lora.alpha=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("sd15", tmp_path_factory.mktemp("pipeline") / "sd15")


@pytest.fixture
def run(folder, tmp_path):
    def go(name: str, *words: str) -> int:
        return train(tmp_path / name, f"model.path={folder}", *COMMON, *words)

    return go


def rows(folder: Path, split: str = "train") -> list[dict]:
    return [r for r in read_jsonl(folder / "metrics.jsonl") if r["split"] == split]


@pytest.mark.parametrize("words", [
    ["algo=diffusion_dpo", "train.ema=0.9", "noise.draws=2"],
    ["algo=ddim_inpo", "noise.inversion_steps=3", *LORA_WORDS, "train.ema=0.9"],
], ids=["full", "lora-inverted"])
def test_a_killed_run_goes_on_to_the_same_bits(words, run, tmp_path, monkeypatch):
    """Weights, moments, their average, and what was logged; the rows go round more than once, so draws of later visits are in it."""
    assert run("whole", *words) == 0
    real, calls = Engine.step, []

    def stepping(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise SystemError("killed")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stepping)
        with pytest.raises(SystemError):
            run("run", *words)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1].name == "step-000003"
    assert run("run", *words) == 0
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    own, average = ({n.split(" ", 1)[1]: t for n, t in whole.items() if n.startswith(kind)} for kind in ("weights", "ema"))
    assert own.keys() == average.keys() and not all(torch.equal(own[name], average[name]) for name in own)
    assert [r["loss"] for r in rows(tmp_path / "whole")] == [r["loss"] for r in rows(tmp_path / "run")]
    assert rows(tmp_path / "whole", "eval")[-1]["loss"] == rows(tmp_path / "run", "eval")[-1]["loss"]


def test_the_average_is_what_is_saved_and_judged(run, tmp_path):
    """A run with an average trains as one without; its model and its held-out loss are the average's."""
    assert run("plain", "algo=diffusion_dpo", "optim.lr=1e-2") == 0
    assert run("average", "algo=diffusion_dpo", "optim.lr=1e-2", "train.ema=0.99") == 0
    plain, average = tmp_path / "plain", tmp_path / "average"
    assert [r["loss"] for r in rows(plain)] == [r["loss"] for r in rows(average)]
    (first, *_, last), (first_average, *_, last_average) = rows(plain, "eval"), rows(average, "eval")
    assert first["loss"] == first_average["loss"] and last["loss"] != last_average["loss"]
    held = {n.removeprefix("ema network."): t for n, t in weights(average).items() if n.startswith("ema")}
    (file,) = (average / "model" / "unet").glob("*.safetensors")
    saved = load_file(file)
    assert all(torch.equal(saved[name], held[name]) for name in held) and len(held) == len(saved)


def test_stored_scores_are_live_ones_and_a_second_run_computes_none(run, tmp_path, capsys):
    said = re.compile(r"reference: stored \((\d+) of (\d+) replies were there\)")
    words = ["algo=diffusion_dpo", "algo.beta=1.0", "noise.pool=3", "noise.draws=2", "noise.dropout=0.3"]
    assert run("live", *words, "reference.store=off") == 0
    capsys.readouterr()
    found = []
    for name in ("first", "second"):
        assert run(name, *words, "reference.store=on", "seed=1" if name == "second" else "seed=0") == 0
        found.append(tuple(map(int, said.search(capsys.readouterr().err).groups())))
    assert found[0][0] == 0 and found[1] == (found[0][1], found[0][1]) and found[0][1] > 0
    for live, stored in zip(rows(tmp_path / "live"), rows(tmp_path / "first"), strict=True):
        assert stored["loss"] == pytest.approx(live["loss"], abs=1e-5)
        assert stored["reward/margin"] == pytest.approx(live["reward/margin"], abs=1e-4)


@pytest.mark.parametrize("words", [[], LORA_WORDS], ids=["full", "lora"])
def test_a_run_starts_where_another_ended(words, run, tmp_path, capsys):
    """Its reference too: the loss starts at ln 2 again, and held-out pictures are scored as they were at the end."""
    assert run("first", "algo=diffusion_dpo", "optim.lr=1e-2", *words) == 0
    assert run("second", "algo=diffusion_dpo", f"model.start={tmp_path / 'first'}", *words) == 0
    (fresh, *_, end), start = rows(tmp_path / "first", "eval"), rows(tmp_path / "second", "eval")[0]
    assert start["logp/chosen"] == pytest.approx(end["logp/chosen"], rel=1e-6)
    assert start["logp/chosen"] != pytest.approx(fresh["logp/chosen"], rel=1e-5)
    assert start["loss"] == pytest.approx(0.693147, abs=1e-6)
    if words:
        assert run("third", "algo=diffusion_dpo", f"model.start={tmp_path / 'first'}") == 2
        assert "add adapter=lora" in capsys.readouterr().err


def test_inversion_dpo_trains_from_an_adapter_against_the_base(run, tmp_path):
    assert run("first", "algo=diffusion_dpo", "optim.lr=1e-2", *LORA_WORDS) == 0
    words = ["algo=inversion_dpo", "noise.inversion_steps=4", "noise.draws=2", "algo.beta=1.0", *LORA_WORDS]
    assert run("second", *words, f"model.start={tmp_path / 'first'}", "reference.policy=base") == 0
    assert all(r["grad_norm"] > 1e-4 and abs(r["loss"] - 0.693147) > 1e-6 for r in rows(tmp_path / "second"))


# ---- the average by itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_trap_4_22_weights_are_back_bit_for_bit(folder, lora):
    policy = toy.policy(folder, lora=lora)
    average = WeightAverage(policy, 0.5)
    moved(policy, 0.1)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    micro = toy.micro(policy, toy.rows(policy, 2))
    own = policy(micro)["token_logp"].detach()
    with pytest.raises(ZeroDivisionError), average.active():
        assert all(torch.equal(p, average.weights[name]) for name, p in policy.trainable().items())
        assert not torch.equal(policy(micro)["token_logp"], own)
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in policy.trainable().items())
    assert torch.equal(policy(micro)["token_logp"], own)


def test_an_average_follows_faster_at_first(folder):
    policy = toy.policy(folder, lora=LORA)
    average = WeightAverage(policy, 0.3)
    name, parameter = next(iter(policy.trainable().items()))
    wanted = parameter.detach().clone()
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.3), (4, 0.3)):
        moved(policy, 0.1, seed=step)
        average.refresh(step)
        wanted = decay * wanted + (1 - decay) * parameter.detach()
    torch.testing.assert_close(average.weights[name], wanted)
    again = WeightAverage(policy, 0.3)
    again.load({n: t.clone() for n, t in average.state().items()})
    moved(policy, 0.1)
    for one in (average, again):
        one.refresh(5)
    assert all(torch.equal(average.weights[n], again.weights[n]) for n in average.weights)
