"""Policies and references: log-probs against a plain oracle, padding, generation, dropout, adapters."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from prefopt.config.schema import DataConfig, ModelConfig, SamplerConfig, TrustConfig
from prefopt.data import bandit
from prefopt.data.batch import Row, build
from prefopt.data.records import BadRow, parse_row
from prefopt.data.sources import load_data
from prefopt.errors import RunFailed, UserError
from prefopt.policies.load import load_policy
from prefopt.policies.reference import make_reference
from prefopt.policies.tabular import Tabular
from prefopt.policies.trees import plant
from tests import toy
from tests.toy import pair, policy, save_model, turns

FAMILIES = ("llama", "qwen2", "gpt2")
LORA = {"enabled": True, "r": 4, "alpha": 8}
ROWS = (
    pair("How are you?", "I am well, thank you. Is that so?", "x"),
    pair(turns("Hello there", "so", "The capital of Peru?"), "Lima", "Two and two make four; three and three make six."),
    pair("Two", "four", "Paris 🙂"),
)
GREEDY = SamplerConfig(temperature=0.0, max_new_tokens=12, batch_size=8)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    """An adapter that is far from the identity, saved by `CausalLM.save`, with another dropout in its file."""
    made = policy(llama, LORA)
    shake(made, 0.3)
    where = tmp_path_factory.mktemp("adapter")
    made.save(where)
    settings = json.loads((where / "adapter_config.json").read_text())
    (where / "adapter_config.json").write_text(json.dumps({**settings, "lora_dropout": 0.5}))
    return where


def shake(p, size, seed=0):
    """Moves every trained weight at random."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in p.trainable().values():
            weight += size * torch.randn(weight.shape, generator=g)


def per_edge(values, micro):
    return torch.zeros(len(micro.layout.lengths), dtype=values.dtype).index_add(0, micro.layout.token_edge, values)


def oracle_of(p, *rows):
    found = []
    for tokens in map(p.tokenise, rows):
        for branch in tokens.branches:
            found += toy.oracle(p, tokens.prompt + branch.ids, [False] * len(tokens.prompt) + branch.mask)
    return torch.tensor(found, dtype=torch.float64)


# ---- log-probs ----


@torch.no_grad()
def test_log_probs_equal_a_float64_softmax(folder):
    p = policy(folder)
    micro = toy.micro(p, *ROWS)
    got = p(micro)
    assert got.dtype == torch.float32 and got.shape == micro.layout.token_edge.shape
    torch.testing.assert_close(got.double(), oracle_of(p, *ROWS), atol=2e-5, rtol=0)


@torch.no_grad()
def test_trap_06_log_probs_do_not_depend_on_batch_or_padding(folder):
    p = policy(folder)
    together = toy.micro(p, *ROWS)
    parts = [p(toy.micro(p, row)) for row in ROWS]
    torch.testing.assert_close(p(together), torch.cat(parts), atol=2e-5, rtol=0)
    wider = toy.micro(p, *ROWS)
    for name, fill in (("input_ids", p.pad), ("attention", False), ("trained", False)):
        setattr(wider, name, F.pad(getattr(wider, name), (0, 9), value=fill))
    torch.testing.assert_close(p(wider), p(together), atol=2e-5, rtol=0)


@pytest.mark.parametrize("special", [{"pad_token": "<pad>"}, {"pad_token": "<eos>"}, {"pad_token": None}, {"pad_token": "you"}],
                         ids=["pad id 0", "pad = eos", "no pad", "pad = a word"])
@torch.no_grad()
def test_trap_06_log_probs_do_not_depend_on_the_pad_token(tmp_path, special):
    # One word-level tokenizer, so that a word can be the pad token; EOS and pad occur inside the trained tokens.
    p = policy(save_model(tmp_path, template="zephyr", kind="word", special=special))
    expected = {"<pad>": 0, "<eos>": p.tokenizer.eos_token_id, None: p.tokenizer.eos_token_id}
    assert p.pad == expected.get(special["pad_token"], p.tokenizer.convert_tokens_to_ids("you"))
    rows = (pair("How are you?", "I am well, thank you. Is that so?", "you"), pair("The capital of Peru?", "Lima you", "you you four"))
    got = p(toy.micro(p, *rows))
    torch.testing.assert_close(got.double(), oracle_of(p, *rows), atol=2e-5, rtol=0)
    torch.testing.assert_close(got, torch.cat([p(toy.micro(p, row)) for row in rows]), atol=2e-5, rtol=0)


@torch.no_grad()
def test_trap_07_bf16_logits_are_normalised_and_summed_in_fp32(llama):
    p = policy(llama, attention="sdpa", share_prompts=False)  # the same hidden states on both sides, to the bit
    p.precision = "bf16"
    micro = toy.micro(p, *ROWS)
    got = p(micro)
    assert got.dtype == torch.float32
    with p.autocast():
        logits = p.model(input_ids=micro.input_ids, attention_mask=micro.attention.long(), use_cache=False).logits
    assert logits.dtype == torch.bfloat16
    exact = logits[:, :-1][micro.trained[:, 1:]].double().log_softmax(-1)
    exact = exact.gather(-1, micro.input_ids[:, 1:][micro.trained[:, 1:]][:, None])[:, 0]
    torch.testing.assert_close(per_edge(got.double(), micro), per_edge(exact, micro), atol=1e-3, rtol=0)


def test_gradients_of_rows_that_are_not_asked_for_are_zero(llama):
    p = policy(llama, attention="sdpa")
    micro = toy.micro(p, *ROWS)
    embedded = []
    p.model.get_input_embeddings().register_forward_hook(lambda _, __, out: (out.retain_grad(), embedded.append(out))[0])
    per_edge(p(micro), micro)[2].backward()
    (states,) = embedded
    touched, trees = states.grad.abs().sum(-1), plant(micro, p.pad)
    own = torch.zeros_like(trees.branch, dtype=torch.bool)
    own[1] = (trees.branch[1] == 0) | (trees.branch[1] == 1)  # the third edge: the second prompt and its first reply
    assert touched[own].sum() > 0 and touched[~own].sum() == 0


def test_gradient_equals_that_of_the_plain_path(llama):
    p = policy(llama)
    micro = toy.micro(p, *ROWS)
    weight = p.model.get_output_embeddings().weight
    (got,) = torch.autograd.grad(p(micro).sum(), weight)
    with p.plainly():
        logits = p.model(input_ids=micro.input_ids, attention_mask=micro.attention.long(), use_cache=False).logits
    logp = logits[:, :-1].double().log_softmax(-1).gather(-1, micro.input_ids[:, 1:, None])[..., 0]
    (expected,) = torch.autograd.grad((logp * micro.trained[:, 1:]).sum(), weight)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(llama):
    grads = []
    for on in (False, True):
        p = policy(llama, LORA, gradient_checkpointing=on)
        shake(p, 0.1)
        p.train()
        assert p.model.get_base_model().is_gradient_checkpointing == on
        p(toy.micro(p, *ROWS)).sum().backward()
        grads.append({name: w.grad for name, w in p.trainable().items()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-4, rtol=1e-4)


# ---- generation ----


@torch.no_grad()
def plain_greedy(p, ids, count):
    """One prompt, no cache, no padding."""
    new = []
    while len(new) < count and not (new and new[-1] in p.tokeniser.ends):
        with p.plainly():
            new.append(int(p.model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new


def test_trap_06_generation_with_left_padding_equals_unpadded_greedy(folder):
    p = policy(folder)
    prompts = [p.prompt_ids(row.prompt, row.chat) for row in ROWS]
    assert len({len(ids) for ids in prompts}) == 3
    replies = p.generate(prompts, GREEDY, seed=0)
    for ids, reply in zip(prompts, replies, strict=True):
        assert reply.ids == plain_greedy(p, ids, 12)
        assert reply.finished == (reply.ids[-1] in p.tokeniser.ends)


def test_a_reply_ends_at_the_first_end_token_and_says_so(llama):
    p = policy(llama)
    prompts = [p.prompt_ids(row.prompt, row.chat) for row in ROWS]
    first = plain_greedy(p, prompts[0], 12)
    p.tokeniser.ends = {first[2]}
    reply = p.generate(prompts, GREEDY, seed=0)[0]
    assert reply.ids == first[: first.index(first[2]) + 1] and reply.finished


def test_samples_depend_on_the_seed_and_leave_global_randomness_alone(llama):
    p = policy(llama).train()
    prompts = [p.prompt_ids(ROWS[0].prompt, False)] * 4
    sampler = SamplerConfig(max_new_tokens=6)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = (p.generate(prompts, sampler, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert [r.ids for r in a] == [r.ids for r in b] != [r.ids for r in c]
    assert len({tuple(r.ids) for r in a}) > 1
    assert p.training and p.model.training


def test_a_reply_does_not_depend_on_what_is_drawn_beside_it(llama):
    """Its noise is that of (seed, place), whatever the batch, the order and the share of a process."""
    p = policy(llama)
    prompts = [p.prompt_ids(row.prompt, row.chat) for row in ROWS] * 3
    assert len({len(ids) for ids in prompts}) == 3
    made = [r.ids for r in p.generate(prompts, SamplerConfig(max_new_tokens=8), 5)]
    for size in (1, 4):
        assert [r.ids for r in p.generate(prompts, SamplerConfig(max_new_tokens=8, batch_size=size), 5)] == made
    for at in ([0, 2, 4, 6, 8], [7, 5, 3, 1]):
        assert [r.ids for r in p.generate([prompts[i] for i in at], SamplerConfig(max_new_tokens=8), 5, at)] == [made[i] for i in at]
    assert made[0] != made[3] != made[6], "each place has noise of its own"


@torch.no_grad()
@pytest.mark.parametrize("sampler", [SamplerConfig(max_new_tokens=1), SamplerConfig(0.5, 0.6, max_new_tokens=1)])
def test_replies_are_draws_from_the_policys_distribution(llama, sampler):
    p = policy(llama)
    prompt, count = p.prompt_ids(ROWS[0].prompt, ROWS[0].chat), 2000
    with p.plainly():
        wanted = (p.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].double() / sampler.temperature).softmax(-1)
    most = wanted.sort(descending=True)
    wanted[most.indices[1:][most.values.cumsum(0)[:-1] >= sampler.top_p]] = 0
    wanted /= wanted.sum()
    sampler.batch_size = 1000
    drawn = torch.bincount(torch.tensor([r.ids[0] for r in p.generate([prompt] * count, sampler, 0)]), minlength=len(wanted))
    assert not drawn[wanted == 0].any() and (wanted == 0).any() == (sampler.top_p < 1)
    drawn, hoped = drawn[wanted > 0], count * wanted[wanted > 0]
    chi, freedom = ((drawn - hoped).square() / hoped).sum(), len(hoped) - 1
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom + float((1 / hoped).sum())), "Pearson's chi-square"


def test_a_policy_without_finite_scores_writes_nothing(llama):
    p = policy(llama)
    p.model.get_output_embeddings().weight.data[3, 3] = math.nan
    with pytest.raises(RunFailed, match="scores of next tokens are not finite"):
        p.generate([[5, 6]], SamplerConfig(max_new_tokens=2), 0)


def test_trap_29_what_a_checkpoint_ships_for_sampling_does_not_change_the_distribution(llama, tmp_path):
    p = policy(llama)
    sampler = SamplerConfig(max_new_tokens=8)
    prompts = [p.prompt_ids(row.prompt, row.chat) for row in ROWS] * 3
    plain = p.generate(prompts, sampler, 0)
    shipped = p.model.generation_config
    shipped.update(repetition_penalty=9.0, min_p=0.5, top_k=1, temperature=0.1, no_repeat_ngram_size=1, do_sample=True)
    assert [r.ids for r in p.generate(prompts, sampler, 0)] == [r.ids for r in plain]
    assert p.generate(prompts, GREEDY, 0)[0].ids == plain_greedy(p, prompts[0], 12)
    assert p.model.generation_config is shipped  # kept for saving
    lora = policy(llama, LORA)
    lora.model.get_base_model().generation_config.update(repetition_penalty=9.0)
    assert [r.ids for r in lora.generate(prompts, sampler, 0)] == [r.ids for r in plain]


def test_generation_stays_within_the_context(tmp_path):
    p = policy(save_model(tmp_path, "gpt2"))
    near = [5] * 250
    assert len(p.generate([near], SamplerConfig(temperature=0.0, max_new_tokens=50), 0)[0].ids) <= 6
    with pytest.raises(UserError, match="a prompt fills the model's context of 256 tokens"):
        p.generate([[5] * 256], GREEDY, 0)


def test_text_rendering_is_sampled_as_it_is_trained(llama):
    p = policy(llama, data={"render": "text"})
    assert p.prompt_ids(pair("Hello:").prompt, False) == p.tokenise(pair("Hello:")).prompt == p.tokenizer("Hello:")["input_ids"]


# ---- trap 11: dropout ----


@pytest.mark.parametrize(("family", "shipped"), [
    ("llama", {"attention_dropout": 0.1}), ("qwen2", {"attention_dropout": 0.1}),
    ("gpt2", {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
])
def test_trap_11_training_mode_has_no_dropout_unless_it_is_asked_for(tmp_path, family, shipped):
    where = save_model(tmp_path, family, **shipped)
    assert all(json.loads((where / "config.json").read_text())[k] == 0.1 for k in shipped)
    # Attention dropout shows with every kernel; eager is the one that all families have.
    quiet, noisy = (policy(where, dropout=d, attention="eager").train() for d in (0.0, 0.1))
    with torch.no_grad():
        micro = toy.micro(quiet, *ROWS)
        assert torch.equal(quiet(micro), quiet(micro))
        assert not torch.equal(noisy(micro), noisy(micro))
        assert torch.equal(noisy.eval()(micro), quiet.eval()(micro))


@torch.no_grad()
def test_trap_11_adapters_have_no_dropout_unless_it_is_asked_for(llama, adapter):
    for start in ({}, {"adapter": str(adapter)}):
        quiet, noisy = (policy(llama, {**LORA, **start, "dropout": d}).train() for d in (0.0, 0.3))
        if not start:
            shake(quiet, 0.3)
            shake(noisy, 0.3)
        micro = toy.micro(quiet, *ROWS)
        assert torch.equal(quiet(micro), quiet(micro))
        assert not torch.equal(noisy(micro), noisy(micro))


# ---- references: traps 10, 14 ----


def largest(p, score, micro):
    with torch.no_grad():
        return float((p(micro) - score(micro)).abs().max())


def step(p, micro):
    p.train()
    optimizer = torch.optim.SGD(p.trainable().values(), lr=0.05)
    p(micro).sum().backward()
    optimizer.step()
    p.eval()


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_trap_10_policy_minus_reference_is_zero_at_the_start_and_the_reference_stays(llama, lora):
    p = policy(llama, lora)
    micro = toy.micro(p, *ROWS)
    score = make_reference(p, "initial")
    assert score.how == ("adapter off" if lora else "frozen copy")
    assert largest(p, score, micro) == 0
    before = score(micro)
    step(p, micro)
    assert largest(p, score, micro) > 0.01
    assert torch.equal(score(micro), before)
    assert not score(micro).requires_grad


def test_trap_14_initial_and_base_differ_for_an_adapter_that_is_not_fresh(llama, adapter):
    p = policy(llama, {**LORA, "adapter": str(adapter)})
    micro = toy.micro(p, *ROWS)
    base, initial = make_reference(p, "base"), make_reference(p, "initial")
    assert (base.how, initial.how) == ("adapter off", "frozen copy of the initial adapter")
    assert largest(p, initial, micro) == 0
    assert largest(p, base, micro) > 0.1
    torch.testing.assert_close(base(micro), policy(llama)(micro), atol=1e-5, rtol=0)
    before_initial, before_base, trained = initial(micro), base(micro), set(p.trainable())
    step(p, micro)
    assert torch.equal(initial(micro), before_initial) and torch.equal(base(micro), before_base)
    assert largest(p, initial, micro) > 0.01
    assert set(p.trainable()) == trained and trained and all("default" in name for name in trained)


def test_trap_14_the_margin_of_a_pair_at_the_start(llama, adapter):
    p = policy(llama, {**LORA, "adapter": str(adapter)})
    micro = toy.micro(p, ROWS[0])
    with torch.no_grad():
        ratios = {which: per_edge(p(micro) - make_reference(p, which)(micro), micro) for which in ("initial", "base")}
    assert float(ratios["initial"][0] - ratios["initial"][1]) == 0
    assert abs(float(ratios["base"][0] - ratios["base"][1])) > 0.1


@torch.no_grad()
def test_trap_14_a_fresh_adapter_changes_nothing(llama):
    p = policy(llama, LORA)
    micro = toy.micro(p, *ROWS)
    initial, base = make_reference(p, "initial"), make_reference(p, "base")
    assert torch.equal(initial(micro), base(micro))
    torch.testing.assert_close(initial(micro), policy(llama)(micro), atol=1e-5, rtol=0)


@pytest.mark.parametrize("which", ["initial", "base"])
def test_scoring_the_reference_keeps_mode_gradients_and_randomness(llama, adapter, which):
    p = policy(llama, {**LORA, "adapter": str(adapter)}).train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    score = make_reference(p, which)
    micro = toy.micro(p, *ROWS)
    logp = p(micro)
    score(micro)  # between forward and backward, as in a step
    logp.sum().backward()
    assert p.training and all(w.grad is not None for w in p.trainable().values())
    assert torch.equal(torch.get_rng_state(), before)


def test_base_needs_an_adapter(llama):
    with pytest.raises(UserError, match="reference.policy=base means the model without its adapter, and there is none"):
        make_reference(policy(llama), "base")


# ---- adapters and saving ----


def test_lora_trains_the_adapter_only_and_is_the_same_for_a_seed(llama):
    a, b, c = policy(llama, LORA, seed=1), policy(llama, LORA, seed=1), policy(llama, LORA, seed=2)
    assert all("lora_" in name and w.dtype == torch.float32 for name, w in a.trainable().items())
    same = [all(torch.equal(w, other.trainable()[n]) for n, w in a.trainable().items()) for other in (b, c)]
    assert same == [True, False]
    named = policy(llama, {**LORA, "targets": "q_proj, v_proj"})
    assert {n.split(".")[-4] for n in named.trainable()} == {"q_proj", "v_proj"}


@torch.no_grad()
def test_saving_and_loading_gives_the_same_log_probs(llama, adapter, tmp_path):
    full = policy(llama)
    shake(full, 0.1)
    full.save(tmp_path / "full")
    micro = toy.micro(full, *ROWS)
    again = policy(tmp_path / "full")
    assert torch.equal(again(micro), full(micro))
    assert again.tokeniser.digest() == full.tokeniser.digest()

    tuned = policy(llama, {**LORA, "adapter": str(adapter)})
    make_reference(tuned, "initial")  # its copy of the adapter is no part of the policy
    shake(tuned, 0.1)
    tuned.save(tmp_path / "tuned")
    assert not (tmp_path / "tuned" / "reference").exists()
    again = policy(llama, {**LORA, "adapter": str(tmp_path / "tuned")})
    assert torch.equal(again(micro), tuned(micro))
    for where in ("full", "tuned"):
        assert not [f.name for f in (tmp_path / where).iterdir() if f.suffix in (".bin", ".pt", ".pkl")]


def test_adapters_that_do_not_load(llama, adapter, tmp_path):
    with pytest.raises(UserError, match="no adapter_config.json there"):
        policy(llama, {**LORA, "adapter": str(tmp_path)})
    wide = save_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(UserError, match="model.lora.adapter=.* does not load"):
        policy(wide, {**LORA, "adapter": str(adapter)})
    with pytest.raises(UserError, match="model.lora.targets=nonsense"):
        policy(llama, {**LORA, "targets": "nonsense"})


# ---- the tabular policy ----


def bandit_rows():
    train, _ = load_data(DataConfig(name="bandit", source="bandit"))
    return train.examples


@torch.no_grad()
def test_tabular_starts_at_the_reference_of_its_world():
    p = load_policy(ModelConfig(name="bandit", kind="tabular"), DataConfig(), TrustConfig(), torch.device("cpu"), "fp32", 0)
    assert isinstance(p, Tabular)
    rows = [Row(p.tokenise(e), e.kind) for e in bandit_rows()]
    micro = build(rows, range(len(rows)), "pairs", p.pad)
    table = bandit.reference_table()
    expected = [table[b.parse(c.text)[0]][b.parse(c.text)[1]] for e in bandit_rows() for c in e.completions for b in (bandit,)]
    torch.testing.assert_close(p(micro), torch.tensor(expected), atol=1e-6, rtol=0)
    score = make_reference(p, "initial")
    assert score.how == "frozen copy" and largest(p, score, micro) == 0
    p.logits += torch.arange(6.0)
    assert largest(p, score, micro) > 0.1


@torch.no_grad()
def test_tabular_samples_from_its_table_and_saves_it(tmp_path):
    p = Tabular(torch.device("cpu"))
    greedy = p.generate([[x] for x in range(4)], GREEDY, 0)
    assert [r.ids[0] for r in greedy] == p.logits.argmax(1).tolist()
    replies = p.generate([[1]] * 4000, SamplerConfig(), seed=3)
    share = torch.bincount(torch.tensor([r.ids[0] for r in replies]), minlength=6) / 4000
    torch.testing.assert_close(share, p.logits[1].softmax(-1), atol=0.03, rtol=0)
    assert replies[0].text == f"1:{replies[0].ids[0]}" and replies[0].finished
    assert bandit.true_reward("1", replies[0].text) == bandit.reward_table()[1][replies[0].ids[0]]
    p.save(tmp_path / "table")
    assert (tmp_path / "table" / "model.safetensors").is_file()
    with pytest.raises(UserError, match="set sampler.top_p=1"):
        p.generate([[0]], SamplerConfig(top_p=0.9), 0)


@pytest.mark.parametrize("row", [{"prompt": "0", "chosen": "hello", "rejected": "0:1"}, {"prompt": "9", "chosen": "0:2", "rejected": "0:1"},
                                 {"prompt": "0", "chosen": "0:6", "rejected": "0:1"}])
def test_tabular_refuses_other_text(row):
    with pytest.raises(BadRow, match="of the bandit world"):
        Tabular(torch.device("cpu")).tokenise(parse_row(row, toy.COLUMNS))


def test_bandit_optimum_is_the_tilted_reference():
    best = bandit.optimal_policy(0.5)
    for x in range(bandit.PROMPTS):
        weights = [math.exp(lp + r / 0.5) for lp, r in zip(bandit.reference_table()[x], bandit.reward_table()[x], strict=True)]
        assert best[x] == pytest.approx([w / sum(weights) for w in weights])


# ---- trap 32 ----


@pytest.mark.parametrize(("family", "lora"), [(f, lo) for f in FAMILIES for lo in (None, LORA)])
@pytest.mark.parametrize("view", ["pairs", "unary", "demonstrations"])
def test_trap_32_every_view_of_every_kind_of_policy_takes_a_step(tmp_path, family, lora, view):
    p = policy(save_model(tmp_path, family), lora).train()
    micro = toy.micro(p, *ROWS, view=view)
    before = {name: w.detach().clone() for name, w in p.trainable().items()}
    loss = -p(micro).mean()
    loss.backward()
    torch.optim.SGD(p.trainable().values(), lr=0.1).step()
    assert math.isfinite(float(loss.detach()))
    assert any(not torch.equal(w, before[name]) for name, w in p.trainable().items())
