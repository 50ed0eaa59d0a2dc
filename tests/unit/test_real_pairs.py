"""scripts/real_pairs.py chooses what it says; scripts/rank_pairs.py, without prefopt, scores a saved adapter as prefopt does."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from prefopt.config.schema import DataConfig
from prefopt.data.sources import load_data
from prefopt.training.engine import quantities
from tests import toy

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


real_pairs, rank_pairs = script("real_pairs"), script("rank_pairs")


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def rankings(count: int) -> list[dict]:
    """Four scored replies to each prompt: in half of the prompts the better one is longer, much more often where nothing is balanced."""
    rows = []
    for i in range(count):
        texts = ["I am well.", "I am very well.", "No.", "yes " * 40]
        scores = [1.0, 5.0, 0.5, 9.0] if i % 4 else [5.0, 1.0, 0.5, 9.0]
        rows.append({"prompt": toy.turns(f"How are you, {i}?"), "completions": texts, "scores": scores})
    return rows


def chosen_pairs(folder: Path) -> tuple[list[dict], list[dict]]:
    return tuple([json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()] for part in ("train", "eval"))


def test_pairs_within_the_limits(tmp_path, capsys):
    file, tokenise = write(tmp_path / "all.jsonl", rankings(24)), toy.tokeniser("bytes", "chatml")
    limits = ["--max-tokens", "90", "--min-gap", "3", "--max-ratio", "2", "--held-out", "8"]
    assert real_pairs.main([str(file), str(tmp_path / "out"), *limits], tokenise) == 0
    said = capsys.readouterr().out
    train, held_out = chosen_pairs(tmp_path / "out")
    assert train and held_out
    prompts = [{json.dumps(r["prompt"]) for r in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == len(held_out) <= 8
    for part in (train, held_out):
        longer = 0
        for row in part:
            tokens = tokenise(toy.example(**{k: row[k] for k in ("prompt", "chosen", "rejected")}))
            lengths = [len(b.ids) for b in tokens.branches]
            assert tokens.longest <= 90 and max(lengths) <= 2 * min(lengths) and row["gap"] >= 3
            longer += (lengths[0] > lengths[1]) - (lengths[0] < lengths[1])
        assert longer == 0  # the longer reply wins as often as it loses
    for reason in ("over 90 tokens", "score gap under 3", "times as long", "chosen reply longer"):
        assert reason in said
    left_out = sum(int(line.split(":")[0].removeprefix("left out ")) for line in said.splitlines() if line.startswith("left out"))
    assert left_out + len(train) + len(held_out) == 24 * 6  # every pair of every ranking is kept or accounted for

    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    real_pairs.main([str(file), str(tmp_path / "again"), *limits], tokenise)
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == before

    cfg = DataConfig(name="jsonl", source="files", path=str(tmp_path / "out"), train="train.jsonl", eval="eval.jsonl")
    assert [len(s.examples) for s in load_data(cfg)] == [len(train), len(held_out)]


def test_dialogues_and_unusable_rows(tmp_path, capsys):
    ask = "\n\nHuman: How are you, {}?\n\nAssistant:"
    replies = (" I am well.", " We are all well.", " I am.")
    rows = [{"chosen": ask.format(i) + replies[0], "rejected": ask.format(i) + replies[1 + i % 2]} for i in range(12)]
    rows += [{"chosen": ask.format(9) + " I am well.", "rejected": ask.format(9)}, {"prompt": "Only a prompt"}]
    file = write(tmp_path / "hh.jsonl", rows)
    wide = ["--held-out", "6", "--max-tokens", "512", "--max-ratio", "20"]
    assert real_pairs.main([str(file), str(tmp_path / "out"), *wide], toy.tokeniser("bytes", "chatml")) == 0
    said = capsys.readouterr().out
    assert "left out 1: row not usable: a completion is empty" in said and "left out 1: a prompt row, not a pair" in said
    train, held_out = chosen_pairs(tmp_path / "out")
    assert all(row["gap"] is None for row in train + held_out)
    assert all(row["chosen"] == [{"role": "assistant", "content": "I am well."}] for row in train + held_out)


@pytest.mark.parametrize("rows, message", [(rankings(5), "too few to keep 8 prompts apart"), (None, "cannot be read")])
def test_refusals(tmp_path, capsys, rows, message):
    file = write(tmp_path / "few.jsonl", rows) if rows else tmp_path / "nowhere.jsonl"
    assert real_pairs.main([str(file), str(tmp_path / "out"), "--held-out", "8"], toy.tokeniser("bytes", "chatml")) == 2
    said = capsys.readouterr()
    assert message in said.err and not (tmp_path / "out").exists()
    assert ("over 128 tokens" in said.out) == bool(rows)  # what was left out says which limit to loosen


def test_saved_adapter_scores_alike_without_prefopt(tmp_path, capsys):
    base = toy.save_model(tmp_path / "base", special={"eos_token": "<|im_end|>"})
    policy = toy.policy(base, lora={"enabled": True, "r": 2})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    policy.save(tmp_path / "adapter")
    rows = [{"prompt": toy.turns(f"How are {i} you?"), "chosen": toy.turns("", "I am well.")[1:],
             "rejected": toy.turns("", "Two and " * (i + 1))[1:]} for i in range(4)]
    micro = toy.micro(policy, *(toy.example(**row) for row in rows))
    with torch.no_grad():
        after = quantities(policy(micro), micro.layout)["logp"].view(-1, 2)
        with policy.without_adapter():
            before = quantities(policy(micro), micro.layout)["logp"].view(-1, 2)
    scored = rank_pairs.score(rows, tmp_path / "adapter", str(base))
    assert (after - before).abs().min() > 1e-3
    torch.testing.assert_close(torch.tensor(scored[0]), before)
    torch.testing.assert_close(torch.tensor(scored[1]), after)
    assert [n for pair in scored[2] for n in pair] == micro.layout.lengths.tolist()

    rank_pairs.main([str(write(tmp_path / "pairs.jsonl", rows)), str(tmp_path / "adapter"), "--base", str(base)])
    ahead = float(((after - before)[:, 0] > (after - before)[:, 1]).float().mean())
    assert f"(DPO's reward) {ahead:.3f} [" in " ".join(capsys.readouterr().out.split())


def test_shares_and_gains():
    assert rank_pairs.wins([2.0, -1.0, 0.0]) == [1.0, 0.0, 0.5]
    low, high = rank_pairs.wilson(8, 10)  # Wilson's interval of 8 in 10
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)
    line = rank_pairs.gain_line("gain", [-1.0] * 5 + [1.0] * 5, [1.0] * 10)  # mean 1/2, standard error sqrt(5 / 18 / 10) = 1/6
    assert "+0.500 [+0.173, +0.827]" in line and "5 pairs became right, 0 wrong" in line
