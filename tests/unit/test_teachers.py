"""Teachers: finished runs of every kind and model folders are found and loaded; what cannot teach is refused in a sentence."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from prefopt.config.schema import ModelConfig, TeacherConfig, TrainConfig
from prefopt.errors import UserError
from prefopt.objectives.teacher_guided import TVKD, TVKDWithKL
from prefopt.objectives.token_divergence import TDPO, AlignDistil
from prefopt.policies.store import digest_of
from prefopt.tracking.tracker import read_jsonl
from prefopt.training.teachers import check_distributions, load_teachers, make_teacher, teacher_config
from tests import toy
from tests.toy_runs import fresh_accelerator, train

LORA = {"enabled": True, "r": 4, "alpha": 8}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return toy.save_model(tmp_path_factory.mktemp("model") / "llama")


def shaken(policy, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return policy.eval()


def as_run(folder, policy, **model):
    """A run folder that holds this policy."""
    policy.save(folder / "model")
    settings = {"name": "toy", "path": policy.cfg.path, "revision": None, "gguf_file": None, "wheel": None, "quantize": None, **model}
    (folder / "config.yaml").write_text(yaml.safe_dump({"algo": {"name": "dpo"}, "model": settings}))
    return folder


def loaded(policy, **paths):
    cfg = TrainConfig(algo={}, model=policy.cfg, data=toy.data_config(), teacher=TeacherConfig(**paths))
    with fresh_accelerator() as accelerator:
        return load_teachers(cfg, policy, accelerator)


# ---- found and loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "model of a run", "adapter's run", "adapter alone"])
@pytest.mark.parametrize("student", ["full", "lora"])
def test_a_teacher_scores_as_the_policy_that_was_saved(llama, tmp_path, kind, student):
    """Full weights and adapters, whatever the run that learns from them trains itself."""
    saved = shaken(toy.policy(llama, LORA if "adapter" in kind else None))
    run = as_run(tmp_path / "run", saved)
    path = run if kind in ("run", "adapter's run") else run / "model"
    if kind == "adapter alone":
        (run / "config.yaml").unlink()
    policy = toy.policy(llama, LORA if student == "lora" else None)
    (teacher,) = loaded(policy, path=str(path))
    micro = toy.micro(policy, toy.pair(), toy.pair("Is that so?", "I am well, thank you.", "The capital of Peru is Lima."))
    with torch.no_grad():
        assert torch.equal(teacher.eval()(micro), saved(micro))
        assert not torch.allclose(teacher(micro), policy(micro), atol=1e-2)


def test_two_teachers_in_their_order(llama, tmp_path):
    first, second = shaken(toy.policy(llama), 1), shaken(toy.policy(llama), 2)
    paths = {"path": str(as_run(tmp_path / "first", first)), "reverse": str(as_run(tmp_path / "second", second))}
    policy = toy.policy(llama)
    found = loaded(policy, **paths)
    micro = toy.micro(policy, toy.pair())
    with torch.no_grad():
        for teacher, saved in zip(found, (first, second), strict=True):
            assert torch.equal(teacher.eval()(micro), saved(micro))


def test_an_adapter_goes_onto_the_model_of_its_own_run(llama, tmp_path):
    other = toy.save_model(tmp_path / "other", seed=5)
    saved = shaken(toy.policy(other, LORA))
    policy = toy.policy(llama)
    (teacher,) = loaded(policy, path=str(as_run(tmp_path / "run", saved)))
    micro = toy.micro(policy, toy.pair())
    with torch.no_grad():
        assert torch.equal(teacher.eval()(micro), saved(micro))


def test_a_hub_id_is_left_to_the_hub():
    model = ModelConfig(name="toy", path="here/it-is", revision="1", gradient_checkpointing=True, dropout=0.1)
    found = teacher_config(replace(model, lora=replace(model.lora, enabled=True, adapter="x")), "org/teacher", "teacher.path")
    assert (found.path, found.revision, found.start, found.dropout) == ("org/teacher", None, None, 0.0)
    assert not found.lora.enabled and found.lora.adapter is None and not found.gradient_checkpointing


# ---- refused ---------------------------------------------------------------------------------------------


def test_what_is_no_policy_is_refused(llama, tmp_path):
    policy = toy.policy(llama)
    run = as_run(tmp_path / "run", policy)
    shutil.rmtree(run / "model")
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none", "there is no such folder"), (run, "is not finished"), (tmp_path / "empty", "neither a run")):
        with pytest.raises(UserError, match=rf"^teacher\.path={path}\b.* {message}"):
            loaded(policy, path=str(path))
    as_run(run, policy)
    (run / "model" / "prefopt_reward.json").write_text("{}")
    with pytest.raises(UserError, match="holds a reward model"):
        loaded(policy, path=str(run))


def test_another_vocabulary_is_refused(llama, tmp_path):
    words = toy.save_model(tmp_path / "words", kind="word")
    with pytest.raises(UserError, match=r"has another vocabulary than the policy \(\d+ tokens against \d+; .* is one that differs\)"):
        loaded(toy.policy(llama), path=str(words))


def test_distributions_that_cannot_be_compared_are_refused(llama, tmp_path):
    policy = toy.policy(llama)
    check_distributions([policy, toy.policy(llama)], AlignDistil())
    with pytest.raises(UserError, match="TDPO compares whole next-token distributions.*model.fused_head is off"):
        check_distributions([toy.policy(llama, fused_head=False)], TDPO())
    wide, size = toy.policy(llama), len(policy.tokenizer)
    wide.model.resize_token_embeddings(size + 64)
    with pytest.raises(UserError, match=rf"its models give logits for {size:,} and {size + 64:,} words"):
        check_distributions([policy, wide], TVKDWithKL())
    gemma = toy.policy(toy.save_model(tmp_path / "gemma2", "gemma2", "gemma"))
    check_distributions([gemma, gemma], TVKDWithKL())
    with pytest.raises(UserError, match=r"caps them \(final_logit_softcapping 3\)"):
        check_distributions([gemma, toy.policy(tmp_path / "gemma2")], AlignDistil())


def test_nobody_is_loaded_where_nobody_is_wanted(llama):
    cfg = TrainConfig(algo={}, teacher=TeacherConfig(path="no such run"))
    policy, source = toy.policy(llama), SimpleNamespace()
    with fresh_accelerator() as accelerator:
        assert make_teacher(cfg, policy, TDPO(), source, [], 1, accelerator) == (None, {})
        assert make_teacher(replace(cfg, teacher=TeacherConfig()), policy, TVKD(), source, [], 1, accelerator) == (None, {})


@pytest.mark.parametrize(("words", "message"), [
    (["algo=tgdpo", "stages=none"], r"teacher\.path has no value, and TGDPO learns from that model; give a finished run "
     r"\(teacher\.path=RUN\), or let one be trained first \(stages=dpo\)"),
    (["algo=align_distil", "stages=none", "teacher.path=x"], r"teacher\.reverse has no value.*stages=dpo_and_reverse"),
    (["algo=dpo", "teacher.path=x"], r"teacher\.path=x: DPO learns from no such model; leave it out"),
    (["algo=tvkd", "stages=none", "teacher.path=x", "teacher.reverse=y"], r"teacher\.reverse=y: TVKD learns from no such model"),
    (["algo=tdpo", "reference.store=on"], r"reference\.store=on: TDPO reads whole next-token distributions.*reference\.store=auto"),
    (["algo=tgdpo", "stages=none", "teacher.path=./none"], r"teacher\.path=\./none: there is no such folder"),
], ids=["no teacher", "no second", "not needed", "second not needed", "store", "no folder"])  # fmt: skip
@pytest.mark.usefixtures("tiny_lm")
def test_refused_on_the_command_line(tmp_path, capsys, words, message):
    assert train(tmp_path / "run", *words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said


# ---- runs ------------------------------------------------------------------------------------------------


BANDIT = ["model=bandit", "data=bandit", "optim.lr=0.05", "train.steps=6", "stages=none"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    where = tmp_path_factory.mktemp("tables")
    assert train(where / "dpo", "algo=dpo", *BANDIT) == 0
    assert train(where / "other", "algo=ipo", *BANDIT) == 0
    return where


@pytest.mark.parametrize("slug", ["tdpo", "tdpo1", "tgdpo", "tvkd", "tvkd_kl", "align_distil"])
def test_runs_on_the_bandit(tables, tmp_path, slug):
    """From finished runs as teachers, and it goes on from a checkpoint."""
    paths = [] if slug.startswith("tdpo") else [f"teacher.path={tables / 'dpo'}"]
    paths += [f"teacher.reverse={tables / 'other'}"] if slug == "align_distil" else []
    assert train(tmp_path / "run", f"algo={slug}", *BANDIT, *paths) == 0
    measured = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in measured if row["split"] == "train"]
    assert len(losses) == 6 and torch.tensor(losses).isfinite().all()
    about = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [m["path"] for m in about.get("teacher", [])] == [str(tables / name / "model") for name in ("dpo", "other")[: len(paths)]]


@pytest.mark.usefixtures("tiny_lm")
def test_a_guides_log_probs_are_stored_like_a_references(tmp_path, capsys, monkeypatch):
    """Under an identity of their own; the numbers are those of a guide that is run along, and the guide may then be gone."""
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    guide = tmp_path / "guide"
    assert train(guide, "algo=dpo", "optim.lr=1e-3") == 0
    words = ["algo=tgdpo", "stages=none", f"teacher.path={guide}", "algo.alpha=5.0"]
    live, stored = tmp_path / "live", tmp_path / "stored"
    assert train(live, *words, "reference.store=off") == 0
    capsys.readouterr()
    assert train(stored, *words) == 0
    said = capsys.readouterr().err
    assert "teacher: stored (0 of 80 replies were there)" in said and "reference: stored" in said
    ours, theirs = (json.loads((run / "manifest.json").read_text()) for run in (stored, live))
    assert "teacher_store" in ours and "teacher_store" not in theirs
    identities = [ours[name]["identity"] for name in ("store", "teacher_store")]
    assert identities[0]["weights"] != identities[1]["weights"]
    assert sorted(p.name for p in (tmp_path / "store" / "reference").iterdir() if p.is_dir()) == sorted({
        *map(digest_of, identities), digest_of(json.loads((guide / "manifest.json").read_text())["store"]["identity"])})
    for a, b in zip(*(read_jsonl(run / "metrics.jsonl") for run in (live, stored)), strict=True):
        for name in ("loss", "grad_norm", "guide/chosen", "reward/margin"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), (name, a["step"])
    assert any(abs(row.get("guide/chosen", 0)) > 1e-4 for row in read_jsonl(stored / "metrics.jsonl"))


@pytest.mark.usefixtures("tiny_lm")
def test_a_teachers_values_are_stored_token_by_token(tmp_path, capsys, monkeypatch):
    """They are those of a teacher that is run along, and others for another weight."""
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    guide = tmp_path / "guide"
    assert train(guide, "algo=dpo", "optim.lr=1e-3") == 0
    words = ["algo=tvkd", "stages=none", f"teacher.path={guide}"]
    live, stored, other = tmp_path / "live", tmp_path / "stored", tmp_path / "other"
    assert train(live, *words, "reference.store=off") == 0
    capsys.readouterr()
    assert train(stored, *words) == 0
    assert "teacher: stored (0 of 80 replies were there)" in capsys.readouterr().err
    assert train(other, *words, "algo.alpha=0.5") == 0
    assert "teacher: stored (0 of 80 replies were there)" in capsys.readouterr().err
    identities = [json.loads((run / "manifest.json").read_text())["teacher_store"]["identity"] for run in (stored, other)]
    assert [i["quantity"] for i in identities] == ["value, weight 0.7, temperature 1", "value, weight 0.5, temperature 1"]
    rows = {run.name: read_jsonl(run / "metrics.jsonl") for run in (live, stored, other)}
    for a, b in zip(rows["live"], rows["stored"], strict=True):
        for name in ("loss", "grad_norm", "reward/margin"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), (name, a["step"])
    assert rows["other"][0]["loss"] != pytest.approx(rows["stored"][0]["loss"], rel=1e-3)


@pytest.mark.usefixtures("tiny_lm")
@pytest.mark.parametrize("slug", ["tdpo", "tvkd_kl", "align_distil"])
def test_runs_of_language_models(tmp_path, slug):
    """A LoRA run that learns from finished LoRA runs; TDPO with a reference that is the adapter switched off."""
    lora = ["model=tiny-lm-lora", "model.lora.learning_rate=1e-2", "train.steps=2", "stages=none"]
    paths = []
    if slug != "tdpo":
        assert train(tmp_path / "guide", "algo=dpo", *lora) == 0
        paths = [f"teacher.path={tmp_path / 'guide'}"]
    if slug == "align_distil":
        assert train(tmp_path / "other", "algo=ipo", *lora) == 0
        paths += [f"teacher.reverse={tmp_path / 'other' / 'model'}"]
    assert train(tmp_path / "run", f"algo={slug}", *lora, *paths) == 0
    steps = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    assert len(steps) == 2 and all(torch.tensor(row["loss"]).isfinite() and row["grad_norm"] > 0 for row in steps)
    if slug == "tdpo":
        assert steps[0]["drift/rejected"] < 1e-6 < steps[1]["drift/rejected"]
