"""`prefopt eval` from run folders: the bandit, the tiny language model, and a user's own data, for which no reward is known."""

from __future__ import annotations

import json

import pytest

from prefopt.cli import main
from prefopt.tracking.tracker import read_jsonl
from tests.toy_runs import train

BANDIT = ("model=bandit", "data=bandit", "data.limit=null", "data.eval_limit=60", "train.batch_size=30", "train.steps=60", "optim.lr=0.1",
          "evaluation.prompts=4")  # fmt: skip
TINY = ("data.limit=64", "data.eval_limit=24", "train.steps=6", "train.batch_size=8", "evaluation.prompts=4")


@pytest.fixture(scope="module")
def bandit(tmp_path_factory):
    run = tmp_path_factory.mktemp("eval") / "bandit"
    assert train(run, *BANDIT) == 0
    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_lm):
    run = tmp_path_factory.mktemp("eval") / "tiny"
    assert train(run, *TINY) == 0
    return run


def evaluate(capsys, *words: str) -> tuple[dict, str]:
    capsys.readouterr()
    assert main(["eval", *words]) == 0
    said = capsys.readouterr().out
    return json.loads(open(said.rpartition("written to ")[2].strip(), encoding="utf-8").read()), said


def test_the_bandit_learns_to_rank_what_its_reward_ranks(bandit, capsys):
    found, said = evaluate(capsys, f"run={bandit}")
    before, after, change = found["before"], found["after"], found["difference"]
    assert found["rows"] == 60 and found["prompts"] == 4 and found["step"] == 60 and found["not_measured"] == {}
    assert before["accuracy"] == before["win_rate"] == before["lc_win_rate"] == 0.5 and after["accuracy"] > 0.9
    assert before["ranking_accuracy"] == before["reference_ranking_accuracy"] < after["ranking_accuracy"]
    assert change["accuracy"]["value"] == pytest.approx(after["accuracy"] - 0.5) and change["accuracy"]["excludes_zero"]
    assert change["ranking_accuracy"]["low"] < change["ranking_accuracy"]["value"] < change["ranking_accuracy"]["high"]
    for name in after:
        if not name.endswith(("_low", "_high")):
            assert after[f"{name}_low"] <= after[name] <= after[f"{name}_high"], name
    line = next(x for x in said.splitlines() if "accuracy (implicit reward)" in x)
    assert line.endswith("*") and "50.0" in line
    last = read_jsonl(bandit / "metrics.jsonl")[-1]
    for name in ("loss", "accuracy", "ranking_accuracy", "ranking_accuracy_low", "reward/margin", "logp/chosen"):
        assert after[name] == pytest.approx(last[name], rel=1e-5), name


def test_the_tiny_world_is_measured_in_full(tiny, capsys, tmp_path):
    found, said = evaluate(capsys, f"run={tiny}", "prompts=12", f"output={tmp_path / 'figures.json'}")
    wanted = {"loss", "accuracy", "ranking_accuracy", "ranking_accuracy_per_token", "reward/margin", "logp/chosen", "true_reward",
              "win_rate", "lc_win_rate", "kl", "length", "finished", "distinct_2"}
    assert wanted <= found["after"].keys() and wanted <= found["difference"].keys() and found["prompts"] == 12
    assert {f"{name}_low" for name in wanted} <= found["after"].keys()
    assert found["difference"]["true_reward"]["value"] == pytest.approx(found["after"]["true_reward"] - found["before"]["true_reward"])
    for words in ("on held-out rows", "on samples", "after - before", "length-controlled win rate", "95 % interval over prompts"):
        assert words in said
    again, _ = evaluate(capsys, f"run={tiny}", "prompts=12", "output=null")
    assert again == found and (tiny / "eval.json").is_file()


def test_greedy_samples_have_no_kl_and_the_reason_is_said(tiny, capsys):
    found, said = evaluate(capsys, f"run={tiny}", "prompts=4", "sampler=greedy")
    assert "kl" not in found["after"] and "not measured: KL: it needs samples at temperature 1" in said
    found, said = evaluate(capsys, f"run={tiny}", "prompts=0")
    assert "win_rate" not in found["after"] and "not measured: everything on samples: no prompt was sampled" in said


def test_two_runs_are_compared_reply_by_reply(tiny, tiny_lm, capsys, tmp_path):
    other = tmp_path / "simpo"
    assert train(other, *TINY, "algo=simpo", "train.steps=12", "seed=3") == 0
    found, said = evaluate(capsys, f"run={tiny}", f"against={other}", "prompts=12")
    turned, _ = evaluate(capsys, f"run={other}", f"against={tiny}", "prompts=12")
    one, two = found["against"], turned["against"]
    assert one["step"] == 12 and one["win_rate"] == pytest.approx(1 - two["win_rate"])
    assert one["difference"]["true_reward"]["value"] == pytest.approx(-two["difference"]["true_reward"]["value"])
    assert one["theirs"]["ranking_accuracy"] == pytest.approx(turned["after"]["ranking_accuracy"])
    assert "loss" not in one["difference"], "two objectives' losses are in different units"
    assert f"win rate of {tiny} against {other}: " in said


def test_runs_over_different_prompts_are_not_put_against_each_other(tiny, bandit, capsys):
    capsys.readouterr()
    assert main(["eval", f"run={tiny}", f"against={bandit}", "prompts=4"]) == 2
    said = capsys.readouterr().err
    assert "different held-out prompts" in said and "Traceback" not in said
    assert main(["eval", f"run={tiny}", f"against={tiny / 'nothing'}", "prompts=2"]) == 2


# ---- a user's own data ---------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_pairs_get_everything_that_needs_no_judge(tiny_lm, capsys, tmp_path):
    rows = [{"prompt": f"Tell me about the {a}.", "chosen": f"The {a} is kind.", "rejected": f"The {a} is cruel and mean to all."}
            for a in ("fox", "cat", "dog", "owl", "goat", "crow", "deer", "duck")]  # fmt: skip
    path, run = write(tmp_path / "pairs.jsonl", rows), tmp_path / "run"
    assert train(run, "data=jsonl", f"data.path={path}", "data.eval_fraction=0.5", "train.steps=3", "train.batch_size=4") == 0
    found, said = evaluate(capsys, f"run={run}")
    assert {"loss", "accuracy", "ranking_accuracy", "kl", "length", "finished", "distinct_2"} <= found["after"].keys()
    assert not {"true_reward", "win_rate", "lc_win_rate"} & found["after"].keys()
    assert found["not_measured"] == {"true reward, win rates": "no reward is known for this data (reward=model brings one)"}
    assert "not measured: true reward, win rates: no reward is known" in said


def test_own_rankings_are_judged_whole_though_the_run_learnt_from_best_and_worst(tiny_lm, capsys, tmp_path):
    rows = [{"prompt": f"Tell me about the {a}.", "scores": [3, 1, 2],
             "completions": [f"The {a} is kind.", f"The {a} is cruel.", f"The {a} sleeps."]}
            for a in ("fox", "cat", "dog", "owl", "hare", "wolf")]  # fmt: skip
    path = write(tmp_path / "rankings.jsonl", rows)
    taus = []
    for pairs in ("best_worst", "all"):
        run = tmp_path / pairs
        assert train(run, "data=jsonl", f"data.path={path}", "data.eval_fraction=0.5", f"data.pairs={pairs}", "train.steps=2",
                     "train.batch_size=3") == 0
        found, said = evaluate(capsys, f"run={run}", "prompts=0")
        taus.append(found["before"]["ranking_kendall_tau"])
        assert "kendall_tau" in found["difference"] and "Kendall" in said
    assert taus[0] == pytest.approx(taus[1], abs=1e-5), "the same model and the same rankings"


def test_without_held_out_rows_there_is_nothing_to_judge_and_it_is_said(tiny_lm, capsys, tmp_path):
    rows = [{"prompt": f"Tell me about the {a}.", "chosen": f"The {a} is kind.", "rejected": f"The {a} is mean."} for a in ("fox", "cat")]
    path, run = write(tmp_path / "pairs.jsonl", rows), tmp_path / "run"
    assert train(run, "data=jsonl", f"data.path={path}", "data.eval_fraction=0", "train.steps=2", "train.batch_size=2") == 0
    found, said = evaluate(capsys, f"run={run}")
    assert found["after"] == {} and set(found["not_measured"]) == {"everything on held-out rows", "everything on samples"}
    assert "data.eval_fraction" in said
