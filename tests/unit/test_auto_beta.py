"""`algo.beta: auto`: the number follows its definition, whatever was there before and however the batch is divided, and a run keeps it."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
import yaml

from prefopt.cli import main
from prefopt.objectives.pairwise import DPO
from prefopt.training.auto_beta import find_beta
from tests.toy_runs import fresh_accelerator, train
from tests.unit.test_engine import TinyPolicy, engine_of, make_rows, source_of
from tests.unit.test_moving_reference import weights

BANDIT = ["algo=dpo", "model=bandit", "data=bandit", "train.save_every=1"]


def found(factor: float = 0.45, budget: int = 10**6, beta: float = 1.0, rows: int = 16, **changes):
    """(beta, s, the engine's policy) of the toy policy, whose reference is itself."""
    objective = DPO(beta=beta)
    with fresh_accelerator() as accelerator:
        engine = engine_of(objective, accelerator)
        engine.reference = lambda micro: start(micro)
        start = TinyPolicy(0).requires_grad_(False)
        engine.cfg.lr = changes.get("lr", 1e-3)
        source = source_of(objective, make_rows(rows), budget)
        made = find_beta(engine, source.step(0), source.step(1), factor)
        assert not engine.optimizer.state and all(p.grad is None for p in engine.parameters)
    return *made, engine.policy


def test_the_factor_of_a_pair_that_moves_by_the_spread_is_what_was_asked_for():
    """The step is made here once more, by torch alone."""
    beta, spread, policy = found(0.4)
    assert 1 / (1 + math.exp(beta * spread)) == pytest.approx(0.4)
    again, start = TinyPolicy(0), TinyPolicy(0)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), start.parameters(), strict=True)), "it is taken back"
    source = source_of(DPO(), make_rows(16), 10**6)

    def margins(model, micro):
        logp = torch.zeros(len(micro.layout.lengths), dtype=torch.float64).index_add(0, micro.layout.token_edge, model(micro))
        return logp[micro.layout.pairs.chosen] - logp[micro.layout.pairs.rejected]

    (first,), (second,) = source.step(0), source.step(1)
    pairs = first.layout.pairs
    h = margins(again, first) - margins(start, first).detach()
    each = -pairs.label * torch.nn.functional.logsigmoid(h) - (1 - pairs.label) * torch.nn.functional.logsigmoid(-h)
    ((pairs.weight * each).sum() / pairs.weight.sum()).backward()
    torch.optim.AdamW(again.parameters(), lr=1e-3, weight_decay=0.0).step()
    weight = second.layout.pairs.weight.double()
    with torch.no_grad():
        change = margins(again, second) - margins(start, second)
    assert spread == pytest.approx(float(((weight * change**2).sum() / weight.sum()).sqrt()), rel=1e-6)


def test_it_depends_neither_on_the_beta_before_nor_on_micro_batches():
    beta, spread, _ = found()
    assert spread == pytest.approx(found(beta=30.0)[1], rel=1e-4) == found(beta=0.03)[1]
    assert beta == pytest.approx(found(budget=1)[0], rel=1e-9)
    assert found(lr=1e-4)[0] == pytest.approx(10 * beta, rel=0.05), "smaller steps, a larger beta"


def test_a_run_with_it_is_the_run_with_its_number_and_goes_on_with_it(tmp_path, capsys):
    assert train(tmp_path / "auto", *BANDIT, "algo.beta=auto") == 0
    said = re.search(r"algo.beta=auto: (\S+); a step at optim.lr=0.05 moves other pairs by (\S+) nats", capsys.readouterr().err)
    beta = json.loads((tmp_path / "auto" / "manifest.json").read_text())["beta"]
    assert beta == pytest.approx(float(said[1]), rel=1e-3) == math.log(0.55 / 0.45) / float(said[2])
    assert yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["algo"]["beta"] == "auto"
    assert str(round(beta, 2)) in (tmp_path / "auto" / "report.html").read_text()
    assert train(tmp_path / "number", *BANDIT, f"algo.beta={beta!r}") == 0
    ours, theirs = weights(tmp_path / "auto"), weights(tmp_path / "number")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    # what it began with is what it goes on with, and what it is judged by
    manifest = tmp_path / "auto" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"beta": {beta!r}', '"beta": 7.0'))
    capsys.readouterr()
    assert main(["eval", f"run={tmp_path / 'auto'}", "prompts=2"]) == 0
    assert "algo.beta=auto" not in capsys.readouterr().err
    judged = json.loads((tmp_path / "auto" / "eval.json").read_text())["after"]["reward/margin"]
    rows = [json.loads(line) for line in (tmp_path / "number" / "metrics.jsonl").read_text().splitlines()]
    own = [row for row in rows if row["split"] == "eval"][-1]["reward/margin"]
    assert judged == pytest.approx(own * 7 / beta, rel=1e-5)


@pytest.mark.parametrize("words, said", [
    (["algo=dpo", "algo.beta=auto:0.7"], "must lie between 0 and 0.5"),
    (["algo=dpo", "algo.beta=auto:x"], "algo.beta=auto:x: it must be a finite number"),
    (["algo=kto", "algo.beta=auto"], "KTO is none; give a number"),
    (["algo=simpo", "algo.beta=auto"], "SimPO is none; give a number"),
    (["algo=dpop", "algo.lambda_=auto"], "algo.lambda_=auto: it must be a finite number"),
    (["algo=online_dpo", "algo.beta=auto"], "source=rounds has none before it trains"),
    (["algo=dpo", "algo.beta=auto", "optim.lr=1e-300"], "it moves pairs by 0 nats; give algo.beta a number"),
], ids=["factor", "word", "unary", "no-reference", "other-key", "rounds", "no-step"])
def test_refused(words, said, tmp_path, capsys):
    assert train(tmp_path / "run", "model=bandit", "data=bandit", *words) == 2
    assert said in capsys.readouterr().err
