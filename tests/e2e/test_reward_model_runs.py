"""A reward model from training to use: evaluated, as the reward of other runs, and as a labeller. Small, in process."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.cli import main
from prefopt.config.schema import DataConfig, TrustConfig
from prefopt.data import bandit
from prefopt.data.sources import load_data
from prefopt.errors import UserError
from prefopt.evaluation.label import Counts, labelled
from prefopt.rewards.learned import LearnedReward, identity_of
from prefopt.tracking.tracker import read_jsonl
from tests.toy import data_config, example, pair, save_model
from tests.toy_runs import train

BANDIT = ("model=bandit", "data=bandit", "data.limit=60", "data.eval_limit=60")
SAID = ("I am well.", "Two and two make four.", "Paris is the capital.", "a fox", "Lima", "three and three make six")


def learned(path, data: DataConfig | None = None) -> LearnedReward:
    return LearnedReward(str(path), data or data_config(), TrustConfig(), torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A reward model of the bandit world that is nearly the true reward."""
    run = tmp_path_factory.mktemp("table") / "rm"
    assert train(run, *BANDIT, "algo=reward_bt", "optim.lr=0.1", "train.steps=200", "train.batch_size=60", "train.eval_every=100") == 0
    return run


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"How are you, {a}?", "chosen": SAID[i % 6], "rejected": SAID[(i + 1) % 6]}
            for i, a in enumerate("abcdefghijklmnop")]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


@pytest.fixture(scope="module", params=["full", "lora"])
def text_run(request, tmp_path_factory, pairs_file) -> Path:
    """A reward model over a toy language model."""
    folder = tmp_path_factory.mktemp(request.param)
    extra = ("model=tiny-lm-lora", "model.lora.r=4") if request.param == "lora" else ("model=tiny-lm",)
    words = ("algo=reward_bt", f"model.path={save_model(folder / 'base')}", "data=jsonl", f"data.path={pairs_file}",
             "data.eval_fraction=0.3", "optim.lr=0.01")
    assert train(folder / "rm", *extra, *words) == 0
    return folder / "rm"


def test_the_bandit_reward_is_found_and_calibrated(table, capsys):
    assert main(["eval", f"run={table}"]) == 0
    figures = json.loads((table / "eval.json").read_text())
    true = figures["calibration"]["true_reward"]
    assert true["correlation"] > 0.999 and true["ece"] < 0.02
    assert true["log_loss"] == pytest.approx(true["best_log_loss"], abs=1e-3)
    assert true["expected_accuracy"] == pytest.approx(true["best_accuracy"], abs=1e-3) and 0.6 < true["best_accuracy"] < 0.95
    assert figures["after"]["log_loss"] < figures["before"]["log_loss"] == pytest.approx(math.log(2))
    assert figures["after"]["ece"] < 0.02 and sum(r["pairs"] for r in figures["calibration"]["reliability"]) == 60
    assert figures["prompts"] == 0 and "everything on samples" in figures["not_measured"]
    shown = capsys.readouterr().out
    assert "reliability" in shown and "cannot pass" in shown
    row = [r for r in read_jsonl(table / "metrics.jsonl") if r["split"] == "eval"][-1]
    assert {"accuracy", "accuracy_low", "log_loss", "brier", "ece"} <= set(row) and "true_reward" not in row and "kl" not in row
    assert json.loads((table / "manifest.json").read_text())["reference"] == "none"
    assert "ALARM" not in (table / "report.html").read_text()


@pytest.mark.parametrize("algo", ["online_dpo", "grpo"])
def test_a_policy_learns_from_a_learned_reward(table, tmp_path, algo):
    run = tmp_path / "run"
    words = ("reward=model", f"reward.path={table}", "train.steps=40", "optim.lr=0.1", "evaluation.prompts=4", "sampler.batch_size=512")
    assert train(run, *BANDIT, f"algo={algo}", *words) == 0
    rows = [r for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "eval"]
    assert all({"reward", "true_reward", "win_rate"} <= set(r) for r in rows)
    rollout = [r["rollout/reward"] for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "train"]
    assert sum(rollout[-10:]) / 10 > sum(rollout[:10]) / 10 + 0.3
    sample = read_jsonl(run / "samples.jsonl")[-1]
    x, y = bandit.parse(sample["completion"])
    assert sample["rewards"]["true_reward"] == bandit.reward_table()[x][y]
    assert sample["rewards"]["reward"] == pytest.approx(float(load_file(str(table / "model" / "model.safetensors"))["logits"][x, y]))
    about = json.loads((run / "manifest.json").read_text())["rewards"]
    assert about["reward"]["path"] == str(table) and len(about["reward"]["fingerprint"]) == 64


def test_a_reward_model_with_its_own_tokenizer(text_run, pairs_file, tmp_path):
    """The policy has another tokenizer and template. What it says is rendered for the reward model as in the model's own training."""
    run, base = tmp_path / "run", save_model(tmp_path / "policy", "gpt2", template="zephyr", kind="pieces")
    words = (f"model.path={base}", "data=jsonl", f"data.path={pairs_file}", "data.eval_fraction=0.3", "algo=online_dpo",
             "sampler.max_new_tokens=8", "source.prompts=4")
    assert train(run, *words, "reward=model", f"reward.path={text_run}", "train.steps=2", "train.batch_size=4") == 0
    sample = read_jsonl(run / "samples.jsonl")[-1]
    assert sample["reward"] is not None
    if sample["completion"]:
        said = example(prompt=sample["prompt"], completion=sample["completion"])
        assert learned(text_run)([said]) == pytest.approx([sample["reward"]], abs=1e-5)


def test_the_same_rewards_as_while_training(text_run):
    """The saved model, found through its run, against the in-run model's own scores."""
    from prefopt.config.schema import EvalConfig
    from prefopt.evaluation.commands import _load, _open_to_judge

    run = _open_to_judge(str(text_run), EvalConfig(run=str(text_run)))
    _load(run)
    wanted = run.judge.rewards_of_rows()
    found = learned(text_run)
    assert not any(p.requires_grad for p in found.model.parameters()) and not found.model.training
    for number, held_out in enumerate(run.held_out.examples):
        for place, completion in enumerate(held_out.completions):
            one = example(prompt=held_out.prompt_text, completion=completion.text)
            assert found([one]) == pytest.approx([wanted[number][place]], abs=1e-5)


def test_rewards_come_in_order_however_they_are_batched(text_run):
    found = learned(text_run)
    asked = [example(prompt="How are you?", completion="well " * n + "x") for n in (5, 1, 9, 3, 20)]
    alone = [found([e])[0] for e in asked]
    assert len(set(alone)) == 5 and found(asked) == pytest.approx(alone, abs=1e-5) and found([]) == []
    found.budget = 30
    assert found(asked) == pytest.approx(alone, abs=1e-5)
    assert math.isfinite(found([example(prompt="How?", completion="x"), empty()])[1])


def empty():
    made = example(prompt="How?", completion="x")
    made.completions[0].messages[0].content[0]["text"] = ""
    return made


def test_long_texts_are_cut_as_in_training_and_counted(tmp_path, pairs_file, capsys):
    limits = ("data.max_prompt_tokens=12", "data.max_completion_tokens=6", "data.on_long_prompt=keep_end")
    words = (f"model.path={save_model(tmp_path / 'base')}", "data=jsonl", f"data.path={pairs_file}", *limits, "train.steps=1")
    assert train(tmp_path / "rm", "algo=reward_bt", *words) == 0
    found = learned(tmp_path / "rm")
    short, long = example(prompt="Hi?", completion="x"), example(prompt="Hi? " * 30, completion="well " * 300)
    capsys.readouterr()
    found([short])
    assert (found.cut, capsys.readouterr().err) == (0, "")
    found([long, short])
    assert found.cut == 1 and "1 texts so far were too long" in capsys.readouterr().err
    assert found.model.tokenise(long).longest <= 18


@pytest.mark.parametrize(("what", "words"), [
    ("nothing", "there is no such folder"),
    ("empty", "holds neither a run nor a saved model"),
    ("causal", "holds a LlamaForCausalLM, which gives no rewards"),
    ("dpo", "holds a run of algo=dpo, which trains no reward model"),
    ("unfinished", "that is not finished"),
    ("labels", "a classifier with 3 labels"),
    ("adapter", "an adapter that prefopt has not trained"),
    ("card", "is not what prefopt wrote"),
])
def test_what_is_no_reward_model_is_said(what, words, tmp_path):
    folder = tmp_path / what
    if what == "causal":
        save_model(folder)
    elif what == "labels":
        from transformers import AutoModelForSequenceClassification

        AutoModelForSequenceClassification.from_pretrained(save_model(folder), num_labels=3).save_pretrained(folder)
    elif what == "dpo":
        assert train(folder, *BANDIT, "algo=dpo", "train.steps=1") == 0
    elif what != "nothing":
        folder.mkdir()
    if what == "unfinished":
        (folder / "config.yaml").write_text("algo: {name: reward_bt}\n")
    if what == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    if what == "card":
        (folder / "prefopt_reward.json").write_text("[]")
    with pytest.raises(UserError, match=words):
        learned(folder)


def test_a_plain_classifier_of_another_maker_is_a_reward_model(tmp_path):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(save_model(tmp_path), num_labels=1)
    plain.save_pretrained(tmp_path)
    found = learned(tmp_path)
    tokens = found.model.tokenise(example(prompt="How are you?", completion="well"))
    with torch.no_grad():
        wanted = float(plain.eval()(input_ids=torch.tensor([tokens.prompt + tokens.branches[0].ids])).logits)
    assert found([example(prompt="How are you?", completion="well")]) == pytest.approx([wanted], abs=1e-5)


def test_worlds_do_not_mix(table, text_run):
    with pytest.raises(UserError, match="of the bandit world, and data=toy is text"):
        learned(table)
    with pytest.raises(UserError, match="for text, and data=bandit is the bandit world"):
        learned(text_run, DataConfig(name="bandit", source="bandit"))


@pytest.mark.parametrize(("words", "said"), [
    (("algo=reward_bt", "source=rounds"), "a reward model writes none"),
    (("algo=reward_bt", "reward=model", "reward.path=x"), "trains a reward model"),
    (("algo=dpo", "reward.path=x"), "is read with reward=model only"),
    (("algo=dpo", "reward=model"), "reward.path has no value"),
])
def test_what_cannot_work_is_refused_at_once(words, said, tmp_path, capsys):
    assert train(tmp_path / "run", *BANDIT, *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_reward_model_cannot_be_sampled(table, capsys):
    assert main(["sample", f"run={table}"]) == 2
    assert "writes no replies" in capsys.readouterr().err


# ---- prefopt label ----


def labels(folder: Path, *words: str) -> list[dict]:
    out = folder / "labelled.jsonl"
    assert main(["label", f"output={out}", "hardware=cpu", "hardware.threads=1", *words]) == 0
    return read_jsonl(out)


def test_labelled_rows_are_read_as_they_are(text_run, pairs_file, tmp_path, capsys):
    rows = labels(tmp_path, f"reward.path={text_run}", "data=jsonl", f"data.path={pairs_file}", "labels=soft")
    given = read_jsonl(pairs_file)
    assert len(rows) == len(given)
    disagreements, found = 0, learned(text_run)
    for row, old in zip(rows, given, strict=True):
        assert row["prompt"] == old["prompt"] and {row["chosen"], row["rejected"]} == {old["chosen"], old["rejected"]}
        disagreements += row["chosen"] != old["chosen"]
        better, worse = found([example(prompt=row["prompt"], completion=row[side]) for side in ("chosen", "rejected")])
        assert better >= worse and row["label"] == pytest.approx(1 / (1 + math.exp(worse - better)), abs=1e-5)
    assert f"{disagreements} of {len(rows)} pairs" in capsys.readouterr().out
    train_split, held_out = load_data(DataConfig(name="jsonl", source="files", path=str(tmp_path / "labelled.jsonl"), eval_fraction=0.0))
    assert [e.label for e in train_split.examples] == [r["label"] for r in rows] and not held_out.examples and not train_split.rejected
    assert train(tmp_path / "again", "data=jsonl", f"data.path={tmp_path / 'labelled.jsonl'}", "algo=dpo",
                 f"model.path={save_model(tmp_path / 'base')}", "train.steps=1") == 0


def test_hard_labels_of_the_bandit(table, tmp_path):
    rows = labels(tmp_path, f"reward.path={table}", "data=bandit", "data.label_noise=0.5")
    truth = bandit.reward_table()
    assert len(rows) == 60 and not any("label" in row for row in rows)
    for row in rows:
        (x, better), (_, worse) = bandit.parse(row["chosen"]), bandit.parse(row["rejected"])
        assert truth[x][better] > truth[x][worse] - 0.05 and row["reward_chosen"] >= row["reward_rejected"]


@pytest.mark.parametrize(("row", "rewards", "wanted"), [
    ({"prompt": "q", "completions": ["a", "b", "c"], "scores": [3, 2, 1]}, [0.5, 2.0, -1.0],
     {"prompt": "q", "completions": ["b", "a", "c"], "scores": [2.0, 0.5, -1.0]}),
    ({"prompt": "q", "completion": "a", "label": False, "weight": 2.0}, [0.5],
     {"prompt": "q", "completion": "a", "reward": 0.5, "label": False, "weight": 2.0}),
    ({"prompt": "q", "completion": "a", "source": "web", "reward": "theirs"}, [0.5],
     {"prompt": "q", "completion": "a", "reward": 0.5, "source": "web"}),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, [1.0, 1.0],
     {"prompt": "q", "chosen": "a", "rejected": "b", "label": 0.5, "reward_chosen": 1.0, "reward_rejected": 1.0}),
    ({"prompt": "q", "completions": ["a", "b"], "scores": [1, 0]}, [1.0, 1.0], None),
])  # fmt: skip
def test_rows_of_every_kind(row, rewards, wanted):
    given = example(**row)
    found = labelled(given, rewards, True, Counts())
    assert found == wanted
    if wanted is not None:
        again = example(**json.loads(json.dumps(found)))
        assert again.prompt_text == "q" and {c.text for c in again.completions} == {c.text for c in given.completions}


def test_chat_rows_stay_messages_and_counts_are_right():
    counts, said = Counts(), [{"role": "user", "content": "q"}]
    chat = pair(said, [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}], margin=1.5, label=0.2)
    row = labelled(chat, [0.0, 1.0], False, counts)
    assert row == {"prompt": said, "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "a"}],
                   "reward_chosen": 1.0, "reward_rejected": 0.0}
    labelled(example(prompt="q", completions=["a", "b", "c"], scores=[3, 2, 2]), [0.0, 1.0, 0.0], False, counts)
    assert asdict(counts) == {"rows": 2, "compared": 3, "disagreements": 1, "ties": 1, "margins_left_out": 1, "rankings_left_out": 0}


def test_rankings_without_scores_get_them(text_run, tmp_path, capsys):
    scores = dict(zip(SAID, learned(text_run)([example(prompt="q", completion=said) for said in SAID]), strict=True))
    ranked = sorted(SAID, key=lambda said: -scores[said])
    marks = ({}, {"scores": None}, {"scores": [1] * 6}, {"ranks": [1, 2, 3, 4, 5, 6]})
    rows = [{"prompt": "q", "completions": ranked[::-1], **mark, "source": "mine"} for mark in marks]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="row 1: 'completions' needs 'scores' or 'ranks' .prefopt label writes scores.*Mend the row"):
        load_data(data_config(path=str(tmp_path / "given.jsonl")))  # as all other commands do
    written = labels(tmp_path, f"reward.path={text_run}", "data=jsonl", f"data.path={tmp_path / 'given.jsonl'}")
    for row in written:
        assert {**row, "scores": None} == {"prompt": "q", "completions": ranked, "scores": None, "source": "mine"}
        assert row["scores"] == pytest.approx([scores[said] for said in ranked], abs=1e-5)
    assert "in 15 of 15 pairs" in capsys.readouterr().out, "only the ranks of the last row said which are better"
    read = load_data(data_config(path=str(tmp_path / "labelled.jsonl"), eval_fraction=0.0))[0]
    assert len(written) == len(read.examples) == 4


@pytest.mark.parametrize(("words", "said"), [
    (("output={there}", "data=bandit", "reward.path={rm}"), "is there already"),
    (("output={folder}/x/l.jsonl", "data=bandit", "reward.path={rm}"), "there is no folder"),
    (("output={folder}/l.csv", "data=bandit", "reward.path={rm}"), "ends in .jsonl"),
    (("output={folder}/l.jsonl", "data=bandit"), "reward.path has no value"),
    (("output={folder}/l.jsonl", "data=bandit", "reward=none"), "gives no reward for data=bandit"),
    (("output={folder}/l.jsonl", "data=jsonl", "data.path={prompts}", "reward=auto"), "gives no reward for data=jsonl"),
    (("output={folder}/l.jsonl", "data=jsonl", "data.path={prompts}", "split=eval", "reward=auto"), "no eval rows of its own"),
    (("output={folder}/l.jsonl", "data=bandit", "reward.path={rm}", "hardware=2xcpu"), "runs in one process"),
    (("data=bandit", "reward.path={rm}"), "output has no value"),
])
def test_label_says_what_is_wrong_and_writes_nothing(words, said, table, tmp_path, capsys):
    there, prompts = tmp_path / "there.jsonl", tmp_path / "prompts.jsonl"
    there.write_text("mine\n")
    prompts.write_text('{"prompt": "How are you?"}\n')
    names = {"there": there, "folder": tmp_path, "rm": table, "prompts": prompts}
    assert main(["label", *(w.format(**names) for w in words)]) == 2
    assert said in capsys.readouterr().err
    assert there.read_text() == "mine\n" and sorted(p.name for p in tmp_path.iterdir()) == ["prompts.jsonl", "there.jsonl"]


def test_scores_that_are_there_load_no_reward_model(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    loaded, real = [], LearnedReward.__init__
    monkeypatch.setattr(LearnedReward, "__init__", lambda self, *args: loaded.append(args[-1]) or real(self, *args))
    words = (*BANDIT, "algo=dpo", "+data.transforms.score.path=" + str(table), "evaluation.prompts=2")
    assert train(tmp_path / "first", *words) == 0 and loaded == ["fp32"]
    assert train(tmp_path / "second", *words, "algo=ipo") == 0 and main(["eval", f"run={tmp_path / 'first'}", "prompts=2"]) == 0
    assert loaded == ["fp32"], "the scores of both splits are on disk"
    assert identity_of(str(table), "fp32") != identity_of(str(table), "bf16"), "rewards of another precision are others"


def test_prompts_alone_hold_nothing_to_score(text_run, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How are you?"}\n')
    words = ["label", f"output={tmp_path / 'l.jsonl'}", f"reward.path={text_run}", "data=jsonl", f"data.path={tmp_path / 'prompts.jsonl'}"]
    assert main(words) == 2 and "no reply to score" in capsys.readouterr().err
