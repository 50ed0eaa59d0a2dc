"""The tiny_feedback world and the language model that is made for it."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from itertools import islice, pairwise

import pytest
import torch

from prefopt.data import tiny_feedback as world
from prefopt.errors import UserError
from prefopt.policies import tiny_lm

PROMPT = "Tell me about the fox at the harbour."
OPENING = "The red fox sleeps near the harbour."
PINNED = (
    "Tell me about the dog at the castle, in detail.",
    "The spotted dog rests at the castle. It is bright. Children call it cheerful.",
    "The brown dog wanders at the castle. It has a narrow tail. Children call it bright.",
)


def reward(completion: str, style: str = "") -> float:
    return world.true_reward(PROMPT[:-1] + (f", {style}." if style else "."), completion)


def text(messages: list[dict[str, str]]) -> str:
    assert len(messages) == 1
    return messages[0]["content"]


def replies(prompt: str, count: int, seed: int = 0) -> list[str]:
    """Replies of the grammar, as the pretraining data and the pairs draw them."""
    animal, place = prompt.split()[4], prompt.split()[7].strip(",.")
    rng = random.Random(f"test/{prompt}/{seed}")
    return [world._reply(animal, place, rng) for _ in range(count)]


# --- the world ---


def test_rows_are_deterministic_and_do_not_depend_on_how_many_are_asked_for():
    few, many = list(world.rows("train", 5, seed=3)), list(world.rows("train", 900, seed=3))
    assert few == many[:5]
    assert list(world.rows("train", 5, seed=4)) != few
    assert list(world.pretraining_rows(5, 1)) == list(islice(world.pretraining_rows(900, 1), 5))


def test_a_row_is_pinned_so_that_two_machines_agree():
    row = next(world.rows("eval", 1))
    assert row == {
        "prompt": [{"role": "user", "content": PINNED[0]}],
        "chosen": [{"role": "assistant", "content": PINNED[1]}],
        "rejected": [{"role": "assistant", "content": PINNED[2]}],
        "chosen_reward": pytest.approx(world.true_reward(PINNED[0], PINNED[1])),
        "rejected_reward": pytest.approx(world.true_reward(PINNED[0], PINNED[2])),
        "chosen_hallucinated": 0,
        "rejected_hallucinated": 0,
        "rationale": "It is bright and cheerful.",
    }


def test_splits_share_no_combination_and_cover_the_world():
    train, held_out = world.prompts("train"), world.prompts("eval")
    assert (len(train), len(held_out)) == (768, 256)
    cells = [{(p.split()[4], p.split()[7].strip(",.")) for p in split} for split in (train, held_out)]
    assert not cells[0] & cells[1]
    for cell in cells:
        assert {a for a, _ in cell} == set(world.ANIMALS) and {p for _, p in cell} == set(world.PLACES)
    assert {text(r["prompt"]) for r in world.rows("eval", 256)} == set(held_out), (
        "one pass holds every prompt once"
    )
    assert {text(r["prompt"]) for r in world.rows("train", 800)} == set(train)
    assert {text(r["prompt"]) for r in world.pretraining_rows(800, 0)} == set(train)


def test_replies_of_a_pair_differ_and_vary_in_length_and_reward():
    rows = list(world.rows("train", 400))
    assert all(text(r["chosen"]) != text(r["rejected"]) for r in rows)
    lengths = [world.word_count(text(r[side])) for r in rows for side in ("chosen", "rejected")]
    assert min(lengths) == 7 and 35 <= max(lengths) <= 50 and statistics.pstdev(lengths) > 5
    spread = []
    for prompt in world.prompts("eval")[:40]:
        spread.append(statistics.pstdev(world.true_reward(prompt, c) for c in replies(prompt, 100)))
    assert 1.0 <= statistics.mean(spread) <= 1.5


def test_vocabulary_holds_every_word_of_the_world():
    known = set(world.vocabulary())
    assert world.vocabulary() == sorted(known)
    for row in world.rows("train", 500):
        for part in ("prompt", "chosen", "rejected"):
            spaced = text(row[part]).replace(".", " . ").replace(",", " , ")
            assert set(spaced.split()) <= known


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"split": "test", "count": 1}, "data.split"),
        ({"split": "train", "count": 0}, "data.count"),
        ({"split": "train", "count": 2.5}, "data.count"),
        ({"split": "train", "count": 1, "seed": "x"}, "data.seed"),
        ({"split": "train", "count": 1, "label_noise": 0.6}, "data.label_noise"),
        ({"split": "train", "count": 1, "label_noise": -0.1}, "data.label_noise"),
        ({"split": "train", "count": 1, "label_noise": math.nan}, "data.label_noise"),
        ({"split": "train", "count": 1, "length_bias": math.inf}, "data.length_bias"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call_by_their_key(arguments, key):
    with pytest.raises(UserError, match=key):
        world.rows(**arguments)


# --- the reward ---


def test_reward_adds_up_as_documented():
    assert reward(OPENING) == pytest.approx(2.0)
    assert reward(OPENING.replace("fox", "owl")) == pytest.approx(2.0 - 2 - 0.5)
    assert reward(f"{OPENING} It is kind.") == pytest.approx(2.8)
    assert reward(f"{OPENING} It is kind. It has a gentle voice.") == pytest.approx(2.0 + 0.8 + 0.48)
    assert reward(f"{OPENING} It is rude.") == pytest.approx(1.4)
    assert reward(f"{OPENING} You would love it, dear friend.", "warmly") == pytest.approx(3.0)
    assert reward(f"{OPENING} You would love it, dear friend.") == pytest.approx(2.0)
    assert reward(f"{OPENING} It eats honey at noon.", "in detail") == pytest.approx(3.0)
    assert reward(f"{OPENING} It eats honey at noon.", "briefly") == pytest.approx(2.0 - 3 * 0.16)
    assert reward(OPENING.upper().replace(" ", "\n ")) == pytest.approx(2.0), "case and spacing do not matter"


def test_garbage_is_worth_little():
    garbage = [
        "",
        " ",
        ".",
        "....",
        "fox harbour",
        "fox fox fox harbour harbour",
        "kind gentle calm brave clever fox harbour.",
        "lorem ipsum dolor sit amet, consectetur",
        "\x00\ud7ff ~~ 🦊🦊 <eos>",
        "The the the the the the the.",
        "The red fox sleeps near the",
        "kind " * 500,
    ]
    ordinary = statistics.mean(reward(c) for c in replies(PROMPT, 200))
    assert ordinary > 1.0
    for completion in garbage:
        assert world.LOWEST_REWARD <= reward(completion) < 0.0, completion
    for style in world.STYLES:
        assert reward("", style) <= -3.0


def test_repetition_does_not_pay():
    for style in world.STYLES:
        for sentence in ("It is kind.", "You would love it, dear friend.", "It eats honey at noon.", OPENING):
            once = f"{OPENING} {sentence}"
            assert reward(f"{once} {sentence}", style) < reward(once, style)
    assert reward(f"{OPENING} It is kind. It has a kind voice.") < reward(f"{OPENING} It is kind.")
    assert reward(" ".join([OPENING] * 30)) == world.LOWEST_REWARD


def test_the_best_length_is_inside():
    """More good sentences pay at first and cost in the end; the best brief reply is the shortest."""
    slots = world.SLOTS
    kind = [f" It is {good}." for good in slots["good"]]
    facts = zip(slots["food"], slots["time"], slots["plain"], strict=True)
    informative = [f" It eats {food} at {time}. It has a {plain} tail." for food, time, plain in facts]
    best = {}
    for style in world.STYLES:
        grown = [OPENING]
        for more in informative if style == "in detail" else kind:
            grown.append(grown[-1] + more)
        values = [reward(completion, style) for completion in grown]
        top = values.index(max(values))
        assert 0 < top < len(values) - 1 and values[-1] < values[top] - 1
        assert all(a > b for a, b in pairwise(values[top:]))
        best[style] = world.word_count(grown[top])
    assert best["briefly"] < best[""] <= best["warmly"] < best["in detail"]


def test_a_prompt_of_another_world_is_refused():
    with pytest.raises(UserError, match="data=tiny_feedback"):
        world.true_reward("What is the capital of France?", OPENING)


# --- the labels ---

COUNT = 4000


@pytest.fixture(scope="module")
def clean() -> list[dict]:
    return list(world.rows("train", COUNT))


def test_labels_follow_bradley_terry(clean):
    gaps = [abs(r["chosen_reward"] - r["rejected_reward"]) for r in clean]
    right = [r["chosen_reward"] > r["rejected_reward"] for r in clean]
    for low, high in ((0.01, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 4.0), (0.01, 9.0)):
        inside = [i for i, gap in enumerate(gaps) if low <= gap < high]
        expected = [1 / (1 + math.exp(-gaps[i])) for i in inside]
        error = math.sqrt(sum(p * (1 - p) for p in expected)) / len(inside)
        assert abs(sum(right[i] for i in inside) / len(inside) - statistics.mean(expected)) < 3.5 * error


def test_label_noise_flips_that_share_of_the_same_pairs(clean):
    noisy = list(world.rows("train", COUNT, label_noise=0.3))
    flipped = 0
    for a, b in zip(clean, noisy, strict=True):
        assert {text(a["chosen"]), text(a["rejected"])} == {text(b["chosen"]), text(b["rejected"])}
        flipped += a["chosen"] != b["chosen"]
    assert abs(flipped / COUNT - 0.3) < 3.5 * math.sqrt(0.21 / COUNT)


def test_label_noise_turns_that_share_of_the_rankings_round():
    clean, noisy = (list(world.rows("train", 400, completions=4, label_noise=noise)) for noise in (0.0, 0.3))
    turned = 0
    for a, b in zip(clean, noisy, strict=True):
        assert a["completions"] == b["completions"] and sorted(a["scores"]) == sorted(b["scores"])
        if a["scores"] != b["scores"]:
            turned += 1
            both = list(zip(a["scores"], b["scores"], strict=True))
            assert all(new <= newer for (old, new), (older, newer) in itertools.permutations(both, 2) if old > older)
    assert abs(turned / 400 - 0.3) < 3.5 * math.sqrt(0.21 / 400)


def test_length_bias_prefers_longer_replies_at_the_cost_of_true_reward(clean):
    def gaps(rows):
        words = [world.word_count(text(r["chosen"])) - world.word_count(text(r["rejected"])) for r in rows]
        return statistics.mean(words), statistics.mean(
            r["chosen_reward"] - r["rejected_reward"] for r in rows
        )

    biased = list(world.rows("train", COUNT, length_bias=1.0))
    (clean_words, clean_reward), (words, worth) = gaps(clean), gaps(biased)
    assert clean_words < 0 < words and worth < clean_reward - 0.1
    for row in biased[:50]:
        assert row["chosen_reward"] == world.true_reward(text(row["prompt"]), text(row["chosen"]))


# --- the tokenizer ---


@pytest.fixture(scope="session")
def tiny_lm_folder():
    return tiny_lm.ensure_tiny_lm(progress=False)


@pytest.fixture(scope="module")
def tokenizer(tiny_lm_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_lm_folder)


def test_tokenizer_round_trip_and_offsets(tokenizer):
    assert tokenizer.is_fast and len(tokenizer) == 7 + len(world.vocabulary())
    assert (
        len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id})
        == 4
    )
    for row in world.rows("eval", 60):
        for part in ("prompt", "chosen", "rejected"):
            written = text(row[part])
            encoded = tokenizer(written, return_offsets_mapping=True)
            ids = encoded["input_ids"]
            assert tokenizer.decode(ids) == written
            assert tokenizer.unk_token_id not in ids and tokenizer.bos_token_id not in ids
            cut = [written[a:b] for a, b in encoded["offset_mapping"]]
            assert cut == tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer("fox zebra")["input_ids"][1] == tokenizer.unk_token_id


def test_chat_template(tokenizer):
    row = next(world.rows("eval", 1))
    chat = row["prompt"] + row["chosen"]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(rendered)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    assert rendered == asked + text(row["chosen"]) + tokenizer.eos_token
    assert ids[: len(tokenizer(asked)["input_ids"])] == tokenizer(asked)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"{text(row['prompt'])} {text(row['chosen'])}"

    system = [{"role": "system", "content": "It is calm."}]
    assert "<|system|>It is calm.<|user|>" in tokenizer.apply_chat_template(system + chat, tokenize=False)
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    assert PROMPT in tokenizer.apply_chat_template(parts, tokenize=False)
    with pytest.raises(Exception, match="roles system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


# --- making and caching ---


def test_cached_model_is_found_again_without_work(tiny_lm_folder, monkeypatch):
    monkeypatch.setattr(tiny_lm, "_make", lambda *_: pytest.fail("made again"))
    assert tiny_lm.ensure_tiny_lm() == tiny_lm_folder == tiny_lm.tiny_lm_path()
    monkeypatch.setitem(tiny_lm.TRAINING, "lr", 1e-3)
    assert tiny_lm.tiny_lm_path() != tiny_lm_folder, "another recipe, another folder"


@pytest.fixture
def short_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    for key, value in {"steps": 2, "batch_size": 4, "warmup_steps": 1}.items():
        monkeypatch.setitem(tiny_lm.TRAINING, key, value)
    return tmp_path


def test_making_it_is_repeatable_and_leaves_the_callers_state_alone(short_recipe, capfd):
    threads = torch.get_num_threads()
    torch.manual_seed(11)
    random.seed(11)
    before, python_before = torch.get_rng_state(), random.getstate()
    with torch.no_grad():
        path = tiny_lm.ensure_tiny_lm()
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python_before
    assert torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32
    out, err = capfd.readouterr()
    assert not out and "pre-training it once" in err and str(path) in err

    names = {file.name for file in path.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert [file.name for file in short_recipe.iterdir() if file.is_dir()] == [path.name], (
        "nothing left behind"
    )

    first = (path / "model.safetensors").read_bytes()
    path.rename(short_recipe / "elsewhere")
    torch.manual_seed(12)
    again = tiny_lm.ensure_tiny_lm(progress=False)
    assert (again / "model.safetensors").read_bytes() == first
    assert capfd.readouterr() == ("", "")


def test_a_lost_race_is_quiet_and_an_interrupted_one_leaves_nothing(short_recipe, monkeypatch):
    path = tiny_lm.tiny_lm_path()
    pretrain = tiny_lm._pretrain

    def another_was_faster(*arguments):
        path.mkdir()
        (path / "config.json").write_text("theirs")
        return pretrain(*arguments)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_lm, "_pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_lm.ensure_tiny_lm(progress=False)
    assert not [file for file in short_recipe.iterdir() if file.is_dir()]
    monkeypatch.setattr(tiny_lm, "_pretrain", another_was_faster)
    assert tiny_lm.ensure_tiny_lm(progress=False) == path
    assert (path / "config.json").read_text() == "theirs"
    assert [file.name for file in short_recipe.iterdir() if file.is_dir()] == [path.name]


# --- what it has learnt ---


@pytest.fixture(scope="module")
def generate(tiny_lm_folder, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lm_folder)
    assert 0.5e6 < model.num_parameters() < 1.2e6
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id

    def run(prompts: list[str], **settings) -> tuple[list[str], float]:
        """Replies, and the share of them that ended within 64 tokens."""
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        rendered = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(rendered, return_tensors="pt", padding=True, padding_side="left")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            out = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=64,
                **settings,
            )
        new = out[:, inputs["input_ids"].shape[1] :]
        ended = (new == tokenizer.eos_token_id).any(1).float().mean().item()
        return tokenizer.batch_decode(new, skip_special_tokens=True), ended

    return run


def held_out_prompts() -> list[str]:
    return [text(row["prompt"]) for row in world.rows("eval", 64)]


def test_greedy_replies_name_the_asked_animal_and_place(generate):
    asked = held_out_prompts()
    answers, ended = generate(asked, do_sample=False)
    named = 0
    for prompt, answer in zip(asked, answers, strict=True):
        animal, place = prompt.split()[4], prompt.split()[7].strip(",.")
        named += {animal, place} <= set(answer.replace(".", " ").split())
    assert named / len(asked) >= 0.95
    assert ended >= 0.95


def test_samples_are_mediocre_and_end(generate):
    asked = held_out_prompts() * 4
    answers, ended = generate(asked, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    assert ended >= 0.98
    rewards = [world.true_reward(p, a) for p, a in zip(asked, answers, strict=True)]
    best = [max(world.true_reward(p, c) for c in replies(p, 200)) for p in asked[:64]]
    assert 0.6 < statistics.mean(rewards) < statistics.mean(best) - 1.5
    assert len(set(answers)) > 200
