"""Token rewards: the identity they rest on, their sums, the files, and KL(start || policy) on what the start has written."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from prefopt.cli import main
from prefopt.config.schema import EvalConfig
from prefopt.data import bandit
from prefopt.evaluation.commands import _load, _open_to_judge
from prefopt.evaluation.token_rewards import export, texts, token_rewards
from prefopt.policies.tiny_lm import build_tokenizer
from prefopt.tracking.tracker import read_jsonl
from tests.toy import policy, save_model
from tests.toy import tokenizer as toy_tokenizer
from tests.toy_runs import train

BANDIT = ("model=bandit", "data=bandit", "data.limit=null", "data.eval_limit=60", "train.batch_size=30", "train.steps=20", "optim.lr=0.1",
          "train.eval_every=20")  # fmt: skip


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def test_soft_value_iteration_gives_the_identity_at_every_state():
    """A decision process over sequences of three tokens out of four, with rewards and a reference at random: where pi is optimal for r plus
    beta times the entropy of pi relative to the reference, beta log(pi / ref) = r(s_t, a_t) + V(s_t+1) - V(s_t)."""
    rng, beta, actions, depth = random.Random(0), 0.3, range(4), 3
    reward, reference, value, best = {}, {}, {}, {}

    def solve(state: tuple[int, ...]) -> float:
        if len(state) == depth:
            return 0.0
        logits = [rng.gauss(0, 1) for _ in actions]
        for a in actions:
            reward[*state, a], reference[*state, a] = rng.gauss(0, 1), logits[a] - log_sum_exp(logits)
        # Q takes in the reward and beta times the reference's log-prob: then V is an ordinary soft maximum, and pi = exp((Q - V) / beta).
        q = [reward[*state, a] + beta * reference[*state, a] + solve((*state, a)) for a in actions]
        value[state] = beta * log_sum_exp([x / beta for x in q])
        for a in actions:
            best[*state, a] = (q[a] - value[state]) / beta
        return value[state]

    solve(())
    moves = list(best)
    assert len(moves) == 4 + 16 + 64
    values = token_rewards(*(torch.tensor([table[m] for m in moves], dtype=torch.float64) for table in (best, reference)), beta)
    for move, found in zip(moves, values.tolist(), strict=True):
        assert found == pytest.approx(reward[move] + value.get(move, 0.0) - value[move[:-1]], abs=1e-8)
    whole = [m for m in moves if len(m) == depth]
    for move in whole:  # V at the start is the same for all replies, so it cancels in pairs
        steps = [move[: i + 1] for i in range(depth)]
        assert sum(float(values[moves.index(s)]) for s in steps) == pytest.approx(sum(reward[s] for s in steps) - value[()], abs=1e-8)


def test_a_language_model_s_logits_are_such_q_values(tmp_path):
    """beta times its logits are Q, beta times their log-sum-exp V; the reward that makes it optimal is Q(s, a) - V(s') - beta log ref."""
    model, other, beta = policy(save_model(tmp_path / "pi")).eval(), policy(save_model(tmp_path / "ref", seed=1)).eval(), 0.1
    ids = torch.randint(4, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.plainly(), other.plainly():
        logits, theirs = (m.model(input_ids=ids, use_cache=False).logits[0].double() for m in (model, other))
    q, v = beta * logits, beta * logits.logsumexp(-1)
    reference = theirs.log_softmax(-1)
    taken, after = ids[0, 1:], torch.cat([v[1:-1], torch.zeros(1)])
    places = torch.arange(11)
    reward = q[places, taken] - after - beta * reference[places, taken]
    found = token_rewards(logits.log_softmax(-1)[places, taken], reference[places, taken], beta)
    assert torch.allclose(found, reward + after - v[:-1], atol=1e-8)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    run = tmp_path_factory.mktemp("tokens") / "run"
    assert train(run, *BANDIT, "algo.beta=0.5") == 0
    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    rows = [{"prompt": f"How are you, {a}? <b>&", "chosen": "I am <i>well</i>, " + a * (i + 1), "rejected": "Two and two" + a}
            for i, a in enumerate("abcdefgh")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"model.path={save_model(folder / 'model')}", "data=jsonl", f"data.path={folder / 'pairs.jsonl'}", "data.eval_fraction=0.4",
             "optim.lr=0.005", "train.eval_every=4", "sampler.max_new_tokens=8", "algo.beta=0.2")
    assert train(folder / "run", *words) == 0
    assert main(["eval", f"run={folder / 'run'}", "tokens=true", "prompts=3"]) == 0
    return folder / "run"


def test_tokens_sum_to_the_reward_of_their_reply(text):
    made, figures = json.loads((text / "token_rewards.json").read_text()), json.loads((text / "eval.json").read_text())["after"]
    assert made["beta"] == 0.2 and [r["name"] for r in made["replies"]] == ["chosen", "rejected"] * 3
    for reply in made["replies"]:
        assert len(reply["tokens"]) == len(reply["ids"]) == len(reply["rewards"]) and any(abs(r) > 1e-4 for r in reply["rewards"])
        assert sum(reply["rewards"]) == pytest.approx(reply["reward"], abs=1e-9)
        assert "".join(reply["tokens"]).startswith(reply["text"])
    for name in ("chosen", "rejected"):
        mine = [r for r in made["replies"] if r["name"] == name]
        assert sum(r["reward"] for r in mine) / 3 == pytest.approx(figures[f"reward/{name}"], abs=1e-5)
        assert sum(r["logp"] for r in mine) / 3 == pytest.approx(figures[f"logp/{name}"], abs=1e-4)
        assert figures[f"log_ratio/{name}"] == pytest.approx(figures[f"reward/{name}"] / 0.2, abs=1e-4)


@pytest.mark.parametrize(("tokenizer", "said"), [
    (build_tokenizer(), "The brown dog waits at the castle. It is bright."), (toy_tokenizer(), "caf\u00e9 \u732b, twice  two"),
], ids=["words", "bytes"])
def test_tokens_are_shown_with_their_blanks_and_whole_characters(tokenizer, said):
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    made = texts(tokenizer, [0], ids)
    assert "".join(made) == said and len(made) == len(ids) and "\ufffd" not in "".join(made)
    assert texts(None, [3], [5]) == ["3:5"]


def test_the_page_escapes_what_was_said(text):
    page = (text / "token_rewards.html").read_text()
    assert "How are you, " in page and "<b>&" not in page and "&lt;b&gt;&amp;" in page and "<i>" not in page
    assert page.count('title="') > 20 and "default-src 'none'" in page


def test_before_the_first_step_all_are_zero(text, tmp_path):
    run = _open_to_judge(str(text), EvalConfig(run=str(text)))
    made = export(run, 2, tmp_path / "eval.json")
    assert len(made["replies"]) == 4 and all(abs(r) < 1e-6 for reply in made["replies"] for r in reply["rewards"])


def test_what_has_no_token_rewards_is_said(tmp_path, capsys):
    assert train(tmp_path / "rm", "model=bandit", "data=bandit", "algo=reward_bt", "train.steps=1") == 0
    assert main(["eval", f"run={tmp_path / 'rm'}", "tokens=true"]) == 2
    assert "holds a reward model, which gives a reply one number and its tokens none" in capsys.readouterr().err


@pytest.mark.parametrize("algo", ["simpo", "sft"])
def test_without_a_reference_they_are_against_the_start_in_nats(algo, tmp_path):
    assert train(tmp_path / "run", *BANDIT[:4], f"algo={algo}", "optim.lr=0.1", "evaluation.kl=false") == 0
    assert main(["eval", f"run={tmp_path / 'run'}", "tokens=true", "prompts=5"]) == 0
    made = json.loads((tmp_path / "run" / "token_rewards.json").read_text())
    assert made["beta"] == 1 and len(made["replies"]) == 10
    start = bandit.reference_table()
    for reply in made["replies"]:
        x, y = bandit.parse(reply["text"])
        assert reply["reward"] == pytest.approx(reply["logp"] - start[x][y], abs=1e-5) and reply["tokens"] == [reply["text"]]


def test_on_what_the_start_has_written_the_mean_implicit_reward_is_minus_kl(table):
    """KL(start || policy) from 1600 samples, against the tables: -beta KL is what rewards of replies typical of the start come to."""
    run = _open_to_judge(str(table), EvalConfig(run=str(table), prompts=4))
    run.judge.prompts = run.judge.prompts * 400
    run.judge.measure(0)
    run.judge.start_drawn = run.judge.drawn
    _load(run)
    found = run.judge.measure(20).replies["forward_kl"]
    start, now = torch.tensor(bandit.reference_table()).double(), run.engine.policy.logits.detach().double().log_softmax(-1)
    exact = float((start.exp() * (start - now)).sum(-1).mean())
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    assert len(found) == 1600 and exact > 0.05
    assert found.mean() == pytest.approx(exact, abs=4 * error) and error < 0.2 * exact
    assert all(float((now - start + v).abs().min()) < 1e-5 for v in found[:4]), "of each sample it is exact"


def test_eval_writes_it_and_a_run_says_how_far_rows_have_moved(table, capsys):
    assert main(["eval", f"run={table}", "prompts=4"]) == 0
    figures = json.loads((table / "eval.json").read_text())
    assert "forward_kl" in figures["after"] and "forward_kl" not in figures["before"] and "KL from initial" in capsys.readouterr().out
    first, *_, last = [r for r in read_jsonl(table / "metrics.jsonl") if r["split"] == "eval"]
    assert first["log_ratio/chosen"] == first["log_ratio/rejected"] == 0
    for side in ("chosen", "rejected"):
        assert last[f"log_ratio/{side}"] == pytest.approx(last[f"reward/{side}"] / 0.5, abs=1e-5)
    assert last["log_ratio/chosen"] > last["log_ratio/rejected"]
