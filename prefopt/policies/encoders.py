"""VAE and text encoders of a pipeline folder: pictures to latents and back, captions to what the network reads. Loaded when first asked.

Captions go through the pipeline's own `encode_prompt`, with the settings its `__call__` has by default (model.max_sequence_length may say
otherwise), so that the network is trained on what it is asked with. The VAE computes in fp32 whatever the precision of the run: SDXL's
gives NaN in fp16.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from prefopt.errors import UserError
from prefopt.policies.pipeline_folder import PipelineFolder, open_folder

BATCH = 16  # captions at a time


class NotFinite(UserError):
    """A picture that the VAE makes no numbers of; `place` is where it stands in the batch."""

    def __init__(self, place: int, where: Path):
        super().__init__(f"the VAE of {where} makes NaN or infinity of picture {place} of its batch (counted from 0); is the picture or "
                         "the VAE damaged?")
        self.place = place


class Encoders:
    """`latents` and `decode` use the VAE, `captions` the text encoders; `free` lets go of both. `count_long` needs a tokenizer alone."""

    def __init__(self, folder: PipelineFolder, dtype: torch.dtype, device: torch.device):
        import diffusers

        self.folder, self.dtype, self.device = folder, dtype, device
        self.pipeline = getattr(diffusers, folder.pipeline)
        self.defaults = {name: p.default for name, p in inspect.signature(self.pipeline.__call__).parameters.items()}

    # ---- pictures --------------------------------------------------------------------------------

    @cached_property
    def vae(self) -> Any:
        return self.folder.load("vae", torch.float32).requires_grad_(False).to(self.device)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [B, C, h, w] of the latents of pictures [B, 3, H, W] in [-1, 1], fp32, scaled and shifted as the network wants
        them. The deviation is 0 of autoencoders that are not variational. Raises `NotFinite`."""
        with torch.autocast(self.device.type, enabled=False):
            out = self.vae.encode(pixels.to(self.device, torch.float32))
        if hasattr(out, "latent_dist"):
            mean, std = out.latent_dist.mean, out.latent_dist.std
        else:
            mean = out.latent if hasattr(out, "latent") else out.latents
            std = torch.zeros_like(mean)
        bad = (~(mean.isfinite() & std.isfinite())).flatten(1).any(1)
        if bad.any():
            raise NotFinite(int(bad.nonzero()[0]), self.folder.path)
        shift, scale = self._shift_and_scale(mean)
        return (mean - shift) * scale, std * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Any]:
        """PIL pictures of latents [B, C, h, w]."""
        from diffusers.image_processor import VaeImageProcessor

        x = latents.to(self.device, torch.float32)
        shift, scale = self._shift_and_scale(x)
        with torch.autocast(self.device.type, enabled=False):
            # A few at a time: a picture of 1024 pixels takes gigabytes on its way.
            made = torch.cat([self.vae.decode(some / scale + shift, return_dict=False)[0] for some in x.split(4)])
        bad = (~made.isfinite()).flatten(1).any(1)
        if bad.any():
            raise NotFinite(int(bad.nonzero()[0]), self.folder.path)
        return VaeImageProcessor(vae_scale_factor=self.folder.latent[1]).postprocess(made, output_type="pil")

    def _shift_and_scale(self, like: Tensor) -> tuple[Any, Any]:
        """What is subtracted from a latent, and what it is then multiplied by."""
        config = self.vae.config
        scale = config.get("scaling_factor") or 1.0
        means, deviations = config.get("latents_mean"), config.get("latents_std")
        if means and deviations:  # per channel, of some SDXL models
            shape = (1, -1, *[1] * (like.dim() - 2))
            return like.new_tensor(means).view(shape), scale / like.new_tensor(deviations).view(shape)
        return config.get("shift_factor") or 0.0, scale

    # ---- captions --------------------------------------------------------------------------------

    @cached_property
    def texts(self) -> Any:
        """The pipeline with its text encoders and tokenizers only."""
        from diffusers.utils import logging

        logging.get_logger("diffusers.pipelines").setLevel(logging.ERROR)  # every caption that is cut, on a line of its own
        parts: dict[str, Any] = {}
        for name, p in inspect.signature(self.pipeline.__init__).parameters.items():
            if name.startswith(("text_encoder", "tokenizer")) and name in self.folder.parts:
                if name.startswith("text_encoder"):
                    parts[name] = self.folder.load(name, self.dtype).requires_grad_(False).to(self.device)
                else:
                    parts[name] = self._load_tokenizer(name)
            elif name != "self" and p.default is inspect.Parameter.empty:
                parts[name] = None
            elif name == "force_zeros_for_empty_prompt":
                parts[name] = self.folder.index.get(name, p.default)
            elif name == "requires_safety_checker":
                parts[name] = False
        made = self.pipeline(**parts)
        if "text_encoder_3" in parts and parts["text_encoder_3"] is None:  # zeros in its stead, as wide as the network reads them
            made.transformer = SimpleNamespace(config=SimpleNamespace(**self.folder.config("transformer")))
        return made

    @torch.no_grad()
    def captions(self, texts: list[str]) -> list[dict[str, Tensor]]:
        """What the network reads of each text, on the CPU: `prompt_embeds` [T, d], and by family `pooled` [d] or `mask` [T].

        "" stands for no caption and is encoded as the pipeline does it for classifier-free guidance: zeros of SDXL models that say so, and
        without the instruction that Sana puts before captions. Texts longer than the encoders read are cut without a word (`count_long`).
        """
        done: dict[str, dict[str, Tensor]] = {}
        distinct = list(dict.fromkeys(text if text.strip() else "" for text in texts))
        for i in range(0, len(distinct), BATCH):
            if some := [text for text in distinct[i : i + BATCH] if text]:
                done |= zip(some, self._encode(some, blank=False), strict=True)
        if "" in distinct:
            done[""] = self._encode([""], blank=True)[0]
        return [done[text if text.strip() else ""] for text in texts]

    def _encode(self, texts: list[str], blank: bool) -> list[dict[str, Tensor]]:
        """What the pipeline makes of texts; with `blank` of leaving them out (FLUX has nothing of its own for it, and encodes "")."""
        takes = inspect.signature(self.pipeline.encode_prompt).parameters
        settings = {name: self.defaults[name] for name in ("clean_caption", "complex_human_instruction")
                    if name in takes and name in self.defaults}
        if (longest := self.folder.max_sequence_length) is not None:
            settings["max_sequence_length"] = longest
        settings |= {name: None for name in ("prompt_2", "prompt_3") if name in takes}
        negative = blank and "do_classifier_free_guidance" in takes
        if "do_classifier_free_guidance" in takes:
            settings["do_classifier_free_guidance"] = negative
        with torch.autocast(self.device.type, enabled=False):
            out = self.texts.encode_prompt(prompt=texts, device=self.device, num_images_per_prompt=1, **settings)
        if self.folder.pipeline == "FluxPipeline":  # embeddings, pooled, ids
            made = dict(zip(("prompt_embeds", "pooled"), out[:2], strict=True))
        elif self.folder.pipeline.startswith(("PixArt", "Sana")):  # embeddings, mask, negative embeddings, negative mask
            made = dict(zip(("prompt_embeds", "mask"), out[2:] if negative else out[:2], strict=True))
        else:  # embeddings, negative ones, and pooled ones likewise
            made = dict(zip(("prompt_embeds", "pooled")[: len(out) // 2], out[1::2] if negative else out[::2], strict=True))
        return [{name: value[i].cpu().clone() for name, value in made.items()} for i in range(len(texts))]

    @property
    def _reader(self) -> str:
        """The tokenizer whose encoder reads farthest."""
        names = [n for n in ("tokenizer", "tokenizer_2", "tokenizer_3") if n in self.folder.parts]
        return names[-1]

    @cached_property
    def _tokenizer(self) -> Any:
        """By itself: how long captions are is known without any weights."""
        return self._load_tokenizer(self._reader)

    def _load_tokenizer(self, name: str) -> Any:
        made = self.folder.load(name)
        # It would warn of "indexing errors" where a caption is merely cut; `count_long` says what happens.
        made.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        return made

    @property
    def limit(self) -> int:
        """Tokens that the farthest reading text encoder takes, its special ones included."""
        clip = self.folder.pipeline == "StableDiffusion3Pipeline" and self._reader != "tokenizer_3"  # its T5 is left out
        longest = self.folder.max_sequence_length
        return int(self._tokenizer.model_max_length) if longest is None or clip else longest

    def too_long(self, texts: list[str]) -> list[int]:
        """Places of the texts whose end no text encoder reads."""
        if not texts:
            return []
        tokenizer, limit, before = self._tokenizer, self.limit, ""
        if instruction := self.defaults.get("complex_human_instruction"):
            before = "\n".join(instruction)
            limit += len(tokenizer.encode(before)) - 2
        return [i for i, ids in enumerate(tokenizer([before + t for t in texts], verbose=False)["input_ids"]) if len(ids) > limit]

    def count_long(self, texts: Iterable[str]) -> dict[str, int]:
        """How many of the distinct captions among `texts` have an end that no text encoder reads, which is said on stderr. Stored or not:
        no weights are needed for it."""
        captions = list(dict.fromkeys(text for text in texts if text.strip()))
        long = self.too_long(captions)
        if long:
            print(f"captions: {len(long):,} of {len(captions):,} captions are longer than {self.limit} tokens and are cut there, such as "
                  f"{captions[long[0]][:60]!r}; what stands after is not read", file=sys.stderr)
        return {"distinct": len(captions), "cut": len(long), "limit": self.limit}

    # ---- both ------------------------------------------------------------------------------------

    def free(self) -> None:
        """Lets go of the loaded parts; they come back when they are asked for again."""
        for part in ("vae", "texts"):
            self.__dict__.pop(part, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """`vae`, `text`: what stored latents and captions depend on, by content."""
        texts = sorted(part for part in self.folder.parts if part.startswith(("text_encoder", "tokenizer")))
        cleaned = bool(self.defaults.get("clean_caption")) and all(importlib.util.find_spec(name) for name in ("bs4", "ftfy"))
        zeros = self.folder.index.get("force_zeros_for_empty_prompt", True) if self.folder.pipeline.endswith("XLPipeline") else ""
        settings = [self.folder.pipeline, self.folder.max_sequence_length, self.dtype, "cleaned" if cleaned else "as is", zeros]
        return {"vae": self.folder.fingerprint("vae"), "text": " ".join(map(str, [*settings, self.folder.fingerprint(*texts)]))}


def open_encoders(folder: str | Path | PipelineFolder, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Encoders:
    """The encoders of a pipeline folder, checked and not yet loaded. `dtype` is that of the text encoders."""
    return Encoders(open_folder(folder), dtype, torch.device(device))
