"""Rendering and tokenising: one BOS, a shared prompt, trained tokens that are exactly the reply, counted truncation."""

import itertools

import pytest
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prefopt.data.dataset import make_dataset
from prefopt.data.records import BadRow
from prefopt.data.sources import Split
from prefopt.data.tokenise import Tokeniser
from prefopt.errors import UserError
from tests import toy
from tests.toy import data_config, example, pair, tokeniser, turns

KINDS = ("word", "bytes", "pieces")
FAITHFUL = ("llama3", "chatml", "system", "zephyr", "gemma", "thinking")  # the prompt alone is a prefix of the whole
CONVERSATIONS = {
    "one turn": "How are you?",
    "several turns": turns("Hello there", "I am well.", "How are you?"),
    "odd characters": turns("é🙂 \n\n x\t", "a", "  ¿?"),
    "a system turn": [{"role": "system", "content": "helpful"}, {"role": "user", "content": "Hello"}],
}
REPLIES = ("I am well.", "\n\nTwo and two,\n\nmake four 🙂é!", "x")


def decode(t, ids):
    return t.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def trained_text(t, branch, special=True):
    return t.tokenizer.decode([i for i, m in zip(branch.ids, branch.mask, strict=True) if m], skip_special_tokens=not special)


def cases(templates, conversations=CONVERSATIONS):
    return [
        pytest.param(kind, template, talk, id=f"{kind}-{template}-{talk}")
        for kind, template, talk in itertools.product(KINDS, templates, conversations)
        if not (template == "gemma" and talk == "a system turn")
    ]


# ---- trap 1, pain 13: BOS ----


@pytest.mark.parametrize(("kind", "template", "talk"), cases([None, *FAITHFUL]))
def test_trap_01_pain_13_exactly_one_bos_at_the_start_or_none(kind, template, talk):
    if template is None and talk != "one turn":
        template = "plain"
    t = tokeniser(kind, None if template == "plain" else template, chat_template="plain" if template == "plain" else None)
    out = t(pair(CONVERSATIONS[talk]))
    bos = t.tokenizer.bos_token_id
    for ids in [out.prompt + b.ids for b in out.branches] + [t.prompt_ids(pair(CONVERSATIONS[talk]).prompt, talk != "one turn")]:
        if template in toy.ADDS_BOS:
            assert ids[0] == bos and ids.count(bos) == 1
        else:
            assert bos not in ids


def test_trap_01_bare_text_gets_the_bos_that_the_tokenizer_would_add():
    t = Tokeniser(toy.tokenizer("bytes", adds_bos=True), data_config(), 512)
    assert t(pair()).prompt == t.tokenizer("How are you?")["input_ids"]


def test_trap_01_two_bos_tokens_are_refused_at_construction():
    with pytest.raises(UserError, match="begins with two BOS tokens; the chat template writes one too many"):
        tokeniser("bytes", "two_bos")


def test_bos_that_opens_every_turn_is_no_bos():
    """SmolLM2 names <|im_start|> its bos_token; a prompt cut at its start must not get a lone one."""
    words = toy.tokenizer("bytes", "chatml", bos_token="<|im_start|>")
    t = Tokeniser(words, data_config(max_prompt_tokens=5, on_long_prompt="keep_end"), 512)
    full = Tokeniser(words, data_config(), 512)
    assert t(pair()).prompt == full(pair()).prompt[-5:]


# ---- trap 2, pain 12: the prompt is a prefix ----


@pytest.mark.parametrize(("kind", "template", "talk"), cases(FAITHFUL))
def test_trap_02_pain_12_what_is_sampled_from_is_what_is_trained_on(kind, template, talk):
    t = tokeniser(kind, template)
    for chosen, rejected in itertools.permutations(REPLIES, 2):
        row = pair(CONVERSATIONS[talk], chosen, rejected)
        out = t(row)
        sampled = t.prompt_ids(row.prompt, row.chat)
        # A reply that starts with a line break may merge with one that ends the prompt.
        straddle = "\n" in chosen[0] + rejected[0]
        assert out.prompt == sampled or (straddle and out.prompt == sampled[: len(out.prompt)])


@pytest.mark.parametrize("kind", KINDS)
def test_trap_02_a_prompt_that_is_no_prefix_is_an_error_with_both_texts(kind):
    t = tokeniser(kind, "opens_thought")
    with pytest.raises(BadRow, match="renders the prompt differently once a reply follows.*think.*I am well"):
        t(pair())


def test_trap_02_an_earlier_turn_that_is_rewritten_is_an_error():
    t = tokeniser("bytes", "thinking")
    assert t(example(messages=turns("Hello", "I am well.")))
    with pytest.raises(BadRow, match="renders the prompt differently"):
        t(example(messages=turns("Hello", "I am well.", "Is that so?", "yes")))


def test_trap_02_a_turn_rewritten_only_by_the_next_reply_is_an_error():
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ m['content'] | upper if not loop.last and messages[-1]['role'] == 'assistant' else m['content'] }}"
        "{{ eos_token }}{% else %}{{ m['content'] + ':' }}{% endif %}{% endfor %}"
    )
    words = toy.tokenizer("bytes")
    words.chat_template = template
    t = Tokeniser(words, data_config(), 512)
    assert t(example(messages=turns("Hello", "yes")))
    with pytest.raises(BadRow, match="renders the prompt differently"):
        t(example(messages=turns("Hello", "yes", "and", "no")))


def test_trap_02_a_turn_rewritten_where_a_reply_is_asked_for_is_an_error():
    words = toy.tokenizer("bytes")
    words.chat_template = (
        "{% for m in messages %}{{ m['content'] | upper if not loop.last and (add_generation_prompt or messages | length > 3)"
        " else m['content'] }}{{ eos_token }}{% endfor %}"
    )
    t = Tokeniser(words, data_config(), 512)
    assert t(example(messages=turns("HELLO", "yes")))
    with pytest.raises(BadRow, match="renders the prompt differently"):
        t(example(messages=turns("HELLO", "yes", "AND", "no")))


def test_trap_02_default_system_text_stands_in_the_prompt():
    out = tokeniser("bytes", "system")(pair())
    t = tokeniser("bytes", "system")
    assert "system\nhelpful" in decode(t, out.prompt)


def test_templates_that_refuse_a_conversation_or_do_not_parse(tmp_path):
    with pytest.raises(BadRow, match="the chat template refuses this conversation .no system turn"):
        tokeniser("bytes", "gemma")(pair(CONVERSATIONS["a system turn"]))
    broken = tmp_path / "t.jinja"
    broken.write_text("{% for %}")
    with pytest.raises(UserError, match="chat template.*set model.chat_template"):
        tokeniser("bytes", chat_template=str(broken))
    with pytest.raises(UserError, match="model.chat_template=nowhere.jinja: there is no such file"):
        tokeniser("bytes", chat_template="nowhere.jinja")


# ---- trap 3: the boundary ----


@pytest.mark.parametrize(("kind", "template", "talk"), cases([*FAITHFUL, "plain"]))
def test_trap_03_trained_tokens_are_exactly_the_reply(kind, template, talk):
    t = tokeniser(kind, None if template == "plain" else template, chat_template="plain" if template == "plain" else None)
    for chosen, rejected in itertools.permutations(REPLIES, 2):
        out = t(pair(CONVERSATIONS[talk], chosen, rejected))
        for reply, branch in zip((chosen, rejected), out.branches, strict=True):
            if kind == "bytes":
                text = trained_text(t, branch, special=False)
                expected = reply.strip() if template in ("llama3", "gemma") else reply
                expected = {"thinking": "<think>\n\n</think>\n\n", "plain": " "}.get(template, "") + expected
                assert text == expected
            first = branch.mask.index(True)
            assert not any(branch.mask[:first]) and all(branch.mask[first:])  # one run, up to the end


def test_trap_03_a_token_that_holds_bytes_of_both_belongs_to_the_reply():
    t = tokeniser("bytes", render="text")
    # "and" is one token after a space: here its first bytes stand in the prompt
    merged = t.tokenizer("Two and")["input_ids"]
    assert len(merged) < len(t.tokenizer("Two a")["input_ids"]) + len(t.tokenizer("nd")["input_ids"])
    out = t(pair("Two a", "nd two", "x"))
    assert [decode(t, b.ids) for b in out.branches] == [" and two<eos>", " ax<eos>"]
    assert [b.mask[0] for b in out.branches] == [True, False] and all(all(b.mask[1:]) for b in out.branches)
    assert decode(t, out.prompt + out.branches[0].ids) == "Two and two<eos>"
    assert decode(t, out.prompt + out.branches[1].ids) == "Two ax<eos>"
    # The shared prompt ends where the first of the two renderings stops being common.
    assert decode(t, out.prompt) == "Two"


def test_trap_03_characters_of_several_tokens():
    t = tokeniser("bytes", render="text")
    out = t(pair("é", "🙂", "🙁"))
    assert [trained_text(t, b, special=False) for b in out.branches] == ["🙂", "🙁"]
    assert decode(t, out.prompt) == "é"


def test_trap_03_offsets_that_leave_out_white_space():
    """Byte-level post-processors may trim their offsets: white space in a reply is trained all the same."""
    words = toy.tokenizer("bytes")
    words.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    offsets = words("so  what", return_offsets_mapping=True)["offset_mapping"]
    assert any(s == e for s, e in offsets)
    t = Tokeniser(words, data_config(render="text"), 512)
    out = t(pair("Is  that", " so  what  is", "  Two"))
    assert [trained_text(t, b, special=False) for b in out.branches] == [" so  what  is", "  Two"]
    assert decode(t, out.prompt) == "Is  that"


def test_trap_03_sentencepiece_with_a_space_put_before_every_piece_of_text():
    """Llama-2's normaliser writes a space after every special token; it belongs to the reply, as it is not in the prompt."""
    marks = [*toy.SPECIAL, "[INST]", "[/INST]"]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.train_from_iterator([line.replace(" ", "▁") for line in toy.LINES],
                                trainers.BpeTrainer(vocab_size=200, special_tokens=marks, show_progress=False))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        chat_template="{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    )
    t = Tokeniser(words, data_config(), 512)
    out = t(pair("Hello there", "I am well", "make four"))
    assert words.convert_ids_to_tokens(out.prompt)[-1] == "[/INST]"
    assert out.prompt == t.prompt_ids(pair("Hello there").prompt, False)
    for branch, reply in zip(out.branches, ("▁I▁am▁well<eos>", "▁make▁four<eos>"), strict=True):
        assert "".join(words.convert_ids_to_tokens(branch.ids)) == reply
        assert all(branch.mask)


def test_plain_template_gives_the_space_before_a_reply_to_the_reply():
    t = tokeniser("bytes", chat_template="plain")
    out = t(pair("Hello", "the capital", "Two"))
    assert decode(t, out.prompt) == "\n\nHuman: Hello\n\nAssistant:"
    assert [decode(t, b.ids) for b in out.branches] == [" the capital<eos>", " Two<eos>"]
    assert t.tokenizer.convert_ids_to_tokens(out.branches[0].ids)[0].startswith("Ġt")
    assert out.prompt == t.prompt_ids(pair("Hello").prompt, False)


def test_every_rendering_of_a_row_goes_back_to_its_text():
    t = tokeniser("bytes", "chatml")
    talk = turns("Hello there", "I am well.", "How are you?")
    out = t(pair(talk, "fine 🙂", "so  so"))
    for reply, branch in zip(("fine 🙂", "so  so"), out.branches, strict=True):
        whole = t.tokenizer.apply_chat_template([*talk, {"role": "assistant", "content": reply}], tokenize=False)
        assert decode(t, out.prompt + branch.ids) == whole.rstrip("\n")


def test_later_turns_of_a_completion_train_replies_only():
    t = tokeniser("bytes", "chatml")
    out = t(example(messages=turns("Hello", "I am well.", "Is that so?", "Two and two")))
    (branch,) = out.branches
    tokens = zip(branch.ids, branch.mask, strict=True)
    runs = [(mask, decode(t, [i for i, _ in run])) for mask, run in itertools.groupby(tokens, lambda token: token[1])]
    assert runs == [
        (True, "I am well.<|im_end|>"),
        (False, "\n<|im_start|>user\nIs that so?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Two and two<|im_end|>"),
    ]


# ---- trap 4, pain 14: the end ----


@pytest.mark.parametrize(("kind", "template", "talk"), cases([None, *FAITHFUL, "plain"], ["one turn"]))
def test_trap_04_pain_14_one_trained_end_token_if_the_reply_is_complete(kind, template, talk):
    t = tokeniser(kind, None if template == "plain" else template, chat_template="plain" if template == "plain" else None)
    end = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "system": "<|im_end|>", "thinking": "<|im_end|>", "gemma": "<end_of_turn>"}
    for branch in t(pair(CONVERSATIONS[talk])).branches:
        assert branch.complete and branch.mask[-1]
        assert t.tokenizer.convert_ids_to_tokens(branch.ids[-1]) == end.get(template, "<eos>")
        assert sum(i in t.ends for i in branch.ids) == 1


@pytest.mark.parametrize("template", [None, "llama3", "zephyr", "gemma"])
def test_trap_04_a_cut_reply_keeps_its_own_last_token_and_gets_no_invented_end(template):
    whole = tokeniser("bytes", template)(pair())
    t = tokeniser("bytes", template, max_completion_tokens=4)
    out = t(pair())
    for full, branch, cut in zip(whole.branches, out.branches, out.cut_completions, strict=True):
        assert branch.ids == full.ids[:4] and branch.mask == full.mask[:4]
        assert not branch.complete
        assert not t.ends & set(branch.ids)
        assert cut == len(full.ids) - 4
    exact = tokeniser("bytes", template, max_completion_tokens=len(whole.branches[0].ids))(pair())
    assert exact.branches[0].complete and exact.branches[0].ids == whole.branches[0].ids and exact.cut_completions[0] == 0


def test_trap_04_a_reply_that_brings_its_own_end_token_does_not_get_a_second():
    out = tokeniser("bytes", render="text")(pair("Q", "good<eos>", "bad"))
    t = tokeniser("bytes")
    assert [decode(t, b.ids) for b in out.branches] == ["good<eos>", "bad<eos>"]


def test_trap_04_a_template_without_an_end_gets_the_eos():
    words = toy.tokenizer("bytes")
    words.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" \
                          "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    t = Tokeniser(words, data_config(), 512)
    assert decode(t, t(pair("Q", "good", "bad")).branches[0].ids).endswith("good\n<eos>")


def test_an_end_token_behind_white_space_is_found():
    words = toy.tokenizer("bytes", "chatml")
    words.chat_template = toy.TEMPLATES["chatml"].replace("+ '<|im_end|>'", "+ ' <|im_end|>'")
    t = Tokeniser(words, data_config(), 512)
    assert words.convert_tokens_to_ids("<|im_end|>") in t.ends


# ---- trap 5, pain 15: truncation ----


def test_trap_05_pain_15_what_is_cut_is_counted():
    rows = [pair("How are you?", "I am well. " * n, "Two and two. " * m) for n, m in ((1, 1), (9, 1), (9, 9))]
    cfg = data_config(max_completion_tokens=12)
    data = make_dataset(Split("train", rows), cfg, tokeniser("bytes", max_completion_tokens=12), "pairs", ("weight",), False, 0)
    whole = make_dataset(Split("train", rows), data_config(), tokeniser("bytes"), "pairs", ("weight",), False, 0)
    assert data.stats["truncated_completions"] == 3 and data.stats["truncated_prompts"] == 0
    lost = sum(len(b.ids) for r in whole.rows for b in r.tokens.branches) - sum(len(b.ids) for r in data.rows for b in r.tokens.branches)
    assert data.stats["cut_tokens"] == lost > 0
    assert whole.stats["cut_tokens"] == 0
    assert all(b.trained >= 1 for r in data.rows for b in r.tokens.branches)


def test_trap_05_a_reply_of_which_nothing_would_be_left_is_a_bad_row():
    # With the first tokens taken by untrained text, one token of room holds nothing to train.
    t = tokeniser("bytes", render="text", max_completion_tokens=1)
    with pytest.raises(BadRow, match="nothing of completion 2 would be left within 1 tokens; raise data.max_completion_tokens"):
        t(pair("Two a", "nd two", "x"))


@pytest.mark.parametrize("render", ["auto", "text"])
def test_trap_05_a_long_prompt_stops_or_keeps_its_end_and_its_bos(render):
    words = toy.tokenizer("bytes", "llama3")
    whole = Tokeniser(words, data_config(render=render), 512)(pair())
    with pytest.raises(BadRow, match=f"the prompt has {len(whole.prompt)} tokens, the limit is 4; data.on_long_prompt=keep_end"):
        Tokeniser(words, data_config(render=render, max_prompt_tokens=4), 512)(pair())
    t = Tokeniser(words, data_config(render=render, max_prompt_tokens=4, on_long_prompt="keep_end"), 512)
    out = t(pair())
    assert out.prompt == [words.bos_token_id, *whole.prompt[-3:]]
    assert out.cut_prompt == len(whole.prompt) - 4
    assert [b.ids for b in out.branches] == [b.ids for b in whole.branches]
    assert t.prompt_ids(pair().prompt, False) == out.prompt


def test_trap_05_the_context_bounds_prompt_and_reply_together():
    t = tokeniser("bytes", context=20)
    out = t(pair("How are you?", "I am well. " * 5, "Two and two. " * 5))
    assert {len(out.prompt) + len(b.ids) for b in out.branches} == {20}
    assert not any(b.complete for b in out.branches)


def test_replies_that_become_equal_are_a_bad_row():
    with pytest.raises(BadRow, match="chosen and rejected are the same tokens after truncation"):
        tokeniser("bytes", max_completion_tokens=3)(pair(chosen="I am well, thank you.", rejected="I am well, you."))
    with pytest.raises(BadRow, match="chosen and rejected are the same tokens$"):
        tokeniser("bytes", "llama3")(pair(chosen="yes", rejected=" yes "))
    with pytest.raises(BadRow, match="all completions are the same tokens"):
        tokeniser("bytes", "llama3")(example(prompt="Q", completions=["a", " a", "a "], scores=[1, 2, 3]))
    assert len(tokeniser("bytes", "llama3")(example(prompt="Q", completions=["a", "b", "a "], scores=[1, 2, 3])).branches) == 3


# ---- empty things ----


def test_an_empty_prompt_without_bos_leaves_the_first_token_untrained():
    t = tokeniser("bytes", render="text")
    out = t(pair("", "I am well", "Two"))
    assert out.prompt == []
    assert [b.mask[0] for b in out.branches] == [False, False] and all(b.trained for b in out.branches)
    assert t.prompt_ids(pair("").prompt, False) == [t.tokenizer.eos_token_id]
    with_bos = Tokeniser(toy.tokenizer("bytes", adds_bos=True), data_config(render="text"), 512)
    assert with_bos(pair("")).prompt == [with_bos.tokenizer.bos_token_id]
    assert all(all(b.mask) for b in with_bos(pair("")).branches)


def test_trap_09_a_reply_that_the_template_or_tokenizer_drops_is_a_bad_row():
    words = toy.tokenizer("bytes")
    words.chat_template = "{% for m in messages %}{{ m['content'] if m['role'] == 'user' or 'x' not in m['content'] else '' }}{% endfor %}"
    with pytest.raises(BadRow, match="the completion has no tokens"):
        Tokeniser(words, data_config(), 512)(pair(chosen="xx"))


# ---- settings ----


def test_text_and_chat_rendering():
    t = tokeniser("bytes", "chatml", render="text")
    out = t(pair("Hello ", "there", "Two"))
    assert decode(t, out.prompt + out.branches[0].ids) == "Hello there<eos>"
    assert t.prompt_ids(pair("Hello ").prompt, False) == t.tokenizer("Hello ")["input_ids"]
    with pytest.raises(BadRow, match="data.render=text, but the row holds chat messages"):
        t(pair(turns("Hello")))
    for settings, row in (({"render": "chat"}, pair()), ({}, pair(turns("Hello")))):
        with pytest.raises(UserError, match="no chat template and the data is chat"):
            tokeniser("bytes", **settings)(row)


def test_tokenizers_that_cannot_serve():
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Tokeniser(toy.tokenizer("bytes", eos_token=None), data_config(), 512)


def test_named_templates_use_the_default_one():
    words = toy.tokenizer("bytes", "chatml")
    words.chat_template = {"default": toy.TEMPLATES["chatml"], "rag": toy.TEMPLATES["zephyr"]}
    assert Tokeniser(words, data_config(), 512)(pair()) == tokeniser("bytes", "chatml")(pair())


def test_digest_changes_with_what_decides_the_ids():
    made = [
        tokeniser("bytes", "chatml"), tokeniser("word", "chatml"), tokeniser("bytes", "llama3"), tokeniser("bytes", "chatml", context=100),
        tokeniser("bytes", "chatml", chat_template="plain"), tokeniser("bytes", "chatml", max_prompt_tokens=9),
        tokeniser("bytes", "chatml", max_completion_tokens=9), tokeniser("bytes", "chatml", on_long_prompt="keep_end"),
        tokeniser("bytes", "chatml", render="text"),
    ]
    assert len({t.digest() for t in made}) == len(made)
    assert tokeniser("bytes", "chatml").digest() == made[0].digest()


def test_a_prompt_row_has_no_branches():
    t = tokeniser("bytes", "chatml")
    out = t(example(prompt="Hello"))
    assert out.branches == [] and out.prompt == t.prompt_ids(pair("Hello").prompt, False)


def test_unary_and_ranking_rows():
    t = tokeniser("bytes", "chatml")
    assert len(t(example(prompt="Q", completion="a", label=True)).branches) == 1
    out = t(example(prompt="Q", completions=["x", "yy", "zzz"], scores=[1, 3, 2]))
    assert [trained_text(t, b, special=False) for b in out.branches] == ["yy", "zzz", "x"]
    assert out.longest == len(out.prompt) + max(len(b.ids) for b in out.branches)
