"""A frozen text encoder: how alike two texts are in meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.config.schema import ModelConfig, TrustConfig
from prefopt.errors import UserError
from prefopt.policies.loading import first_line, load_config, load_tokenizer
from prefopt.policies.locate import locate

BATCH = 64  # texts encoded at a time


def identity_of(path: str) -> dict[str, Any]:
    """What tells the encoder `path` apart from others. Loads nothing."""
    return {"path": path, "fingerprint": locate(ModelConfig(name=path, path=path)).fingerprint()}


class TextSimilarity:
    """Cosine similarity of pairs of texts under the transformers encoder `path`, a folder or hub id: of the text tower's projection where
    it is a CLIP, else of the mean over tokens of the last hidden state. Texts beyond its context lose their end; `cut` counts them.
    """

    def __init__(self, path: str, trust: TrustConfig, device: torch.device):
        located = locate(ModelConfig(name=path, path=path))
        self.device, self.cut = device, 0
        self.tokenizer, config = load_tokenizer(located, trust), load_config(located, trust)
        self.clip = config.model_type in ("clip", "clip_text_model")
        if config.is_encoder_decoder:
            raise UserError(f"{path} is an encoder with a decoder, which needs a text to write; give an encoder such as BERT's or CLIP's")
        import transformers
        from transformers.utils import logging

        logging.disable_progress_bar()  # the run has one progress line of its own
        kind = transformers.CLIPTextModelWithProjection if self.clip else transformers.AutoModel
        try:
            self.model = kind.from_pretrained(located.folder, trust_remote_code=trust.remote_code, use_safetensors=True)
        except Exception as error:  # the library raises a dozen unrelated types
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"the text encoder {path} could not be loaded ({reason}); give "
                            "the folder or hub id of an encoder with safetensors weights") from error
        self.model.eval().requires_grad_(False).to(device)
        text = getattr(config, "text_config", config)
        self.context = getattr(text, "max_position_embeddings", None) or self.tokenizer.model_max_length
        if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
            self.context -= 2  # these families count positions from the padding token's number on
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        out: list[float] = []
        for start in range(0, len(pairs), BATCH):
            a, b = (self._vectors([pair[side] for pair in pairs[start : start + BATCH]]) for side in (0, 1))
            out += F.cosine_similarity(a, b).clamp(-1, 1).tolist()
        return out

    @torch.no_grad()
    def vectors(self, texts: Sequence[str]) -> Tensor:
        """[texts, d] on the CPU."""
        return torch.cat([self._vectors(list(texts[start : start + BATCH])).cpu() for start in range(0, len(texts), BATCH)])

    def _vectors(self, texts: list[str]) -> Tensor:
        """[texts, d]"""
        lengths = [len(ids) for ids in self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        self.cut += sum(n > self.context for n in lengths)
        given = self.tokenizer(texts, truncation=True, max_length=self.context, padding=True, return_tensors="pt").to(self.device)
        out = self.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        if self.clip:
            return out.text_embeds.float()
        mask = given["attention_mask"].unsqueeze(-1).float()
        return (out.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
