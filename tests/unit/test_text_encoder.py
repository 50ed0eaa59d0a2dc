"""Frozen text encoders, which weigh pairs by meaning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tokenizers import processors
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5ForConditionalGeneration

from prefopt.config.schema import TrustConfig
from prefopt.data.sources import Split
from prefopt.data.transforms import Tools, apply_transforms
from prefopt.errors import UserError
from prefopt.policies.text_encoder import BATCH, TextSimilarity, identity_of
from tests.toy import data_config, tokenizer
from tests.toy import pair as toy_pair

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
PAIRS = [("at the lake there is a fox", "a fox"), ("an owl", "an owl"), ("two and two make four, three and three make six", "six " * 40)]


def saved(folder, kind: str):
    words = tokenizer("bytes")
    end = ("<eos>", words.eos_token_id)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[end])  # as CLIP's has it
    torch.manual_seed(0)
    if kind == "bert":
        model = BertModel(BertConfig(vocab_size=len(words), pad_token_id=words.pad_token_id, **SMALL))
    elif kind == "clip":
        ids = {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id, "pad_token_id": words.pad_token_id}
        model = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(words), projection_dim=8, **ids, **SMALL))
    else:
        model = T5ForConditionalGeneration(T5Config(vocab_size=len(words), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def encoder(path: str) -> TextSimilarity:
    return TextSimilarity(path, TrustConfig(), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_similarities_do_not_depend_on_the_batch(kind, tmp_path):
    alike = encoder(saved(tmp_path / kind, kind))
    together = alike(PAIRS)
    assert together == pytest.approx([alike([p])[0] for p in PAIRS], abs=1e-5)
    assert together[1] == pytest.approx(1, abs=1e-6) and -1 <= min(together) and together[0] < 0.999
    assert alike.cut >= 2  # the long texts, once in each call
    assert len(identity_of(str(tmp_path / kind))["fingerprint"]) == 64


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_a_reply_that_is_its_prompt_weighs_exactly_one(kind, tmp_path, monkeypatch):
    """exp(-alpha d) with d = 1 - cosine, which a rounded cosine must not make 0.9999999."""
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    alike, said = encoder(saved(tmp_path / kind, kind)), [f"a fox and {n} owls by the lake" for n in range(40)]
    rows = [toy_pair(text, text, "a fox") for text in said] + [toy_pair("a fox", "an owl at night", "no")]
    split = Split("train", rows)
    settings = {"similarity_weight": {"alpha": 50.0, "encoder": "own"}}
    apply_transforms([split], data_config(transforms=settings), 0, Tools(similarity={"own": alike}.get))
    assert [e.weight for e in split.examples[:-1]] == [1.0] * len(said) and split.examples[-1].weight < 1


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_vectors_are_what_similarities_are_made_of(kind, tmp_path):
    alike, texts = encoder(saved(tmp_path / kind, kind)), [f"{word} and {n} owls" for word in ("a fox", "two") for n in range(50)]
    vectors = alike.vectors(texts)
    assert len(vectors) == len(texts) > BATCH
    found = F.cosine_similarity(vectors[:50], vectors[50:]).tolist()
    assert found == pytest.approx(alike(list(zip(texts[:50], texts[50:], strict=True))), abs=1e-5)


def test_an_encoder_is_read_by_the_mean_of_its_states(tmp_path):
    alike = encoder(saved(tmp_path / "bert", "bert"))
    vectors = []
    for text in PAIRS[0]:
        ids = torch.tensor([alike.tokenizer(text)["input_ids"]])
        vectors.append(alike.model(input_ids=ids).last_hidden_state[0].mean(0))
    assert alike(PAIRS[:1])[0] == pytest.approx(F.cosine_similarity(*vectors, dim=0).item(), abs=1e-6)


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is an encoder with a decoder"):
        encoder(saved(tmp_path / "t5", "t5"))
    with pytest.raises(UserError, match="there is no such folder"):
        encoder(str(tmp_path / "nowhere"))
