"""Beam search as a sampler: the most likely reply by the sum of its log-probs, and where it does not fit."""

from __future__ import annotations

import pytest
import torch

from prefopt.config.compose import typed
from prefopt.config.schema import SamplerConfig
from prefopt.policies.tabular import Tabular
from tests.toy import example, policy, save_model
from tests.unit.test_compose import composed, refusal


def log_probs(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad(), model.plainly():
        return model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)


@pytest.mark.parametrize("length", [1, 2])
def test_as_many_beams_as_words_find_the_most_likely_reply(length, tmp_path):
    """Against all replies of so many tokens. A reply that ends sooner competes with its whole log-prob: length is no merit and no fault."""
    model = policy(save_model(tmp_path / "m", template="zephyr", kind="word")).eval()
    prompts = prompts_of(model)
    words = model.inner.config.vocab_size
    found = model.generate(prompts, SamplerConfig(0.0, 1.0, beams=words, max_new_tokens=length, batch_size=2), 0)
    for prompt, reply in zip(prompts, found, strict=True):
        best: dict[tuple[int, ...], float] = {}
        for first, score in enumerate(log_probs(model, prompt).tolist()):
            if first in model.tokeniser.ends or length == 1:
                best[(first,)] = score
            else:
                second = log_probs(model, [*prompt, first])
                best[(first, int(second.argmax()))] = score + float(second.max())
        assert tuple(reply.ids) == max(best, key=best.get)
        assert reply.finished == (reply.ids[-1] in model.tokeniser.ends)


def prompts_of(model) -> list[list[int]]:
    asked = (example(prompt=text, completion="x") for text in ("How are you?", "Two and two", "Is that so?"))
    return [model.prompt_ids(e.prompt, e.chat) for e in asked]


def test_more_beams_find_likelier_replies(tmp_path):
    model = policy(save_model(tmp_path / "m")).eval()
    prompts = prompts_of(model)
    totals = []
    for beams in (1, 8):
        replies = model.generate(prompts, SamplerConfig(0.0, 1.0, beams=beams, max_new_tokens=6, batch_size=3), 0)
        again = model.generate(prompts, SamplerConfig(0.0, 1.0, beams=beams, max_new_tokens=6, batch_size=3), 1)
        assert [r.ids for r in replies] == [r.ids for r in again], "a search, not a draw"
        totals.append([sum(float(log_probs(model, [*p, *r.ids[:i]])[token]) for i, token in enumerate(r.ids))
                       for p, r in zip(prompts, replies, strict=True)])
    assert sum(totals[1]) > sum(totals[0]), "of each prompt it need not be: what greedy search takes may leave the beams"


def test_a_table_is_searched_exactly():
    table = Tabular(torch.device("cpu"))
    (reply,) = table.generate([[2]], SamplerConfig(0.0, 1.0, beams=5), 0)
    assert reply.ids == [int(table.logits[2].argmax())]


def test_the_preset_and_where_it_does_not_fit():
    sampler = typed(composed("sampler=r_to_q"), "train", "dpo").sampler
    assert (sampler.temperature, sampler.top_p, sampler.beams) == (0, 1, 5)
    assert "sampler.temperature=1 draws one; set sampler.temperature=0" in refusal("sampler.beams=3")
    assert "source=rounds draws several replies to a prompt, and sampler.beams=5 finds one" in refusal("sampler=r_to_q", "source=rounds")
    assert refusal("sampler=r_to_q", "sampler.beams=0") == "sampler.beams=0: it must be at least 1"
    assert typed(composed("run=x", "sampler=r_to_q", command="eval"), "eval").sampler.beams == 5
