"""The comparison of runs: what makes a method, what is refused, what is missing, and the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from prefopt.errors import UserError
from prefopt.report.compare import compare, main
from prefopt.report.compare_page import p_text, table, verdict
from prefopt.report.compare_results import letter, measure

PAIRWISE = "prefopt.objectives.pairwise"
TARGETS = {"dpo": f"{PAIRWISE}.DPO", "simpo": "prefopt.objectives.reference_free.SimPO", "kto": "prefopt.objectives.unary.KTO"}
SETTINGS = {"dpo": {"beta": 0.1}, "simpo": {"beta": 2.0, "gamma": 1.0}, "kto": {"beta": 0.1}}
STEPS = (0, 25, 50, 75, 100)
PROMPTS = 48


def make_config(algo: str, seed: int, changes: dict) -> dict:
    config = {
        "algo": {"name": algo, "_target_": TARGETS[algo], **SETTINGS[algo]},
        "model": {"name": "tiny-lm", "path": None, "micro_batch_tokens": 8192, "learning_rate": 5e-4},
        "data": {"name": "tiny-feedback", "source": "tiny_feedback", "path": None, "limit": 2000, "eval": "eval", "label_noise": 0.0},
        "hardware": {"name": "cpu", "precision": "fp32", "threads": 1}, "reward": {"kind": "auto"},
        "sampler": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64}, "reference": {"policy": "initial"},
        "optim": {"lr": 5e-4, "betas": [0.9, 0.999]}, "train": {"batch_size": 16, "log_every": 1},
        "evaluation": {"prompts": PROMPTS, "kl": True}, "trust": {"packages": []}, "seed": seed, "run_dir": "anywhere",
    }  # fmt: skip
    for dotted, value in changes.items():
        *parts, last = dotted.split(".")
        place = config
        for part in parts:
            place = place[part]
        place[last] = value
    return config


def make_run(
    folder: Path, algo: str = "dpo", seed: int = 0, gain: float = 1.0, spread: float = 0.05, state: str = "finished", until: int = 100,
    prompts: int = PROMPTS, salt: int = 0, manifest: dict | None = None, **changes,
) -> Path:  # fmt: skip
    """A run folder. `gain` is the true rise of the reward, `spread` the deviation of the seed's own effect on it; in `changes`,
    `__` stands for the dot of a key."""
    folder.mkdir(parents=True)
    config = make_config(algo, seed, {key.replace("__", "."): value for key, value in changes.items()})
    hard = np.random.default_rng(7).normal(1.0, 0.8, prompts)  # prompts are as hard for every run
    rng = np.random.default_rng([abs(hash_of(algo)), seed, salt, int(1000 * gain)])
    effect, metrics, samples = rng.normal(0, spread), [], []
    for step in STEPS:
        if step > until:
            break
        x = step / 100
        rewards = hard + x * (gain + effect) + rng.normal(0, 0.6, prompts)
        ratios = x * rng.normal(3 * gain, 1.0, prompts)
        tokens = rng.integers(10, 30, prompts)
        for i in range(prompts):
            samples.append({
                "step": step, "id": i, "prompt": f"Tell me about thing {i}.", "completion": "so it is", "tokens": int(tokens[i]),
                "finished": bool(i % 10), "reward": float(rewards[i]), "log_ratio": float(ratios[i]),
            })  # fmt: skip
        if step:
            metrics.append({"step": step, "seconds": 0.9 * step, "split": "train", "loss": 0.6, "tokens": 1000 * step, "skipped_steps": 0})
        metrics.append({
            "step": step, "seconds": 0.9 * step + 1, "split": "eval", "loss": 0.69, "accuracy": 0.5 + 0.2 * x,
            "length": float(tokens.mean()), "true_reward": float(rewards.mean()), "kl": float(ratios.mean()), "finished": 0.9,
        })  # fmt: skip
    about = {
        "reference": "frozen copy", "model": {"fingerprint": "f" * 64, "where": "/secret/place"}, "parameters": 1000,
        "trainable_parameters": 1000, "packages": {"prefopt": "0.1.0"}, "data": {s: {"sha256": s, "rows": 256} for s in ("train", "eval")},
    }  # fmt: skip
    write(folder, "config.yaml", config)
    write(folder, "manifest.json", about | (manifest or {}))
    write(folder, "status.json", {"state": state, "step": until, "total_steps": 100, "seconds": 100.0 + seed, "message": ""})
    write(folder, "metrics.jsonl", metrics)
    write(folder, "samples.jsonl", samples)
    return folder


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "big") % 10**6


def write(folder: Path, name: str, data) -> None:
    if name.endswith(".yaml"):
        text = yaml.safe_dump(data, sort_keys=False)
    else:
        text = json.dumps(data) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in data)
    (folder / name).write_text(text)


def edit(folder: Path, name: str, change) -> None:
    """Rows of a .jsonl file through `change`; None drops a row."""
    rows = [new for line in (folder / name).read_text().splitlines() if (new := change(json.loads(line))) is not None]
    write(folder, name, rows)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Three methods with three seeds each: dpo at two strengths that are equally good, simpo better."""
    root = tmp_path_factory.mktemp("compare") / "sweep"
    for seed in range(3):
        make_run(root / f"{seed}-a", "dpo", seed, 1.0)
        make_run(root / f"{seed}-b", "dpo", seed, 1.0, salt=1, algo__beta=0.5)
        make_run(root / "deeper" / f"{seed}-c", "simpo", seed, 2.0)
    return root


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    return make_run(tmp_path / "one", "dpo"), make_run(tmp_path / "two", "simpo", gain=1.5)


def labels(*folders: Path, **options) -> list[str]:
    return sorted(m.label for m in measure(folders, **options).methods)


def html(*folders: Path, to: Path, **options) -> str:
    return compare(folders, to / "page.html", **options)[1].read_text(encoding="utf-8")


# ---- methods -------------------------------------------------------------------------------------


def test_runs_are_grouped_by_what_differs_except_the_seed(sweep):
    results = measure([sweep])
    assert results.methods[0].label == "simpo" and {m.label for m in results.methods[1:]} == {"dpo beta=0.1", "dpo beta=0.5"}
    assert [m.letter for m in results.methods] == ["A", "B", "C"]
    assert all(m.seeds == [0, 1, 2] for m in results.methods)
    assert results.estimates[0]["true_reward"].mean == pytest.approx(3.0, abs=0.3)


def test_labels_name_every_key_that_differs(tmp_path):
    changes = [{}, {"optim__lr": 1e-5}, {"optim__lr": 1e-5, "train__batch_size": 32}]
    runs = [make_run(tmp_path / str(i), **change) for i, change in enumerate(changes)]
    assert labels(*runs) == ["dpo lr=0.0005 batch_size=16", "dpo lr=1e-5 batch_size=16", "dpo lr=1e-5 batch_size=32"]


def test_models_are_named_once(tmp_path):
    small = make_run(tmp_path / "a")
    other = {"model__name": "pythia", "model__path": "some/pythia", "manifest": {"model": {"fingerprint": "e" * 64}}}
    large, tuned = make_run(tmp_path / "b", **other), make_run(tmp_path / "c", **(other | {"model__path": "my/pythia"}))
    assert labels(small, large) == ["dpo model=pythia", "dpo model=tiny-lm"], "the path follows from the name"
    assert labels(large, tuned) == ["dpo path=my/pythia", "dpo path=some/pythia"]
    assert "different models" in table(measure([small, large]))


def test_keys_that_change_no_result_make_no_method(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1, train__log_every=5, hardware__threads=2, run_dir="elsewhere")]
    assert labels(*runs) == ["dpo"]
    assert labels(*runs, make_run(tmp_path / "c", hardware__precision="bf16")) == ["dpo precision=bf16", "dpo precision=fp32"]


def test_a_run_named_twice_counts_once_and_hidden_folders_do_not(sweep, tmp_path):
    run = make_run(tmp_path / "s" / "run")
    make_run(tmp_path / "s" / "run2", "simpo")
    make_run(tmp_path / "s" / ".trash" / "old", "kto")
    make_run(run / "inside", "kto")
    (tmp_path / "s" / "ring").symlink_to(tmp_path / "s")
    assert len(measure([tmp_path / "s", run]).runs) == 2


def test_a_seed_run_twice_is_averaged_and_said(tmp_path):
    again = [make_run(tmp_path / "a"), make_run(tmp_path / "b", salt=5), make_run(tmp_path / "c", "simpo")]
    results = measure(again)
    assert sorted(len(m.seeds) for m in results.methods) == [1, 1] and len(results.runs) == 3
    assert "dpo has several runs of seed 0 with other results" in table(results)


def test_letters_go_on_after_z():
    assert [letter(i) for i in (0, 25, 26, 51, 52)] == ["A", "Z", "AA", "AZ", "BA"]


# ---- what is refused -----------------------------------------------------------------------------


def test_folders_without_runs_are_refused(tmp_path, pair):
    with pytest.raises(UserError, match="missing is no folder; give folders of runs"):
        measure([tmp_path / "missing"])
    with pytest.raises(UserError, match="is no folder.*did you mean 'one'"):
        measure([tmp_path / "onee"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no run"):
        measure([tmp_path / "empty", *pair])
    with pytest.raises(UserError, match="only run there; a comparison needs two"):
        measure([pair[0], pair[0]])


def test_a_run_without_evaluation_is_refused(pair):
    edit(pair[1], "metrics.jsonl", lambda row: row if row["split"] == "train" else None)
    with pytest.raises(UserError, match="two was never evaluated .* leave this one out"):
        measure(pair)


def test_an_unreadable_config_is_refused(pair):
    (pair[1] / "config.yaml").write_text("- just a list")
    with pytest.raises(UserError, match="config.yaml cannot be read"):
        measure(pair)


@pytest.mark.parametrize(("changes", "said"), [
    ({"data__limit": 4000}, "data.limit is 2000 or 4000"),
    ({"data__label_noise": 0.2}, "data.label_noise is 0 or 0.2"),
    ({"data__name": "other"}, "data.name is other or tiny-feedback"),
    ({"manifest": {"data": {"train": {"sha256": "train"}, "eval": {"sha256": "x"}}}}, "the eval rows differ"),
])  # fmt: skip
def test_different_data_are_refused_unless_asked_for(tmp_path, changes, said):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "simpo", **changes)]
    with pytest.raises(UserError, match=f"different data .*{said}.*--different-data"):
        measure(runs)
    text = table(measure(runs, allow_different_data=True))
    assert f"different data, compared because it was asked for: {said}" in text


def test_rows_held_out_by_seed_are_explained(tmp_path):
    other = {"data": {"train": {"sha256": "y"}, "eval": {"sha256": "x"}}}
    runs = [make_run(tmp_path / str(i), seed=i, data__source="files", data__eval=None, manifest=other if i else None) for i in range(2)]
    with pytest.raises(UserError, match="a fixed data.eval avoids"):
        measure(runs)


def test_different_prompts_are_refused_unless_asked_for(pair):
    edit(pair[1], "samples.jsonl", lambda row: row | {"prompt": row["prompt"].replace("thing 3.", "thing X.")})
    with pytest.raises(UserError, match="different prompts .48 and 48 of them"):
        measure(pair)
    results = measure(pair, allow_different_data=True)
    assert not results.paired and not results.wins and len(results.rewards) == 1
    assert "not paired by prompt" in table(results)


def test_fewer_prompts_are_paired_on_what_is_shared(pair):
    edit(pair[1], "samples.jsonl", lambda row: row if row["id"] < 40 else None)
    with pytest.raises(UserError, match="different prompts .40 and 48 of them"):
        measure(pair)
    results = measure(pair, allow_different_data=True)
    assert results.paired and results.wins and results.prompts == 40
    assert "the 40 that all answered are used" in table(results)


def test_the_same_run_twice_is_refused(tmp_path):
    make_run(tmp_path / "a"), make_run(tmp_path / "b")
    with pytest.raises(UserError, match="a and b are the same run twice"):
        measure([tmp_path])


# ---- what is missing -----------------------------------------------------------------------------


def test_a_metric_missing_in_one_method_is_a_dash_with_the_reason(pair):
    edit(pair[1], "metrics.jsonl", lambda row: {k: v for k, v in row.items() if k != "accuracy"})
    edit(pair[1], "samples.jsonl", lambda row: row | {"log_ratio": None})
    text = table(measure(pair))
    lines = [line for line in text.splitlines() if re.match(r"A +simpo", line)]
    assert "– (a)" in lines[0] and "– (b)" in lines[1]
    assert "a: KL: samples.jsonl has no log-ratios." in text and "b: Held-out accuracy: the run reports no accuracy on pairs." in text


def test_a_metric_missing_in_one_seed_is_said(tmp_path):
    runs = [make_run(tmp_path / str(i), seed=i) for i in range(3)]
    edit(runs[1], "samples.jsonl", lambda row: row | {"log_ratio": None})
    assert "KL of 2 of 3 runs; in the others, samples.jsonl has no log-ratios." in table(measure(runs))


def test_rewards_of_some_replies_are_not_enough(pair):
    edit(pair[1], "samples.jsonl", lambda row: row | {"reward": None if row["id"] == 3 else row["reward"]})
    results = measure(pair)
    assert "True reward: some replies have no reward." in table(results) and not results.rewards
    edit(pair[0], "samples.jsonl", lambda row: row if row["step"] else None)
    assert "Win rate vs initial (the initial policy was not evaluated; some replies have no reward)" in table(measure(pair))


def test_without_rewards_methods_are_put_side_by_side(pair):
    for run in pair:
        edit(run, "samples.jsonl", lambda row: row | {"reward": None})
    results = measure(pair)
    text = table(results)
    heads = [line for line in text.splitlines() if "method" in line]
    assert not results.rewards and "true reward" not in heads[0] and "KL" in heads[0] and "length" in heads[1]
    assert "True reward (no reward is known for this data)" in text
    assert "not ranked" in verdict(results)
    assert "Nothing was tested" in html(*pair, to=pair[0].parent)


def test_without_samples_what_is_left_is_compared(pair):
    for run in pair:
        (run / "samples.jsonl").unlink()
        (run / "manifest.json").unlink()
    text = table(measure(pair))
    assert text.splitlines()[0].split()[:3] == ["method", "seeds", "accuracy"]
    assert "Executed FLOPs (the manifest has no parameter counts)" in text and "samples.jsonl is missing" in text
    assert "Not shown" in html(*pair, to=pair[0].parent)


def test_a_killed_run_is_judged_at_its_last_whole_evaluation(tmp_path):
    runs = [make_run(tmp_path / "a", state="stopped", until=75), make_run(tmp_path / "b", "simpo")]
    edit(runs[0], "samples.jsonl", lambda row: None if row["step"] == 75 and row["id"] > 5 else row)
    results = measure(runs)
    assert {run.name: run.step for run in results.runs} == {"a": 50, "b": 100}
    text = table(results)
    assert "a did not finish: stopped at step 75 of 100; its figures are those of step 50." in text
    assert "different numbers of tokens" in text


@pytest.mark.parametrize(("algo", "manifest", "per_token"), [
    ("dpo", {}, 8000), ("simpo", {}, 6000), ("kto", {}, 10000), ("dpo", {"trainable_parameters": 10, "reference": "adapter off"}, 6020),
    ("dpo", {"reference": "stored"}, 6000),
])  # fmt: skip
def test_model_flops_follow_the_formula(tmp_path, algo, manifest, per_token):
    runs = [make_run(tmp_path / str(i), algo, seed=i, manifest=manifest) for i in range(2)]
    assert measure(runs).estimates[0]["flops"].mean == per_token * 100_000


# ---- what is said --------------------------------------------------------------------------------


def test_the_table_tells_what_is_significant_and_what_is_not(sweep):
    results = measure([sweep])
    text = table(results)
    assert len(re.findall(r"(A minus [BC]: \d.*p (<|=) 0.0\d+$)", text, re.M)) == 2
    assert re.search(r"B minus C: .*not significant$", text, re.M)
    assert len(re.findall(r"A against [BC]: \d\d %", text)) == 2
    assert "simpo has the highest true reward" in verdict(results)
    assert "each of the 2 other methods is significant" in verdict(results)


def test_equal_methods_are_not_told_apart_in_words(tmp_path):
    runs = [make_run(tmp_path / f"{a}{s}", "dpo", s, salt=s, algo__beta=b) for a, b in (("x", 0.1), ("y", 0.5)) for s in range(3)]
    assert "the data cannot tell it from dpo beta=" in verdict(measure(runs))


def test_alarms_and_small_numbers_of_seeds_are_caveats(pair):
    edit(pair[0], "metrics.jsonl", lambda row: row | ({"length": 10.0 + row["step"]} if row["split"] == "eval" else {}))
    text = table(measure(pair))
    assert "Alarm “Replies grew much longer”: dpo (1 of 1 run). The table of runs says which." in text
    assert "One seed only: all methods." in text
    assert "for these runs" in verdict(measure(pair))


def test_settings_tried_on_one_model_are_a_caveat(tmp_path):
    other = {"model__name": "pythia", "manifest": {"model": {"fingerprint": "e" * 64}}}
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **other), make_run(tmp_path / "c", **other, optim__lr=1e-5)]
    assert "Several settings" not in table(measure(runs[:2])), "one on each of two models"
    assert "Several settings of one algorithm: dpo (2)." in table(measure(runs))


def test_jobs_of_a_sweep_without_a_run_are_counted(pair, tmp_path):
    states = {"one": "finished", "two": "finished", "3": "failed", "4": "waiting"}
    jobs = [{"run_dir": f"x/{name}", "state": state} for name, state in states.items()]
    write(tmp_path, "sweep.json", jobs)
    assert "2 of 4 jobs" in (text := table(measure([tmp_path]))) and "(1 failed, 1 waiting)" in text


def test_p_values_in_words():
    assert [p_text(p) for p in (0.0001, 0.0042, 0.0498, 1.0)] == ["p < 0.001", "p = 0.004", "p = 0.0498", "p = 1.00"]


def test_many_pairs_are_summed_up(tmp_path):
    for i in range(7):
        make_run(tmp_path / f"run{i}", gain=0.5 * i, optim__lr=float(i + 1))
    text = table(measure([tmp_path]))
    assert "  A: above B C D E F G\n" in text and "  G: below all others\n" in text and "minus" not in text


# ---- the page ------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.stack = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "polyline", "polygon"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page_has_every_part_and_needs_nothing_from_outside(sweep, tmp_path):
    text = html(sweep, to=tmp_path)
    seen = Tags(text)
    assert not seen.stack and len([t for t, _ in seen.tags if t == "svg"]) == 4 and len([t for t, _ in seen.tags if t == "table"]) == 5
    for words in ("Table 1.", "Table 2.", "Table 3.", "Table 4.", "Figure 4.", "equal length", "n.s.", "Holm",
                  "initial policy", "\\toprule", "Student’s t", "6N"):
        assert words in text, words
    for tag, attributes in seen.tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "base", "form"), tag
        assert not {"src", "href", "style", "action"} & attributes.keys() and not any(name.startswith("on") for name in attributes)
    for place in (0, 1):  # results and costs: as many cells in every row as in the head, none of them empty but the initial policy's
        (body,) = re.findall(r"<table>.*?</table>", text, re.S)[place : place + 1]
        head, *rows = re.findall(r"<tr.*?</tr>", body, re.S)
        cells = [re.findall(r"<t[hd][ >].*?</t[hd]>", row, re.S) for row in (head, *rows)]
        assert len({len(row) for row in cells}) == 1, place
        words_in = [[re.sub(r"<[^>]*>|\s", "", cell) for cell in row] for row in cells[1:]]
        assert all(all(row) for row in words_in[1 - place :]), place
    assert not re.search(r"https?://|url\(|@import", text) and "default-src 'none'" in text
    assert str(sweep.parent) not in text and "/secret/place" not in text, "no path of the machine"
    assert "nan" not in re.sub(r"<[^>]*>", " ", text).lower().split()


def test_the_same_runs_give_the_same_page(sweep, tmp_path):
    parts = sorted(p.parent for p in sweep.rglob("config.yaml"))
    assert html(*parts, to=tmp_path) == html(*reversed(parts), to=tmp_path)


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    names = {"data__name": evil, "model__name": evil}
    runs = [make_run(tmp_path / "a&<b>", **names), make_run(tmp_path / "b", **names, optim__lr=evil)]
    write(runs[0], "status.json", {"state": evil, "step": evil, "total_steps": evil})
    text = html(*runs, to=tmp_path)
    assert not Tags(text).stack and "<script" not in text and "&lt;script&gt;" in text and "a&<b>" not in text


def test_where_the_page_goes(sweep, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare([sweep])[1] == sweep.resolve() / "compare.html"
    assert compare(pair)[1] == Path("compare.html") and Path("compare.html").is_file()
    assert compare(pair, tmp_path)[1] == tmp_path / "compare.html"
    with pytest.raises(UserError, match="there is no folder"):
        compare(pair, tmp_path / "no" / "page.html")


def test_the_command_line(pair, capsys, tmp_path):
    main([str(pair[0]), "--output", str(tmp_path / "x.html"), str(pair[1]), "--different-data"])
    said = capsys.readouterr().out
    assert "true reward" in said and said.rstrip().endswith(f"comparison: {tmp_path / 'x.html'}")
    for argv, words in (([], "needs folders"), (["a", "--output"], "needs the name"), (["--outptu"], "did you mean '--output'")):
        with pytest.raises(UserError, match=words):
            main(argv)


def test_comparing_imports_no_torch(pair, tmp_path):
    """In a process of its own, because other tests of this one have imported torch."""
    code = "import sys; from prefopt.report.compare import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, *map(str, pair), "--output", str(tmp_path / "x.html")], check=True, capture_output=True)
