"""What people who know Hydra do out of habit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefopt.cli import main

BANDIT = ["model=bandit", "data=bandit", "hardware=cpu", "hardware.threads=1"]
FAST = [*BANDIT, "debug=fast"]


def config(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


@pytest.fixture
def shown(capsys, tmp_path):
    """Runs a command that only prints; returns what it printed."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 0
        assert not list(tmp_path.iterdir()), "a command that only prints wrote something"
        return capsys.readouterr().out

    return run


def test_cfg_job_prints_the_composed_config(shown):
    printed = yaml.safe_load(shown("train", "--cfg", "job", "algo=simpo", "optim.warmup=0.2"))
    assert printed["algo"]["_target_"].endswith(".SimPO") and printed["optim"]["warmup"] == 0.2
    assert printed["optim"]["lr"] == "${model.learning_rate}" and "hydra" not in printed


def test_cfg_job_resolve_fills_in_every_reference(shown):
    text = shown("train", "model=bandit", "--cfg", "job", "--resolve", "data=bandit", "hydra.run.dir=runs/mine")
    printed = yaml.safe_load(text)
    assert printed["optim"]["lr"] == printed["model"]["learning_rate"] and printed["run_dir"] == "runs/mine" and "${" not in text
    assert "-dpo-bandit" in yaml.safe_load(shown("train", "model=bandit", "--cfg", "job", "--resolve"))["run_dir"]


def test_other_ways_of_looking(shown):
    assert yaml.safe_load(shown("train", "--cfg", "hydra"))["hydra"]["output_subdir"] is None
    assert "schedule: cosine" in shown("train", "--cfg", "job", "--package", "optim")
    assert "pkg://prefopt.conf" in shown("train", "--info") and "pkg://prefopt.conf" in shown("train", "--info", "algo=ipo")
    assert "algo/ipo" in shown("train", "--info", "defaults", "algo=ipo")
    assert "--multirun" in shown("train", "--hydra-help")
    assert "prompts: 256" in shown("eval", "--cfg", "job") and "count: 4" in shown("sample", "--cfg", "job")


@pytest.mark.parametrize("words", [["train", "--help"], ["train", "-h", "algo=ipo"]])
def test_help_of_train_says_what_prefopt_takes(words, shown):
    text = shown(*words)
    for part in ("usage: prefopt train", "algo=dpo ", "simpo", "model=tiny-lm ", "optim.lr: ", "# peak learning rate of AdamW", "--cfg job",
                 "--config-dir", "hydra.run.dir=", "prefopt train -m algo=dpo,ipo seed=0,1,2"):
        assert part in text, part
    assert "Powered by Hydra" not in text


@pytest.mark.parametrize("command, part", [
    ("eval", "run: ???"), ("sample", "prompt: null"), ("data check", "data=tiny-feedback"), ("list", "--view"),
    ("show", "prefopt show dpo"), ("doctor", "exit code"), ("completion", "bash|zsh|fish"),
])
def test_help_of_other_commands(command, part, shown):
    text = shown(*command.split(), "--help")
    assert part in text and f"prefopt {command}" in text
    assert "--multirun" not in text


@pytest.mark.parametrize("sign", ["", "+"])
def test_experiment_and_run_dir(sign, shown):
    printed = yaml.safe_load(shown("train", f"{sign}experiment=simpo_llama3-8b-instruct", "--cfg", "job", "algo.beta=3"))
    assert printed["algo"] == {"_target_": "prefopt.objectives.reference_free.SimPO", "beta": 3, "gamma": 1.375, "label_smoothing": 0.0,
                               "link": "logistic"}
    assert printed["model"]["name"] == "llama3-8b-instruct" and printed["train"]["batch_size"] == 128


def test_run_dir_and_debug_fast(tmp_path):
    assert main(["train", *FAST, "hydra.run.dir=here/it is"]) == 0
    assert json.loads((tmp_path / "here" / "it is" / "status.json").read_text())["step"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    manifest = json.loads((tmp_path / "here" / "it is" / "manifest.json").read_text())
    assert manifest["command"].startswith("prefopt train model=bandit")


def test_default_run_dir_is_named_after_the_choices(tmp_path):
    assert main(["train", *FAST, "algo=ipo"]) == 0
    [run] = (tmp_path / "runs").iterdir()
    assert run.name.endswith("-ipo-bandit")


def test_multirun_with_the_options_anywhere(tmp_path, capsys):
    """Its jobs are processes; two of four steps each."""
    assert main(["train", "algo=dpo,ipo", "-m", *FAST, "hydra.sweep.dir=sweep"]) == 0
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [config(Path(j["run_dir"]))["algo"]["name"] for j in jobs] == ["dpo", "ipo"]
    assert all(Path(j["run_dir"]).parent.name == "sweep" for j in jobs)
    assert [j["state"] for j in jobs] == ["finished", "finished"] and "job 2 finished after" in capsys.readouterr().err


def test_sweep_seeds(tmp_path, monkeypatch):
    """The jobs themselves are replaced: what is tested is which ones there are."""
    seen = []
    monkeypatch.setattr("prefopt.launch.jobs.run_job", lambda job: seen.append(job.cfg.seed) or ("finished", ""))
    assert main(["train", "-m", "sweep=seeds", *FAST, "hydra.sweep.dir=sweep", "hydra.launcher.jobs=1"]) == 0
    assert seen == [0, 1, 2]


# ---- the user's own groups and objectives ----

OBJECTIVE = '''"""An objective of somebody else's package."""

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import relu

from prefopt.objectives.base import Objective, Term, Terms


@dataclass
class Hinge(Objective):
    """A hinge on the log-ratio margin."""

    width: float = 1.0

    columns: ClassVar[tuple] = ("weight", "label")
    require: ClassVar[tuple] = ("width > 0",)

    def __call__(self, batch):
        pairs, ratio = batch.pairs, batch.log_ratio()
        h = ratio[pairs.chosen] - ratio[pairs.rejected]
        return Terms([Term("hinge", pairs.label * relu(self.width - h) + (1 - pairs.label) * relu(self.width + h), "pair")])

    def rewards(self, batch):
        return batch.log_ratio().detach()
'''


@pytest.fixture
def mine(tmp_path, tmp_path_factory, monkeypatch):
    """A folder with the user's groups, and the package that they name, on sys.path."""
    conf, site = tmp_path_factory.mktemp("mine"), tmp_path_factory.mktemp("site")
    for group in ("algo", "data", "experiment"):
        (conf / group).mkdir()
    (conf / "algo" / "wide_hinge.yaml").write_text("# Mine.\n_target_: mylosses.hinge.Hinge\nwidth: 2.0\n")
    (conf / "data" / "world.yaml").write_text("name: world\nsource: bandit\n")
    (conf / "experiment" / "all.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /algo: wide_hinge\n  - override /data: world\n  - override /model: bandit\n"
        "trust:\n  packages: [mylosses]\nseed: 7\n")
    (site / "mylosses").mkdir()
    (site / "mylosses" / "__init__.py").write_text("")
    (site / "mylosses" / "hinge.py").write_text(OBJECTIVE)
    monkeypatch.syspath_prepend(str(site))
    yield conf
    for name in ("mylosses", "mylosses.hinge"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("how", ["--config-dir", "-cd", "searchpath"])
def test_own_groups_and_a_trusted_objective(how, mine, tmp_path):
    where = [f"hydra.searchpath=[file://{mine}]"] if how == "searchpath" else [how, str(mine)]
    chosen = ["algo=wide_hinge", "model=bandit", "data=world", "trust.packages=[mylosses]", "hardware=cpu", "debug=fast"]
    assert main(["train", *where, *chosen, "hydra.run.dir=run"]) == 0
    written = config(tmp_path / "run")
    assert written["algo"] == {"name": "wide_hinge", "_target_": "mylosses.hinge.Hinge", "width": 2.0}
    assert written["data"]["name"] == "world"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if r["split"] == "eval"]
    assert losses[0] == pytest.approx(2.0) and losses[-1] < losses[0]
    assert "hinge" in (tmp_path / "run" / "report.html").read_text()
    assert main(["eval", "run=run", "prompts=2"]) == 0


def test_own_experiment(mine, tmp_path):
    assert main(["train", "-cd", str(mine), "+experiment=all", "debug=fast", "hardware=cpu", "hydra.run.dir=run"]) == 0
    assert config(tmp_path / "run")["algo"]["name"] == "wide_hinge" and config(tmp_path / "run")["seed"] == 7


@pytest.mark.parametrize("words, said", [
    ("algo=wide_hinge", "mylosses.hinge.Hinge is outside prefopt; if you trust that code, set trust.packages=[mylosses]"),
    ("algo=wide_hing", "there is no algo=wide_hing; did you mean 'algo=wide_hinge'?"),
    ("algo=wide_hinge trust.packages=[mylosses] algo.width=-1", "algo.width=-1: Hinge needs width > 0"),
    ("algo=wide_hinge trust.packages=[mylosses] algo.widht=1", "algo.widht is no setting of Hinge; did you mean 'algo.width'?"),
    ("data=world data.limit=3", "data.limit is left to its default by the chosen config; add it with a plus sign: +data.limit=..."),
    ("algo._target_=mylosses.hinge.Hing trust.packages=[mylosses]", "mylosses.hinge has no class Hing; did you mean 'Hinge'?"),
])
def test_own_groups_are_checked_like_the_others(words, said, mine, tmp_path, capsys):
    assert main(["train", "-cd", str(mine), "model=bandit", "data=bandit", *words.split()]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and "mylosses.hinge" not in sys.modules


# ---- what must stay light ----

def test_help_and_listings_import_neither_torch_nor_hydra():
    """A subprocess, because this process has both loaded."""
    code = """
import sys
from prefopt.cli import main
for line in ("--help", "train --help", "list", "list algo", "show dpo", "doctor", "completion bash", "__complete"):
    words = line.split()
    assert main(words) in (0, 1), words
    heavy = {"torch", "hydra", "omegaconf", "transformers", "numpy", "datasets"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_stops_early_is_no_error():
    """A real pipe, because that is what breaks."""
    done = subprocess.run(f"{sys.executable} -m prefopt.cli list | head -n 1", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("algo")


@pytest.mark.parametrize("text", ["Hello, how are you?", "it's", "a 'b' c: {x} [1,2]", "5% of $HOME?", "what = x", "back\\slash"])
def test_a_prompt_is_free_text(text):
    """`prefopt sample prompt=...`: what a person asks needs no quotes but the shell's."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from prefopt.launch.app import _quoted

    assert OverridesParser.create().parse_override(_quoted(f"prompt={text}")).value() == text
    assert _quoted("prompt='as it is'") == "prompt='as it is'" and _quoted("prompt=null") == "prompt=null"
