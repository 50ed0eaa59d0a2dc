"""TRL's trainers on a tiny model, and our loss on their batches. What the two are held to: test_trl_parity.py, test_trl_trainers.py.

TRL tokenises, collates and computes its loss with the model it was given. We take the token ids out of its batch, run a copy of the
model on each sequence alone (no padding), take float32 log-softmax, and call our objective.
"""

import copy
import importlib

import datasets
import pytest
import torch
from samples import scored
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.objectives.base import Batch, Pairs, reduce_terms, total_weights

WORDS = "red green blue one two three four cat dog bird sees hears likes the a".split()
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
PREFERENCES = [  # replies of unequal length; prompts of one word and of several
    {"prompt": "the cat", "chosen": " sees a red bird", "rejected": " hears two"},
    {"prompt": "one", "chosen": " likes blue", "rejected": " likes the green dog a four"},
    {"prompt": "a dog hears the", "chosen": " three bird", "rejected": " cat"},
]
ONE_WORD_PROMPTS = [  # and chosen replies of one length
    {"prompt": "cat", "chosen": " sees a red", "rejected": " hears two"},
    {"prompt": "one", "chosen": " likes blue bird", "rejected": " likes the green dog a four"},
    {"prompt": "dog", "chosen": " three bird sees", "rejected": " cat"},
]
LABELLED = [
    {"prompt": "the cat", "completion": " sees a red bird", "label": True},
    {"prompt": "one", "completion": " likes the green dog", "label": False},
    {"prompt": "a dog hears the", "completion": " three bird", "label": True},
    {"prompt": "two dog", "completion": " hears", "label": False},
    {"prompt": "blue", "completion": " dog likes a cat one", "label": True},
    {"prompt": "bird the", "completion": " four four", "label": False},
]


def tokenizer():
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def llama(seed):
    """A random Llama without dropout, wide enough in its weights that no log-prob is near uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        attention_dropout=0.0, tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).float()


def trainer(tmp_path, name, rows, module="trl", ref_model=None, size=None, **options):
    """A TRL trainer on `rows`, on the CPU in float32, and our own copy of its model."""
    library = importlib.import_module(module)
    model = llama(0)
    ours = copy.deepcopy(model)
    args = getattr(library, f"{name}Config")(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, max_length=64,
        per_device_train_batch_size=size or len(rows), save_strategy="no", disable_tqdm=True, **options,
    )
    extra = {"ref_model": ref_model} if ref_model is not None else {}
    made = getattr(library, f"{name}Trainer")(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer(), **extra
    )
    return made, ours


def collated(made, rows=slice(None)):
    """TRL's batch of the rows, in their order (the trainer's own loader would shuffle them)."""
    return made._prepare_inputs(made.data_collator([made.train_dataset[i] for i in range(len(made.train_dataset))[rows]]))


def run(made, inputs):
    """TRL's loss on `inputs` and the gradient of every parameter."""
    made.model.zero_grad()
    made.model.train()
    loss = made.compute_loss(made.model, dict(inputs))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in made.model.named_parameters()}


def sequences(ids, attention, completion):
    """[(ids without padding, their completion mask)]"""
    keep = attention.bool()
    return [(row[k], mask[k].bool()) for row, k, mask in zip(ids, keep, completion, strict=True)]


def paired(inputs):
    """Sequences of a CPO or ORPO batch: all chosen, then all rejected."""
    return [s for side in ("chosen", "rejected") for s in sequences(
        inputs[f"{side}_input_ids"], inputs[f"{side}_attention_mask"], inputs[f"{side}_labels"] != -100)]


def token_logps(model, edges):
    """Log-probs of the trained tokens of each sequence, run alone: plain float32 log-softmax."""
    out = []
    for ids, trained in edges:
        logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        out.append(logps[:-1].gather(1, ids[1:, None])[:, 0][trained[1:]])
    return out


def ours_on(objective, model, edges, reference=None, **views):
    """Our loss on the sequences and the gradient of every parameter."""
    model.zero_grad()
    model.train()
    policy = token_logps(model, edges)
    lengths = torch.tensor([len(p) for p in policy])
    layout = Batch(lengths, torch.repeat_interleave(torch.arange(len(edges)), lengths), {}, **views)
    tokens = {"policy": torch.cat(policy)}
    if "reference" in objective.quantities:
        with torch.no_grad():
            tokens["reference"] = torch.cat(token_logps(reference, edges))
    batch = scored(objective, layout, tokens)
    loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, layout))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def pairs(count):
    """All chosen sequences first, then all rejected, as TRL lays them out."""
    one = torch.ones(count)
    return {"pairs": Pairs(torch.arange(count), torch.arange(count) + count, one, one, 0 * one)}


def assert_same(theirs, ours):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)
    assert theirs[1].keys() == ours[1].keys() and any(g.abs().max() > 1e-3 for g in theirs[1].values())
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def dpo_edges(inputs):
    return sequences(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
