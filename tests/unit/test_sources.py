"""Files, folders and hub datasets as rows; what is unreadable, bad or held out."""

import gzip
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from prefopt.config.catalogue import conf_dir
from prefopt.config.schema import DataConfig
from prefopt.data.dataset import make_dataset
from prefopt.data.sources import load_data, read_file
from prefopt.errors import UserError
from tests.toy import data_config, tokeniser


def pairs(count, tag=""):
    return [{"prompt": f"question {tag}{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def load(path, **settings):
    return load_data(data_config(path=str(path), **{"eval_fraction": 0.0, **settings}))


def prompts(split):
    return [e.prompt_text for e in split.examples]


def from_yaml(name, **settings) -> DataConfig:
    """A data config as its YAML says it, checked against the schema."""
    written = [OmegaConf.load(conf_dir() / "data" / f"{name}.yaml")]
    while parents := [p for p in written[0].pop("defaults", []) if p != "_self_"]:
        written.insert(0, OmegaConf.load(conf_dir() / "data" / f"{parents[0]}.yaml"))
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), *written, settings))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder to lay out like a hub dataset; what `datasets` makes of it is kept beside it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "hub"


# ---- kinds of files ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_kinds_of_files(tmp_path, name):
    train, held_out = load(write(tmp_path / name, pairs(7)))
    assert prompts(train) == [f"question {i}" for i in range(7)]
    assert train.examples[2].origin == f"{tmp_path / name} row 3"
    assert held_out.examples == []


def test_folder_glob_and_named_files(tmp_path):
    write(tmp_path / "d" / "b.jsonl", pairs(2, "b"))
    write(tmp_path / "d" / "a.parquet", pairs(2, "a"))
    write(tmp_path / "d" / "sub" / "c.jsonl.gz", pairs(2, "c"))
    (tmp_path / "d" / "README.md").write_text("not data")
    assert prompts(load(tmp_path / "d")[0]) == [f"question {t}{i}" for t in "abc" for i in range(2)]
    assert prompts(load(tmp_path / "d" / "*")[0]) == [f"question {t}{i}" for t in "ab" for i in range(2)]
    assert prompts(load(tmp_path / "d" / "**" / "*.gz")[0]) == ["question c0", "question c1"]
    assert prompts(load(tmp_path / "d", train="b.jsonl")[0]) == ["question b0", "question b1"]


def test_a_named_eval_file_is_taken_out_of_the_training_folder(tmp_path):
    write(tmp_path / "d" / "a.jsonl", pairs(3, "a"))
    write(tmp_path / "d" / "held.jsonl", pairs(2, "h"))
    (tmp_path / "link").symlink_to(tmp_path / "d")
    for folder in (tmp_path / "d", tmp_path / "link"):
        train, held_out = load(folder, eval="held.jsonl")
        assert prompts(train) == [f"question a{i}" for i in range(3)]
        assert prompts(held_out) == ["question h0", "question h1"]
    train, held_out = load(tmp_path / "d" / "a.jsonl", eval=str(tmp_path / "d" / "held.jsonl"))
    assert (len(train.examples), len(held_out.examples)) == (3, 2)


def test_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    lines = [json.dumps(r) for r in pairs(2)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{lines[0]}\r\n\r\n{lines[1]}".encode())
    train, _ = load(tmp_path / "a.jsonl")
    assert [e.origin.split()[-1] for e in train.examples] == ["1", "3"]


def test_limits_keep_the_first_rows(tmp_path):
    write(tmp_path / "d" / "a.jsonl", pairs(9))
    write(tmp_path / "d" / "e.jsonl", pairs(9, "e"))
    train, held_out = load(tmp_path / "d", eval="e.jsonl", limit=4, eval_limit=2)
    assert prompts(train) == [f"question {i}" for i in range(4)]
    assert prompts(held_out) == ["question e0", "question e1"]


# ---- unreadable files ----


def unreadable(tmp_path):
    good = write(tmp_path / "good.jsonl.gz", pairs(50)).read_bytes()
    broken = bytearray(good)
    broken[len(good) // 2 : len(good) // 2 + 8] = b"\xff" * 8
    yield "missing.jsonl", None, "there is no such file"
    yield "no-match-*.jsonl", None, "no .* file matches"
    yield "notes.txt", b"hello", "cannot read this kind of file"
    yield "cut.jsonl.gz", good[:-20], "cannot be read"
    yield "broken.jsonl.gz", bytes(broken), "cannot be read"
    yield "plain.jsonl.gz", b"{}", "cannot be read \\(BadGzipFile"
    yield "bad.json", b"[{]", "cannot be read \\(JSONDecodeError"
    yield "dict.json", b"{}", "must hold a list of rows"
    yield "bad.parquet", b"nonsense", "not a readable parquet file"
    yield "empty.jsonl", b"", "no usable row among 0 \\(first reason: the data is empty\\)"


def test_unreadable_files_end_in_a_sentence_that_names_them(tmp_path):
    for name, content, reason in unreadable(tmp_path):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=reason) as caught:
            load(tmp_path / name)
        assert name in str(caught.value) or name == "empty.jsonl"
        assert caught.value.exit_code == 2


def test_a_file_without_read_permission_and_an_empty_folder(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", pairs(1))

    def refuse(*args):
        raise PermissionError("Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match="a.jsonl: cannot be read \\(PermissionError"):
        load(path)
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder holds no .jsonl"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(("source", "path", "train"), [("files", None, None), ("hub", None, "train"), ("hub", "x/y", None)])
def test_settings_that_are_missing(source, path, train):
    with pytest.raises(UserError, match="must be set|is not set"):
        load_data(data_config(source=source, path=path, train=train))


# ---- bad rows ----

BAD = {
    2: ('{"prompt": "Q", "chosen": "a", ', "malformed JSON \\(.* at column \\d+\\)"),
    3: ("[1, 2]", "not a JSON object"),
    5: ('{"prompt": "Q", "chosen": "a", "rejected": "a"}', "chosen and rejected are the same text"),
    6: ('{"prompt": "Q", "completions": ["a", "b"], "scores": [1, NaN]}', "'scores' is nan"),
    8: ('{"prompt": "Q", "chosen": "", "rejected": "a"}', "a completion is empty"),
    9: ('{"prompt": "\\udcff", "chosen": "a", "rejected": "b", "label": ' + "9" * 5000 + "}", "malformed JSON"),
}


def with_bad_rows(path, bad=BAD):
    lines = [json.dumps(r) for r in pairs(10)]
    for number, (line, _) in bad.items():
        lines[number - 1] = line
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("number", BAD)
def test_stop_names_file_row_and_reason(tmp_path, number):
    path = with_bad_rows(tmp_path / "a.jsonl", {number: BAD[number]})
    with pytest.raises(UserError, match=BAD[number][1]) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path} row {number}: ")
    assert "data.on_bad_row=skip" in str(caught.value)


def test_skip_counts_and_lists_the_bad_rows_and_keeps_the_others(tmp_path):
    path = with_bad_rows(tmp_path / "a.jsonl")
    train, _ = load(path, on_bad_row="skip")
    assert [r.origin for r in train.rejected] == [f"{path} row {n}" for n in BAD]
    assert len(train.examples) + len(train.rejected) == 10
    assert prompts(train) == [f"question {i}" for i in range(10) if i + 1 not in BAD]


def test_bytes_that_are_no_text_spoil_one_row_only(tmp_path):
    lines = [json.dumps(r).encode() for r in pairs(3)]
    lines[1] = lines[1].replace(b"good", b"go\xffd")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    train, _ = load(tmp_path / "a.jsonl", on_bad_row="skip")
    assert len(train.examples) == 2
    assert train.rejected[0].origin.endswith("a.jsonl row 2") and "malformed" in train.rejected[0].reason


def test_nan_scores_in_parquet(tmp_path):
    rows = [{"prompt": "Q", "completions": ["a", "b"], "scores": [1.0, s]} for s in (0.0, math.nan)]
    with pytest.raises(UserError, match="a.parquet row 2: 'scores' is nan"):
        load(write(tmp_path / "a.parquet", rows))


def test_only_bad_rows_is_an_error_even_if_they_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text("x\ny\n")
    with pytest.raises(UserError, match="no usable row among 2 .*row 1: malformed JSON"):
        load(tmp_path / "a.jsonl", on_bad_row="skip")


def test_rows_that_fail_in_tokenising_are_counted_too(tmp_path):
    rows = pairs(4)
    rows[2]["prompt"] = "very long " * 100
    path = write(tmp_path / "a.jsonl", rows)
    cfg = data_config(path=str(path), eval_fraction=0.0, max_prompt_tokens=50, on_bad_row="skip")
    train, _ = load_data(cfg)
    data = make_dataset(train, cfg, tokeniser(max_prompt_tokens=50), "pairs", ("weight",), False, 0)
    assert (data.stats["rows"], data.stats["rejected"]) == (3, 1)
    assert train.rejected[0].origin == f"{path} row 3"
    cfg.on_bad_row = "stop"
    with pytest.raises(UserError, match="row 3: the prompt has 800 tokens, the limit is 50"):
        make_dataset(train, cfg, tokeniser(max_prompt_tokens=50), "pairs", ("weight",), False, 0)


# ---- the held-out share ----


def test_equal_prompts_never_stand_on_both_sides(tmp_path):
    rows = [{"prompt": f"question {i % 37}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(300)]
    cfg = data_config(path=str(write(tmp_path / "a.jsonl", rows)), eval_fraction=0.1)
    train, held_out = load_data(cfg)
    assert 30 <= len(held_out.examples) < 60
    assert len(train.examples) + len(held_out.examples) == 300
    assert not set(prompts(train)) & set(prompts(held_out))


def test_the_held_out_prompts_depend_on_the_prompts_only(tmp_path):
    rows = pairs(200)
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", rows[::-1])
    held = lambda path: set(prompts(load_data(data_config(path=str(path)))[1]))  # noqa: E731
    assert len(held(a)) == 10
    assert held(a) == held(b) != {row["prompt"] for row in rows[:10]}


def test_eval_limit_bounds_the_held_out_share(tmp_path):
    _, held_out = load(write(tmp_path / "a.jsonl", pairs(200)), eval_fraction=0.5, eval_limit=7)
    assert len(held_out.examples) == 7


def test_one_prompt_for_all_rows_leaves_them_for_training(tmp_path):
    rows = [{"prompt": "Q", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(50)]
    train, held_out = load(write(tmp_path / "a.jsonl", rows), eval_fraction=0.1)
    assert (len(train.examples), len(held_out.examples)) == (50, 0)


# ---- hub layouts ----


def ultrafeedback_row(i):
    """A row as HuggingFaceH4/ultrafeedback_binarized has it."""
    prompt = f"question {i}"
    sides = [[{"content": prompt, "role": "user"}, {"content": f"{kind} {i}", "role": "assistant"}] for kind in ("good", "bad")]
    return {"prompt": prompt, "prompt_id": f"{i:x}", "chosen": sides[0], "rejected": sides[1], "messages": sides[0],
            "score_chosen": 8.5, "score_rejected": 3.0}


def test_ultrafeedback_config_reads_its_real_schema(hub):
    for split, count in (("train_prefs", 5), ("test_prefs", 2), ("train_sft", 5), ("test_gen", 1)):
        write(hub / "data" / f"{split}-00000-of-00001.parquet", [ultrafeedback_row(i) for i in range(count)])
    cfg = from_yaml("ultrafeedback", path=str(hub))
    train, held_out = load_data(cfg)
    assert (len(train.examples), len(held_out.examples), train.rejected) == (5, 2, [])
    e = train.examples[3]
    assert (e.kind, e.chat, e.prompt_text, [c.text for c in e.completions]) == ("pair", True, "question 3", ["good 3", "bad 3"])
    assert e.origin == f"{hub} train_prefs row 4"
    cfg.columns.messages = "messages"
    assert load_data(cfg)[0].digest() == train.digest()
    data = make_dataset(train, cfg, tokeniser("bytes", "zephyr"), "pairs", ("weight", "label"), False, 0)
    assert data.stats["rows"] == 5


def test_hh_config_reads_its_real_schema(hub):
    def row(i):
        head = f"\n\nHuman: question {i}\n\nAssistant: hm\n\nHuman: go on\n\nAssistant:"
        return {"chosen": f"{head} good {i}", "rejected": f"{head} bad {i}"}

    write(hub / "train.jsonl.gz", [row(i) for i in range(4)])
    write(hub / "test.jsonl.gz", [row(i) for i in range(2)])
    train, held_out = load_data(from_yaml("hh-rlhf", path=str(hub)))
    assert (len(train.examples), len(held_out.examples)) == (4, 2)
    assert [m.text for m in train.examples[1].prompt] == ["question 1", "hm", "go on"]
    assert [c.text for c in train.examples[1].completions] == ["good 1", "bad 1"]
    assert train.examples[1].origin == f"{hub} train row 2"


def test_a_hub_split_that_is_not_there_and_a_dataset_that_is_not(hub):
    write(hub / "train.parquet", [ultrafeedback_row(0)])
    with pytest.raises(UserError, match="has no split 'train_prefs'; it has train"):
        load_data(from_yaml("ultrafeedback", path=str(hub)))
    with pytest.raises(UserError, match="could not be loaded"):
        load_data(from_yaml("ultrafeedback", path=str(hub / "nowhere")))


@pytest.mark.parametrize(("file", "commit"), [
    ("hf://datasets/x/y@0123abc/data/train.parquet", "0123abc"), ("/home/me@work/y/train.parquet", "v1.0"),
])
def test_the_commit_that_the_hub_resolved_is_kept(monkeypatch, file, commit):
    import datasets

    table = datasets.Dataset.from_list(pairs(3))
    table.info.download_checksums = {file: {"num_bytes": 1}}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, revision, name: {"train": table})
    train, _ = load_data(data_config(source="hub", path="x/y", train="train", revision="v1.0"))
    assert train.revision == commit and len(train.examples) == 3


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_configs_for_your_own_files(tmp_path, name):
    train, held_out = load_data(from_yaml(name, path=str(write(tmp_path / f"a.{name}", pairs(100)))))
    assert (len(train.examples), len(held_out.examples)) == (95, 5)


def test_generated_worlds_load_from_their_configs():
    train, held_out = load_data(from_yaml("bandit"))
    assert len(train.examples) == len(held_out.examples) == 4 * 15
    assert all(0.5 <= e.label < 1 for e in train.examples)
    train, held_out = load_data(from_yaml("tiny-feedback", limit=20, eval_limit=10))
    assert (len(train.examples), len(held_out.examples)) == (20, 10)
    assert not set(prompts(train)) & set(prompts(held_out))


def test_digest_follows_content_and_order(tmp_path):
    rows = pairs(3)
    digest = lambda rows: load(write(tmp_path / "a.jsonl", rows))[0].digest()  # noqa: E731
    same = digest(rows)
    assert digest(rows) == same
    assert digest(rows[::-1]) != same
    assert digest([{**rows[0], "label": 0.9}, *rows[1:]]) != same
    assert digest([{**rows[0], "weight": 0.9}, *rows[1:]]) != same


def test_read_file_streams(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(2))
    with open(path, "a") as stream:
        stream.write("x" * 10)
    assert next(iter(read_file(Path(path))))[1]["prompt"] == "question 0"
