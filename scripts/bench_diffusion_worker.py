"""One job of the benchmark on pictures in a process of its own: `bench_diffusion_worker.py JOB.json`; see bench_diffusion.py.

`make` writes a pipeline with random weights, `sites` says at which times and noises prefopt will score the rows, `prefopt` trains through
`prefopt train`, and `baseline` is the plain loop of the public scripts of Diffusion-DPO (arXiv 2311.12908), restated: every step encodes
its pictures and captions, and runs the policy and a frozen copy of it one after the other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from bench_worker import Clock, Done, peak_memory

WORDS = [a + b for a in "ba be bi bo ka ke ki ko la le li lo".split() for b in "dan fel gor hum jix ner pol rus tav wem".split()]
DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
        "steps_offset": 1}
SEED = 0  # of prefopt's runs: their times and noises follow from it
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

# Widths of the U-Net's blocks, its other settings, widths of the VAE's blocks, (width, layers, heads, projected) of each text encoder.
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {"cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True, "addition_embed_type": "text_time",
        "transformer_layers_per_block": [1, 2, 10], "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"unet": {**SD15, "block_out_channels": [320, 640, 1280, 1280]}, "vae": [128, 256, 512, 512], "text": [(768, 12, 12, 0)]},
    "sd15-half": {"unet": {**SD15, "block_out_channels": [160, 320, 640, 640]}, "vae": [64, 128, 256, 256], "text": [(768, 12, 12, 0)]},
    "sd15-third": {"unet": {**SD15, "block_out_channels": [96, 192, 384, 384]}, "vae": [32, 64, 128, 128], "text": [(768, 12, 12, 0)]},
    "sdxl": {"unet": {**SDXL, "block_out_channels": [320, 640, 1280]}, "vae": [128, 256, 512, 512],
             "text": [(768, 12, 12, 0), (1280, 32, 20, 1280)]},
    "tiny": {"unet": {"cross_attention_dim": 32, "attention_head_dim": 4, "block_out_channels": [32, 32, 64, 64]}, "vae": [32, 32, 32, 32],
             "text": [(32, 2, 2, 0)]},
    "tiny-sdxl": {"unet": {**SDXL, "cross_attention_dim": 64, "attention_head_dim": [2, 2, 4], "block_out_channels": [32, 32, 64],
                           "transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8,
                           "projection_class_embeddings_input_dim": 6 * 8 + 32}, "vae": [32, 32, 32, 32],
                  "text": [(32, 2, 2, 0), (32, 2, 2, 32)]},
}  # fmt: skip


# ---- the model and the data ----------------------------------------------------------------------


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<eos>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
                                   model_max_length=77, padding_side="right")


def make(job: dict[str, Any]) -> None:
    """A pipeline of this shape with random weights, saved as published ones are."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape = SHAPES[job["shape"]]
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=job["resolution"] // 8, **shape["unet"])
    vae = diffusers.AutoencoderKL(
        block_out_channels=shape["vae"], layers_per_block=2, latent_channels=4, scaling_factor=0.18215,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    texts = {}
    for number, (width, layers, heads, projected) in enumerate(shape["text"]):
        config = CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            max_position_embeddings=77, projection_dim=projected or width, bos_token_id=1, eos_token_id=2, pad_token_id=2)
        end = f"_{number + 1}" if number else ""
        kind = CLIPTextModelWithProjection if projected else CLIPTextModel
        texts |= {f"text_encoder{end}": kind(config), f"tokenizer{end}": tokenizer()}
    parts = {"unet": unet, "vae": vae, "scheduler": diffusers.DDIMScheduler(**DDIM), **texts}
    if len(shape["text"]) == 2:
        made = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        made = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made.save_pretrained(job["model"])
    Path(job["out"]).write_text(json.dumps({"parameters": sum(p.numel() for p in unet.parameters())}))


# ---- prefopt -------------------------------------------------------------------------------------


def words(job: dict[str, Any]) -> list[str]:
    """The command line of `prefopt train`."""
    latents = 4 * (job["resolution"] // 8) ** 2
    return [
        f"hydra.run.dir={job['work']}/run-{os.getpid()}", "algo=diffusion_dpo", f"algo.beta={job['beta'] / latents!r}",
        f"model={'sdxl' if 'sdxl' in job['shape'] else 'sd15'}{'-lora' if job['lora'] else ''}", f"model.path={job['model']}",
        f"model.resolution={job['resolution']}", f"model.gradient_checkpointing={str(job['checkpointing'] or job['cheap']).lower()}",
        f"model.recompute={'cheap' if job['cheap'] else 'all'}",
        "data=pictures", f"data.path={job['rows']}", "data.eval_fraction=0", f"seed={SEED}",
        *(["noise=pool", "noise.pool=1"] if job["stored"] else ["noise=default"]),
        f"hardware={'1xgpu' if job['cuda'] else 'cpu'}", f"hardware.threads={job['threads']}", f"hardware.precision={job['precision']}",
        f"train.batch_size={job['batch']}", f"train.micro_batch_tokens={2 * job['micro']}", f"train.steps={job['steps']}",
        "train.self_check=false", "evaluation.prompts=0", "evaluation.kl=false", f"train.eval_every={10**9}", f"train.save_every={10**9}",
        f"optim.lr={job['lr']}", "optim.schedule=constant", "optim.warmup=0",
    ]  # fmt: skip


def sites(job: dict[str, Any]) -> None:
    """Which rows each step of prefopt's run has, and the numbers that their times and noises follow from."""
    from prefopt.launch.app import run
    from prefopt.training import setup

    found: list[Any] = []

    def record(cfg: Any, policy: Any, objective: Any, source: Any, *rest: Any) -> None:
        rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
        folder, known = Path(job["rows"]).resolve().parent, {}
        for row in rows:
            for side in ("chosen", "rejected"):
                path = str(folder / row[side]["image"])
                known[policy.encodings.image_of({"type": "image", "path": path})] = path
        captions = {policy.encodings.caption_of(row["prompt"]): row["prompt"] for row in rows}
        for step in range(job["steps"]):
            pairs = []
            for micro in source.step(step):
                for chosen, rejected in zip(*micro.input_ids[:, 1:].view(-1, 2, 4).unbind(1), strict=True):
                    (winner, caption, group, number), (loser, *same) = chosen.tolist(), rejected.tolist()
                    assert same == [caption, group, number]
                    pairs.append({"caption": captions[caption], "paths": [known[winner], known[loser]], "pictures": [winner, loser],
                                  "group": group, "number": number})
            found.append(pairs)
        raise Done

    setup.make_references = record
    with suppress(Done):
        run("train", words(job))
    Path(job["out"]).write_text(json.dumps(found))


def prefopt(job: dict[str, Any], clock: Clock) -> None:
    """`prefopt train`, watched at the end of each step."""
    from prefopt.launch.app import run

    with watched(job, clock), suppress(Done):
        run("train", words(job))
    manifest = json.loads(next(Path(job["work"]).glob(f"run-{os.getpid()}/manifest.json")).read_text())
    clock.extra["reference"] = manifest["reference"]


@contextmanager
def watched(job: dict[str, Any], clock: Clock):
    from prefopt.training import engine

    step = engine.Engine.step

    def timed(self: Any, micros: Any, lr: float) -> Any:
        clock.steps_begin = clock.steps_begin or clock.now()
        result = step(self, micros, lr)
        clock.stepped()
        clock.losses.append(result.loss)
        clock.extra.setdefault("logps", []).append([result.metrics["logp/chosen"], result.metrics["logp/rejected"]])
        if len(clock.ends) == job["steps"]:
            raise Done
        return result

    engine.Engine.step = timed
    try:
        yield
    finally:
        engine.Engine.step = step


# ---- the public loop -----------------------------------------------------------------------------


def baseline(job: dict[str, Any], clock: Clock) -> None:
    """Diffusion-DPO as its public scripts do it. Only times and noises are prefopt's, so that losses can be compared. To the baseline's
    advantage pictures are decoded and scaled before the clock runs, and in bf16 the VAE computes in bf16 as well."""
    import diffusers
    import transformers

    from prefopt.config.schema import NoiseConfig
    from prefopt.policies.denoisers import process_of
    from prefopt.policies.noise import Draws, normals

    folder, device = Path(job["model"]), "cuda" if job["cuda"] else "cpu"
    half = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    index = json.loads((folder / "model_index.json").read_text())

    def frozen(part: str) -> Any:
        library, name = index[part]
        kind = getattr(diffusers if library == "diffusers" else transformers, name)
        return kind.from_pretrained(folder, subfolder=part).requires_grad_(False).eval().to(device, half)

    vae, reference = frozen("vae"), frozen("unet")
    encoders = [frozen(part) for part in ("text_encoder", "text_encoder_2") if part in index]
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder / part) for part in ("tokenizer", "tokenizer_2") if part in index]
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    if job["lora"]:
        from peft import LoraConfig

        unet.requires_grad_(False).to(half)
        torch.manual_seed(SEED)
        unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if job["checkpointing"]:
        unet.enable_gradient_checkpointing()
    unet.to(device).train()
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["lr"], weight_decay=0.0)
    autocast = torch.autocast(device, dtype=torch.bfloat16) if job["precision"] == "bf16" else nullcontext()

    side, draws = job["resolution"] // 8, Draws(NoiseConfig(pool=1 if job["stored"] else None), SEED)
    process = process_of(scheduler.config)
    shape = (4, side, side)
    steps = json.loads(Path(job["sites"]).read_text())
    decoded = {path: pixels_of(path) for pairs in steps for pair in pairs for path in pair["paths"]}

    def read(captions: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        ids = [t(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids.to(device)
               for t in tokenizers]
        with torch.no_grad():
            if len(encoders) == 1:
                return encoders[0](ids[0])[0], None
            outs = [encoder(i, output_hidden_states=True) for encoder, i in zip(encoders, ids, strict=True)]
        sizes = torch.tensor([[job["resolution"], job["resolution"], 0, 0, job["resolution"], job["resolution"]]], device=device)
        states = torch.cat([out.hidden_states[-2] for out in outs], -1)
        return states, {"text_embeds": outs[1][0], "time_ids": sizes.float().expand(len(captions), 6)}

    def errors(model: Any, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor, added: Any, noise: torch.Tensor) -> torch.Tensor:
        with autocast:
            made = model(noisy, t, text, added_cond_kwargs=added).sample
        return (made.float() - noise.float()).square().mean((1, 2, 3))

    for pairs in steps:
        clock.steps_begin = clock.steps_begin or clock.now()
        total, logps = 0.0, [0.0, 0.0]
        for begin in range(0, len(pairs), job["micro"]):
            micro = pairs[begin : begin + job["micro"]]
            pixels = torch.stack([decoded[pair["paths"][k]] for k in (0, 1) for pair in micro]).to(device, half)
            with torch.no_grad():
                posterior = vae.encode(pixels).latent_dist
            eps = [normals(shape, "posterior", p["group"], p["number"], p["pictures"][k]) for k in (0, 1) for p in micro]
            latents = (posterior.mean.float() + posterior.std.float() * torch.stack(eps).to(device)) * vae.config.scaling_factor
            noise = torch.stack([draws.noise(shape, p["group"], p["number"], 0) for p in micro]).to(device).repeat(2, 1, 1, 1)
            shares = torch.tensor([draws.time(p["group"], p["number"])[0] for p in micro], dtype=torch.float64)
            t = process.times(shares).to(device).repeat(2)
            noisy = scheduler.add_noise(latents, noise, t)
            text, added = read([p["caption"] for p in micro])
            text, added = text.repeat(2, 1, 1), added and {name: value.repeat(2, 1) for name, value in added.items()}
            own = errors(unet, noisy, t, text, added, noise)
            with torch.no_grad():
                theirs = errors(reference, noisy, t, text, added, noise)
            (better, worse), (ref_better, ref_worse) = own.chunk(2), theirs.chunk(2)
            inside = -0.5 * job["beta"] * ((better - worse) - (ref_better - ref_worse))
            loss = -torch.nn.functional.logsigmoid(inside).sum() / len(pairs)
            loss.backward()
            total += float(loss.detach())
            for k, part in enumerate((better, worse)):
                logps[k] += float(-0.5 * part.detach().sum() * noise[0].numel() / len(pairs))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.stepped()
        clock.losses.append(total)
        clock.extra.setdefault("logps", []).append(logps)


def pixels_of(path: str) -> torch.Tensor:
    """[3, H, W] in [-1, 1]."""
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1).float() / 127.5 - 1


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    if job["kind"] in ("make", "sites"):
        {"make": make, "sites": sites}[job["kind"]](job)
        return
    clock = Clock(job["cuda"], time.time())
    {"prefopt": prefopt, "baseline": baseline}[job["kind"]](job, clock)
    Path(job["out"]).write_text(json.dumps({**clock.result(), **peak_memory(job["cuda"])}))


if __name__ == "__main__":
    main()
