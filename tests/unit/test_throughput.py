"""Tokens and pairs per second, FLOPs, padding and memory: counted right, timed right, and always in view."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prefopt.config.catalogue import load_yaml
from prefopt.config.schema import HardwareConfig, OptimConfig
from prefopt.data.batch import Row, build
from prefopt.data.tokenise import Branch, Tokens
from prefopt.policies.reference import make_reference
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import throughput
from prefopt.training.engine import Engine
from prefopt.training.progress import Progress
from prefopt.training.setup import make_objective
from prefopt.training.throughput import Effort, Speed, StepKind, count, find_peak, peak_memory, unit
from tests import toy
from tests.toy_runs import fresh_accelerator, train

LAYERS, HIDDEN, WIDE, WORDS = 4, 32, 48, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)


def row(prompt: int, *replies: int, mismatched: tuple[int, ...] = ()) -> Row:
    def branches(lengths):
        return [Branch(list(range(5, 5 + n)), [True] * n, True) for n in lengths]

    return Row(Tokens(list(range(5, 5 + prompt)), branches(replies)), "pair", mismatched=branches(mismatched) or None)


# ---- FLOPs (trap 34) -----------------------------------------------------------------------------

# How far the count may be above torch's own, and why.
EXACT = 1e-3
RECOMPUTED = 0.06  # torch runs a layer again only as far as its last product
FIRST_LAYER = 0.025  # with frozen embeddings nothing is differentiated below the first adapters: 1 of 4 layers' inputs
SETTINGS = {
    "trees": ({}, EXACT), "rows": ({"share_prompts": False}, EXACT), "full logits": ({"fused_head": False}, EXACT),
    "checkpointing": ({"gradient_checkpointing": True}, RECOMPUTED), "lora": ({"lora": {"enabled": True, "r": 2}}, FIRST_LAYER),
    "lora, checkpointing": ({"lora": {"enabled": True, "r": 2}, "gradient_checkpointing": True}, FIRST_LAYER),
}


CASES = [(slug, setting) for slug in ("dpo", "kto") for setting in SETTINGS]
CASES += [("simpo", "trees"), ("sft", "trees"), ("tdpo", "trees"), ("tdpo", "lora")]


@pytest.mark.parametrize(("slug", "setting"), CASES)
def test_executed_flops_are_those_that_torch_counts(folder, slug, setting):
    """A whole optimiser step: live reference, second scoring pass, mismatched replies, padding, recomputation, filler and all."""
    changes, above = SETTINGS[setting]
    policy, objective = toy.policy(folder, attention="eager", **changes), make_objective(load_yaml("algo", slug))
    rows = [row(9, 4, 7), row(3, 2, 11)]
    if objective.mismatched:
        rows = [row(9, 4, 7, mismatched=(5,)), row(3, 2, 11, mismatched=(3,))]
    micros = [build(rows, chosen, objective.view, policy.pad) for chosen in ([0, 1], [])]
    with fresh_accelerator() as accelerator:
        reference = make_reference(policy, "initial") if "reference" in objective.quantities else None
        engine = Engine(policy, objective, reference, OptimConfig(lr=0.0), accelerator)
        in_place = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}  # torch's counter knows addmm alone
        with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
            result = engine.step(micros, 0.0)
    assert -EXACT < result.effort.executed / counted.get_total_flops() - 1 < above
    assert 0 < result.effort.useful < result.effort.executed


def test_flops_are_those_counted_by_hand(folder):
    """Prompt of 9, replies of 4 and 7: every number written out."""
    policy = toy.policy(folder, attention="sdpa")
    vocabulary = policy.model.config.vocab_size
    body = LAYERS * (HIDDEN * HIDDEN * 2 + HIDDEN * HIDDEN + 3 * HIDDEN * WIDE)  # q and o; k and v of half the heads; gate, up, down
    keys = 9 * 10 // 2 + (10 + 11 + 12 + 13) + (10 + 11 + 12 + 13 + 14 + 15 + 16)
    forward = 2 * body * 20 + 2 * HIDDEN * vocabulary * 11 + 4 * LAYERS * HIDDEN * keys
    kind = Engine.kind.func(_engine(policy, "simpo"))
    micro = build([row(9, 4, 7)], [0], "pairs", policy.pad)
    assert throughput.useful(micro, kind) == 3 * forward
    # Without sharing the useful work stays what it was; computed are two rows of 16, of which 13 are tokens in one.
    rows = replace(kind, layout="rows", shared=False)
    assert throughput.useful(micro, rows) == 3 * forward
    masked = 2 * body * 32 + 2 * HIDDEN * vocabulary * 11 + 4 * LAYERS * HIDDEN * 2 * 16 * 16
    assert count([micro], rows).executed == 3 * masked + 2 * HIDDEN * vocabulary * 11  # logits are made again in the backward pass
    # Frozen weights get no gradient; attention has no weights.
    frozen = throughput.useful(micro, replace(kind, frozen=True))
    assert frozen == 2 * forward + 4 * LAYERS * HIDDEN * keys
    # A mismatched reply is scored and never differentiated.
    other = build([row(9, 4, 7, mismatched=(5,))], [0], "unary", policy.pad)
    extra = 2 * body * 5 + 2 * HIDDEN * vocabulary * 5 + 4 * LAYERS * HIDDEN * (10 + 11 + 12 + 13 + 14)
    assert throughput.useful(other, kind) == 3 * forward + extra


def _engine(policy, slug):
    return type("Parts", (), {"policy": policy, "teacher": None, "objective": make_objective(load_yaml("algo", slug))})()


def test_packed_trees_compute_what_they_hold(folder):
    """Without padding or masked attention nothing but the logits is computed that is of no use."""
    policy = toy.policy(folder)
    kind = replace(Engine.kind.func(_engine(policy, "simpo")), layout="packed")
    micro = build([row(9, 4, 7), row(3, 2, 11)], [0, 1], "pairs", policy.pad)
    did = count([micro], kind)
    assert did.tokens == did.slots == 20 + 16 and did.rows == 2
    assert did.executed == pytest.approx(did.useful + kind.shape.head * 2 * 24)
    alone = count([micro], replace(kind, shared=False))
    assert alone.tokens == alone.slots == 20 + 16 + 9 + 3 and alone.useful == did.useful < alone.executed


def test_a_stored_reference_is_not_computed(folder):
    policy = toy.policy(folder)
    kind = Engine.kind.func(_engine(policy, "dpo"))
    live, stored = row(9, 4, 7), row(9, 4, 7)
    stored.stored = {"reference": [[-1.0] * 4, [-1.0] * 7]}
    live, stored = (count([build([r], [0], "pairs", policy.pad)], kind) for r in (live, stored))
    assert live.executed - stored.executed == kind.shape.forward(
        throughput.computed(build([row(9, 4, 7)], [0], "pairs", policy.pad), kind))
    assert live.useful == stored.useful


def test_padding_is_what_holds_no_token():
    micro = build([row(9, 4, 7), row(3, 2, 11)], [0, 1], "pairs", 0)
    filler = build([row(9, 4, 7), row(3, 2, 11)], [], "pairs", 0, filler=1)
    rows, trees = (count([micro, filler], StepKind(layout=layout, shared=layout == "trees")) for layout in ("rows", "trees"))
    assert rows == Effort(2, 13 + 16 + 5 + 14, 4 * 16 + 2 * 14)
    assert trees == Effort(2, 20 + 16, 2 * 20 + 16), "a filler is padding through and through"


# ---- time ----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    return now


def test_evaluations_sampling_and_first_steps_do_not_count(clock):
    speed = Speed(peak=50.0, world=2, unit="pairs")
    did = Effort(rows=4, tokens=90, slots=100, useful=200, executed=300)
    for seconds, waited in ((30, 0), (10, 0), (2, 0), (7, 5)):
        clock[0] += seconds
        found = speed.step(did, memory=1000, waited=waited)
        clock[0] += 50  # an evaluation
        speed.restart()
    assert found == {"rows_per_second": 2, "tokens_per_second": 45, "useful_mfu": 1.0, "hardware_mfu": 1.5,
                     "padding": pytest.approx(0.1), "peak_memory": 1000}
    again = Speed(peak=100.0, world=2, unit="pairs")  # resumed, on a faster machine
    again.load(json.loads(json.dumps(speed.state())))
    for seconds in (40, 40, 4):
        clock[0] += seconds
        again.step(did, memory=10)
    assert again.averages() == {
        "unit": "pairs", "steps": 3, "seconds": 8, "rows_per_second": 1.5, "tokens_per_second": 33.75, "peak_memory": 1000,
        "useful_mfu": 600 / (2 * 50 * 4 + 2 * 100 * 4), "hardware_mfu": 900 / 1200, "padding": pytest.approx(0.1),
    }  # fmt: skip


def test_a_run_of_first_steps_alone_has_averages_too(clock):
    speed = Speed(peak=None, world=1, unit="rows")
    assert speed.averages() == {}
    clock[0] += 4
    assert speed.step(Effort(8, 80, 80, 1, 1), 5) == {"rows_per_second": 2, "tokens_per_second": 20, "padding": 0, "peak_memory": 5}
    assert speed.averages()["rows_per_second"] == 2


def test_the_window_forgets_old_steps(clock):
    speed = Speed(None, 1, "rows")
    for i in range(throughput.WARM_UP + 3 * throughput.RECENT):
        clock[0] += 1 if i < throughput.WARM_UP + 2 * throughput.RECENT else 2
        found = speed.step(Effort(rows=2), 0)
    assert found["rows_per_second"] == 1 and speed.averages()["rows_per_second"] == pytest.approx(1.5)


def test_peak_and_memory_are_of_this_machine():
    cpu = torch.device("cpu")
    flops, where = find_peak(HardwareConfig(name="cpu"), cpu)
    assert 1e8 < flops < 1e15 and where == "a measured matrix product"
    assert find_peak(HardwareConfig(name="cpu", peak_tflops=2.0), cpu) == (2e12, "hardware.peak_tflops")
    before = peak_memory(cpu)
    assert 5e7 < before < 1e12
    held = torch.ones(100_000_000)
    assert peak_memory(cpu) >= held.numel() * 4


def test_rows_are_called_what_they_are():
    assert unit("pairs", {"pair"}, False) == unit("unary", {"pair"}, False) == "pairs"
    assert unit("unary", {"unary"}, False) == "completions"
    assert unit("demonstrations", {"pair"}, False) == unit("pairs", {"pair", "ranking_all"}, False) == "rows"
    assert unit("groups", {"prompt"}, True) == "prompts"


# ---- in view -------------------------------------------------------------------------------------

FULL = {"loss": 0.6123, "reward/margin": 0.31, "accuracy": 0.72, "rows_per_second": 5.12, "tokens_per_second": 2340.4, "useful_mfu": 0.412,
        "padding": 0.031, "peak_memory": 9.12e9, "grad_norm": 1.0}


def test_the_progress_line_has_every_number():
    line = Progress(200, 0, True, "pairs").line(12, FULL, "1:20 left")
    assert line == ("step 12/200  loss 0.612  margin 0.31  acc 0.72  5.1 pairs/s  2,340 tok/s  MFU 41 %  pad 3 %  9.1 GB  1:20 left")
    assert len(line) <= 120


@pytest.mark.parametrize("columns", [150, 119, 100, 79, 40])
def test_the_progress_line_never_wraps(columns):
    line = Progress(200, 0, True, "completions").line(12, FULL, "1:20 left", columns)
    assert len(line) <= columns and "step 12/200" in line and line.endswith("1:20 left")
    assert ("[#" in line) == (columns == 150) and ("completions/s" in line) == (columns > 50)


def test_unknown_numbers_are_left_out():
    line = Progress(4, 0, True).line(1, {"loss": 1.0, "rows_per_second": 0.0123, "useful_mfu": None}, "")
    assert line == "step 1/4  loss 1.000  0.012 rows/s"


def test_a_run_writes_its_speed_everywhere(tmp_path, capsys):
    assert train(tmp_path / "run", "model=tiny-lm", "train.steps=4") == 0
    rows = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    keys = {"rows_per_second", "tokens_per_second", "useful_mfu", "hardware_mfu", "padding", "peak_memory"}
    assert all(keys <= r.keys() for r in rows)
    assert all(0 < r["useful_mfu"] < r["hardware_mfu"] and 0 <= r["padding"] < 1 and r["peak_memory"] > 1e8 for r in rows)
    status, manifest = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("status", "manifest"))
    assert keys <= status["speed"].keys() and status["speed"]["unit"] == "pairs" and status["speed"]["steps"] == 2
    assert manifest["peak"]["tflops"] > 0 and manifest["peak"]["from"] == "a measured matrix product" and manifest["machine"]
    said = capsys.readouterr().err
    assert all(word in said for word in ("pairs/s", "tok/s", "MFU", "pad ", " GB"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Pairs per second" in page and "Useful MFU" in page


def test_a_table_has_no_flops(tmp_path, capsys):
    assert train(tmp_path / "run", "model=bandit", "data=bandit", "algo=kto") == 0
    row = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"][-1]
    assert row["rows_per_second"] > 0 and row["padding"] == 0 and not {"useful_mfu", "hardware_mfu"} & row.keys()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["peak"] is None and "MFU" not in capsys.readouterr().err
