"""Published datasets: a small table with the real columns, laid out and loaded as the hub's, and what comes out of it."""

import json
from pathlib import Path

import pytest

from prefopt.config import schema
from prefopt.config.catalogue import groups, load_yaml
from prefopt.config.schema import DataCheckConfig, ModelConfig
from prefopt.data import known, picture_sources
from prefopt.data.dataset import make_dataset
from prefopt.data.records import BadRow, NoPreference
from prefopt.data.sources import load_data
from prefopt.errors import UserError
from prefopt.evaluation.data_check import check_text
from tests.toy import save_model, tokeniser
from tests.unit.test_sources import from_yaml, hub, write

__all__ = ["hub"]  # the fixture

ALGO = {"kto-mix-14k": "prefopt.objectives.unary.KTO"}


def chat(*turns):
    return [{"content": text, "role": role} for role, text in turns]


def asked(i, *replies):
    return chat(("user", f"question {i}"), *(("assistant", r) for r in replies))


def shp(i, label):
    return {"post_id": f"p{i}", "domain": "askculinary_train", "upvote_ratio": 0.98, "history": f"question {i}", "c_root_id_A": f"a{i}",
            "c_root_id_B": f"b{i}", "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": 9, "score_B": 3, "human_ref_A": f"A {i}",
            "human_ref_B": f"B {i}", "labels": label, "seconds_difference": 1.0, "score_ratio": 3.0}


def helpsteer(i, strength, split="train", prompt=None):
    return {"split": split, "prompt": prompt or f"question {i}", "response_1": f"first {i}", "response_2": f"second {i}",
            "preference_strength": strength, "preference_statement": "because", "preference_elaboration": "so",
            "three_most_similar_preferences": [{"statement": "because", "elaboration": "so", "strength": strength}],
            "all_preferences_unprocessed": [{"statement": "because", "elaboration": "so", "strength": strength}]}


def pku(i, better, safer):
    return {"prompt": f"question {i}", "response_0": f"zero {i}", "response_1": f"one {i}", "prompt_source": "x", "response_0_source": "y",
            "response_1_source": "y", "is_response_0_safe": True, "is_response_1_safe": False, "response_0_severity_level": 0,
            "response_1_severity_level": 2, "better_response_id": better, "safer_response_id": safer,
            "response_0_sha256": "0", "response_1_sha256": "1"}


def nectar(i, ranks=(3, 1, 2), prompt=None):
    return {"prompt": prompt or f"\n\nHuman: question {i}\n\nAssistant: ", "turns": 1, "num_responses": len(ranks),
            "source": ["lmsys-chat-1m"], "good_natured": True,
            "answers": [{"answer": f"answer {r}", "model": "m", "rank": r} for r in ranks]}


def ultrafeedback(i, scores):
    aspect = {"Rating": "4", "Rationale": "fine"}
    return {"source": "evol_instruct", "instruction": f"question {i}", "models": ["m"] * len(scores), "correct_answers": ["None"],
            "incorrect_answers": ["None"], "completions": [
                {"annotations": {"helpfulness": aspect, "honesty": aspect, "instruction_following": aspect, "truthfulness": aspect},
                 "critique": "well", "custom_system_prompt": "be honest", "fine-grained_score": s, "model": "m", "overall_score": 10.0,
                 "principle": "honesty", "response": f"answer {n}"} for n, s in enumerate(scores)]}


def dpo_mix(i):
    """Whole dialogues that part at the last reply; some begin with a system message."""
    head = chat(("system", "helpful")) if i % 2 else []
    talk = head + asked(i, "hm") + chat(("user", "go on"))
    return {"dataset": "argilla/distilabel-capybara-dpo-7k-binarized", "chosen": talk + chat(("assistant", f"good {i}")),
            "rejected": talk + chat(("assistant", f"bad {i}")), "chosen_rating": 5.0, "rejected_rating": 2.0}


def cleaned(i):
    return {"source": "sharegpt", "prompt": f"question {i}", "chosen": asked(i, f"good {i}"), "chosen-rating": 5.0, "chosen-model": "m",
            "rejected": asked(i, f"bad {i}"), "rejected-rating": 2.0, "rejected-model": "m"}


def kto_mix(i, label):
    return {"prompt": asked(i), "completion": chat(("assistant", f"reply {i}")), "label": label}


LAYOUT = {  # file in the repository -> rows
    "shp": {"askculinary/train.json": [shp(0, 1), shp(1, 0), shp(2, 1)], "askculinary/validation.json": [shp(3, 0)],
            "askculinary/test.json": [shp(4, 0)]},
    "helpsteer2": {"preference/preference.jsonl.gz": [helpsteer(0, -3), helpsteer(1, 2), helpsteer(2, 0), helpsteer(3, -1, "val"),
                                                      helpsteer(4, 0), helpsteer(5, 0, "val")],
                   "train.jsonl.gz": [{"prompt": "q", "response": "r", "helpfulness": 3, "correctness": 3, "coherence": 3, "complexity": 1,
                                       "verbosity": 1}]},
    "pku-saferlhf": {"data/train-00000-of-00001.parquet": [pku(0, 0, 1), pku(1, 1, 1)], "data/test-00000-of-00001.parquet": [pku(2, 1, 0)]},
    "nectar": {"data/train-00000-of-00001.parquet": [nectar(i) for i in range(3)]},
    "ultrafeedback-ranked": {"data/train.jsonl": [ultrafeedback(0, [2.5, 4.75, 3.0, 1.0]), ultrafeedback(1, [3.0] * 4),
                                                  ultrafeedback(2, [None, 4.0, 2.0, 2.0]), ultrafeedback(3, [None, None, None, 2.0])]},
    "dpo-mix-7k": {"data/train-00000-of-00001.parquet": [dpo_mix(i) for i in range(3)],
                   "data/test-00000-of-00001.parquet": [dpo_mix(9)]},
    "ultrafeedback-cleaned": {"data/train-00000-of-00001.parquet": [cleaned(i) for i in range(3)]},
    "kto-mix-14k": {"data/train-00000-of-00001.parquet": [kto_mix(0, True), kto_mix(1, False), kto_mix(2, True)],
                    "data/test-00000-of-00001.parquet": [kto_mix(3, False)]},
}
# (question number, what each completion says, in order) of the training rows; and the same of the held-out rows
FOUND = {
    "shp": ([(0, ["A 0", "B 0"]), (1, ["B 1", "A 1"]), (2, ["A 2", "B 2"])], [(3, ["B 3", "A 3"])]),
    "helpsteer2": ([(0, ["first 0", "second 0"]), (1, ["second 1", "first 1"])], [(3, ["first 3", "second 3"])]),
    "pku-saferlhf": ([(0, ["zero 0", "one 0"]), (1, ["one 1", "zero 1"])], [(2, ["one 2", "zero 2"])]),
    "nectar": ([(i, ["answer 1", "answer 2", "answer 3"]) for i in range(3)], []),
    "ultrafeedback-ranked": ([(0, ["answer 1", "answer 2", "answer 0", "answer 3"]), (2, ["answer 1", "answer 2", "answer 3"])], []),
    "dpo-mix-7k": ([(i, [f"good {i}", f"bad {i}"]) for i in range(3)], [(9, ["good 9", "bad 9"])]),
    "ultrafeedback-cleaned": ([(i, [f"good {i}", f"bad {i}"]) for i in range(3)], []),
    "kto-mix-14k": ([(i, [f"reply {i}"]) for i in range(3)], [(3, ["reply 3"])]),
}
NO_PREFERENCE = {
    "helpsteer2": {"a tie: preference_strength is 0": 2},
    "ultrafeedback-ranked": {"a tie: all 4 completions have the same score": 1, "fewer than two of its completions have a score": 1},
}
KIND = {"nectar": "ranking", "ultrafeedback-ranked": "ranking", "kto-mix-14k": "unary"}


def lay_out(folder: Path, name: str) -> str:
    for file, rows in LAYOUT[name].items():
        path = folder / file
        if path.suffix == ".json":  # jsonl under another name, as SHP has it
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        else:
            write(path, rows)
    return str(folder)


@pytest.mark.parametrize("name", LAYOUT)
def test_the_real_schema_through_the_hub_path(name, hub):
    cfg = from_yaml(name, path=lay_out(hub, name), eval_fraction=0.0, on_bad_row="stop")
    train, held_out = load_data(cfg)
    wanted_train, wanted_eval = FOUND[name]
    for split, wanted in ((train, wanted_train), (held_out, wanted_eval)):
        assert [next(m.text for m in e.prompt if m.role == "user") for e in split.examples] == [f"question {i}" for i, _ in wanted]
        assert [[c.text for c in e.completions] for e in split.examples] == [texts for _, texts in wanted]
        assert {e.kind for e in split.examples} <= {KIND.get(name, "pair")}
        assert all(e.chat and e.weight == 1 and e.margin == 0 and e.label == 1 for e in split.examples)
        assert not split.rejected
    assert train.no_preference == NO_PREFERENCE.get(name, {})
    view = {"unary": "unary"}.get(KIND.get(name), "pairs")
    data = make_dataset(train, cfg, tokeniser("bytes", "llama3", max_prompt_tokens=1024), view, (), False, 0)
    assert data.stats["rows"] == len(wanted_train) and data.stats["no_preference"] == sum(NO_PREFERENCE.get(name, {}).values())


def test_every_mapped_dataset_is_proved_here_and_every_mapping_is_used():
    hub_data = {name for name in groups()["data"] if "_hub" in load_yaml("data", name).get("defaults", [])}
    assert hub_data == set(LAYOUT) == set(FOUND)
    assert tuple(sorted({**known.ROWS, **picture_sources.ROWS})) == schema.CHOICES["data.rows"]
    assert {load_yaml("data", name).get("rows") for name in hub_data} - {None} | {"pku-safer"} == set(known.ROWS)


@pytest.mark.parametrize("name", LAYOUT)
def test_data_check_works_on_it(name, hub, tmp_path):
    model = ModelConfig(name="toy", path=str(save_model(tmp_path / "model", "llama", "llama3")))
    cfg = DataCheckConfig({"_target_": ALGO.get(name, "prefopt.objectives.pairwise.DPO")}, model, from_yaml(name, path=lay_out(hub, name)))
    text = check_text(cfg)
    assert f"train: {len(FOUND[name][0])} usable rows, 0 broken" in text
    for reason, count in NO_PREFERENCE.get(name, {}).items():
        assert f"{count}: {reason}" in text
    assert "double BOS" in text and "⟦" in text


def test_what_is_chosen_can_be_the_safer_reply(hub):
    train, _ = load_data(from_yaml("pku-saferlhf", path=lay_out(hub, "pku-saferlhf"), rows="pku-safer", eval_fraction=0.0))
    assert [e.completions[0].text for e in train.examples] == ["one 0", "one 1"]


def test_a_domain_of_shp_is_a_folder(hub):
    lay_out(hub, "shp")
    write(hub / "legaladvice" / "train.jsonl", [shp(7, 1)])
    train, _ = load_data(from_yaml("shp", path=str(hub), subset="legaladvice", eval=None, eval_fraction=0.0))
    assert [e.prompt_text for e in train.examples] == ["question 7"]


def test_a_split_that_the_column_does_not_name(hub):
    with pytest.raises(UserError, match="has no split 'validation'; it has train, val"):
        load_data(from_yaml("helpsteer2", path=lay_out(hub, "helpsteer2"), eval="validation"))


def test_rows_of_helpsteer_keep_their_number_in_the_file(hub):
    train, held_out = load_data(from_yaml("helpsteer2", path=lay_out(hub, "helpsteer2")))
    assert [e.origin.split(" ", 1)[1] for e in train.examples + held_out.examples] == ["train row 1", "train row 2", "val row 4"]


def test_turns_of_a_longer_helpsteer_prompt():
    marked = "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nAnd\n\nyou?"
    (row,) = known.helpsteer2(helpsteer(0, 1, prompt=marked))
    assert [(m["role"], m["content"]) for m in row["prompt"]] == [("user", "Hi"), ("assistant", "Hello."), ("user", "And\n\nyou?")]
    (same,) = known.helpsteer2(helpsteer(0, 1, prompt=marked + "\n<extra_id_1>Assistant\n"))
    assert same["prompt"] == row["prompt"]
    with pytest.raises(BadRow, match="extra_id_N"):
        known.helpsteer2(helpsteer(0, 1, prompt="Hi <extra_id_2>quality:4"))


def test_several_turns_of_a_nectar_prompt(hub):
    write(hub / "train.jsonl", [nectar(0, prompt="\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And you?\n\nAssistant: ")])
    (e,) = load_data(from_yaml("nectar", path=str(hub), eval_fraction=0.0))[0].examples
    assert [(m.role, m.text) for m in e.prompt] == [("user", "Hi"), ("assistant", "Hello."), ("user", "And you?")]


@pytest.mark.parametrize(("rows", "row", "reason"), [
    ("shp", {**shp(0, 1), "labels": 2}, "'labels' is 2; it must be one of 0, 1"),
    ("shp", {**shp(0, 1), "history": None}, "'history' is not text"),
    ("helpsteer2", helpsteer(0, 4), "'preference_strength' is 4; it must be one of -3, -2"),
    ("pku-better", {"prompt": "q", "response_0": "a"}, "'better_response_id' is None"),
    ("pku-safer", {"prompt": "q", "safer_response_id": 0}, "'response_0' is not text"),
    ("nectar", {"prompt": "q", "answers": "a"}, "'answers' is not a list of completions"),
    ("ultrafeedback", {"completions": ["a", "b"]}, "'completions' is not a list of completions"),
    ("ultrafeedback", {**ultrafeedback(0, [1.0, 2.0]), "instruction": None}, "'instruction' is not text"),
], ids=lambda value: value if isinstance(value, str) and " " not in value else "")
def test_rows_that_do_not_fit_their_mapping_say_so(rows, row, reason):
    with pytest.raises(BadRow, match=reason) as caught:
        known.ROWS[rows](row)
    assert not isinstance(caught.value, NoPreference)


def test_a_bad_row_stops_and_a_tie_does_not(tmp_path):
    path = write(tmp_path / "a.jsonl", [helpsteer(0, 0), helpsteer(1, 9)])
    settings = {"source": "files", "path": str(path), "subset": None, "train": None, "eval": None, "on_bad_row": "stop"}
    with pytest.raises(UserError, match="row 2: 'preference_strength' is 9"):
        load_data(from_yaml("helpsteer2", **settings))
    write(path, [helpsteer(0, 0), helpsteer(1, 0)])
    with pytest.raises(UserError, match="no usable row among 2 .first reason: a tie: preference_strength is 0"):
        load_data(from_yaml("helpsteer2", **settings))


def test_the_commit_of_data_that_is_cached_and_read_without_a_network(hub, monkeypatch):
    """`datasets` keeps what it has prepared in a folder named by the commit."""
    import datasets

    write(hub / "train.jsonl", [kto_mix(i, True) for i in range(3)])
    load_data(from_yaml("kto-mix-14k", path=str(hub), eval=None))
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    (prepared,) = {file.parent for file in cache.rglob("*.arrow")}
    target = cache / "someone___kto" / "default" / "0.0.0" / commit
    target.parent.mkdir(parents=True)
    prepared.rename(target)
    for file in target.glob("*.arrow"):
        file.rename(target / "kto-train.arrow")
    info = json.loads((target / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(json.dumps({**info, "builder_name": "json", "dataset_name": "kto", "config_name": "default"}))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    train, held_out = load_data(from_yaml("kto-mix-14k", path="someone/kto", eval=None, eval_fraction=0.4))
    assert train.revision == held_out.revision == commit and len(train.examples) == 2
