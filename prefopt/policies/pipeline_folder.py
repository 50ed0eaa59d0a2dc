"""A model folder in the layout of diffusers (model_index.json): what is in it, and its parts, loaded one by one from safetensors."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prefopt.errors import UserError
from prefopt.policies.locate import Located

# What each pipeline cannot do without.
NEEDED = {
    "StableDiffusionPipeline": "unet scheduler vae text_encoder tokenizer",
    "StableDiffusionXLPipeline": "unet scheduler vae text_encoder text_encoder_2 tokenizer tokenizer_2",
    "PixArtAlphaPipeline": "transformer scheduler vae text_encoder tokenizer",
    "PixArtSigmaPipeline": "transformer scheduler vae text_encoder tokenizer",
    "StableDiffusion3Pipeline": "transformer scheduler vae text_encoder text_encoder_2 tokenizer tokenizer_2",  # the T5 may be left out
    "FluxPipeline": "transformer scheduler vae text_encoder text_encoder_2 tokenizer tokenizer_2",
    "SanaPipeline": "transformer scheduler vae text_encoder tokenizer",
}
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# diffusion_pytorch_model[.fp16][-00001-of-00002][.fp16].safetensors
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<one>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<two>\w+))?\.safetensors")


@dataclass(frozen=True)
class PipelineFolder:
    """A checked folder: every part that its pipeline needs is there, with weights that are no pickles."""

    path: Path
    pipeline: str  # class of diffusers
    index: dict[str, Any]
    asked: int | None = None  # model.max_sequence_length

    @cached_property
    def max_sequence_length(self) -> int | None:
        """Tokens that the text encoder behind CLIP, or the one in its place, reads of a caption; None of pipelines that have CLIP alone."""
        import diffusers

        takes = inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters
        if "max_sequence_length" in takes:
            return self.asked or int(takes["max_sequence_length"].default)
        if self.asked:
            raise UserError(f"model.max_sequence_length={self.asked}: a {self.pipeline} has no such setting, and its text encoders read as "
                            "much as they were made for; leave it out")
        return None

    @cached_property
    def parts(self) -> dict[str, tuple[str, str]]:
        """(library, class) of each part that is there."""
        pairs = {name: value for name, value in self.index.items() if isinstance(value, list) and len(value) == 2}
        return {name: (value[0], value[1]) for name, value in pairs.items() if all(value)}

    @property
    def network(self) -> str:
        """Which part is trained: `unet` or `transformer`."""
        return "unet" if "unet" in NEEDED[self.pipeline].split() else "transformer"

    def config(self, part: str) -> dict[str, Any]:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return _json(self.path / part / name)

    @property
    def latent(self) -> tuple[int, int]:
        """(channels of the latents, pixels of a side for each of their places), without loading the VAE."""
        vae = self.config("vae")
        blocks = vae.get("encoder_block_out_channels") or vae.get("block_out_channels") or [0] * 4
        return int(vae.get("latent_channels", 4)), 2 ** (len(blocks) - 1)

    def variant(self, part: str) -> str | None:
        """The variant to ask for where there are only files of one, such as fp16."""
        found = {match["one"] or match["two"] for f in (self.path / part).glob("*.safetensors") if (match := WEIGHTS.fullmatch(f.name))}
        return None if None in found or not found else sorted(found)[0]

    def load(self, part: str, dtype: torch.dtype | None = None) -> Any:
        """A part as its library loads it, models in evaluation mode. UserError where weights are missing or do not fit."""
        for noisy in ("diffusers", "transformers"):  # the run has one progress line of its own
            importlib.import_module(f"{noisy}.utils.logging").disable_progress_bar()
        library, name = self.parts[part]
        folder = str(self.path / part)
        kind = getattr(importlib.import_module(library), name, None)
        if kind is None:
            raise UserError(f"{self.path} wants {library}.{name} as its {part}, which the installed {library} does not have; update it")
        settings: dict[str, Any] = {"use_safetensors": True, "variant": self.variant(part), "output_loading_info": True}
        try:
            if dtype is None:
                return kind.from_pretrained(folder)
            model, report = kind.from_pretrained(folder, **{"torch_dtype" if library == "diffusers" else "dtype": dtype}, **settings)
        except Exception as error:  # a damaged file, another shape
            raise UserError(f"the {part} of {self.path} cannot be loaded ({type(error).__name__}: {_first_line(error)})") from error
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"the {part} of {self.path} lacks weights ({', '.join(missing[:3])}); download it again")
        return model.eval()

    def fingerprint(self, *parts: str) -> str:
        """sha256 over the contents of parts: weights, configs, vocabularies."""
        h = hashlib.sha256()
        for part in parts:
            folder = self.path / part
            h.update(f"{part} {Located(str(folder), None, '').fingerprint()}".encode())
            for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".txt", ".model")):
                # What saved it, and from where, says nothing of what it computes.
                said = file.read_bytes() if file.suffix != ".json" else json.dumps(_stripped(_json(file)), sort_keys=True).encode()
                h.update(file.name.encode() + hashlib.sha256(said).digest())
        return h.hexdigest()


def open_folder(folder: str | Path | PipelineFolder, max_sequence_length: int | None = None) -> PipelineFolder:
    """Reads model_index.json and looks whether everything is there. UserError naming what is missing. What is open stays as it is."""
    if isinstance(folder, PipelineFolder):
        return folder
    path = Path(folder).expanduser()
    if not (path / "model_index.json").is_file():
        raise UserError(f"{path} holds no model_index.json; it is not a folder that a pipeline of diffusers was saved to (save_pretrained)")
    index = _json(path / "model_index.json")
    name = index.get("_class_name", "")
    if name not in NEEDED:
        raise UserError(f"{path} is a {name or 'pipeline without a name'}, which prefopt does not know; it trains {', '.join(NEEDED)}")
    found = PipelineFolder(path, name, index, max_sequence_length)
    wanted = NEEDED[name].split()
    for part in dict.fromkeys([*wanted, *(p for p in found.parts if p.startswith(("text_encoder", "tokenizer")))]):
        if part not in found.parts or not (path / part).is_dir():
            raise UserError(f"{path} has no {part}, which a {name} needs; download the folder again, or copy the {part} of the model it is "
                            "made from")
        library, kind = found.parts[part]
        if library not in ("diffusers", "transformers"):
            raise UserError(f"the {part} of {path} is {library}.{kind}, code of its own, which prefopt does not run")
        if part.startswith("tokenizer"):
            if not any((path / part).iterdir()):
                raise UserError(f"the folder {part} of {path} is empty; download it again")
            continue
        found.config(part)
        if part != "scheduler" and not any((path / part).glob("*.safetensors")):
            pickled = sorted(f.name for f in (path / part).iterdir() if f.suffix in PICKLES)
            if pickled:
                raise UserError(f"the {part} of {path} has its weights in {pickled[0]}, a pickle, which could run any code when it is "
                                "loaded; prefopt loads safetensors only. If you trust it, load it with diffusers and write it anew "
                                "(save_pretrained).")
            raise UserError(f"the {part} of {path} has no weights (*.safetensors); download them")
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); the folder is not complete") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error})") from error


def _stripped(said: Any) -> Any:
    return {k: v for k, v in said.items() if not k.startswith(("_", "transformers_version"))} if isinstance(said, dict) else said


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
