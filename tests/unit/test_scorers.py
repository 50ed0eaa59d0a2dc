"""Scorers of pictures: equal to computations of their own from the same weights, whatever stands beside a picture in its batch."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from transformers import (
    BlipConfig,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
)

from prefopt.cli import main
from prefopt.config.schema import DataConfig, EvaluationConfig, RewardConfig
from prefopt.data.records import Completion, Example, Message
from prefopt.data.sources import load_data
from prefopt.errors import UserError
from prefopt.rewards import scorers
from prefopt.rewards.scorers import BLIP_L, CLIP_H, CLIP_MEAN, CLIP_STD, SCORERS, cropped, harmonic, padded
from prefopt.rewards.true_reward import held_out_rewards, make_rewards
from tests.toy import tokenizer

CPU = torch.device("cpu")
SIZE = 16  # pixels of the tiny models
LAYERS = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LONG = "a fox " * 60


def pictures(count: int = 5, seed: int = 0) -> list[Image.Image]:
    """Smooth random pictures of several shapes."""
    rng = np.random.default_rng(seed)
    shapes = [(20, 20), (33, 20), (20, 47), (16, 16), (50, 31)]
    small = [rng.integers(0, 256, (4, 5, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(p).resize(shapes[i % 5], Image.Resampling.BICUBIC) for i, p in enumerate(small)]


def example(caption: str, image: Image.Image, origin: str = "") -> Example:
    said = Completion([Message("assistant", [{"type": "image", "image": image}])])
    return Example([Message("user", [{"type": "text", "text": caption}])], [said], "demonstration", chat=False, origin=origin)


def words():
    """Ends each text with a token, as CLIP's does. Its number is not 2, by which transformers knows old configs of CLIP."""
    found = tokenizer("bytes", eos_token="<unk>")
    end = ("<unk>", found.eos_token_id)
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <unk>", special_tokens=[end])
    assert found.eos_token_id != 2
    return found


def clip_config() -> CLIPConfig:
    own = words()
    text = {"vocab_size": len(own), "hidden_size": 16, "max_position_embeddings": 24, "eos_token_id": own.eos_token_id,
            "bos_token_id": own.bos_token_id, "pad_token_id": own.pad_token_id, "hidden_act": "gelu", **LAYERS}
    vision = {"hidden_size": 20, "image_size": SIZE, "patch_size": 8, "hidden_act": "gelu", **LAYERS}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that leave nothing near 0, so that a part left out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.2) + ("norm" in name and name.endswith("weight")))
        if hasattr(model, "logit_scale"):
            model.logit_scale.fill_(math.log(40.0))
    return model.eval()


def clip_folder(folder, seed: int = 0):
    spread(CLIPModel(clip_config()), seed).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def clip_pixels(image: Image.Image) -> torch.Tensor:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    process = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return process(images=[image], return_tensors="pt")["pixel_values"][0]


# ---- the authors' models, written out ------------------------------------------------------------


class Block(nn.Module):
    """A layer of open_clip's transformers."""

    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 24))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(24, width))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width) for _ in range(2)])

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClip(nn.Module):
    """open_clip's CLIP, with its names of parameters."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 20, 8, 8, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.zeros(20))
        self.visual.positional_embedding = nn.Parameter(torch.zeros(5, 20))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(20), nn.LayerNorm(20)
        self.visual.transformer = Tower(20)
        self.visual.proj = nn.Parameter(torch.zeros(20, 12))
        self.token_embedding = nn.Embedding(vocabulary, 16)
        self.positional_embedding = nn.Parameter(torch.zeros(24, 16))
        self.transformer, self.ln_final = Tower(16), nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.zeros(16, 12))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def score(self, pixels, ids):
        v = self.visual
        x = v.conv1(pixels[None]).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(1, 1, -1), x], 1) + v.positional_embedding
        image = v.ln_post(v.transformer(v.ln_pre(x))[:, 0]) @ v.proj
        mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        y = self.token_embedding(torch.tensor([ids])) + self.positional_embedding[: len(ids)]
        text = self.ln_final(self.transformer(y, mask))[:, -1] @ self.text_projection  # nothing after the end token
        return F.cosine_similarity(image, text).item()


def attention(q, k, v, heads: int):
    split = [x.view(*x.shape[:-1], heads, -1).transpose(0, 1) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*split).transpose(0, 1).reshape(q.shape)


def image_reward(t: dict[str, torch.Tensor], pixels: torch.Tensor, ids: list[int]) -> float:
    """ImageReward of one picture and one caption, from tensors with the authors' names."""

    def linear(x, name):
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)

    see, say = "blip.visual_encoder", "blip.text_encoder"
    x = F.conv2d(pixels[None], t[f"{see}.patch_embed.proj.weight"], t[f"{see}.patch_embed.proj.bias"], stride=8).flatten(2)[0].T
    x = torch.cat([t[f"{see}.cls_token"][0], x]) + t[f"{see}.pos_embed"][0]
    for i in range(2):
        b = f"{see}.blocks.{i}"
        x = x + linear(attention(*linear(norm(x, f"{b}.norm1", 1e-6), f"{b}.attn.qkv").chunk(3, -1), heads=2), f"{b}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{b}.norm2", 1e-6), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    seen = norm(x, f"{see}.norm", 1e-6)
    y = t[f"{say}.embeddings.word_embeddings.weight"][ids] + t[f"{say}.embeddings.position_embeddings.weight"][: len(ids)]
    y = norm(y, f"{say}.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        b = f"{say}.encoder.layer.{i}"
        for part, other in (("attention", y), ("crossattention", seen)):
            other = y if part == "attention" else other
            mixed = attention(*(linear(z, f"{b}.{part}.self.{n}") for z, n in ((y, "query"), (other, "key"), (other, "value"))), heads=2)
            y = norm(linear(mixed, f"{b}.{part}.output.dense") + y, f"{b}.{part}.output.LayerNorm", 1e-12)
        y = norm(linear(F.gelu(linear(y, f"{b}.intermediate.dense")), f"{b}.output.dense") + y, f"{b}.output.LayerNorm", 1e-12)
    h = y[0]
    for n in (0, 2, 4, 6, 7):
        h = linear(h, f"mlp.layers.{n}")
    return ((h - 0.16717362830052426) / 1.0333394966054072).item()


# ---- folders -------------------------------------------------------------------------------------


def head(prefix: str, width: int, seed: int = 3) -> dict[str, torch.Tensor]:
    generator, out = torch.Generator().manual_seed(seed), {}
    for n, wide in zip((0, 2, 4, 6, 7), (10, 8, 6, 4, 1), strict=True):
        out[f"{prefix}{n}.weight"] = torch.randn(wide, width, generator=generator) * 0.4
        out[f"{prefix}{n}.bias"] = torch.randn(wide, generator=generator)
        width = wide
    return out


def hpsv2_folder(folder):
    """As docs/image-rewards.md says: the authors' tensors, with CLIP's config and tokenizer beside them."""
    folder.mkdir()
    model = spread(OpenClip(len(words())), 1)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    clip_config().save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def imagereward_folder(folder):
    folder.mkdir()
    own = words()
    text = BlipTextConfig(vocab_size=len(own), hidden_size=16, encoder_hidden_size=20, max_position_embeddings=24,
                          bos_token_id=own.bos_token_id, sep_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, **LAYERS)
    vision = BlipVisionConfig(hidden_size=20, image_size=SIZE, patch_size=8, layer_norm_eps=1e-6, **LAYERS)
    tensors = {f"blip.text_encoder.{n}": p for n, p in spread(BlipTextModel(text, add_pooling_layer=False), 1).state_dict().items()}
    theirs = {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed", "post_layernorm": "norm",
              "embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks", "layer_norm": "norm",
              "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj"}
    for name, tensor in spread(BlipVisionModel(vision), 2).state_dict().items():
        for ours, old in theirs.items():
            name = name.replace(ours, old)
        tensors[f"blip.visual_encoder.{name}"] = tensor
    tensors |= {"blip.vision_proj.weight": torch.zeros(2, 20), "blip.text_encoder.embeddings.position_ids": torch.arange(24)[None]}
    save_file(tensors | head("mlp.layers.", 16), folder / "model.safetensors")
    BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def aesthetic_folder(folder, layers: dict[str, torch.Tensor] | None = None):
    clip_folder(folder)
    save_file(head("layers.", 12) if layers is None else layers, folder / "head.safetensors")
    return folder


FOLDERS = {"pickscore": clip_folder, "clip": clip_folder, "hpsv2": hpsv2_folder, "imagereward": imagereward_folder,
           "aesthetic": aesthetic_folder, "harmonic": clip_folder}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folders = {kind: make(tmp_path_factory.mktemp("scorers") / kind) for kind, make in FOLDERS.items()}
    return SimpleNamespace(folders=folders, scorers={kind: SCORERS[kind](str(folder), CPU) for kind, folder in folders.items()})


CAPTIONS = ["a fox at the lake", "an owl", "a fox at the lake", "two herons walk home", "an owl"]


# ---- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pickscore", "clip"])
def test_clip_scores_are_those_of_the_whole_model(kind, opened):
    model = CLIPModel.from_pretrained(opened.folders[kind]).eval()
    scores = opened.scorers[kind]([example(c, p) for c, p in zip(CAPTIONS, pictures(), strict=True)])
    for caption, image, score in zip(CAPTIONS, pictures(), scores, strict=True):
        with torch.no_grad():
            out = model(**words()([caption], return_tensors="pt"), pixel_values=clip_pixels(image)[None])
        wanted = out.logits_per_image.item() / (1 if kind == "pickscore" else 40)
        assert score == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert np.std(scores) > 0.01


def test_hpsv2_is_the_authors_model_on_the_whole_picture(opened):
    model = OpenClip(len(words()))
    model.load_state_dict(load_file(opened.folders["hpsv2"] / "model.safetensors"))
    scores = opened.scorers["hpsv2"]([example(c, p) for c, p in zip(CAPTIONS, pictures(), strict=True)])
    with torch.no_grad():
        wanted = [model.score(padded(p, SIZE), words()(c)["input_ids"]) for c, p in zip(CAPTIONS, pictures(), strict=True)]
        cut = [model.score(cropped(p, SIZE), words()(c)["input_ids"]) for c, p in zip(CAPTIONS, pictures(), strict=True)]
    assert scores == pytest.approx(wanted, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(scores, cut, strict=True)) > 0.01, "cropped pictures would have other scores"


def test_image_reward_is_the_authors_model(opened):
    tensors = load_file(opened.folders["imagereward"] / "model.safetensors")
    scores = opened.scorers["imagereward"]([example(c, p) for c, p in zip(CAPTIONS, pictures(), strict=True)])
    shown = [cropped(p, SIZE, half=round) for p in pictures()]
    wanted = [image_reward(tensors, pixels, words()(c)["input_ids"]) for c, pixels in zip(CAPTIONS, shown, strict=True)]
    assert scores == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert np.std(scores) > 0.01


def test_aesthetic_reads_the_direction_of_the_features_and_no_caption(opened):
    folder = opened.folders["aesthetic"]
    model = CLIPModel.from_pretrained(folder).eval()
    layers = load_file(folder / "head.safetensors")
    scores = opened.scorers["aesthetic"]([example(c, p) for c, p in zip(CAPTIONS, pictures(), strict=True)])
    for image, score in zip(pictures(), scores, strict=True):
        with torch.no_grad():
            x = model.visual_projection(model.vision_model(clip_pixels(image)[None]).pooler_output)[0]
        x = x / x.norm()
        for n in (0, 2, 4, 6, 7):
            x = layers[f"layers.{n}.weight"] @ x + layers[f"layers.{n}.bias"]
        assert score == pytest.approx(x.item(), rel=1e-4, abs=1e-4)
    assert scores == opened.scorers["aesthetic"]([example("something else", p) for p in pictures()])


@pytest.mark.parametrize("form", ["hub", "one-layer", "hub-one-layer"])
def test_aesthetic_heads_come_in_several_files(form, tmp_path, opened):
    weight, bias = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)), torch.tensor([5.0])
    if form == "one-layer":
        folder = aesthetic_folder(tmp_path / "a", {"weight": weight, "bias": bias})
    else:  # one file with the encoder and the head, and the config of the encoder alone
        folder = tmp_path / "a"
        opened.scorers["aesthetic"].vision.save_pretrained(folder)
        more = head("layers.", 12) if form == "hub" else {"predictor.weight": weight, "predictor.bias": bias}
        save_file({**load_file(folder / "model.safetensors"), **more}, folder / "model.safetensors")
    rows = [example("an owl", p) for p in pictures()]
    scores = SCORERS["aesthetic"](str(folder), CPU)(rows)
    if form == "hub":
        assert scores == pytest.approx(opened.scorers["aesthetic"](rows), abs=1e-5)
    else:
        features = [opened.scorers["aesthetic"].vision(cropped(p, SIZE)[None]).image_embeds[0] for p in pictures()]
        assert scores == pytest.approx([5 + (weight[0] @ (x / x.norm())).item() for x in features], abs=1e-4)


@pytest.mark.parametrize("kind", sorted(FOLDERS))
def test_trap_4_27_a_score_does_not_depend_on_what_else_is_judged(kind, opened, monkeypatch):
    rows = [example(c, p) for c, p in zip(CAPTIONS * 2, pictures(10), strict=True)]
    scorer = opened.scorers[kind]
    scores = scorer(rows)
    order = random.Random(0).sample(range(10), 10)
    assert scorer([rows[i] for i in order]) == pytest.approx([scores[i] for i in order], rel=1e-4, abs=1e-5)
    monkeypatch.setattr(scorers, "BATCH", 3)
    assert scorer(rows) == pytest.approx(scores, rel=1e-4, abs=1e-5)
    assert [scorer([row])[0] for row in rows] == pytest.approx(scores, rel=1e-4, abs=1e-5)
    assert scorer([]) == []
    assert all(isinstance(score, float) for score in scores)
    if kind in ("clip", "hpsv2"):
        assert all(-1 <= score <= 1 for score in scores)
    if kind == "pickscore":
        assert all(-40 <= score <= 40 for score in scores)


@pytest.mark.parametrize("kind", sorted(set(FOLDERS) - {"aesthetic"}))
def test_equal_captions_are_read_once_and_long_ones_lose_their_end(kind, opened, capsys):
    scorer = SCORERS[kind](str(opened.folders[kind]), CPU)
    image = pictures()[0]
    once, again, longer = scorer([example(LONG, image), example(LONG, image), example(LONG + "and an owl", image)])
    assert once == pytest.approx(again) and once == pytest.approx(longer)
    assert scorer.cut == 2, "two different captions"
    assert "longer than 24 tokens" in capsys.readouterr().err
    scorer([example("an owl", image)])
    assert scorer.cut == 2 and not capsys.readouterr().err


@pytest.mark.parametrize("size", [(40, 30), (31, 50), (16, 16), (17, 90), (8, 9)])
def test_pixels_are_prepared_as_transformers_does(size):
    image = pictures()[1].resize(size)
    assert torch.allclose(cropped(image, SIZE), clip_pixels(image), atol=1e-5)


def test_the_whole_picture_is_shown_between_black_margins():
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    out = padded(image, SIZE) * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    assert out.shape == (3, SIZE, SIZE)
    assert torch.allclose(out[:, 4:12], torch.ones(3, 8, SIZE), atol=1e-5)
    assert out[:, :4].abs().max() < 1e-6 and out[:, 12:].abs().max() < 1e-6
    square = Image.effect_mandelbrot((SIZE, SIZE), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    assert torch.equal(padded(square, SIZE), cropped(square, SIZE))


def test_the_published_sizes():
    """986 million parameters are said of CLIP-H; ImageReward's file in fp32 has 1.79 GB, of which two projections are not read."""
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**CLIP_H))
        text, vision = BlipTextConfig(**BLIP_L["text_config"]), BlipVisionConfig(**BLIP_L["vision_config"])
        blip = [BlipTextModel(text, add_pooling_layer=False), BlipVisionModel(vision)]
    assert sum(p.numel() for p in clip.parameters()) == pytest.approx(986.1e6, abs=0.1e6)
    widths = [768, 1024, 128, 64, 16, 1]
    rest = sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False)) + 256 * (1025 + 769)
    assert 4 * (sum(p.numel() for model in blip for p in model.parameters()) + rest) == pytest.approx(1.79e9, abs=0.005e9)


def test_what_cannot_be_used_is_refused_in_a_sentence(tmp_path, opened):
    def refused(kind: str, path, *parts: str) -> None:
        with pytest.raises(UserError) as error:
            SCORERS[kind](str(path), CPU)
        text = str(error.value)
        assert text.startswith(f"reward.path={path}") and "\n" not in text and all(part in text for part in parts), text

    refused("pickscore", "no/such-model", "nor to be had from the hub")
    refused("clip", "./nowhere", "there is no such folder")
    with pytest.raises(UserError, match="^evaluation.rewards: clip:./nowhere: there is no such folder"):  # nobody has set reward.path
        held_out_rewards(EvaluationConfig(rewards=["clip:./nowhere"]))
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "HPS_v2.1_compressed.pt").write_bytes(b"")
    refused("hpsv2", tmp_path / "pickle", "HPS_v2.1_compressed.pt, a pickle", "docs/image-rewards.md")
    refused("imagereward", opened.folders["clip"], "tensors are missing", "docs/image-rewards.md")
    refused("clip", opened.folders["imagereward"], "of type blip")
    refused("aesthetic", opened.folders["clip"], "its head is neither")
    refused("aesthetic", aesthetic_folder(tmp_path / "wide", head("layers.", 9)), "layer 0 of its head reads 9 features, and 12 come in")
    relu = {name.replace("layers.2", "layers.3"): t for name, t in head("layers.", 12).items()}
    refused("aesthetic", aesthetic_folder(tmp_path / "relu", relu), "neither one linear layer nor the authors' five")
    bare = tmp_path / "bare"
    CLIPModel(clip_config()).save_pretrained(bare)
    refused("clip", bare, "no tokenizer there, and that of openai/clip-vit-large-patch14 cannot be loaded")
    text = example("an owl", pictures()[0], "rows.jsonl row 3")
    text.completions[0].messages[0].content = [{"type": "text", "text": "an owl"}]
    with pytest.raises(UserError, match="rows.jsonl row 3: this reward judges pictures"):
        opened.scorers["clip"]([text])
    (tmp_path / "broken.png").write_bytes(b"none")
    broken = example("an owl", pictures()[0], "rows.jsonl row 4")
    broken.completions[0].messages[0].content = [{"type": "image", "path": str(tmp_path / "broken.png")}]
    with pytest.raises(UserError, match="rows.jsonl row 4: "):
        opened.scorers["clip"]([broken])


@pytest.mark.parametrize("kind", sorted(FOLDERS))
def test_the_config_opens_them(kind, opened):
    data = DataConfig(name="mine", source="files")
    (name, reward), *more = make_rewards(RewardConfig(kind, str(opened.folders[kind])), data).items()
    assert name == "reward" and not more
    rows = [example(c, p) for c, p in zip(CAPTIONS, pictures(), strict=True)]
    assert reward(rows) == pytest.approx(opened.scorers[kind](rows))
    assert reward.source["path"] == str(opened.folders[kind]) and len(reward.source["fingerprint"]) == 64


def test_pairs_of_pictures_are_labelled_by_a_scorer(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    shown = pictures(6)
    for i, image in enumerate(shown):
        image.save(tmp_path / "in" / f"{i}.png")
    sides = [{"image": f"{i}.png"} for i in range(6)]
    sides[2] |= {"ops": ["flip"]}
    rows = [{"prompt": caption, "chosen": sides[2 * i], "rejected": sides[2 * i + 1]} for i, caption in enumerate(CAPTIONS[:3])]
    (tmp_path / "in" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = f"reward.path={opened.folders['clip']}"
    assert main(["label", "data=pictures", "data.path=in/pairs.jsonl", "reward=clip", where, "hardware=cpu", "output=out.jsonl"]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    shown[2] = shown[2].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for i, (row, given) in enumerate(zip(found, rows, strict=True)):
        a, b = opened.scorers["clip"]([example(given["prompt"], image) for image in shown[2 * i : 2 * i + 2]])
        assert (row["reward_chosen"], row["reward_rejected"]) == pytest.approx((max(a, b), min(a, b)), abs=1e-5)
        best = given["chosen" if a >= b else "rejected"]
        assert row["chosen"] == {**best, "image": f"in/{best['image']}"}
    read = load_data(DataConfig(name="mine", source="files", path="out.jsonl", pictures=True, eval_fraction=0.0))[0].examples
    assert [Path(c.picture["path"]).is_file() for e in read for c in e.completions] == [True] * 6


@pytest.mark.parametrize(("weight", "wanted"), [(0.0, 0.6), (0.3, 0.6486486), (0.5, 0.6857143), (1.0, 0.8)])
def test_the_harmonic_reward_of_rpo(weight, wanted):
    """A likeness of 0.8 and a match of 0.6 (arXiv 2407.12164)."""
    assert harmonic(0.8, 0.6, weight) == pytest.approx(wanted, abs=1e-7)


def test_likeness_is_to_the_mean_of_the_photos(opened, tmp_path):
    """Without it the reward is the match with the caption, moved to [0, 1]; with all weight on it a photo alone is as like as can be."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(2)]
    asked = [example("an owl", image) for image in images]
    cosines = opened.scorers["clip"](asked)
    assert opened.scorers["harmonic"](asked) == pytest.approx([(c + 1) / 2 for c in cosines], abs=1e-6)
    images[0].save(tmp_path / "photo.png")
    like = SCORERS["harmonic"](str(opened.folders["clip"]), CPU, photos=str(tmp_path), likeness=1.0)(asked)
    assert like[0] == pytest.approx(1.0, abs=1e-6) and like[1] < like[0]
    with pytest.raises(UserError, match="asks for likeness to photos of a subject, and there is no folder with any"):
        SCORERS["harmonic"](str(opened.folders["clip"]), CPU, photos=str(tmp_path / "none"), likeness=0.5)
