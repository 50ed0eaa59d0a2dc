"""Whatever a user gets wrong: one sentence that names it and the fix, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefopt.cli import main
from prefopt.data import tiny_feedback
from prefopt.tracking.tracker import JsonlTracker, read_jsonl
from prefopt.training import checkpoint
from tests.toy_runs import train

BANDIT = ["model=bandit", "data=bandit", "hardware=cpu", "hardware.threads=1", "debug=fast"]
TINY = ["hardware=cpu", "hardware.threads=1", "debug=fast"]


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must be refused; returns its sentence."""

    def run(*words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = main(list(words))
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("model: ")]
        assert code == 2, err
        assert len(lines) == 1 and lines[0].startswith("prefopt: ") and out == "", err
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return lines[0].removeprefix("prefopt: ")

    return run


@pytest.mark.parametrize("words, said", [
    ("trian", "unknown command 'trian'; did you mean 'train'?"),
    ("data chek", "did you mean 'data check'?"),
    ("list algoo", "there is no group algoo; did you mean 'algo'?"),
    ("show simpp", "there is no config named simpp; did you mean 'simpo'?"),
    ("completion basch", "did you mean 'bash'?"),
    ("train sed=3", "unknown key 'sed'; did you mean 'seed'?"),
    ("train optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
    ("train optm.lr=1", "unknown key 'optm.lr'; did you mean 'optim.lr'?"),
    ("train model.lora.rank=4", "unknown key 'model.lora.rank'; there are model.lora.enabled, model.lora.learning_rate, model.lora.r,"),
    ("train lr=1e-4", "unknown key 'lr'; did you mean 'optim.lr'?"),
    ("train beta=1", "unknown key 'beta'; did you mean 'algo.beta'?"),
    ("train +foo=1", "unknown key 'foo'; there are algo, model, data"),
    ("train +optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
    ("train +optim.lr=1", "optim.lr exists already; write optim.lr=... without the +"),
    ("train ~optim.lr", "~optim.lr: a key cannot be taken away"),
    ("train algo.bta=1", "algo.bta is no setting of DPO; did you mean 'algo.beta'?"),
    ("train +algo.bta=1", "algo.bta is no setting of DPO; did you mean 'algo.beta'?"),
    ("train modl=tiny-lm", "unknown key 'modl'; did you mean 'model'?"),
    ("train algo=dpoo", "there is no algo=dpoo; did you mean 'algo=dpo'?"),
    ("train experiment=dpo_lama", "did you mean 'experiment=dpo_llama3-8b'?"),
    ("train algo=null", "algo=null: a group is chosen by name"),
    ("train algo=dpo,ipo", "algo=dpo,ipo has several values; add -m"),
    ("train simpo", "'simpo' is no override; did you mean 'algo=simpo'?"),
    ("train optim.betas=[0.9", "cannot read 'optim.betas=[0.9'"),
    ("train --cgf job", "unknown option --cgf; did you mean '--cfg'?"),
    ("train --cfg jobb", "--cfg: invalid choice: 'jobb'"),
    ("train --config-dir nowhere", "nowhere' not found"),
    ("train --experimental-rerun x", "--experimental-rerun reads a pickle"),
    ("train optim.lr=high", "optim.lr=high: it must be a number"),
    ("train seed=1.5", "seed=1.5: it must be a whole number"),
    ("train model.gradient_checkpointing=3", "model.gradient_checkpointing=3: it must be true or false"),
    ("train optim=3", "optim=3: optim is a block of keys; set one of them, such as optim.lr"),
    ("train trust.packages=foo", "trust.packages=foo: it must be a list"),
    ("train seed=${nope}", "seed: Interpolation key 'nope' not found"),
    ("train algo.beta=abc", "algo.beta=abc: it must be a finite number"),
    ("train algo.beta=inf", "algo.beta=Infinity: it must be a finite number"),
    ("train optim.lr=inf", "optim.lr=Infinity: it must be a finite number"),
    ("train optim.lr=-1", "optim.lr=-1.0: it must be above 0"),
    ("train train.batch_size=0", "train.batch_size=0: it must be at least 1"),
    ("train algo.beta=-1", "algo.beta=-1: DPO needs beta > 0"),
    ("train algo.label_smoothing=0.7", "algo.label_smoothing=0.7: DPO needs 0 <= label_smoothing < 0.5"),
    ("train optim.schedule=cosin", "optim.schedule=cosin is none of constant, linear, cosine; did you mean 'optim.schedule=cosine'?"),
    ("train model=bandit", "model=bandit and data=tiny-feedback do not fit"),
    ("train reference.policy=base", "use reference.policy=initial, or a LoRA model"),
    ("train data=hh-rlhf data.label_noise=0.1", "remove it for data=hh-rlhf"),
    ("train algo._target_=os.system", "outside prefopt; if you trust that code, set trust.packages=[os]"),
    ("train algo._target_=prefopt.errors.UserError", "is not an objective"),
    ("train data=jsonl", "data.path has no value, and data=jsonl needs one"),
    ("train data=jsonl data.path=nowhere.jsonl", "data.path=nowhere.jsonl: there is no such file"),
    ("train hydra.run.dir=/dev/null/run model=bandit data=bandit", "the folder /dev/null/run cannot be made"),
    ("train model.path=./nowhere", "model.path=./nowhere: there is no such folder"),
    ("train hardware.device=cuda hardware.name=mine", "hardware=mine asks for a GPU"),
    ("eval run=nowhere", "nowhere holds no run (there is no config.yaml in it)"),
    ("eval", "run has no value; give it one: run=..."),
    ("eval runn=x", "unknown key 'runn'; did you mean 'run'?"),
    ("eval -m run=a,b", "-m makes sweeps of prefopt train"),
    ("eval algo=dpo", "the group algo is not part of this command"),
    ("sample run=nowhere", "nowhere holds no run"),
    ("sample run=. promt=x", "unknown key 'promt'; did you mean 'prompt'?"),
    ("train -m algo=dpo,ipoo", "there is no algo=ipoo; did you mean 'algo=ipo'?"),
    ("train -m optim.lrr=1,2", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
    ("train -m model=bandit data=bandit optim.lr=0.1,-1",
     "job 2 (model=bandit data=bandit optim.lr=-1): optim.lr=-1.0: it must be above 0. No job was started."),
    ("train -m data=jsonl data.path=nowhere.jsonl seed=0,1", "nowhere.jsonl: there is no such file"),
])
def test_refused(words, said, refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert said in refused(*words.split())


def test_an_existing_empty_folder_is_not_taken_away(refused, tmp_path):
    (tmp_path / "mine" / "run").mkdir(parents=True)
    refused("train", "hydra.run.dir=mine/run", "model.path=./nowhere")
    refused("train", "-m", "hydra.sweep.dir=mine/run", "optim.lr=-1")
    assert (tmp_path / "mine" / "run").is_dir()


def test_a_typo_is_reported_without_importing_torch():
    """A subprocess, because this process has torch loaded."""
    code = ("import sys; from prefopt.cli import main; code = main(['train', 'optim.lrr=1', 'algo=dpo']); "
            "sys.exit(9 if {'torch', 'transformers'} & set(sys.modules) else code)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "prefopt: unknown key 'optim.lrr'; did you mean 'optim.lr'?\n")


# ---- data ----

def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


GOOD = [{k: "".join(m["content"] for m in row[k]) for k in ("prompt", "chosen", "rejected")} for row in tiny_feedback.rows("train", 6, 0)]
UNARY = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in GOOD]
ROWS = {
    "malformed": ([*GOOD[:3], '{"prompt": "a", "cho'], "rows.jsonl row 4: malformed JSON"),
    "equal": ([*GOOD[:2], {**GOOD[2], "rejected": GOOD[2]["chosen"]}], "rows.jsonl row 3: chosen and rejected are the same text"),
    "empty": ([{**GOOD[0], "chosen": " "}], "rows.jsonl row 1: a completion is empty"),
    "nan": ([GOOD[0], '{"prompt": "a", "completions": ["b", "c"], "scores": [NaN, 1]}'], "rows.jsonl row 2: 'scores' is nan"),
    "label": ([{**GOOD[0], "label": 2}], "rows.jsonl row 1: 'label' is 2.0, outside [0, 1]"),
    "columns": ([{"question": "a"}], "rows.jsonl row 1: none of the columns prompt, chosen,"),
    "long": ([{**GOOD[0], "prompt": " ".join([GOOD[0]["prompt"]] * 100)}], "rows.jsonl row 1: the prompt"),
    "nothing": ([], "data.path=rows.jsonl: no usable row"),
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows_are_named(name, refused, tmp_path, tiny_lm):
    rows, said = ROWS[name]
    write_rows(tmp_path / "rows.jsonl", rows)
    sentence = refused("train", *TINY, "data=jsonl", "data.path=rows.jsonl")
    assert said in sentence
    assert name == "nothing" or "set data.on_bad_row=skip" in sentence


@pytest.mark.parametrize("rows, algo, said", [
    (UNARY, "dpo", "this is a unary row, and the objective needs pairs"),
    ([{"prompt": "a"}], "sft", "this is a prompt row, and the objective needs completions"),
    ([{**GOOD[0], "margin": 0.5}], "ipo", "Set data.columns.margin=null"),
])
def test_data_of_the_wrong_kind_is_refused_before_the_model_is_loaded(rows, algo, said, refused, tmp_path):
    write_rows(tmp_path / "rows.jsonl", rows)
    sentence = refused("train", f"algo={algo}", "data=jsonl", "data.path=rows.jsonl", "model=llama3-8b", "hardware=cpu")
    assert sentence.startswith("rows.jsonl row 1: ") and said in sentence


@pytest.mark.parametrize("name, content, said", [
    ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 100, mtime=0)[:40], "cut.jsonl.gz: cannot be read (EOFError"),
    ("no.parquet", b"not a table at all", "no.parquet: is not a readable parquet file"),
    ("object.json", b"{}", "a .json file must hold a list of rows"),
    ("table.csv", b"a,b", "cannot read this kind of file; use .jsonl"),
    ("folder.jsonl", None, "the folder holds no .jsonl"),
], ids=["cut gzip", "no parquet", "object", "csv", "empty folder"])  # not from the bytes: two workers must collect the same tests
def test_unreadable_files_are_named(name, content, said, refused, tmp_path):
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    sentence = refused("train", "data=jsonl", f"data.path={name}", "hardware=cpu")
    assert name in sentence and said in sentence


def test_after_bad_data_the_corrected_command_works_in_the_same_folder(refused, tmp_path, tiny_lm):
    write_rows(tmp_path / "rows.jsonl", [*GOOD, "{"])
    words = ["train", *TINY, "data=jsonl", "data.path=rows.jsonl", "hydra.run.dir=runs/one"]
    assert "rows.jsonl row 7" in refused(*words)
    assert main([*words, "data.on_bad_row=skip", "data.eval_fraction=0", "train.steps=1", "evaluation.kl=false"]) == 0


# ---- models ----

def test_a_model_that_cannot_be_reached_is_named(refused):
    sentence = refused("train", *TINY, "model=smollm2-135m", "model.wheel=null", "model.path=nobody/nothing")
    assert "tried hub nobody/nothing" in sentence and "set model.path to a folder" in sentence


def test_data_that_cannot_be_reached_is_named(refused):
    sentence = refused("train", "data=hh-rlhf", "data.path=nobody/nothing", "hardware=cpu")
    assert "data.path=nobody/nothing could not be loaded" in sentence and "use data=jsonl" in sentence


def test_pickled_weights_are_refused(refused, tmp_path, tiny_lm):
    shutil.copytree(tiny_lm, tmp_path / "legacy", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "legacy" / "pytorch_model.bin")
    sentence = refused("train", *TINY, "model.path=legacy")
    assert "legacy has its weights in pytorch_model.bin, a pickle" in sentence and "save_pretrained" in sentence


# ---- run folders ----

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", *BANDIT, f"hydra.run.dir={run}"]) == 0
    return run


def unfinished(finished: Path, target: Path) -> Path:
    """A copy of a run that looks as if it had been killed after its last checkpoint."""
    shutil.copytree(finished, target)
    status = json.loads((target / "status.json").read_text())
    (target / "status.json").write_text(json.dumps({**status, "state": "running"}))
    return target


def test_a_folder_of_another_config_names_the_keys_that_differ(refused, finished, tmp_path):
    unfinished(finished, tmp_path / "run")
    sentence = refused("train", *BANDIT, "hydra.run.dir=run", "optim.lr=0.5", "algo.beta=0.3")
    assert "algo.beta: 0.1 -> 0.3" in sentence and "optim.lr: 0.05 -> 0.5" in sentence and "Choose another hydra.run.dir" in sentence


def test_resume_never_refuses_an_existing_run(refused, finished, tmp_path):
    unfinished(finished, tmp_path / "run")
    assert "resume=never; choose another hydra.run.dir or set resume=auto" in refused("train", *BANDIT, "hydra.run.dir=run", "resume=never")


def test_foreign_files_are_not_mixed_with_a_run(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    assert "is not empty and holds no run of prefopt (it has thesis.tex)" in refused("train", *BANDIT, "hydra.run.dir=run")


def test_a_broken_config_of_a_run_is_named(refused, finished, tmp_path):
    run = unfinished(finished, tmp_path / "run")
    (run / "config.yaml").write_text("algo: [")
    for words in (["train", *BANDIT, "hydra.run.dir=run"], ["eval", "run=run"], ["sample", "run=run"]):
        assert "run/config.yaml cannot be read" in refused(*words)


def test_a_run_that_names_foreign_code_is_not_opened(refused, finished, tmp_path):
    run = unfinished(finished, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("prefopt.objectives.pairwise.DPO", "subprocess.Popen"))
    assert "subprocess.Popen is outside prefopt" in refused("eval", "run=run")


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_a_run_without_checkpoint_cannot_be_judged(command, refused, finished, tmp_path):
    run = unfinished(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert "run has no checkpoint yet; train it first" in refused(command, "run=run")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name, damage", [
    ("weights.safetensors", flip),
    ("optimizer.safetensors", lambda path: path.write_bytes(path.read_bytes()[:100])),
    ("weights.safetensors", Path.unlink),
    ("state.json", lambda path: path.write_text('{"step": 4')),
    ("state.json", lambda path: path.write_text("[]")),
    ("state.json", Path.unlink),
], ids=["flipped", "cut", "missing", "broken-state", "no-state", "missing-state"])
def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_is_taken(name, damage, finished, tmp_path, capsys):
    run = unfinished(finished, tmp_path / "run")
    *earlier, last = checkpoint.steps(run / "checkpoints")
    damage(last / name)
    assert main(["eval", "run=run"]) == 0
    wanted = rf"the checkpoint \S*{last.name} is damaged \((.+)\); going on from {earlier[-1].name}"
    said = re.search(wanted, capsys.readouterr().err)
    assert said and name in said[1]
    assert last.is_dir() and (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert main(["train", *BANDIT, "hydra.run.dir=run"]) == 0
    said = capsys.readouterr().err
    assert re.search(wanted, said) and f"resuming after step {int(earlier[-1].name[5:])} of" in said
    theirs = checkpoint.steps(finished / "checkpoints")[-1]
    assert all((last / f.name).read_bytes() == f.read_bytes() for f in theirs.glob("*.safetensors")), "it ends as if nothing had been"
    for row in ("train", "eval"):
        whole, mended = ([r["step"] for r in read_jsonl(folder / "metrics.jsonl") if r["split"] == row] for folder in (finished, run))
        assert whole == mended, "no row is lost or doubled"


def test_where_every_checkpoint_is_corrupt_nothing_is_touched(finished, tmp_path, capsys):
    run = unfinished(finished, tmp_path / "run")
    for folder in checkpoint.steps(run / "checkpoints"):
        (folder / "weights.safetensors").write_bytes(b"")
    for words in (["train", *BANDIT, "hydra.run.dir=run"], ["eval", "run=run"]):
        capsys.readouterr()
        assert main(words) == 2
        assert "and there is none before it; remove" in capsys.readouterr().err.splitlines()[-1]
        assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


# ---- a full disk ----

def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def full_rust(*args, **kwargs):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("what, how, named", [
    ("prefopt.training.checkpoint.save_file", full_rust, "checkpoints/step-"),
    ("prefopt.training.rundir.Path.write_text", full, "config.yaml"),
    ("prefopt.tracking.tracker.JsonlTracker.log", full, "somewhere"),
])
def test_a_full_disk_is_one_sentence_and_can_be_mended(what, how, named, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(what, how)
        assert main(["train", *BANDIT, "hydra.run.dir=run"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("prefopt: the disk is full (") and named in said and "repeat the command" in said
    assert not list(tmp_path.rglob("*.part"))
    assert main(["train", *BANDIT, "hydra.run.dir=run"]) == 0


def test_half_a_row_on_a_full_disk_is_noticed_and_mended(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"step": 1})

    class Small(io.FileIO):
        def write(self, data):
            return super().write(data[:5])

    tracker.close()
    tracker._file = Small(tracker.path, "ab")
    with pytest.raises(OSError) as caught:
        tracker.log({"step": 2})
    tracker.close()
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tracker.path)
    again = JsonlTracker(tracker.path)
    again.log({"step": 2})
    again.close()
    assert tracker.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_prefopt_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFOPT_DEBUG", "1")
    from prefopt.errors import UserError

    with pytest.raises(UserError):
        train(tmp_path / "run", "optim.lr=-1")


def test_the_jobs_of_a_sweep_that_never_began_can_be_repeated(tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", [*GOOD, *UNARY])  # the first row alone is looked at before jobs begin
    words = ["train", "-m", *TINY, "algo=dpo", "data=jsonl", "data.path=rows.jsonl", "hydra.sweep.dir=sweep", "train.steps=1"]
    assert main(words) == 1
    assert f"rows.jsonl row {len(GOOD) + 1}: this is a unary row" in capsys.readouterr().err
    [job] = [p for p in (tmp_path / "sweep").iterdir() if p.is_dir()]
    assert [f.name for f in job.iterdir()] == ["log.txt"]
    write_rows(tmp_path / "rows.jsonl", GOOD)
    assert main(words) == 0
