"""Every row shape that is accepted, and every reason for which a row is not."""

import math

import pytest

from prefopt.data.records import BadRow, parse_dialogue, parse_row
from tests.toy import COLUMNS, turns


def parse(**row):
    return parse_row(row, COLUMNS, "file row 1")


def texts(messages):
    return [(m.role, m.text) for m in messages]


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name a fruit\n\nAssistant: "
CHAT = turns("Hi", "Hello", "Name a fruit")


# ---- accepted shapes ----


def test_pair_of_texts():
    e = parse(prompt="Q", chosen="good", rejected="bad", source="me")
    assert (e.kind, e.chat, e.label, e.weight, e.margin, e.origin) == ("pair", False, 1.0, 1.0, 0.0, "file row 1")
    assert texts(e.prompt) == [("user", "Q")]
    assert [c.text for c in e.completions] == ["good", "bad"]
    assert all(m.train for c in e.completions for m in c.messages)
    assert e.meta == {"source": "me"}


@pytest.mark.parametrize("chosen", [turns("", "good")[1:], turns("", "good")[1], "good"], ids=["list", "one message", "text"])
def test_pair_with_chat_prompt(chosen):
    e = parse(prompt=CHAT, chosen=chosen, rejected="bad")
    assert e.chat
    assert texts(e.prompt) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Name a fruit")]
    assert [c.text for c in e.completions] == ["good", "bad"]
    assert not any(m.train for m in e.prompt)


@pytest.mark.parametrize("with_prompt", [True, False])
def test_pair_of_whole_message_lists(with_prompt):
    prompt = {"prompt": "Name a fruit"} if with_prompt else {}
    e = parse(chosen=turns("Hi", "Hello", "Name a fruit", "plum"), rejected=turns("Hi", "Hello", "Name a fruit", "no"), **prompt)
    assert e.chat
    assert texts(e.prompt) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Name a fruit")]
    assert [c.text for c in e.completions] == ["plum", "no"]


def test_pair_of_dialogue_strings_which_part_before_the_last_turn():
    e = parse(chosen="\n\nHuman: Hi\n\nAssistant: A\n\nHuman: x\n\nAssistant: B", rejected="\n\nHuman: Hi\n\nAssistant: C")
    assert texts(e.prompt) == [("user", "Hi")]
    assert texts(e.completions[0].messages) == [("assistant", "A"), ("user", "x"), ("assistant", "B")]
    assert [m.train for m in e.completions[0].messages] == [True, False, True]


def test_pair_of_dialogue_strings():
    e = parse(chosen=HH + "plum", rejected=HH + "no")
    assert e.chat
    assert texts(e.prompt) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Name a fruit")]
    assert [c.text for c in e.completions] == ["plum", "no"]


@pytest.mark.parametrize("prompt", [HH, HH.rstrip(), HH.removesuffix("\n\nAssistant: ")])
def test_a_dialogue_string_as_prompt_may_end_by_asking_for_a_reply(prompt):
    e = parse(prompt=prompt, chosen="plum", rejected="no")
    assert texts(e.prompt) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Name a fruit")]


def test_pair_with_soft_label_weight_and_margin():
    e = parse(prompt="Q", chosen="a", rejected="b", label=0.7, weight=2, margin=-0.5)
    assert (e.label, e.weight, e.margin) == (0.7, 2.0, -0.5)


@pytest.mark.parametrize("marks", [{"scores": [1, 3, 2]}, {"ranks": [3, 1, 2]}])
def test_ranking_is_ordered_best_first(marks):
    e = parse(prompt="Q", completions=["worst", "best", "middle"], **marks)
    assert e.kind == "ranking"
    assert [c.text for c in e.completions] == ["best", "middle", "worst"]
    assert e.completions[0].score > e.completions[1].score > e.completions[2].score


def test_ranking_of_message_lists():
    e = parse(prompt=CHAT, completions=[turns("", "a")[1:], turns("", "b")[1:]], scores=[0.5, 0.25])
    assert [c.text for c in e.completions] == ["a", "b"]


@pytest.mark.parametrize(("label", "desirable"), [(True, True), (False, False), (1, True), (0, False), (1.0, True)])
def test_unary(label, desirable):
    e = parse(prompt="Q", completion="a", label=label)
    assert e.kind == "unary"
    assert e.completions[0].desirable is desirable


def test_demonstrations():
    e = parse(prompt="Q", completion="a")
    assert (e.kind, e.completions[0].desirable) == ("demonstration", None)
    chat = parse(messages=turns("Hi", "Hello", "Name a fruit", "plum"))
    assert chat.kind == "demonstration"
    assert texts(chat.prompt) == [("user", "Hi")]
    assert [m.train for m in chat.completions[0].messages] == [True, False, True]


def test_messages_beside_a_prompt_are_a_demonstration():
    # ultrachat_200k has both columns
    e = parse(prompt="Hi", prompt_id="7", messages=turns("Hi", "Hello"))
    assert (e.kind, e.completions[0].text) == ("demonstration", "Hello")


def test_prompt_alone():
    assert parse(prompt="Q").kind == "prompt"
    assert parse(prompt=CHAT).completions == []


def test_content_may_be_a_list_of_text_parts():
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a fruit"}]
    e = parse(prompt=[{"role": "user", "content": parts}], chosen="plum", rejected="no")
    assert e.prompt_text == "Name a fruit"
    assert e.prompt[0].plain() == {"role": "user", "content": "Name a fruit"}


def test_columns_can_be_renamed_and_removed():
    columns = {**COLUMNS, "prompt": "question", "chosen": "best", "rejected": "worst", "margin": None}
    e = parse_row({"question": "Q", "best": "a", "worst": "b", "margin": 4.0}, columns)
    assert (e.prompt_text, e.margin, e.meta) == ("Q", 0.0, {"margin": 4.0})


def test_null_columns_are_as_if_absent():
    e = parse(prompt="Q", chosen="a", rejected="b", label=None, completion=None, messages=None)
    assert (e.kind, e.label) == ("pair", 1.0)


def test_a_system_turn_and_a_tool_turn_are_kept():
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "tool", "content": "T"}]
    assert texts(parse(prompt=prompt, chosen="a", rejected="b").prompt) == [("system", "S"), ("user", "Q"), ("tool", "T")]


# ---- rejected rows ----

REJECTED = {
    "nothing known": (dict(foo=1), "none of the columns prompt, chosen, .* is there \\(it has: foo\\)"),
    "nothing at all": (dict(), "it has: no columns"),
    "no rejected": (dict(prompt="Q", chosen="a"), "there is no 'rejected'"),
    "no chosen": (dict(prompt="Q", chosen=None, rejected="a"), "there is no 'chosen'"),
    "bare text pair": (dict(chosen="a", rejected="b"), "where the prompt ends cannot be known"),
    "equal texts": (dict(prompt="Q", chosen="a", rejected="a"), "same text"),
    "equal dialogues": (dict(chosen=HH + "plum", rejected=HH + "plum"), "same text"),
    "one dialogue is longer": (dict(chosen=turns("Hi", "a"), rejected=turns("Hi", "a", "b", "c")), "ends where the other goes on"),
    "nothing shared": (dict(chosen=turns("Hi", "a"), rejected=turns("Ho", "b")), "share no beginning"),
    "part at a user's turn": (dict(chosen=turns("Hi", "a", "b", "c"), rejected=turns("Hi", "a", "x", "c")), "part at a user's turn"),
    "dialogue ends with the user": (dict(chosen=turns("Hi", "a", "b"), rejected=turns("Hi", "c")), "does not end with an assistant's turn"),
    "reply ends with the user": (dict(prompt="Q", chosen=turns("", "a", "b")[1:], rejected="c"), "does not end with an assistant's turn"),
    "empty chosen": (dict(prompt="Q", chosen="", rejected="b"), "a completion is empty"),
    "blank rejected": (dict(prompt="Q", chosen="a", rejected=" \n"), "a completion is empty"),
    "empty last turn": (dict(chosen=turns("Hi", "a", "b", ""), rejected=turns("Hi", "c", "b", "d")), "a completion is empty"),
    "empty demonstration": (dict(prompt="Q", completion=""), "a completion is empty"),
    "label not a number": (dict(prompt="Q", chosen="a", rejected="b", label="x"), "'label' is 'x', not a number"),
    "label above 1": (dict(prompt="Q", chosen="a", rejected="b", label=1.5), "'label' is 1.5, outside \\[0, 1\\]"),
    "label NaN": (dict(prompt="Q", chosen="a", rejected="b", label=math.nan), "'label' is nan"),
    "weight negative": (dict(prompt="Q", chosen="a", rejected="b", weight=-1), "'weight' is -1.0, outside"),
    "margin infinite": (dict(prompt="Q", chosen="a", rejected="b", margin=math.inf), "'margin' is inf"),
    "margin too big": (dict(prompt="Q", chosen="a", rejected="b", margin=10**400), "'margin' is '10+', not a number"),
    "unary label": (dict(prompt="Q", completion="a", label=0.5), "label is 0.5; for a single completion it is true or false"),
    "unary label NaN": (dict(prompt="Q", completion="a", label=math.nan), "true or false"),
    "unary without prompt": (dict(completion="a", label=True), "'completion' needs a prompt"),
    "ranking without prompt": (dict(completions=["a", "b"], scores=[1, 2]), "'completions' needs a prompt"),
    "ranking without scores": (dict(prompt="Q", completions=["a", "b"]), "needs 'scores' or 'ranks'"),
    "ranking of one": (dict(prompt="Q", completions=["a"], scores=[1]), "not a list of two or more"),
    "ranking no list": (dict(prompt="Q", completions="ab", scores=[1, 2]), "not a list of two or more"),
    "scores too few": (dict(prompt="Q", completions=["a", "b"], scores=[1]), "there are 2 completions but 1 scores"),
    "scores no list": (dict(prompt="Q", completions=["a", "b"], scores=3), "but no list of scores"),
    "scores NaN": (dict(prompt="Q", completions=["a", "b"], scores=[1, math.nan]), "'scores' is nan"),
    "scores null": (dict(prompt="Q", completions=["a", "b"], scores=[1, None]), "'scores' is 'None', not a number"),
    "scores tied": (dict(prompt="Q", completions=["a", "b"], scores=[2, 2]), "all completions have the same score"),
    "completion begins with the user": (dict(prompt="Q", completion=turns("Hi", "a")), "must begin and end with an assistant's turn"),
    "prompt is answered": (dict(prompt=turns("Hi", "a"), chosen="b", rejected="c"), "the prompt ends with an assistant's turn"),
    "prompt string is answered": (dict(prompt=HH + "plum", chosen="b", rejected="c"), "the prompt ends with an assistant's turn"),
    "prompt is a number": (dict(prompt=7, chosen="a", rejected="b"), "'prompt' is neither text nor a list of messages"),
    "prompt is an empty list": (dict(prompt=[], chosen="a", rejected="b"), "'prompt' is neither text nor a list of messages"),
    "no role": (dict(prompt=[{"content": "Q"}], chosen="a", rejected="b"), "'prompt' holds something that is no message"),
    "unknown role": (dict(prompt=[{"role": "bot", "content": "Q"}], chosen="a", rejected="b"), "unknown role 'bot'"),
    "null content": (dict(prompt=[{"role": "user", "content": None}], chosen="a", rejected="b"), "neither text nor a list of parts"),
    "image part": (dict(prompt=[{"role": "user", "content": [{"type": "image"}]}], chosen="a", rejected="b"), "part of type 'image'"),
    "text part without text": (dict(prompt=[{"role": "user", "content": [{"type": "text"}]}]), "part of type 'text'"),
    "demonstration without reply": (dict(messages=turns("Hi")), "must end with an assistant's"),
    "demonstration without user": (dict(messages=turns("", "a")[1:]), "needs a user's turn"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_with_its_reason(name):
    row, reason = REJECTED[name]
    with pytest.raises(BadRow, match=reason):
        parse_row(row, COLUMNS)


def test_trap_09_an_empty_completion_is_refused_in_every_shape():
    for row in (
        dict(prompt="Q", chosen="", rejected="b"), dict(prompt="Q", completion=" "), dict(prompt="Q", completion="", label=True),
        dict(prompt="Q", completions=["a", ""], scores=[1, 0]), dict(messages=turns("Hi", "")),
        dict(chosen=HH, rejected=HH + "plum"),
    ):
        with pytest.raises(BadRow, match="a completion is empty"):
            parse_row(row, COLUMNS)


@pytest.mark.parametrize("text", ["", "Hello", "Human or machine?", "x\n\nHuman: a\n\nAssistant: b", "\n\nAssistant: b"])
def test_only_whole_dialogues_are_parsed_as_such(text):
    assert parse_dialogue(text) is None


def test_dialogue_keeps_paragraphs_and_marks_inside_lines():
    found = parse_dialogue("\n\nHuman: one\n\ntwo, said Human: yes\n\nAssistant:three")
    assert texts(found) == [("user", "one\n\ntwo, said Human: yes"), ("assistant", "three")]
