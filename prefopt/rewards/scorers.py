"""Published scorers of pictures as rewards: PickScore, HPSv2.1, ImageReward, CLIP score, RPO's harmonic reward, LAION's aesthetic score.

Thin code over the CLIP and BLIP of transformers; no package of a scorer is imported. Weights are read from a folder or the hub, safetensors
only. Where authors publish pickles, docs/image-rewards.md tells how to write them anew; tensors keep the authors' names, which are mapped
here. Everything is computed in fp32: between two pictures of a prompt scores often differ in the third digit, which bf16 does not have.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.data.pictures import SUFFIXES, load_picture
from prefopt.data.records import Example
from prefopt.errors import UserError
from prefopt.policies.locate import Located
from prefopt.rewards.pictures import picture

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 32  # pictures, or captions, at a time
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HELP = "docs/image-rewards.md tells how a folder is made"
# Where a folder has no config.json of its own: the architecture that the authors' weights belong to.
CLIP_H = {
    "projection_dim": 1024,
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                    "hidden_act": "gelu", "projection_dim": 1024},
    "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
                      "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "projection_dim": 1024},
}  # fmt: skip
BLIP_L = {
    "text_config": {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "num_hidden_layers": 12,
                    "num_attention_heads": 12, "layer_norm_eps": 1e-12},
    "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                      "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6},
}  # fmt: skip


# ---- pixels --------------------------------------------------------------------------------------


def cropped(image: Image, size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD,
            half: Callable[[float], int] = math.floor) -> Tensor:
    """[3, size, size]: the shorter side made `size` long (bicubic, on 8 bits), the middle cut out, (x / 255 - mean) / std.

    Where the margins of the longer side are no whole number, transformers rounds them down and torchvision to the nearest (`half`).
    """
    from PIL import Image as pil

    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    image = image.resize((size, long) if width <= height else (long, size), pil.Resampling.BICUBIC)
    left, top = (half((side - size) / 2) for side in image.size)
    return _normalised(_pixels(image.crop((left, top, left + size, top + size))), mean, std)


def padded(image: Image, size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """[3, size, size]: the longer side made `size` long (bicubic), black added on both sides of the other, normalised as in `cropped`."""
    pixels = _pixels(image)
    scale = size / max(pixels.shape[1:])
    height, width = (round(side * scale) for side in pixels.shape[1:])
    if scale != 1:
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", align_corners=False, antialias=True)[0]
    left, top = (size - width) // 2, (size - height) // 2
    return _normalised(F.pad(pixels, (left, size - width - left, top, size - height - top)), mean, std)


def _pixels(image: Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


# ---- files ---------------------------------------------------------------------------------------


class Files:
    """The files of the model at `path`: a folder, or a hub id. Everything it raises is a `UserError` that begins with `asked`, the setting
    that named it."""

    def __init__(self, path: str, asked: str | None = None):
        self.path, self.asked = path, asked or f"reward.path={path}"
        given = Path(path).expanduser()
        if not given.is_dir() and (path.startswith((".", "/", "~")) or given.exists()):
            raise self.wrong(f"there is no such folder (looked from {Path.cwd()})")
        self.folder = given if given.is_dir() else self._fetch()
        found = sorted(self.folder.glob("*.safetensors"))
        if not found:
            pickles = [f.name for f in sorted(self.folder.iterdir()) if f.suffix in (".bin", ".pt", ".pth", ".ckpt")]
            what = f"its weights are in {pickles[0]}, a pickle, which could run any code when it is loaded; " if pickles else ""
            raise self.wrong(f"{what}there are no safetensors, and prefopt reads nothing else; {HELP}")
        from safetensors.torch import load_file

        # Position numbers are no weights; older files hold them. Some copies on the hub put `model.` before the authors' names.
        merged = {name.removeprefix("model."): t for file in found for name, t in load_file(file).items()}
        self.tensors = {name: t for name, t in merged.items() if not name.endswith("position_ids")}

    def wrong(self, why: str) -> UserError:
        return UserError(f"{self.asked}: {why}")

    def _fetch(self) -> Path:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.path, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
        except Exception as error:  # not found, gated, no network: the hub client has many types for one situation
            raise self.wrong(f"neither a folder, nor to be had from the hub ({type(error).__name__}); check the name and the network, or "
                             "give a folder") from error

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file; empty where it is not there."""
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise self.wrong(f"{name} cannot be read ({error})") from error
        return found if isinstance(found, dict) else {}

    def tokenizer(self, published: str) -> Any:
        """Of the folder, or else the one that the authors use."""
        from transformers import AutoTokenizer

        own = any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"))
        try:
            found = AutoTokenizer.from_pretrained(self.folder if own else published)
        except Exception as error:
            whose = "its tokenizer" if own else f"no tokenizer there, and that of {published}"
            raise self.wrong(f"{whose} cannot be loaded ({type(error).__name__}); put the files of {published} into the folder") from error
        if found.pad_token is None:
            found.pad_token = found.eos_token
        return found

    def model(self, kind: type[nn.Module], config: Any, tensors: Mapping[str, Tensor], **settings: Any) -> nn.Module:
        """A model of transformers with these weights in fp32, all of which it must have, and no others."""
        from transformers.utils import logging

        logging.disable_progress_bar()  # the run has one progress line of its own
        with torch.device("meta"):
            wanted = {name: t.shape for name, t in kind(config, **settings).state_dict().items()}
        odd = [n for n in {**wanted, **tensors} if n not in wanted or n not in tensors or wanted[n] != tensors[n].shape]
        if odd:
            raise self.wrong(f"this is no {kind.__name__} as its config has it: {len(odd)} tensors are missing, too many or of another "
                             f"shape, such as {odd[0]}; {HELP}")
        return kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=torch.float32, **settings)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, without the beginning."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def linears(self, tensors: Mapping[str, Tensor], width: int) -> nn.Sequential:
        """A head of linear layers with nothing between them but dropout, which scoring leaves out. `tensors`: N.weight and N.bias."""
        numbers = sorted({int(name.split(".")[0]) for name in tensors if re.fullmatch(r"\d+\.(weight|bias)", name)})
        if numbers not in ([0], [0, 2, 4, 6, 7]) or set(tensors) != {f"{n}.{what}" for n in numbers for what in ("weight", "bias")}:
            raise self.wrong(f"its head is neither one linear layer nor the authors' five (it has: {', '.join(sorted(tensors)) or 'none'})")
        layers = []
        for number in numbers:
            weight, bias = tensors[f"{number}.weight"], tensors[f"{number}.bias"]
            if weight.shape[1] != width:
                raise self.wrong(f"layer {number} of its head reads {weight.shape[1]} features, and {width} come in; the head belongs to "
                                 "another model")
            layer, width = nn.Linear(width, len(weight)), len(weight)
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer)
        if width != 1:
            raise self.wrong(f"its head gives {width} numbers, and a reward is one")
        return nn.Sequential(*layers)

    def clip_config(self) -> Any:
        from transformers import CLIPConfig

        settings = self.read("config.json")
        if settings and settings.get("model_type") != "clip":
            raise self.wrong(f"this is a model of type {settings.get('model_type')}, and CLIP is needed")
        return CLIPConfig.from_pretrained(self.folder) if settings else CLIPConfig(**CLIP_H)

    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of pixels; OpenAI's, which most models of this kind took over, where the folder does not say."""
        settings = self.read("preprocessor_config.json")
        return settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)


# ---- the scorers ---------------------------------------------------------------------------------


class Scorer:
    """A reward of each example's first completion, a picture, given its prompt, the caption.

    Captions that are longer than the text encoder reads lose their end; `cut` counts them. Equal captions are read once per call.
    """

    what = ""  # reward=...
    context = 0  # tokens of a caption that are read; 0: none
    tokenizer: Any = None

    def __init__(self, path: str, device: torch.device, asked: str | None = None):
        self.device, self.cut, self.said = device, 0, 0
        files = Files(path, asked)
        self.build(files)
        self.modules().to(device).eval().requires_grad_(False)
        self.source = {"path": path, "fingerprint": Located(str(files.folder), None, path).fingerprint()}

    def build(self, files: Files) -> None:
        """Reads the model."""
        raise NotImplementedError

    def modules(self) -> nn.ModuleList:
        """What is moved to the device."""
        raise NotImplementedError

    def pixels(self, image: Image) -> Tensor:
        """[3, h, w], as the model takes them."""
        raise NotImplementedError

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[captions, ...]: what `score` needs of captions."""
        return torch.stack([ids, mask], 1)

    def score(self, pixels: Tensor, captions: Tensor) -> Tensor:
        """[pictures], of pictures and their captions as `read` gave them."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example]) -> list[float]:
        place = {text: number for number, text in enumerate(dict.fromkeys(e.prompt_text for e in examples))}
        captions = torch.cat([self._captions(list(place)[i : i + BATCH]) for i in range(0, len(place), BATCH)]) if place else None
        out: list[float] = []
        for start in range(0, len(examples), BATCH):
            chunk = examples[start : start + BATCH]
            pixels = torch.stack([self.pixels(picture(example)) for example in chunk]).to(self.device)
            out += self.score(pixels, captions[[place[e.prompt_text] for e in chunk]]).tolist()
        return out

    def _captions(self, texts: list[str]) -> Tensor:
        if not self.context:
            return torch.zeros(len(texts), 0, device=self.device)
        self.cut += sum(len(ids) > self.context for ids in self.tokenizer(texts, truncation=False, verbose=False)["input_ids"])
        if self.cut and self.cut >= 2 * self.said:  # whenever their number has doubled
            self.said = self.cut
            print(f"reward={self.what}: {self.cut} captions so far were longer than {self.context} tokens; their ends were not read",
                  file=sys.stderr)
        given = self.tokenizer(texts, truncation=True, max_length=self.context, padding="max_length", return_tensors="pt").to(self.device)
        return self.read(given["input_ids"], given["attention_mask"])


class ClipScore(Scorer):
    """CLIP score: r = cos(E_image(x), E_text(c)), in [-1, 1] (arXiv 2103.00020).

    The paper of that name reports 2.5 max(r, 0) (arXiv 2104.08718), others 100 r. Of PickScore's folder it is the cosine without its scale.
    """

    what = "clip"
    published = "openai/clip-vit-large-patch14"

    def build(self, files: Files) -> None:
        from transformers import CLIPModel

        if "visual.conv1.weight" in files.tensors:
            files.tensors = from_open_clip(files.tensors)
        config = files.clip_config()
        self.model = files.model(CLIPModel, config, files.tensors)
        self.size, self.context = config.vision_config.image_size, config.text_config.max_position_embeddings
        self.tokenizer, self.statistics = files.tokenizer(self.published), files.statistics()

    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.model])

    def pixels(self, image: Image) -> Tensor:
        return cropped(image, self.size, *self.statistics)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    def seen(self, pixels: Tensor) -> Tensor:
        """[pictures, d] directions."""
        return F.normalize(self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output), dim=-1)

    def score(self, pixels: Tensor, captions: Tensor) -> Tensor:
        return (self.seen(pixels) * captions).sum(-1)


class Harmonic(ClipScore):
    """The harmonic reward of RPO (arXiv 2407.12164): r = 1 / (likeness / a + (1 - likeness) / b), in (0, 1].

    a = (cos(picture, mean of the photos) + 1) / 2, b = (cos(picture, caption) + 1) / 2. The paper takes ALIGN's features, we a CLIP's.
    Raises `UserError` where likeness is asked for and there are no photos.
    """

    what = "harmonic"

    def __init__(self, path: str, device: torch.device, photos: str | None = None, likeness: float = 0.0):
        super().__init__(path, device)
        self.likeness, self.subject = likeness, None
        if likeness > 0:
            files = Path(photos).iterdir() if photos and Path(photos).is_dir() else ()
            found = sorted(p for p in files if p.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"reward.photos={photos}: reward.likeness={likeness:g} asks for likeness to photos of a subject, and there "
                                f"is no folder with any; name one, or set reward.likeness=0 (images: {' '.join(SUFFIXES)})")
            with torch.no_grad():
                pixels = torch.stack([self.pixels(load_picture({"path": str(p)})) for p in found]).to(device)
                self.subject = F.normalize(self.seen(pixels).mean(0), dim=-1)

    def score(self, pixels: Tensor, captions: Tensor) -> Tensor:
        seen = self.seen(pixels)
        match = ((seen * captions).sum(-1) + 1) / 2
        return match if self.subject is None else harmonic((seen @ self.subject + 1) / 2, match, self.likeness)


def harmonic(likeness: Any, match: Any, weight: float) -> Any:
    """The weighted harmonic mean of two similarities in (0, 1]; `weight` is that of the first."""
    return 1 / (weight / likeness + (1 - weight) / match)


class PickScore(ClipScore):
    """PickScore: r = exp(s) cos(E_image(x), E_text(c)), s the model's own scale (arXiv 2305.01569), about 17 to 24.

    CLIP-H fitted to choices between two pictures of a prompt; sigmoid(r_1 - r_2) is the fitted probability of the first. Some papers divide
    r by 26 or give the cosine (reward=clip).
    """

    what = "pickscore"
    published = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def score(self, pixels: Tensor, captions: Tensor) -> Tensor:
        return self.model.logit_scale.exp() * super().score(pixels, captions)


class HPSv2(ClipScore):
    """HPSv2.1: r = cos(E_image(x), E_text(c)), in [-1, 1], about 0.2 to 0.35; tables show 100 r (arXiv 2306.09341).

    CLIP-H as PickScore's, but the whole picture is shown to it: the longer side is scaled and the rest is black. Cropping, which many
    re-implementations do, gives other scores for all but square pictures.
    """

    what = "hpsv2"
    published = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def pixels(self, image: Image) -> Tensor:
        return padded(image, self.size, *self.statistics)


class ImageReward(Scorer):
    """ImageReward: r = (h(f) - 0.167) / 1.033, f the first state of BLIP's text encoder, which attends to the picture (arXiv 2304.05977).

    h is five linear layers with nothing between them. The two numbers made r of the authors' own validation set have mean 0 and variance 1;
    most pictures lie within -2.5 to 2. Captions are read up to 35 tokens.
    """

    what = "imagereward"
    mean, std = 0.16717362830052426, 1.0333394966054072

    def build(self, files: Files) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        settings = {**BLIP_L, **{key: value for key, value in files.read("config.json").items() if key in BLIP_L}}
        text, vision = BlipTextConfig(**settings["text_config"]), BlipVisionConfig(**settings["vision_config"])
        self.vision = files.model(BlipVisionModel, vision, from_blip(files.part("blip.visual_encoder.")))
        self.text = files.model(BlipTextModel, text, files.part("blip.text_encoder."), add_pooling_layer=False)
        self.head = files.linears(files.part("mlp.layers."), text.hidden_size)
        self.size, self.context = vision.image_size, min(35, text.max_position_embeddings)
        self.tokenizer = files.tokenizer("google-bert/bert-base-uncased")

    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.vision, self.text, self.head])

    def pixels(self, image: Image) -> Tensor:
        return cropped(image, self.size, half=round)

    def score(self, pixels: Tensor, captions: Tensor) -> Tensor:
        ids, mask = captions.unbind(1)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        states = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(states[:, 0]).squeeze(-1) - self.mean) / self.std


class Aesthetic(Scorer):
    """LAION's aesthetic score: r = h(E_image(x) / |E_image(x)|), about 1 to 10; it reads no caption (LAION-5B, arXiv 2210.08402).

    h is one linear layer or five, fitted to ratings. A head goes with the CLIP it was fitted on (OpenAI's ViT-L/14 for the usual ones);
    with another of the same width it gives numbers that mean nothing.
    """

    what = "aesthetic"

    def build(self, files: Files) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        settings = files.read("config.json")
        if not settings:
            raise files.wrong(f"there is no config.json of the CLIP that its head was fitted on; {HELP}")
        config = CLIPVisionConfig.from_pretrained(files.folder)
        config.projection_dim = settings.get("projection_dim", config.projection_dim)
        seen = {n: t for n, t in files.tensors.items() if n.startswith(("vision_model.", "visual_projection."))}
        self.vision = files.model(CLIPVisionModelWithProjection, config, seen)
        # Authors' names: of the five layers, of one as the hub has it, of one as LAION's own file has it.
        bare = {f"0.{name}": files.tensors[name] for name in ("weight", "bias") if name in files.tensors}
        single = {f"0.{name}": t for name, t in files.part("predictor.").items()}
        self.head = files.linears(files.part("layers.") or single or bare, config.projection_dim)
        self.size, self.statistics = config.image_size, files.statistics()

    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.vision, self.head])

    def pixels(self, image: Image) -> Tensor:
        return cropped(image, self.size, *self.statistics)

    def score(self, pixels: Tensor, captions: Tensor) -> Tensor:
        return self.head(F.normalize(self.vision(pixel_values=pixels).image_embeds, dim=-1)).squeeze(-1)


SCORERS: dict[str, type[Scorer]] = {kind.what: kind for kind in (PickScore, HPSv2, ImageReward, ClipScore, Aesthetic, Harmonic)}


# ---- names of tensors ----------------------------------------------------------------------------

_OPEN_CLIP = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."), ("transformer.resblocks.", "text_model.encoder.layers."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"), ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."), ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."), ("ln_final.", "text_model.final_layer_norm."),
    ("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"),
)  # fmt: skip
_LAYER = ((".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".attn.out_proj.", ".self_attn.out_proj."),
          (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."))
_BLIP = (("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
         ("patch_embed.proj.", "embeddings.patch_embedding."), ("norm.", "post_layernorm."))
_BLIP_LAYER = (("blocks.", "encoder.layers."), (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."),
               (".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection."))


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an open_clip model, under the names that transformers' CLIPModel has for them."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in _OPEN_CLIP:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        for old, new in _LAYER:
            name = name.replace(old, new)
        if ".attn.in_proj_" in name:  # query, key and value in one
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                out[name.replace(".attn.in_proj_", f".self_attn.{which}_proj.")] = part
        else:
            out[name] = tensor.T if name in ("visual_projection.weight", "text_projection.weight") else tensor
    return out


def from_blip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of BLIP's picture encoder, under the names that transformers' BlipVisionModel has for them."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in _BLIP:
            name = new + name.removeprefix(old) if name.startswith(old) else name
        for old, new in _BLIP_LAYER:
            name = name.replace(old, new)
        out[name] = tensor
    return out
