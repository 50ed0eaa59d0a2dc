"""One job of the benchmark on rollouts in a process of its own: `bench_rollout_worker.py JOB.json`; see bench_rollout.py.

`make` writes a pipeline with random weights, `prefopt` trains through `prefopt train algo=flow_grpo`, and `baseline` is the loop of public
scripts for online training of diffusion models, restated: pictures are decoded one by one, the reference is a frozen copy of the network,
and the unconditional half of guidance goes through the network with the conditional half, in one batch inside the autograd graph, though
it is detached afterwards (Flow-GRPO, arXiv 2505.05470) and so brings no gradient.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench_diffusion_worker import SEED, TARGETS, make
from bench_worker import Clock, Done, peak_memory
from torch import Tensor


@dataclass
class Rollouts(Clock):
    """What one run took and what it computed: [begin, end] of each round's drawing and of each optimiser step, seconds of decoding, the
    rewards of each round, and of each step what `measured` says."""

    drawing: list[list[float]] = field(default_factory=list)
    training: list[list[float]] = field(default_factory=list)
    decoding: float = 0.0
    rewards: list[list[float]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("drawing", "training", "decoding", "rewards", "steps")} | self.extra


def brightness(image: Any) -> float:
    """The reward of both sides: the mean of a picture's numbers, in [0, 1]. It takes no time and is as smooth as sides that round
    differently need it."""
    return float(np.asarray(image.convert("RGB"), dtype=np.float64).mean() / 255)


# ---- prefopt -------------------------------------------------------------------------------------


def words(job: dict[str, Any]) -> list[str]:
    """The command line of `prefopt train`."""
    return [
        f"hydra.run.dir={job['work']}/run-{os.getpid()}", "algo=flow_grpo", f"algo.beta={job['beta']}",
        "model=sd15", f"model.path={job['model']}", f"model.resolution={job['resolution']}",
        f"model.gradient_checkpointing={str(job['checkpointing']).lower()}", f"model.guidance={job['guidance']}",
        "reward=brisque",  # replaced by that of both sides
        "data=pictures", f"data.path={job['rows']}", "data.eval_fraction=0", f"seed={SEED}",
        f"source.prompts={job['prompts']}", f"source.samples={job['samples']}", f"sampler.batch_size={job['drawn_at_once']}",
        f"trajectory.steps={job['sampling_steps']}", "trajectory.noise=1.0", "trajectory.window_size=null", "trajectory.early=1",
        f"hardware={'1xgpu' if job['cuda'] else 'cpu'}", f"hardware.threads={job['threads']}", f"hardware.precision={job['precision']}",
        f"train.batch_size={job['step_prompts']}", f"train.micro_batch_tokens={job['micro']}",
        f"train.steps={job['rounds'] * job['prompts'] // job['step_prompts']}",
        "train.self_check=false", "evaluation.prompts=0", "evaluation.kl=false", f"train.eval_every={10**9}", f"train.save_every={10**9}",
        f"optim.lr={job['lr']}", "optim.schedule=constant", "optim.warmup=0",
    ]  # fmt: skip


def prefopt(job: dict[str, Any], clock: Rollouts) -> None:
    """`prefopt train`, watched where it draws, decodes, scores and steps."""
    from prefopt.launch.app import run
    from prefopt.policies.encoders import Encoders
    from prefopt.training import setup
    from prefopt.training.engine import Engine
    from prefopt.training.trajectories import TrajectorySource

    begin, decode, score, step = TrajectorySource._begin, Encoders.decode, Engine.score, Engine.step
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def beginning(self: Any, *args: Any) -> Any:
        clock.drawing.append([clock.now()])
        made = begin(self, *args)
        clock.drawing[-1].append(clock.now())
        clock.rewards.append([d.reward for d in made.drawn])
        return made

    def decoding(self: Any, latents: Tensor) -> Any:
        began = clock.now()
        images = decode(self, latents)
        clock.decoding += clock.now() - began
        return images

    def scoring(self: Any, *args: Any) -> Any:
        batch = score(self, *args)
        policy = batch.scores["policy"]
        seen.append((policy["step_logp"].detach(), batch.scores["previous"]["step_logp"], policy["divergence"].detach()))
        return batch

    def stepping(self: Any, micros: Any, lr: float) -> Any:
        seen.clear()
        clock.training.append([clock.now()])
        result = step(self, micros, lr)
        clock.training[-1].append(clock.now())
        clock.steps.append(measured(result.loss, *(torch.cat(part) for part in zip(*seen, strict=True))))
        if len(clock.steps) == job["rounds"] * job["prompts"] // job["step_prompts"]:
            raise Done
        return result

    reward = {"reward": lambda examples: [brightness(e.completions[0].picture["image"]) for e in examples]}
    with ExitStack() as patches:
        for owner, name, watched in ((TrajectorySource, "_begin", beginning), (Encoders, "decode", decoding), (Engine, "score", scoring),
                                     (Engine, "step", stepping), (setup, "make_rewards", lambda *_: reward)):
            patches.enter_context(patch.object(owner, name, watched))
        patches.enter_context(suppress(Done))
        run("train", words(job))
    manifest = json.loads(next(Path(job["work"]).glob(f"run-{os.getpid()}/manifest.json")).read_text())
    clock.extra["reference"] = manifest["reference"]


def measured(loss: float, logp: Tensor, previous: Tensor, kl: Tensor) -> dict[str, float]:
    """Of all transitions of a step."""
    return {"loss": loss, "logp": float(logp.mean()), "ratio": float(((logp - previous).exp() - 1).abs().mean()), "kl": float(kl.mean())}


# ---- the public loop -----------------------------------------------------------------------------


def baseline(job: dict[str, Any], clock: Rollouts) -> None:
    """Flow-GRPO's loop on DDIM's steps, as its public scripts and those of DDPO and D3PO are written. Only the noise, and which prompts a
    round and a step have, are prefopt's, so that both sides draw and learn the same. As in those scripts log-probs are kept from sampling
    and captions are encoded once a round; the reward and the order of transitions take no time on either side."""
    import diffusers
    import transformers
    from peft import LoraConfig

    from prefopt.data.batch import step_rows
    from prefopt.policies.noise import normals

    folder, device = Path(job["model"]), "cuda" if job["cuda"] else "cpu"
    half = torch.bfloat16 if job["precision"] == "bf16" else torch.float32

    def frozen(kind: Any, part: str) -> Any:
        return kind.from_pretrained(folder, subfolder=part).requires_grad_(False).eval().to(device, half)

    vae, encoder = frozen(diffusers.AutoencoderKL, "vae"), frozen(transformers.CLIPTextModel, "text_encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    reference = frozen(diffusers.UNet2DConditionModel, "unet")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    unet.requires_grad_(False).to(half)
    torch.manual_seed(SEED)
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))
    trained = [p for p in unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if job["checkpointing"]:
        unet.enable_gradient_checkpointing()
    unet.to(device).train()
    optimizer = torch.optim.AdamW(trained, lr=job["lr"], weight_decay=0.0)
    autocast = torch.autocast(device, dtype=torch.bfloat16) if job["precision"] == "bf16" else nullcontext()

    scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler", timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(job["sampling_steps"])
    times = scheduler.timesteps.tolist()
    cumprod = [float(scheduler.alphas_cumprod[t]) for t in times] + [1.0]
    last = len(times) - 1  # DDIM's last step has no noise, and so no log-prob
    side, samples = job["resolution"] // 8, job["samples"]
    shape = (4, side, side)
    captions = [json.loads(line)["prompt"] for line in Path(job["rows"]).read_text().splitlines()]
    total = len(captions)

    def read(texts: list[str]) -> Tensor:
        ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids.to(device)
        with torch.no_grad():
            return encoder(ids)[0].float()

    def guided(model: Any, x: Tensor, number: int, text: Tensor, blank: Tensor) -> Tensor:
        """Both halves in one batch, the unconditional one detached afterwards."""
        t = torch.full((2 * len(x),), times[number], device=device)
        with autocast:
            said = model(torch.cat([x, x]), t, torch.cat([blank.expand(len(x), -1, -1), text])).sample.float()
        without, conditional = said.chunk(2)
        return without.detach() + job["guidance"] * (conditional - without.detach())

    def gaussian(eps: Tensor, x: Tensor, number: int) -> tuple[Tensor, float]:
        """DDIM with eta = 1: mean and standard deviation of the next latents."""
        now, then = cumprod[number], cumprod[number + 1]
        std = ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        return then**0.5 * x0 + max(1 - then - std**2, 0.0) ** 0.5 * eps, std

    def density(x: Tensor, mean: Tensor, std: float) -> Tensor:
        each = -(x - mean).square() / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)
        return each.mean((1, 2, 3))

    for number in range(job["rounds"]):
        # Drawing: all latents and log-probs are kept.
        clock.drawing.append([clock.now()])
        rows = [step_rows(total, total, i // total, SEED)[i % total] for i in range(number * job["prompts"], (number + 1) * job["prompts"])]
        keys = [(SEED, number, row, group, sample) for group, row in enumerate(rows) for sample in range(samples)]
        known, blank = {row: read([captions[row]])[0] for row in rows}, read([""])
        walks, logps, rewards = [], [], []
        for begin in range(0, len(keys), job["drawn_at_once"]):
            part = keys[begin : begin + job["drawn_at_once"]]
            text = torch.stack([known[row] for _, _, row, *_ in part])
            x = torch.stack([normals(shape, "walk", *key) for key in part]).to(device)
            latents, found = [x], []
            for place in range(len(times)):
                with torch.no_grad():
                    mean, std = gaussian(guided(unet, x, place, text, blank), x, place)
                x = mean
                if place < last:
                    x = mean + std * torch.stack([normals(shape, "transition", *key, place) for key in part]).to(device)
                    found.append(density(x, mean, std))
                latents.append(x)
            walks.append(torch.stack(latents, 1))
            logps.append(torch.stack(found, 1))
            began = clock.now()
            for latent in x:  # one by one
                with torch.no_grad():
                    image = vae.decode(latent[None].to(half) / vae.config.scaling_factor).sample[0].float()
                pixels = (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
                rewards.append(brightness(diffusers.image_processor.VaeImageProcessor.numpy_to_pil(pixels)[0]))
            clock.decoding += clock.now() - began
        walk, old = torch.cat(walks), torch.cat(logps)
        clock.rewards.append(rewards)
        grouped = np.array(rewards).reshape(job["prompts"], samples)
        advantage = (grouped - grouped.mean(1, keepdims=True)) / (grouped.std(1, keepdims=True) + 1e-4)
        advantage = torch.tensor(advantage.reshape(-1), dtype=torch.float32, device=device)
        clock.drawing[-1].append(clock.now())

        # Training: some prompts' pictures to an optimiser step, one step of the sampler at a time.
        for turn in range(job["prompts"] // job["step_prompts"]):
            clock.training.append([clock.now()])
            chosen = step_rows(job["prompts"], job["step_prompts"], turn, f"{SEED} {number}")
            pictures = [group * samples + sample for group in chosen for sample in range(samples)]
            loss, seen = 0.0, []
            for begin in range(0, len(pictures), job["micro"]):
                part = pictures[begin : begin + job["micro"]]
                text = torch.stack([known[keys[i][2]] for i in part])
                for place in range(last):
                    x, to = walk[part, place], walk[part, place + 1]
                    mean, std = gaussian(guided(unet, x, place, text, blank), x, place)
                    with torch.no_grad():
                        other, _ = gaussian(guided(reference, x, place, text, blank), x, place)
                    logp, weight = density(to, mean, std), advantage[part].clamp(-5, 5)
                    ratio = (logp - old[part, place]).exp()
                    policy_loss = torch.maximum(-weight * ratio, -weight * ratio.clamp(1 - 1e-4, 1 + 1e-4))
                    kl = ((mean - other).square() / (2 * std**2)).mean((1, 2, 3))
                    share = (policy_loss + job["beta"] * kl).sum() / (len(pictures) * last)
                    share.backward()
                    loss += float(share.detach())
                    seen.append((logp.detach(), old[part, place], kl.detach()))
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.training[-1].append(clock.now())
            clock.steps.append(measured(loss, *(torch.cat(side) for side in zip(*seen, strict=True))))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    if job["kind"] == "make":
        make(job)
        return
    clock = Rollouts(job["cuda"], time.time())
    {"prefopt": prefopt, "baseline": baseline}[job["kind"]](job, clock)
    Path(job["out"]).write_text(json.dumps({**clock.result(), **peak_memory(job["cuda"])}))


if __name__ == "__main__":
    main()
