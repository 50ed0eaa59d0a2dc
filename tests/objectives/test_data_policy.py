"""IS-DAA on data that says how likely the policy which wrote the replies found them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from samples import default

from prefopt.config.schema import ColumnsConfig, DataConfig, OptimConfig
from prefopt.data.batch import build
from prefopt.data.dataset import make_dataset
from prefopt.data.records import BadRow, parse_row
from prefopt.data.sources import Split, load_data
from prefopt.errors import UserError
from prefopt.objectives.pairwise import DPO
from prefopt.policies.reference import make_reference
from prefopt.policies.tabular import Tabular
from prefopt.training.engine import Engine
from tests.toy import COLUMNS, data_config
from tests.toy_runs import fresh_accelerator, train

NAMED = {**COLUMNS, "chosen_logp": "chosen_logp", "rejected_logp": "rejected_logp"}
DATA = DataConfig(name="bandit", source="bandit", columns=ColumnsConfig(), eval_limit=None)


def bandit_rows(logps: list[tuple[float, float] | None]) -> list:
    """Rows of the bandit's first pairs, whose replies were written with these log-probs."""
    split = load_data(DATA)[0]
    split.examples = split.examples[: len(logps)]
    for example, given in zip(split.examples, logps, strict=True):
        for completion, logp in zip(example.completions, given or (None, None), strict=True):
            completion.logp = logp
    objective = default("is_daa")
    return make_dataset(split, DATA, Tabular(torch.device("cpu")).tokenise, "pairs", objective.columns, False, 0).rows


@pytest.mark.parametrize("base", ["dpo", "ipo"])
def test_weights_are_taken_against_the_policy_that_wrote_the_replies(base):
    """And against the reference where a row does not say it; of the rest of the loss the reference stays the measure."""
    objective, policy = default("is_daa"), Tabular(torch.device("cpu"))
    objective.base = base
    given = [(-1.0, -2.0), None, (-9.0, -9.0), (-0.5, -0.1)]
    micro = build(bandit_rows(given), range(4), "pairs", policy.pad)
    with fresh_accelerator() as accelerator:
        engine = Engine(policy, objective, make_reference(policy, "initial"), OptimConfig(), accelerator)
        with torch.no_grad():
            policy.logits += torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(0))
            batch = engine.score(micro)
        made = objective(batch)
    pairs, logp, reference = batch.pairs, batch.logp(), batch.logp("reference")
    weights = []
    for row, (w, l) in enumerate(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)):  # noqa: E741
        mu = given[row] or (float(reference[w]), float(reference[l]))
        weights.append(math.exp(min(float(logp[w]) - mu[0] + float(logp[l]) - mu[1], 2 * objective.eps)))
    assert weights[2] == pytest.approx(math.exp(2)) and len({round(w, 3) for w in weights}) == 4
    assert made.metrics["importance_weight"].tolist() == pytest.approx(weights, rel=1e-5)
    plain = build(bandit_rows([None] * 4), range(4), "pairs", policy.pad)
    with fresh_accelerator() as accelerator:
        unweighted = objective(Engine(policy, objective, lambda m: reference, OptimConfig(), accelerator).score(plain))
    values = unweighted.terms[0].values / unweighted.metrics["importance_weight"]
    torch.testing.assert_close(made.terms[0].values, values * torch.tensor(weights), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("tiny_lm")
def test_a_run_reads_them_from_its_file(tmp_path, capsys):
    """Another writer, another loss from the first step on; objectives that do not use them refuse the columns."""
    rows = [{"prompt": f"question {i}", "chosen": f"a good answer {i}", "rejected": f"bad {i}", "lw": -20.0 - i, "lr": -9.0}
            for i in range(8)]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("pairs", "half")}
    files["pairs"].write_text("\n".join(map(json.dumps, rows)))
    files["half"].write_text("\n".join(json.dumps({k: v for k, v in r.items() if k != "lr" or r["prompt"] == "question 3"}) for r in rows))
    words = ["model=tiny-lm", "data=jsonl", "algo.eps=50", "train.steps=1", f"data.path={files['pairs']}"]
    columns = ["data.columns.chosen_logp=lw", "data.columns.rejected_logp=lr"]
    losses = []
    for name, more in (("with", columns), ("without", [])):
        assert train(tmp_path / name, "algo=is_daa", *words, *more) == 0
        first = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        losses.append(first["loss"])
    assert losses[1] == pytest.approx(math.log(2), abs=1e-4) and abs(losses[0] - losses[1]) > 0.1
    capsys.readouterr()
    assert train(tmp_path / "dpo", "algo=dpo", *[w for w in words if "eps" not in w], *columns) == 2
    assert "which this objective does not use. Set data.columns.chosen_logp=null" in " ".join(capsys.readouterr().err.split())
    assert train(tmp_path / "half", "algo=is_daa", *words, *columns, f"data.path={files['half']}") == 2
    assert "it has the log-prob of one reply and not of the other" in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_a_log_prob_is_refused():
    row = {"prompt": "q", "chosen": "yes", "rejected": "no", "chosen_logp": -1, "rejected_logp": 0.5}
    with pytest.raises(BadRow, match="'rejected_logp' is 0.5, outside"):
        parse_row(row, NAMED)
    example = parse_row(row | {"rejected_logp": -2}, NAMED, "row 1")
    assert [c.logp for c in example.completions] == [-1, -2]
    with pytest.raises(UserError, match="row 1: the data has log-probs of the policy that wrote the replies"):
        make_dataset(Split("train", [example]), data_config(), None, "pairs", DPO.columns, False, 0)


@pytest.mark.usefixtures("tiny_lm")
def test_a_reply_that_is_cut_has_no_log_prob(tmp_path, capsys):
    """What the data says was of the whole reply."""
    rows = [{"prompt": "q", "chosen": "the sky is blue and the sea is green", "rejected": "no", "chosen_logp": -9, "rejected_logp": -1}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows * 4)))
    columns = ["data.columns.chosen_logp=chosen_logp", "data.columns.rejected_logp=rejected_logp"]
    words = ["algo=is_daa", "model=tiny-lm", "data=jsonl", f"data.path={path}", "data.max_completion_tokens=3", *columns]
    assert train(tmp_path / "run", *words) == 2
    assert "a reply is cut (data.max_completion_tokens)" in " ".join(capsys.readouterr().err.split())
