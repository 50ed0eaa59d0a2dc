"""Every supported architecture against transformers' own logits, and every family's chat template against its traits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.config.schema import SamplerConfig
from prefopt.data.records import BadRow
from prefopt.errors import UserError
from tests import toy
from tests.toy import FAMILIES, data_config, example, micro, pair, policy, save_model, tokeniser, turns

EXAMPLES = (
    pair("How are you?", "I am well, thank you. The capital of France is Paris.", "Two and two make four."),
    pair(turns("Hello there", "I am well.", "tell me a story"), "once upon a time there was a fox", "Is that so?"),
)
ATTENTION = {"gemma2": "eager"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / family, family)


def load(folder, family, **settings):
    return policy(folder, attention=ATTENTION.get(family, "sdpa"), **settings)


def plain_logps(model, p, examples):
    """Log-probs of the trained tokens, in edge order, from a model's own logits: one unpadded sequence at a time, in float64."""
    out = []
    for tokens in map(p.tokenise, examples):
        for branch in tokens.branches:
            ids = torch.tensor([tokens.prompt + branch.ids])
            with torch.no_grad():
                logp = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            wanted = torch.tensor([False] * len(tokens.prompt) + branch.mask)[1:]
            out.append(logp.gather(-1, ids[0, 1:, None])[wanted, 0])
    return torch.cat(out)


def stirred(p):
    """The policy with adapters that are no longer the identity."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in p.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return p


def test_log_probs_are_those_of_the_models_own_logits(family, folder):
    p = load(folder, family)
    own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ours = p.eval()(micro(p, *EXAMPLES))
    torch.testing.assert_close(ours.double(), plain_logps(own, p, EXAMPLES), atol=2e-5, rtol=1e-5)
    assert max(t.longest for t in map(p.tokenise, EXAMPLES)) > 3 * 8  # longer than the sliding windows


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_the_windows_and_caps_of_these_models_count(family, tmp_path):
    """So that the test above would see it if one of them were left out."""
    folder = save_model(tmp_path / "m", family)
    p = load(folder, family)
    ours = p.eval()(micro(p, *EXAMPLES)).double()
    caps = [{"attn_logit_softcapping": None}, {"final_logit_softcapping": None}] if family == "gemma2" else []
    for left_out in ({"sliding_window": 512}, *caps):
        other = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, **left_out).eval()
        assert (plain_logps(other, p, EXAMPLES) - ours).abs().max() > 0.01, left_out


def test_lora_log_probs_are_those_of_the_merged_model(family, folder, tmp_path):
    p = stirred(load(folder, family, lora={"enabled": True, "r": 4}))
    batch = micro(p, *EXAMPLES)
    ours = p.eval()(batch).double()
    with p.without_adapter():
        base = p(batch).double()
    own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    torch.testing.assert_close(base, plain_logps(own, p, EXAMPLES), atol=2e-5, rtol=1e-5)
    p.save(tmp_path / "adapter")
    from peft import PeftModel

    merged = PeftModel.from_pretrained(own, tmp_path / "adapter").merge_and_unload()
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(ours, plain_logps(merged, p, EXAMPLES), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [None, {"enabled": True, "r": 4}], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(family, folder, lora):
    found = []
    for checkpointing in (False, True):
        p = load(folder, family, lora=lora, gradient_checkpointing=checkpointing).train()
        if lora:
            stirred(p)
        p(micro(p, *EXAMPLES)).mean().backward()
        found.append({name: parameter.grad for name, parameter in p.trainable().items()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-5)
    assert sum(g.abs().sum() for g in found[0].values()) > 0


def test_greedy_replies_are_the_most_likely_tokens_of_the_full_forward(family, folder):
    """With padding on the left and a cache, as sampling works, against neither."""
    p = load(folder, family)
    prompts = [p.tokenise(e).prompt for e in EXAMPLES]
    replies = p.generate(prompts, SamplerConfig(temperature=0.0, max_new_tokens=12), seed=0)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = list(prompt)
        for token in reply.ids:
            with torch.no_grad(), p.plainly():
                assert int(p.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids.append(token)
        assert reply.finished or len(reply.ids) == 12


def test_a_saved_policy_is_a_plain_transformers_folder(family, folder, tmp_path):
    p = load(folder, family).eval()
    with torch.no_grad():
        for parameter in p.trainable().values():
            parameter.add_(0.01)
    p.save(tmp_path / "saved")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager", dtype=torch.float32).eval()
    torch.testing.assert_close(p(micro(p, *EXAMPLES)).double(), plain_logps(own, p, EXAMPLES), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_a_softcap_that_the_kernel_would_leave_out_is_refused(attention, tmp_path):
    folder = save_model(tmp_path / "m", "gemma2")
    with pytest.raises(UserError, match=f"which model.attention={attention} does not; set model.attention=auto"):
        policy(folder, attention=attention)


# ---- chat templates ----

TEMPLATES = {"llama": "llama3", "mistral": "mistral", "gemma2": "gemma", "gemma3": "gemma3", "qwen2": "system", "qwen3": "qwen3"}
END = {"llama": "<|eot_id|>", "mistral": "<eos>", "gemma2": "<end_of_turn>", "gemma3": "<end_of_turn>", "qwen2": "<|im_end|>",
       "qwen3": "<|im_end|>"}
PROMPT_END = {"mistral": "How are you?[/INST]", "gemma2": "<start_of_turn>model\n", "gemma3": "<start_of_turn>model\n",
              "llama": "<|start_header_id|>assistant<|end_header_id|>\n\n", "qwen2": "<|im_start|>assistant\n",
              "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n"}
SYSTEM = [{"role": "system", "content": "helpful"}, {"role": "user", "content": "Hello"}]


def text(t, ids):
    return t.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("talk", ["How are you?", turns("Hello there", "I am well.", "How are you?")], ids=["one turn", "several turns"])
def test_one_bos_one_trained_end_and_a_prompt_that_is_sampled_from(family, talk):
    t = tokeniser("bytes", TEMPLATES[family])
    row = pair(talk, "fine", "I will not say.")
    out = t(row)
    assert out.prompt == t.prompt_ids(row.prompt, row.chat)
    assert text(t, out.prompt).endswith(PROMPT_END[family])
    bos = t.tokenizer.bos_token_id
    for branch, reply in zip(out.branches, ("fine", "I will not say."), strict=True):
        ids = out.prompt + branch.ids
        assert ids.count(bos) == (family not in ("qwen2", "qwen3")) and (bos not in ids or ids[0] == bos)
        assert all(branch.mask) and branch.complete
        assert text(t, branch.ids) == (" " if family == "mistral" else "") + reply + END[family]
        assert sum(i in t.ends for i in branch.ids) == 1


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_system_message_is_rendered_or_refused_with_what_to_do(family):
    t = tokeniser("bytes", TEMPLATES[family])
    if family in ("gemma2", "mistral"):  # Mistral's drops it once a reply follows
        with pytest.raises(BadRow, match="a system message: put that text into the first user's message, or set model.chat_template"):
            t(pair(SYSTEM, "fine", "bad"))
    else:
        out = t(pair(SYSTEM, "fine", "bad"))
        assert text(t, out.prompt).count("helpful") == 1
        assert out.prompt == t.prompt_ids(pair(SYSTEM).prompt, True)


def test_qwen3_answers_without_a_thought_unless_asked():
    """The empty thought is context, not a target; with `thinking` it is the reply's, and a reply may bring its own."""
    plain, thinking = (toy.Tokeniser(toy.tokenizer("bytes", "qwen3"), data_config(), 512, None, on) for on in (False, True))
    empty = "<think>\n\n</think>\n\n"
    assert text(plain, plain(pair("Q", "fine", "bad")).branches[0].ids) == "fine<|im_end|>"
    out = thinking(pair("Q", "fine", "bad"))
    assert text(thinking, out.prompt + out.branches[0].ids).endswith(f"assistant\n{empty}fine<|im_end|>")
    assert not text(thinking, thinking.prompt_ids(pair("Q").prompt, True)).endswith(empty)
    reasoned = pair("Q", "<think>\nso\n</think>\n\nfine", "bad")
    assert text(thinking, thinking(reasoned).branches[0].ids).endswith("<think>\nso\n</think>\n\nfine<|im_end|>")
    with pytest.raises(BadRow, match="renders the prompt differently"):
        plain(reasoned)
    assert plain.digest() != thinking.digest()


def test_thoughts_leave_earlier_turns_of_the_prompt_in_training_as_in_sampling():
    t = tokeniser("bytes", "qwen3")
    row = pair(turns("Hello", "<think>\nhm\n</think>\n\nI am well.", "and you"), "fine", "bad")
    out = t(row)
    assert "hm" not in text(t, out.prompt) and "I am well." in text(t, out.prompt)
    assert out.prompt == t.prompt_ids(row.prompt, True)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_dialogue_in_the_completion_trains_replies_only(family):
    t = tokeniser("bytes", TEMPLATES[family])
    (branch,) = t(example(messages=turns("Hello", "I am well.", "Is that so?", "yes"))).branches
    trained = text(t, [i for i, m in zip(branch.ids, branch.mask, strict=True) if m])
    assert trained == "I am well.<end_of_turn>yes<end_of_turn>"
