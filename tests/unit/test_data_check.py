"""`prefopt data check`: what it counts, lists, suggests and shows."""

import json
import re

import pytest

from prefopt.config.schema import DataCheckConfig, DataConfig, ModelConfig, SourceConfig
from prefopt.data.tokenise import Branch
from prefopt.errors import UserError
from prefopt.evaluation.data_check import MARKS, at_share, check_text, marked, percentiles
from prefopt.policies import loading
from tests.toy import data_config, model_config, save_model

DPO, KTO, SFT = "prefopt.objectives.pairwise.DPO", "prefopt.objectives.unary.KTO", "prefopt.objectives.unary.SFT"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "m", template="llama3")


@pytest.fixture
def check(folder, tmp_path, monkeypatch):
    """Writes rows (dicts, or lines as they are) to a file and checks it; eval rows go to a second file."""
    monkeypatch.setattr(loading, "load_model", None)  # the weights are never loaded

    def run(rows, eval_rows=(), algo=DPO, example=0, **settings):
        for name, content in (("train", rows), ("eval", eval_rows)):
            lines = [r if isinstance(r, str) else json.dumps(r) for r in content]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        data = data_config(path=str(tmp_path), train="train.jsonl", eval="eval.jsonl", **settings)
        settings = {"name": algo.rpartition(".")[2].lower(), "_target_": algo}
        return check_text(DataCheckConfig(algo=settings, model=model_config(folder), data=data, example=example))

    return run


def pairs(count, start=0):
    return [{"prompt": f"question {i}", "chosen": f"good answer {i}", "rejected": f"bad {i}"} for i in range(start, start + count)]


def line(text, start):
    """The first line that starts so, with single spaces."""
    return next(" ".join(found.split()) for found in text.splitlines() if found.strip().startswith(start))


def test_a_clean_dataset(check):
    text = check(pairs(10), pairs(4, 100))
    assert "(view: pairs)" in text.splitlines()[0] and "algo=dpo" in text
    assert line(text, "train:") == "train: 10 usable rows, 0 broken"
    assert line(text, "eval:") == "eval: 4 usable rows, 0 broken"
    assert line(text, "kinds") == "kinds pair 10"
    assert line(text, "truncated") == "truncated 0 prompts, 0 completions, 0 tokens lost"
    assert line(text, "replies without end").startswith("replies without end 0 ")
    assert line(text, "double BOS") == "double BOS 0 (must be 0)"
    assert line(text, "duplicates") == "duplicates 0 rows repeat an earlier one, 0 have an earlier one's prompt"
    assert line(text, "length") == "length chosen is longer in 100.0 % of pairs, shorter in 0.0 %"
    assert line(text, "0 of 4 eval rows")
    assert "broken train rows" not in text and "would stop" not in text


def test_percentiles_are_values_that_occur():
    assert percentiles(list(range(1, 101))) == [5, 50, 95, 100]
    assert percentiles([7]) == [7, 7, 7, 7]
    assert at_share([1, 2, 3, 4], 50) == 2


def test_lengths_are_those_before_truncation(check):
    long = {"prompt": "question", "chosen": "word " * 60, "rejected": "bad"}
    plain = check([*pairs(3), long], algo=DPO)
    cut = check([*pairs(3), long], max_completion_tokens=9)
    assert line(plain, "chosen") == line(cut, "chosen")
    assert line(cut, "truncated").startswith("truncated 0 prompts,") and not line(cut, "truncated").startswith("truncated 0 prompts, 0 ")
    ends = int(line(cut, "replies without end").split()[3])
    assert ends == int(line(cut, "truncated").split()[3]) > 0


def test_truncated_prompts_and_prompts_that_are_refused(check):
    rows = [*pairs(3), {"prompt": "very " * 40, "chosen": "good", "rejected": "bad"}]
    kept = check(rows, max_prompt_tokens=40, on_long_prompt="keep_end", example=3)
    assert line(kept, "truncated").startswith("truncated 1 prompts, 0 completions")
    assert re.search(r"prompt, shared, 40 tokens \(\d+ more cut off at its start\)", kept)
    refused = check(rows, max_prompt_tokens=40)
    assert "1 broken train rows" in refused and "row 4: the prompt has" in refused
    suggestion = int(re.search(r"data.max_prompt_tokens=(\d+)", refused)[1])
    assert suggestion > 100  # the refused prompt counts, or the advice would never let it in
    assert suggestion == int(re.search(r"data.max_prompt_tokens=(\d+)", kept)[1])


def test_duplicates_and_overlap(check):
    rows = [*pairs(5), *pairs(2), {**pairs(1)[0], "rejected": "another"}]
    text = check(rows, [*pairs(1), *pairs(2, 50)])
    assert line(text, "duplicates") == "duplicates 2 rows repeat an earlier one, 3 have an earlier one's prompt"
    assert "1 of 3 eval rows have a prompt that is in train as well" in text


def test_ties_and_soft_labels(check):
    rows = [{**pairs(1)[0], "label": p} for p in (0.5, 0.7, 1.0, 0.5)]
    rows.append({"prompt": "Q", "completions": ["a", "b", "b"], "scores": [1, 1, 0]})
    text = check(rows)
    assert line(text, "ties") == "ties 1 rankings with equal scores, 1 with equal texts; 2 of 3 soft labels are 0.5"
    assert line(text, "kinds") == "kinds pair 4, ranking 1"
    assert line(text, "best") and line(text, "worst")


def test_length_bias(check):
    rows = pairs(3) + [{"prompt": "Q", "chosen": "x", "rejected": "long answer"}]
    assert line(check(rows), "length") == "length chosen is longer in 75.0 % of pairs, shorter in 25.0 %"


@pytest.mark.parametrize(("policy", "says"), [("stop", "A run would stop at the first of them"), ("skip", "A run leaves them out")])
def test_broken_rows_are_listed_with_row_and_reason(check, tmp_path, policy, says):
    bad = ["{oops", {"prompt": "Q", "chosen": "a", "rejected": "a"}, {"prompt": "Q", "chosen": "", "rejected": "b"}]
    text = check([*pairs(2), *bad, *pairs(2, 7)], [*pairs(1, 90), "[]"], on_bad_row=policy)
    assert line(text, "train:") == "train: 4 usable rows, 3 broken"
    for row, reason in ((3, "malformed JSON"), (4, "chosen and rejected are the same text"), (5, "a completion is empty")):
        assert f"{tmp_path / 'train.jsonl'} row {row}: {reason}" in text
    assert f"{tmp_path / 'eval.jsonl'} row 2: not a JSON object" in text
    assert text.count(says) == 1


def test_only_the_first_twenty_broken_rows_are_listed(check):
    text = check([*pairs(2), *["nonsense"] * 50])
    assert "50 broken train rows, the first 20" in text
    assert text.count("malformed JSON") == 20


def test_unused_columns_are_named(check):
    assert line(check([{**pairs(1)[0], "score_chosen": 7, "id": "x"}]), "columns not used") == "columns not used id, score_chosen"


def test_the_suggestion_covers_99_percent(check):
    rows = [{"prompt": "Q", "chosen": "word " * n, "rejected": "x"} for n in range(1, 41)]
    text = check(rows)
    reply = int(re.search(r"data.max_completion_tokens=(\d+)", text)[1])
    again = check(rows, max_completion_tokens=reply)
    cut = int(line(again, "truncated").split()[3])
    assert cut <= 0.01 * 80
    assert "the model's context is 256" in text


def test_a_suggestion_beyond_the_context_says_so(check):
    rows = [{"prompt": "very " * 30, "chosen": "good " * 45, "rejected": "bad " * 40}] * 3
    assert "together they pass the context: completions of long prompts will be cut at 256 tokens in all" in check(rows)


# ---- the example ----


def test_the_example_marks_what_is_trained_and_shows_special_tokens(check):
    text = check(pairs(3), example=1)
    shown = text[text.index("example 1:"):]
    assert "train.jsonl row 2 (pair)" in shown
    assert shown.count("<bos>") == 1
    assert "<|start_header_id|>user<|end_header_id|>\n\nquestion 1<|eot_id|><|start_header_id|>assistant" in shown
    assert "<|end_header_id|>\n\n\nchosen, " in shown
    assert "⟦good answer 1<|eot_id|>⟧\nrejected, " in shown
    assert shown.endswith("⟦bad 1<|eot_id|>⟧")


def test_untrained_turns_inside_a_completion_stand_outside_the_marks(check):
    talk = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "one"), ("user", "and"), ("assistant", "two"))]
    text = check([{"messages": talk}], algo=SFT)
    assert "⟦one<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nand<|eot_id|>" in text
    assert text.endswith("⟦two<|eot_id|>⟧")


def test_a_cut_reply_says_what_is_missing(check):
    text = check([{"prompt": "Q", "chosen": "word " * 30, "rejected": "bad"}], max_completion_tokens=5)
    assert re.search(r"chosen, 5 tokens, 5 trained \(\d+ more cut off at its end\)", text)


def test_marks_need_no_text_around_them():
    shown = marked(Branch([1, 2, 3], [False, True, True], True), lambda ids: "".join(map(str, ids)))
    assert shown == f"1{MARKS[0]}23{MARKS[1]}"


@pytest.mark.parametrize("number", [3, -1])
def test_an_example_that_is_not_there(check, number):
    with pytest.raises(UserError, match=f"example={number}: there are 3 usable training rows; choose 0 to 2"):
        check(pairs(3), example=number)


# ---- other kinds of data, objectives and models ----


def test_unary_data(check):
    rows = [{"prompt": f"Q{i}", "completion": f"reply {i}", "label": i % 3 > 0} for i in range(6)]
    text = check(rows, algo=KTO)
    assert line(text, "kinds") == "kinds unary 6"
    assert line(text, "desirable") and line(text, "undesirable")
    assert "length" not in text.replace("lengths", "")
    sft = check(rows, algo=SFT)
    assert line(sft, "train:") == "train: 4 usable rows, 0 broken, 2 thumbs-down rows left out"


def test_data_that_the_objective_cannot_read(check):
    with pytest.raises(UserError, match="this is a demonstration row, and the objective needs pairs"):
        check([{"prompt": "Q", "completion": "a"}])
    with pytest.raises(UserError, match="no usable row among 1"):
        check(["nonsense"])


def test_rows_of_which_none_survives_the_tokeniser(check):
    text = check(pairs(2), max_prompt_tokens=2)
    assert line(text, "train:") == "train: 0 usable rows, 2 broken"
    assert text.endswith("no usable row to show")


def test_the_bandit_and_tiny_lm_need_no_file_and_no_weights(monkeypatch):
    bandit = check_text(DataCheckConfig(algo={"_target_": DPO}, model=ModelConfig(name="bandit", kind="tabular"),
                                        data=DataConfig(name="bandit", source="bandit")))
    assert line(bandit, "train:") == "train: 60 usable rows, 0 broken"
    assert "suggested limits" not in bandit and re.search(r"⟦\d⟧$", bandit)

    def refuse(*args, **kwargs):
        raise AssertionError("the weights were asked for")

    monkeypatch.setattr("prefopt.policies.tiny_lm.ensure_tiny_lm", refuse)
    tiny = check_text(DataCheckConfig(algo={"_target_": DPO}, model=ModelConfig(name="tiny-lm"),
                                      data=DataConfig(name="tiny-feedback", source="tiny_feedback", limit=50, eval_limit=20)))
    assert line(tiny, "train:") == "train: 50 usable rows, 0 broken"
    assert line(tiny, "0 of 20 eval rows") and "<eos>⟧" in tiny


def test_prompts_to_sample_from_are_enough_for_an_online_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_model", None)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(3)))

    def checked(kind):
        data = data_config(path=str(tmp_path / "p.jsonl"))
        return check_text(DataCheckConfig(algo={"_target_": DPO}, model=model_config(folder), data=data, source=SourceConfig(kind)))

    text = checked("rounds")
    assert "train: 3 usable rows, 0 broken" in text and "suggested limit: data.max_prompt_tokens=" in text
    assert "max_completion_tokens" not in text
    with pytest.raises(UserError, match="this is a prompt row, and the objective needs pairs"):
        checked("offline")


def test_every_group_that_an_algorithm_may_choose_is_part_of_the_command():
    """Else `prefopt data check algo=NAME` is refused for a group that its user never named."""
    from prefopt.config.catalogue import groups, load_yaml

    chosen = {word.split("@")[0].removeprefix("override /") for name in groups()["algo"]
              for part in load_yaml("algo", name).get("defaults", []) if isinstance(part, dict) for word in part}
    there = {name for part in load_yaml("", "data_check")["defaults"] if isinstance(part, dict) for name in part}
    assert chosen >= {"noise", "adapter", "source"} and chosen <= there
