"""Shell completion: what each word can become, and the bash script around it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

from prefopt import cli
from prefopt.config import catalogue
from prefopt.config.completion import OPTIONS, SCRIPTS, TOP, answer, primary_groups, script
from prefopt.config.schema import COMMANDS
from prefopt.errors import UserError


def complete(line: str, point: int | None = None) -> list[str]:
    return answer({"COMP_LINE": line, "COMP_POINT": str(len(line.encode()) if point is None else point)})


@pytest.mark.parametrize("line, found", [
    ("prefopt tr", ["train"]),
    ("prefopt train alg", ["algo.", "algo="]),
    ("prefopt train algo=ip", ["algo=ipo"]),
    ("prefopt train -m algo=dpo,si", ["algo=dpo,simpo"]),
    ("prefopt train model=tiny-lm-", ["model=tiny-lm-lora"]),
    ("prefopt train optim.we", ["optim.weight_decay="]),
    ("prefopt train model.lo", ["model.lora."]),
    ("prefopt train model.lora.a", ["model.lora.adapter=", "model.lora.alpha="]),
    ("prefopt train algo=simpo algo.", ["algo.beta=", "algo.gamma=", "algo.label_smoothing=", "algo.link="]),
    ("prefopt train optim.schedule=", ["optim.schedule=constant", "optim.schedule=cosine", "optim.schedule=linear"]),
    ("prefopt train model.gradient_checkpointing=t", ["model.gradient_checkpointing=true"]),
    ("prefopt train +experiment=simpo_l", ["+experiment=simpo_llama3-8b", "+experiment=simpo_llama3-8b-instruct"]),
    ("prefopt train ++optim.ep", ["++optim.eps="]),
    ("prefopt train hydra.run.", ["hydra.run.dir="]),
    ("prefopt train --cf", ["--cfg"]),
    ("prefopt train --cfg j", ["job"]),
    ("prefopt eval r", ["run="]),
    ("prefopt eval algo", []),
    ("prefopt sample co", ["count="]),
    ("prefopt data ", ["check"]),
    ("prefopt data check exa", ["example="]),
    ("prefopt data check tracker", []),
    ("prefopt show smollm2_", ["smollm2_real-pairs"]),
    ("prefopt show dpo d", []),
    ("prefopt export somewhere style=k", ["style=kohya"]),
    ("prefopt show dpo model=tiny-f", ["model=tiny-flow"]),
    ("prefopt list al", ["algo"]),
    ("prefopt list algo --view u", ["unary"]),
    ("prefopt list algo --needs no-r", ["no-reference"]),
    ("prefopt list algo --modality d", ["diffusion"]),
    ("prefopt list algo --m", ["--modality"]),
    ("prefopt completion f", ["fish"]),
    ("prefopt nonsense x", []),
    ("PREFOPT_DEBUG=1 /usr/local/bin/prefopt tr", ["train"]),
    ("something else", []),
    ("", []),
])
def test_candidates(line, found):
    assert complete(line) == found


def test_every_command_and_option_is_offered():
    assert complete("prefopt ") == sorted(TOP) and set(cli.COMMANDS) <= set(TOP)
    assert complete("prefopt train -") == sorted(OPTIONS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_group_and_key_of_a_command_is_offered(command):
    line = f"prefopt {command.replace('_', ' ')} "
    offered = complete(line)
    for group in primary_groups(command):
        assert f"{group}=" in offered
        assert complete(f"{line}{group}=") == [f"{group}={name}" for name in catalogue.groups()[group]]
    for f in fields(COMMANDS[command]):
        assert f"{f.name}=" in offered or f"{f.name}." in offered


def test_the_word_ends_at_the_cursor():
    line = "prefopt train algo=dpö optim.lr=1"
    assert complete(line, len("prefopt train al")) == ["algo.", "algo="]
    assert answer({"COMP_LINE": "prefopt tr", "COMP_POINT": ""}) == ["train"]


def test_run_folders_and_files(tmp_path):
    for run in ("runs/a-dpo", "runs/b-sweep/0-dpo", "elsewhere/c"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.yaml").touch()
    (tmp_path / "runs" / ".hidden").mkdir()
    (tmp_path / "runs" / "with blank").mkdir()
    (tmp_path / "pairs.jsonl").touch()
    assert complete("prefopt eval run=") == ["run=runs/a-dpo", "run=runs/b-sweep/"]
    assert complete("prefopt eval run=runs/b-sweep/") == ["run=runs/b-sweep/0-dpo"]
    assert complete("prefopt sample run=else") == ["run=elsewhere/"]
    assert complete("prefopt sample run=nowhere/") == []
    assert complete("prefopt train data.path=pa") == ["data.path=pairs.jsonl"]
    assert complete("prefopt train --config-dir r") == ["runs/"]


def test_own_groups_are_offered(tmp_path):
    (tmp_path / "mine" / "algo").mkdir(parents=True)
    (tmp_path / "mine" / "algo" / "ipo_mine.yaml").touch()
    for option in ("--config-dir mine", "-cd mine", "--config-dir=mine"):
        assert complete(f"prefopt train {option} algo=ipo") == ["algo=ipo", "algo=ipo_mine"]


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_script_says_how_to_install_it_and_is_valid(shell, tmp_path):
    text = script(shell)
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert any(f"prefopt completion {shell}" in line for line in comments) and any("every shell" in line for line in comments)
    if program := shutil.which(shell):  # bash is everywhere, the others where they are installed
        (tmp_path / "script").write_text(text)
        assert subprocess.run([program, "-n", str(tmp_path / "script")], capture_output=True, text=True).stderr == ""


def test_other_shells_are_refused():
    with pytest.raises(UserError, match="did you mean 'zsh'"):
        script("zsj")
    with pytest.raises(UserError, match="takes bash, zsh or fish: prefopt completion bash"):
        script("")


@pytest.mark.parametrize("line, breaks, found", [
    ("prefopt tr", "=:", "train"),
    ("prefopt train optim.sched", "=:", "optim.schedule="),
    ("prefopt train algo=ip", "=:", "ipo"),
    ("prefopt train algo=ip", "", "algo=ipo"),
    ("prefopt train algo=dpo,ip", "=:", "dpo,ipo"),
    ("prefopt train hydra.run.dir=a:b", "=:", "b-run/"),
    ("prefopt train hydra.run.dir=a:b", "=", "a:b-run/"),
])
def test_bash_completes_what_it_takes_for_the_word(line, breaks, found, tmp_path):
    """A real bash, because its breaking of words at = and : is what goes wrong."""
    (tmp_path / "a:b-run").mkdir()
    program = tmp_path / "bin" / "prefopt"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m prefopt.cli "$@"\n')
    program.chmod(0o755)
    code = f'eval "$(prefopt completion bash)"; COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDBREAKS="{breaks}"; _prefopt; ' \
           'printf "%s\\n" "${COMPREPLY[@]}"; complete -p prefopt'
    env = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.splitlines() == [found, "complete -F _prefopt prefopt"] and done.stderr == ""


def test_complete_answers_through_the_command_line(monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "prefopt doc")
    monkeypatch.setenv("COMP_POINT", "11")
    assert cli.main(["__complete"]) == 0
    assert capsys.readouterr().out == "doctor\n"
