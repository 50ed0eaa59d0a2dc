"""Runs whose reference is stored: the same numbers as live, filled once, refused where something does not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefopt.config.schema import TrainConfig
from prefopt.errors import RunFailed
from prefopt.objectives.pairwise import DPO
from prefopt.policies import store
from prefopt.policies.reference import AdapterOff, AsLoaded, FrozenCopy, Reloaded, Stored, make_reference
from prefopt.policies.store import Store
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint, reference
from prefopt.training.engine import Engine, quantities
from prefopt.training.reference import evaluations, identity_of, make_references, replies_of, visits
from prefopt.training.rundir import load_run_config
from prefopt.training.setup import make_accelerator, set_up
from prefopt.training.source import OfflineSource
from tests import toy
from tests.toy_runs import fresh_accelerator, train

PAIRS = [toy.pair(), toy.pair("Is that so?", "I am well, thank you.", "The capital of Peru is Lima."),
         toy.pair("Tell me a story.", "once upon a time there was a fox.", "Two and two make four; three and three make six."),
         toy.pair("How are you?", "I am well.", "The capital of France is Paris.")]


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """Each of these tests begins with an empty store."""
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    return tmp_path / "store" / "reference"


@pytest.fixture
def calls(monkeypatch):
    """Micro-batches that somebody scored under the reference: to fill the store, with the adapter off, or by a copy."""
    seen = []
    for kind in (AdapterOff, FrozenCopy):
        def counted(self, micro, real=kind.__call__):
            seen.append(type(self))
            return real(self, micro)

        monkeypatch.setattr(kind, "__call__", counted)
    return seen


def manifest(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def numbers(run: Path) -> list[dict[str, float]]:
    """All that was measured, but for what time and machine decide. The accuracy counts after a step: before it, margins are rounding."""
    kept = ("loss", "grad_norm", "accuracy", "ranking_accuracy", "reference_ranking_accuracy", "kl", "true_reward", "logp/chosen",
            "reward/margin", "reward/desirable", "theory")
    return [{k: row[k] for k in ("step", *kept) if row.get(k) is not None and (k != "accuracy" or row["step"] > 1)}
            for row in read_jsonl(run / "metrics.jsonl")]


@pytest.mark.usefixtures("tiny_lm")
@pytest.mark.parametrize("settings", [["algo=dpo"], ["algo=kto"], ["algo=ipo", "model=tiny-lm-lora", "model.lora.learning_rate=1e-3"]],
                         ids=["dpo", "kto", "lora"])
def test_a_stored_run_measures_what_a_live_one_measures(settings, tmp_path, calls):
    live, stored = tmp_path / "live", tmp_path / "stored"
    assert train(live, *settings, "reference.store=off") == 0
    assert manifest(live)["reference"] == ("adapter off" if "model=tiny-lm-lora" in settings else "frozen copy")
    calls.clear()
    assert train(stored, *settings) == 0
    replies = 4 * 40 if "algo=kto" in settings else 2 * 40
    assert manifest(stored)["reference"] == f"stored (0 of {replies} replies were there)"
    assert FrozenCopy not in calls
    for a, b in zip(numbers(live), numbers(stored), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    ours, theirs = (load_file(checkpoint.steps(run / "checkpoints")[-1] / "weights.safetensors") for run in (live, stored))
    # AdamW divides by the size of the gradient, so where that is nearly nothing its rounding is what is learnt.
    bound = 1e-4 if "model=tiny-lm-lora" in settings else 2e-5
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=bound)


@pytest.mark.usefixtures("tiny_lm")
def test_a_second_run_scores_nothing_and_another_objective_only_what_is_new(tmp_path, calls, capsys):
    assert train(tmp_path / "first") == 0
    assert "reference: stored (0 of 80 replies were there)" in capsys.readouterr().err
    assert calls
    calls.clear()
    assert train(tmp_path / "second", "algo=ipo", "seed=0") == 0
    assert not calls and manifest(tmp_path / "second")["reference"] == "stored (80 of 80 replies were there)"
    assert train(tmp_path / "third", "algo=kto") == 0
    assert calls and manifest(tmp_path / "third")["reference"] == "stored (80 of 160 replies were there)"


@pytest.mark.usefixtures("tiny_lm")
def test_only_rows_that_the_run_visits_are_scored(tmp_path):
    assert train(tmp_path / "run", "train.steps=2", "train.batch_size=4", "evaluation.prompts=0") == 0
    assert manifest(tmp_path / "run")["reference"] == f"stored (0 of {2 * (8 + 8)} replies were there)"


@pytest.mark.usefixtures("tiny_lm")
def test_a_fill_that_is_stopped_keeps_its_chunks(tmp_path, monkeypatch, own_store):
    monkeypatch.setattr(reference, "CHUNK", 1)
    real, added = Store.add, []

    def adding(self, *args):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(len(args[0]))
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", adding)
        assert train(tmp_path / "run", "train.micro_batch_tokens=256") == 130
    assert len(store.shards(own_store)) == 3 and store.verify(own_store)[1] == []
    assert train(tmp_path / "run", "train.micro_batch_tokens=256") == 0
    assert manifest(tmp_path / "run")["reference"] == f"stored ({sum(added)} of 80 replies were there)"


@pytest.mark.usefixtures("tiny_lm")
def test_the_self_check_stops_wrong_stored_scores(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(AsLoaded, "__call__", lambda self, micro: AdapterOff.__call__(self, micro) - 0.1)
        assert train(tmp_path / "run") == 1
    assert "self-check: policy and reference differ" in capsys.readouterr().err


# ---- what a run that goes on is told -----------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path) -> Path:
    lines = [{"prompt": p.prompt[0].text, "chosen": p.completions[0].text, "rejected": p.completions[1].text} for p in PAIRS]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines * 3))
    return path


def stop_at(monkeypatch, step: int) -> None:
    real, seen = Engine.step, []

    def stepping(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == step:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "step", stepping)


def test_a_changed_weight_on_resume_is_named(tmp_path, pairs, monkeypatch, capsys):
    model = toy.save_model(tmp_path / "model")
    common = ["model=smollm2-135m", f"model.path={model}", "data=jsonl", f"data.path={pairs}", "data.eval_fraction=0.25",
              "sampler.max_new_tokens=8", "train.save_every=1", "train.batch_size=2"]
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train(tmp_path / "run", *common) == 130
    began = manifest(tmp_path / "run")["store"]["identity"]
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] + 1e-3}, model / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert train(tmp_path / "run", *common) == 2
    said = capsys.readouterr().err
    assert f"began with another reference than this command gives it (weights: {began['weights']} -> " in said
    assert "tokenizer" not in said
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert train(tmp_path / "run", *common) == 0


def test_a_store_that_was_emptied_is_filled_again_on_resume(tmp_path, pairs, monkeypatch, capsys, own_store):
    model = toy.save_model(tmp_path / "model")
    common = ["model=smollm2-135m", f"model.path={model}", "data=jsonl", f"data.path={pairs}", "data.eval_fraction=0.25",
              "sampler.max_new_tokens=8", "train.save_every=1", "train.batch_size=2"]
    assert train(tmp_path / "whole", *common) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train(tmp_path / "run", *common) == 130
    shutil.rmtree(own_store)
    assert train(tmp_path / "run", *common) == 0  # all at once, as the first time, so to the same bits
    a, b = (load_file(checkpoint.steps(tmp_path / run / "checkpoints")[-1] / "weights.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "computed anew" not in capsys.readouterr().err


def test_adapter_off_wins_a_tie_and_loses_to_a_full_store(tmp_path, pairs, capsys):
    """One pass over rows, none held out: live scoring costs exactly what filling the store costs."""
    model = toy.save_model(tmp_path / "model")
    common = ["model=smollm2-135m", "adapter=lora", f"model.path={model}", "data=jsonl", f"data.path={pairs}", "data.eval_fraction=0",
              "train.steps=null", "train.epochs=1", "train.batch_size=4"]
    assert train(tmp_path / "tie", *common) == 0
    assert manifest(tmp_path / "tie")["reference"] == "adapter off" and "store" not in manifest(tmp_path / "tie")
    assert "reference: live;" in capsys.readouterr().err
    assert train(tmp_path / "asked", *common, "reference.store=on") == 0
    assert manifest(tmp_path / "asked")["reference"] == "stored (0 of 7 replies were there)"  # two rows differ in one reply, three times
    assert train(tmp_path / "there", *common) == 0
    assert manifest(tmp_path / "there")["reference"] == "stored (7 of 7 replies were there)"
    assert train(tmp_path / "passes", *common, "train.epochs=2", "reference.store=off") == 0
    assert manifest(tmp_path / "passes")["reference"] == "adapter off"


@pytest.mark.parametrize(("settings", "said"), [
    (["model=bandit", "data=bandit"], "model=bandit is a table"),
    (["source=rounds"], "source=rounds trains on replies that are not written yet"),
    (["source=rounds", "reference.refresh=round"], "the reference moves"),
    (["algo=reward_bt"], "trains a reward model"),
], ids=["bandit", "rounds", "moving", "reward"])
def test_what_cannot_be_stored_is_refused(settings, said, tmp_path, capsys):
    assert train(tmp_path / "run", *settings, "reference.store=on") == 2
    err = capsys.readouterr().err
    assert f"reference.store=on: {said}" in err or said in err
    assert "use reference.store=auto" in err and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("tiny_lm")
def test_kl_to_a_policy_that_is_loaded_for_each_evaluation(tmp_path, monkeypatch):
    loads, held = [], []
    real = Reloaded.ready

    def ready(self):
        loads.append(self.model is None)
        held.append(self)
        real(self)

    monkeypatch.setattr(Reloaded, "ready", ready)
    lazy, kept = tmp_path / "lazy", tmp_path / "kept"
    assert train(lazy, "optim.lr=1e-3") == 0
    assert sum(loads) == 3 and held[-1].model is None  # three evaluations, and nothing left behind
    assert train(kept, "optim.lr=1e-3", "reference.store=off") == 0
    kl = [[r["kl"] for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "eval"] for run in (lazy, kept)]
    assert kl[0] == pytest.approx(kl[1], abs=1e-4) and kl[0][0] == pytest.approx(0, abs=1e-5) and abs(kl[0][-1]) > 1e-3


# ---- without a run -----------------------------------------------------------------------------------


@dataclass
class TokenDPO(DPO):
    """DPO that reads the reference token by token."""

    quantities: ClassVar = {"policy": ("logp", "token_logp"), "reference": ("logp", "token_logp")}


def config(folder: Path, run: Path, data: dict | None = None, **model) -> TrainConfig:
    return TrainConfig(algo={}, model=toy.model_config(folder, **model), data=toy.data_config(**(data or {})), run_dir=str(run))


def rows_with_strangers(policy) -> list:
    """Pairs with mismatched replies under their prompts, as KTO has them."""
    rows = toy.rows(policy, *PAIRS)
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        row.mismatched = other.tokens.branches
    return rows


@pytest.mark.parametrize("objective", [DPO(), TokenDPO()], ids=["sums", "tokens"])
def test_stored_scores_are_the_live_ones(objective, tmp_path):
    folder = toy.save_model(tmp_path / "model")
    policy = toy.policy(folder)
    rows = rows_with_strangers(policy)
    with fresh_accelerator() as accelerator:
        source = OfflineSource(rows[:3], "pairs", 2, 64, policy.pad, True, 0)
        made = make_references(config(folder, tmp_path / "run"), policy, objective, source, rows[3:], 2, accelerator)
        assert isinstance(made.reference, Stored) and isinstance(made.initial, Reloaded)
        engine = Engine(policy, objective, made.reference, TrainConfig(algo={}).optim, accelerator)
        live = FrozenCopy(policy)
        for budget in (1, 64, 10**6):
            for micro in replace(source, rows=rows, budget=budget).everything("pairs"):
                scores = engine.score(micro).scores["reference"]
                assert set(scores) == ({"logp", "token_logp"} if isinstance(objective, TokenDPO) else {"logp"})
                for name, values in quantities(live(micro), micro.layout).items():
                    if name in scores:
                        torch.testing.assert_close(scores[name], values, atol=1e-5, rtol=0)
                keep = torch.arange(len(micro.gradient)) % 2 == 0
                part = micro.only(keep)
                known = quantities(live(part), part.layout)
                for name, values in part.stored["reference"].items():
                    torch.testing.assert_close(values, known[name], atol=1e-5, rtol=0)
    assert all(len(row.stored["reference"]) == len(replies_of(row)) == 4 for row in rows)


def test_a_missing_entry_is_an_error_and_never_scored_anew(tmp_path):
    folder = toy.save_model(tmp_path / "model")
    policy = toy.policy(folder)
    rows = rows_with_strangers(policy)
    with fresh_accelerator() as accelerator:
        source = OfflineSource(rows, "pairs", 4, 10**6, policy.pad, True, 0)
        made = make_references(config(folder, tmp_path / "run"), policy, DPO(), source, [], 1, accelerator)
        engine = Engine(policy, DPO(), made.reference, TrainConfig(algo={}).optim, accelerator)
        engine.score(source.step(0)[0])
        rows[2].stored["reference"].pop()
        with pytest.raises(RunFailed, match="row 2 has stored scores of `reference` for 3 of its 4 replies"):
            source.step(0)
        for row in rows:
            row.stored.clear()
        with pytest.raises(RunFailed, match="no scores in the reference store.*reference.store=off"):
            engine.score(source.step(0)[0])


def test_an_adapter_from_disk_is_scored_as_it_was_loaded(tmp_path):
    folder = toy.save_model(tmp_path / "model")
    lora = {"enabled": True, "r": 4}
    first = toy.policy(folder, lora)
    for parameter in first.trainable().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    first.save(tmp_path / "adapter")
    lora["adapter"] = str(tmp_path / "adapter")
    found = {}
    for which in ("initial", "base"):
        policy = toy.policy(folder, lora)
        rows = toy.rows(policy, *PAIRS)
        cfg = config(folder, tmp_path / "run", lora=lora)
        cfg.reference.policy, cfg.reference.store = which, "on"
        with fresh_accelerator() as accelerator:
            source = OfflineSource(rows, "pairs", 4, 10**6, policy.pad, True, 0)
            made = make_references(cfg, policy, DPO(), source, [], 1, accelerator)
        micro = source.everything("pairs")[0]
        assert not isinstance(made.initial, Reloaded) and made.initial.how == "frozen copy of the initial adapter"
        known = quantities(make_reference(policy, which, name="check")(micro), micro.layout)["logp"]
        torch.testing.assert_close(micro.stored["reference"]["logp"], known, atol=1e-5, rtol=0)
        found[which] = identity_of(cfg, policy)
    assert found["base"]["adapter"] is None and len(found["initial"]["adapter"]) == 64
    assert {k for k in found["base"] if found["base"][k] != found["initial"][k]} == {"adapter"}


def test_what_changes_the_identity(tmp_path):
    def identity(name: str, data: dict | None = None, seed: int = 0, change: dict | None = None, **model) -> dict:
        folder = toy.save_model(tmp_path / name, seed=seed)
        if change:
            weights = load_file(folder / "model.safetensors")
            save_file({**weights, **{k: weights[k] + v for k, v in change.items()}}, folder / "model.safetensors", {"format": "pt"})
        policy = toy.policy(folder, data=data, **model)
        return identity_of(config(folder, tmp_path / "run", data, **model), policy)

    def changed(**other) -> set[str]:
        made = identity(**other)
        return {key for key in base if made[key] != base[key]}

    base = identity("base")
    assert changed(name="moved") == set()  # the same model in another folder
    assert changed(name="weights", change={"model.norm.weight": 1e-6}) == {"weights"}
    assert changed(name="template", chat_template="plain") == {"chat_template"}
    assert changed(name="render", data={"render": "text"}) == {"render"}
    assert changed(name="short", data={"max_completion_tokens": 5}) == {"max_completion_tokens"}
    assert changed(name="prompts", data={"max_prompt_tokens": 50, "on_long_prompt": "keep_end"}) == {"max_prompt_tokens", "on_long_prompt"}
    assert {"attention"} <= changed(name="eager", attention="eager") <= {"attention", "scoring"}
    assert changed(name="plain", fused_head=False) == {"scoring"}
    policy = toy.policy(tmp_path / "base")
    policy.source["fingerprint"] = None  # a model without one gets one from its weights
    first = identity_of(config(tmp_path / "base", tmp_path / "run"), policy)["weights"]
    next(policy.parameters()).data[0, 0] += 1e-6
    assert len(first) == 64 and identity_of(config(tmp_path / "base", tmp_path / "run"), policy)["weights"] != first


@pytest.mark.parametrize(("total", "size", "steps"), [
    (10, 4, 1), (10, 4, 2), (10, 4, 3), (10, 4, 7), (10, 3, 9), (5, 8, 2), (6, 2, 1), (7, 7, 3),
])
def test_visits_are_those_that_the_source_makes(total, size, steps, tmp_path):
    policy = toy.policy(toy.save_model(tmp_path / "model"))
    rows = [toy.rows(policy, PAIRS[i % 4])[0] for i in range(total)]
    source = OfflineSource(rows, "pairs", size, 10**6, policy.pad, True, 3)
    seen = [row for step in range(steps) for micro in source.step(step) for row in micro.rows]
    assert visits(source, steps) == [seen.count(i) for i in range(total)]


@pytest.mark.usefixtures("tiny_lm")
@pytest.mark.parametrize("settings", [["train.steps=4"], ["train.steps=7", "train.eval_every=3"], ["train.steps=6", "train.eval_every=3"]],
                         ids=["fifths", "rest", "even"])
def test_evaluations_are_counted_as_the_loop_makes_them(settings, tmp_path):
    assert train(tmp_path / "run", *settings, "evaluation.prompts=0", "train.batch_size=2", "algo=simpo") == 0
    cfg = load_run_config(tmp_path / "run").train
    made = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "eval"]
    assert evaluations(cfg.steps, cfg.eval_every) == len(made)


@pytest.mark.usefixtures("tiny_lm")
def test_eval_of_a_stored_run_needs_no_store(tmp_path, own_store, calls):
    assert train(tmp_path / "run") == 0
    shutil.rmtree(own_store)
    from prefopt.cli import main

    assert main(["eval", f"run={tmp_path / 'run'}", "prompts=4"]) == 0
    assert not own_store.exists()
    last = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "eval"][-1]
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["after"]["loss"] == pytest.approx(last["loss"], rel=1e-5)


@pytest.mark.usefixtures("tiny_lm")
def test_the_limit_evicts_others_and_not_what_the_run_uses(tmp_path, own_store):
    assert train(tmp_path / "first", "reference.store_limit_gb=0") == 0
    first = store.shards(own_store)
    assert first  # in use, so they stay
    assert train(tmp_path / "second", "algo=kto", "reference.store_limit_gb=0") == 0
    assert set(first) < set(store.shards(own_store))  # it used those too
    assert train(tmp_path / "third", "data.max_completion_tokens=12", "reference.store_limit_gb=0") == 0
    assert not set(first) & set(store.shards(own_store))


def test_set_up_of_a_stored_run_gives_every_row_its_scores(tmp_path, tiny_lm):
    assert train(tmp_path / "run", "algo=kto") == 0
    cfg = load_run_config(tmp_path / "run")
    run = set_up(cfg, make_accelerator(cfg))
    assert isinstance(run.engine.reference, Stored)
    for rows in (run.source.rows, run.judge.held_out.rows):
        assert rows and all(len(row.stored["reference"]) == 4 for row in rows)
