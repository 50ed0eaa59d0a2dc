"""Follow-up likelihood as a reward: exact spans against plain teacher forcing, its signs, its use, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml

from prefopt.cli import main
from prefopt.config.compose import typed
from prefopt.config.schema import TrustConfig
from prefopt.data.records import Message
from prefopt.errors import UserError
from prefopt.paths import cache_dir
from prefopt.rewards.followup import FollowupLikelihood, scorer_config
from prefopt.rewards.followups import STATEMENTS
from prefopt.tracking.tracker import read_jsonl
from tests.toy import example, oracle, policy, save_model, turns
from tests.toy_runs import train
from tests.unit.test_compose import composed, refusal

FEW = {"correct": (("That is right.", "Yes, so it is!"), ("That is wrong.", "No, it is not so.")), "lively": (("How fun",), ("So dull",))}
ASKED = [
    example(prompt="How are you?", completion="I am well."),
    example(prompt=turns("How are you?", "I am well.", "Is that so?"), completion="Two and two make four. That is right."),
    example(prompt="Tell me a story", completion="once upon a time"),
]


def reward(path, statements=FEW, **settings) -> FollowupLikelihood:
    made = FollowupLikelihood(str(path), TrustConfig(), torch.device("cpu"), "fp32", statements=statements)
    for name, value in settings.items():
        setattr(made, name, value)
    return made


@pytest.fixture(scope="module", params=["chatml", "gemma", "mistral", None])
def scorer(request, tmp_path_factory) -> FollowupLikelihood:
    family = "gpt2" if request.param is None else "llama"
    return reward(save_model(tmp_path_factory.mktemp("scorer") / "model", family, template=request.param))


def by_hand(scorer: FollowupLikelihood, asked, statement: str) -> float:
    """Mean log-prob of a statement's tokens, from the rendered text alone: tokens that hold one of its letters."""
    tokenizer, template = scorer.model.tokenizer, scorer.tokeniser.template
    said = [m.plain() for m in (*asked.prompt, *asked.completions[0].messages)] + [{"role": "user", "content": statement}]
    text = tokenizer.apply_chat_template(said, chat_template=template, tokenize=False)
    begin = text.rindex(statement)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    if scorer.tokeniser.adds_bos and ids[0] != tokenizer.bos_token_id:
        ids, spans = [tokenizer.bos_token_id, *ids], [(0, 0), *spans]
    inside = [max(a, begin) < min(b, begin + len(statement)) for a, b in spans]
    covered = "".join(text[a:b] for (a, b), holds in zip(spans, inside, strict=True) if holds)
    assert statement in covered and len(covered) <= len(statement) + 2
    return fmean(oracle(scorer.model, ids, inside))


def test_log_probs_are_those_of_plain_teacher_forcing(scorer, monkeypatch):
    found = []
    monkeypatch.setattr(scorer, "reward", lambda values: found.append(list(values)) or 0.0)
    scorer(ASKED)
    for asked, values in zip(ASKED, found, strict=True):
        assert values == pytest.approx([by_hand(scorer, asked, f) for f in scorer.flat], abs=1e-4)


def test_the_reward_is_praise_minus_complaints_by_category(scorer):
    likely = {asked.origin + asked.completions[0].text: [by_hand(scorer, asked, f) for f in scorer.flat] for asked in ASKED}
    for asked, found in zip(ASKED, scorer(ASKED), strict=True):
        l = likely[asked.origin + asked.completions[0].text]  # noqa: E741
        wanted = ((l[0] + l[1]) / 2 - (l[2] + l[3]) / 2 + l[4] - l[5]) / 2
        assert found == pytest.approx(wanted, abs=1e-4) and abs(found) > 1e-3


def test_equal_sides_cancel_and_swapped_ones_turn_the_sign(tmp_path):
    model = save_model(tmp_path / "m")
    same = {name: (praise, praise) for name, (praise, _) in FEW.items()}
    assert reward(model, same)(ASKED) == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    turned = {name: (complaints, praise) for name, (praise, complaints) in FEW.items()}
    assert reward(model, turned)(ASKED) == pytest.approx([-r for r in reward(model)(ASKED)], abs=1e-6)


def test_rewards_do_not_depend_on_the_batch_or_the_layout(tmp_path, monkeypatch):
    """A dialogue is computed once for all of its follow-ups; where that cannot be, a few follow-ups at a time."""
    model = save_model(tmp_path / "m")
    shared = reward(model)
    assert shared.model.share and shared.model.layout != "rows"
    together = shared(ASKED)
    assert together == pytest.approx([shared([e])[0] for e in ASKED], abs=1e-5) and shared([]) == []
    shared.budget = 40
    assert shared(ASKED) == pytest.approx(together, abs=1e-5)
    monkeypatch.setattr(shared.model, "share", False)
    shared.model.layout = "rows"
    assert shared(ASKED) == pytest.approx(together, abs=1e-4)


def test_the_dialogue_is_a_shared_prefix_and_statements_are_its_branches(scorer):
    for asked in ASKED:
        tokens = scorer.tokens(asked)
        assert len(tokens.branches) == 6 and all(b.trained >= 2 and b.mask[-1] for b in tokens.branches)
        assert min(b.mask.index(True) for b in tokens.branches) == 0 and len(tokens.prompt) > 10
        goal = replace(asked, prompt=[Message("system", [{"type": "text", "text": "worth 9 of 10"}])] + asked.prompt, bare=asked.prompt)
        assert scorer.tokens(goal) == tokens, "what a transform has added for the policy is not judged"


def test_a_dialogue_without_room_loses_its_start_and_that_is_counted(tmp_path, capsys):
    made = reward(save_model(tmp_path / "m", template="gemma"))
    capsys.readouterr()
    (found,) = made([example(prompt="How are you? " * 100, completion="I am well.")])
    tokens = made.tokens(example(prompt="How are you? " * 100, completion="I am well."))
    assert made.cut == 2 and "1 dialogues so far were too long" in capsys.readouterr().err and found == found
    assert tokens.prompt[0] == made.model.tokenizer.bos_token_id and tokens.longest == made.tokeniser.context


def test_the_statements():
    assert len(STATEMENTS) == 6
    for praise, complaints in STATEMENTS.values():
        assert len(praise) == len(complaints) == 10
        assert abs(fmean(len(f.split()) for f in praise) - fmean(len(f.split()) for f in complaints)) <= 1
    flat = [f for sides in STATEMENTS.values() for side in sides for f in side]
    assert len(set(flat)) == 120 and all(f.strip() == f for f in flat)


# ---- the model that scores -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    said = ("I am well.", "Two and two make four.", "Paris is the capital.", "a fox", "Lima", "six")
    file.write_text("".join(json.dumps({"prompt": f"How are you, {a}?", "chosen": said[i % 6], "rejected": said[(i + 1) % 6]}) + "\n"
                            for i, a in enumerate("abcdefgh")))
    return file


def test_a_run_an_adapter_s_too_is_loaded_as_it_was(tmp_path):
    base = save_model(tmp_path / "base")
    trained = policy(base, {"enabled": True, "r": 4}).eval()
    with torch.no_grad():
        for parameter in trained.trainable().values():
            parameter.add_(0.05)
    trained.save(tmp_path / "run" / "model")
    settings = typed(composed(f"model.path={base}", "adapter=lora", "model.lora.r=4", "optim.lr=1"), "train", "dpo").model
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"algo": {"name": "dpo"}, "model": asdict(settings)}))
    found = reward(tmp_path / "run")
    assert not any(p.requires_grad for p in found.model.parameters()) and not found.model.training
    tokens = found.tokens(ASKED[0])
    ids = tokens.prompt + tokens.branches[0].ids
    mask = [False] * len(tokens.prompt) + tokens.branches[0].mask
    assert oracle(found.model, ids, mask) == pytest.approx(oracle(trained, ids, mask), abs=1e-5)
    assert found(ASKED) != pytest.approx(reward(base)(ASKED), abs=1e-3)


def test_rounds_and_labels_use_it(pairs, tmp_path, capsys):
    """The run's own initial model judges; then the run labels the pairs it was trained on."""
    run, base = tmp_path / "run", save_model(tmp_path / "base")
    words = (f"model.path={base}", "data=jsonl", f"data.path={pairs}", "data.eval_fraction=0.3", "algo=online_dpo", "reward=flr",
             "source.prompts=2", "train.batch_size=2", "train.steps=1", "sampler.max_new_tokens=4", "evaluation.prompts=1")
    assert train(run, *words) == 0
    rows = [r for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "eval"]
    assert {"reward", "win_rate"} <= set(rows[-1]) and "true_reward" not in rows[-1]
    sample = next(s for s in read_jsonl(run / "samples.jsonl") if s["completion"])
    said = example(prompt=sample["prompt"], completion=sample["completion"])
    assert reward(base, STATEMENTS)([said]) == pytest.approx([sample["reward"]], abs=1e-4)
    assert main(["label", "reward=flr", f"reward.path={run}", "data=jsonl", f"data.path={pairs}", "data.limit=2",
                 f"output={tmp_path / 'out.jsonl'}"]) == 0
    assert [r["reward_chosen"] >= r["reward_rejected"] for r in read_jsonl(tmp_path / "out.jsonl")] == [True, True]


def test_what_cannot_judge_is_said(tiny_lm, tmp_path):
    with pytest.raises(UserError, match="of the follow-ups are unknown words to the tokenizer of .*give a model that speaks English"):
        reward(tiny_lm, STATEMENTS)
    with pytest.raises(UserError, match="reward.path=.*nowhere: there is no such folder"):
        scorer_config(str(tmp_path / "nowhere"))
    assert train(tmp_path / "table", "model=bandit", "data=bandit", "train.steps=1") == 0
    with pytest.raises(UserError, match="holds a table of the bandit world, which reads no texts"):
        scorer_config(str(tmp_path / "table"))
    assert scorer_config("some/model").path == "some/model"


def test_where_it_does_not_fit():
    assert typed(composed("reward=flr", "algo=online_dpo"), "train", "online_dpo").reward.kind == "followup"
    assert "reward=flr reads texts, and data=bandit has none" in refusal("reward=flr", "model=bandit", "data=bandit")
    assert "reward=followup is for judging a policy's replies" in refusal("reward=flr", "algo=reward_bt")
    assert "prefopt label reward=flr needs one" in refusal("reward=flr", "output=x.jsonl", command="label")
    assert "is read with reward=model only (or reward=flr, " in refusal("reward.path=x")


def test_a_small_instruct_model_tells_help_from_harm():
    """The first five of the easy pairs; all 48 take minutes (docs/reward-models.md)."""
    path = cache_dir() / "models" / "SmolLM2-135M-Instruct"
    if not path.is_dir():
        pytest.skip("SmolLM2-135M-Instruct is not on this machine")
    judge = FollowupLikelihood(str(path), TrustConfig(), torch.device("cpu"), "fp32")
    rows = read_jsonl(Path(__file__).parents[1] / "easy_pairs.jsonl")[:5]
    scores = judge([example(prompt=row["prompt"], completion=row[side]) for row in rows for side in ("chosen", "rejected")])
    assert sum(good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)) > 0.6 * len(rows)
