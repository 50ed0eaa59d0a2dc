"""The networks of diffusers' text-to-image models behind one interface: a noisy latent, a time and a caption go in, a prediction comes out.

What differs between families stays in here: how a time is told to the network, packing of latents, position ids, sizes, learned variances.
`predict` returns the network's output in its own parameterisation, with plain latents [B, C, h, w] on both sides.
"""

from __future__ import annotations

import inspect
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prefopt.config.schema import LoraConfig
from prefopt.errors import UserError
from prefopt.policies.compiled import compile_blocks
from prefopt.policies.pipeline_folder import PipelineFolder, open_folder
from prefopt.policies.process import Process
from prefopt.policies.recompute import checkpoint_blocks

PREDICTS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
MOST_TOKENS = 4096  # 1024 pixels at 16 pixels a token


def process_of(scheduler: dict[str, Any], tokens: int = MOST_TOKENS) -> Process:
    """The process that a scheduler_config.json describes: what the network predicts, and its noise levels or its shift.

    `tokens` are the places of a picture that the network attends over: a dynamic shift (FLUX) depends on them. How a sampler spaces its
    steps says nothing of the process and is left out. UserError where the config describes none that prefopt knows.
    """
    import diffusers

    name = scheduler.get("_class_name", "")
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        raise UserError(f"the scheduler {name or 'without a name'} is not one of the installed diffusers; set it to DDIMScheduler or "
                        "FlowMatchEulerDiscreteScheduler in scheduler_config.json")
    made = kind.from_config(scheduler)
    config = made.config
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        for key in ("shift_terminal", "invert_sigmas"):
            if config.get(key):
                raise UserError(f"scheduler_config.json sets {key}={config[key]}, a noise schedule that prefopt does not know")
        if config.num_train_timesteps != 1000:
            raise UserError(f"scheduler_config.json has num_train_timesteps={config.num_train_timesteps}; a flow is told its times in "
                            "thousandths")
        return Process("flow", None, _shift(config, tokens))
    predicts = PREDICTS.get(config.get("prediction_type", "epsilon"))
    cumprod = getattr(made, "alphas_cumprod", None)
    if predicts is None or cumprod is None:
        raise UserError(f"{name} with prediction_type={config.get('prediction_type')} is no process that prefopt knows; it knows "
                        f"{', '.join(PREDICTS)}")
    try:
        return Process(predicts, torch.as_tensor(cumprod).double())
    except ValueError as error:
        raise UserError(f"scheduler_config.json: {error}") from error


def _shift(config: Any, tokens: int) -> float:
    """The factor of the odds of a time, t / (1 - t): fixed, or growing with the picture as the pipelines have it."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1.0)
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", MOST_TOKENS)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - least) / (most - least)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


class Denoiser:
    """A network and what it takes to ask it. `latent_channels`, `factor` (pixels for each place of a latent), `resolution` (native, in
    pixels), `process` and `family` describe it; `lora` is the config of its adapter, if it has one, and `user_width` that of the users that
    it is told."""

    attention: ClassVar[str] = "to_q,to_k,to_v,to_out.0"  # the projections that LoRA is put on by diffusers' training scripts
    default_size: ClassVar[int] = 128  # of the native latent, where the network's config does not say
    takes_users: ClassVar[bool] = False  # whether `call` tells the network `_users`
    packs: int = 1  # places of the latent, along a side, that are one token: a latent has a multiple of them

    def __init__(self, folder: PipelineFolder, network: nn.Module, resolution: int | None = None):
        import diffusers

        self.folder, self.network = folder, network
        self.pipeline = getattr(diffusers, folder.pipeline)
        self.latent_channels, self.factor = folder.latent
        size = network.config.get("sample_size") or self.default_size
        self.resolution = (size if isinstance(size, int) else size[0]) * self.factor
        self.packs *= network.config.get("patch_size") or 1
        side = (resolution or self.resolution) // self.factor // self.packs
        self.process = process_of(folder.config("scheduler"), side * side)
        self.lora: LoraConfig | None = None
        self.user_width: int | None = None
        self.tells_users = True
        if self.channels_in() != self.latent_channels:
            raise UserError(f"the {folder.network} of {folder.path} takes {self.channels_in()} channels, and latents have "
                            f"{self.latent_channels}: it is made for inpainting or editing, not for text-to-image")

    @property
    def family(self) -> str:
        raise NotImplementedError

    def channels_in(self) -> int:
        return self.network.config.in_channels

    def call(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], sizes: Tensor) -> Tensor:
        raise NotImplementedError

    def predict(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], sizes: Tensor | None = None) -> Tensor:
        """The network's output for noisy latents [B, C, h, w] at times [B] (whole numbers; of a flow in (0, 1)), in their shape.

        `cond` are the batched tensors of `Encoders.captions`, and of `Users.batch` where the network is told users. `sizes` [B, 6] in
        pixels: original height and width, top and left of the crop, height and width of the crop; without them the picture counts as never
        cropped. Under autocast latents stay in fp32, otherwise they are given in the network's type; times and sizes are not rounded to it.
        """
        if x_t.dim() != 4:
            raise ValueError(f"{self.family} denoises pictures [B, C, h, w], not {tuple(x_t.shape)}")
        dtype = torch.float32 if torch.is_autocast_enabled(x_t.device.type) else self.network.dtype
        if sizes is None:
            whole = [x_t.shape[2] * self.factor, x_t.shape[3] * self.factor]
            sizes = torch.tensor([[*whole, 0, 0, *whole]], device=x_t.device).expand(len(x_t), 6)
        if not self.tells_users:
            cond = {name: value for name, value in cond.items() if not name.startswith("user")}
        cond = {name: value.to(dtype) if value.is_floating_point() else value for name, value in cond.items()}
        out = self.call(x_t.to(dtype), t, cond, sizes.float())
        # Half of what some networks return is a variance, which is not trained.
        return out[:, : x_t.shape[1]] if out.shape[1] == 2 * x_t.shape[1] else out

    @contextmanager
    def without_adapter(self):
        """In it the network is the one that the adapter was put on."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        before, told = [m.disable_adapters for m in layers], self.tells_users
        try:
            self.tells_users = False  # without a user it is the base
            for layer in layers:
                layer._disable_adapters = True  # enable_adapters() would also switch gradients off, in the middle of a step
            yield
        finally:
            self.tells_users = told
            for layer, was in zip(layers, before, strict=True):
                layer._disable_adapters = was

    def _users(self, cond: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """What the network's cross-attentions are given beside the caption (`policies/user_branch.py`)."""
        return {"ip_hidden_states": cond["user"], "ip_adapter_masks": cond.get("user_mask")} if "user" in cond else None

    def save(self, folder: str | Path, complete: bool = False) -> None:
        """Into `folder`: LoRA weights as `pipe.load_lora_weights(folder)` reads them, or the attention to users, or the network in a folder
        of its own (unet/, transformer/); with `complete` and without an adapter all other parts of the pipeline as well, linked where the
        disk allows it."""
        folder = Path(folder)
        if self.lora is not None:
            from prefopt.policies.lora_export import save_lora

            save_lora(self, folder)
            return
        if self.user_width is not None:
            from prefopt.policies.user_branch import save_user_branch

            save_user_branch(self, folder)
            return
        self.network.save_pretrained(folder / self.folder.network)
        if complete:
            for file in sorted(f for f in self.folder.path.rglob("*") if f.is_file()):
                place = file.relative_to(self.folder.path)
                if place.parts[0] in (*self.folder.parts, "model_index.json") and place.parts[0] != self.folder.network:
                    _link(file.resolve(), folder / place)

    def restore(self, folder: str | Path) -> None:
        """Puts in what `save` wrote of a network of this architecture. UserError where it does not fit."""
        folder = Path(folder)
        if self.lora is not None:
            from prefopt.policies.lora_export import restore_lora

            restore_lora(self, folder)
            return
        if self.user_width is not None:
            from prefopt.policies.user_branch import restore_user_branch

            restore_user_branch(self, folder)
            return
        from safetensors.torch import load_file

        files = sorted((folder / self.folder.network).glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} holds no {self.folder.network} with weights (*.safetensors)")
        weights = {name: value for file in files for name, value in load_file(file).items()}
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"the {self.folder.network} in {folder} is of another architecture than {self.folder.path} "
                            f"({str(error).splitlines()[-1].strip()[:150]})") from error


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:  # another disk
        shutil.copyfile(file, target)


class StableDiffusion(Denoiser):
    """SD 1.x and 2.x: a UNet that reads one CLIP text encoder."""

    takes_users = True

    @property
    def family(self) -> str:
        return "sd21" if self.network.config.cross_attention_dim == 1024 else "sd15"

    def call(self, x, t, cond, sizes):
        return self.network(x, t, encoder_hidden_states=cond["prompt_embeds"], cross_attention_kwargs=self._users(cond),
                            return_dict=False)[0]


class StableDiffusionXL(Denoiser):
    """SDXL: a UNet that is also told a pooled caption and the sizes of the picture. These stay in fp32 up to their sinusoids: bf16 would
    make 1001 pixels 1000."""

    family, takes_users = "sdxl", True

    def call(self, x, t, cond, sizes):
        added = {"text_embeds": cond["pooled"], "time_ids": sizes}
        return self.network(x, t, encoder_hidden_states=cond["prompt_embeds"], added_cond_kwargs=added,
                            cross_attention_kwargs=self._users(cond), return_dict=False)[0]


class PixArt(Denoiser):
    """PixArt-alpha and -Sigma: a DiT that predicts noise and its variance. The 1024-pixel alpha is also told the size of the picture."""

    family, takes_users = "pixart", True

    def call(self, x, t, cond, sizes):
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.use_additional_conditions:
            added = {"resolution": sizes[:, 4:6], "aspect_ratio": sizes[:, 4:5] / sizes[:, 5:6]}
        return self.network(x, encoder_hidden_states=cond["prompt_embeds"], encoder_attention_mask=cond["mask"], timestep=t,
                            added_cond_kwargs=added, cross_attention_kwargs=self._users(cond), return_dict=False)[0]


class StableDiffusion3(Denoiser):
    """SD 3 and 3.5: an MMDiT trained as a rectified flow; times are told in thousandths."""

    family = "sd3"
    attention = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out"

    def call(self, x, t, cond, sizes):
        return self.network(hidden_states=x, timestep=t.float() * 1000, encoder_hidden_states=cond["prompt_embeds"],
                            pooled_projections=cond["pooled"], return_dict=False)[0]


class Flux(Denoiser):
    """FLUX.1: an MMDiT over packed latents, four places a token. FLUX.1-dev is told a guidance scale, `guidance`, in training and sampling
    alike: the pipeline's default unless it is set. Its own code rounds times to 8 bits under bf16, in training and sampling alike."""

    family, packs = "flux", 2
    attention = StableDiffusion3.attention

    def __init__(self, folder: PipelineFolder, network: nn.Module, resolution: int | None = None):
        super().__init__(folder, network, resolution)
        self.guidance = float(inspect.signature(self.pipeline.__call__).parameters["guidance_scale"].default)

    def channels_in(self) -> int:
        return self.network.config.in_channels // 4

    def call(self, x, t, cond, sizes):
        batch, channels, height, width = x.shape
        if height % 2 or width % 2:
            raise ValueError(f"FLUX packs latents two by two; {height} x {width} places cannot be packed")
        rows, columns = height // 2, width // 2
        packed = x.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * 4)
        places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
        places[..., 1] += torch.arange(rows, device=x.device)[:, None]
        places[..., 2] += torch.arange(columns, device=x.device)
        words = torch.zeros(cond["prompt_embeds"].shape[1], 3, device=x.device, dtype=x.dtype)
        told = torch.full((batch,), self.guidance, device=x.device) if self.network.config.guidance_embeds else None
        out = self.network(hidden_states=packed, timestep=t.float(), guidance=told, pooled_projections=cond["pooled"],
                           encoder_hidden_states=cond["prompt_embeds"], txt_ids=words, img_ids=places.view(-1, 3), return_dict=False)[0]
        return out.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


class Sana(Denoiser):
    """Sana: a DiT with linear attention over the latents of a deep autoencoder, a rectified flow; times are told in thousandths."""

    family = "sana"

    def call(self, x, t, cond, sizes):
        times = t.float() * 1000 * self.network.config.timestep_scale
        return self.network(x, encoder_hidden_states=cond["prompt_embeds"], encoder_attention_mask=cond["mask"], timestep=times,
                            return_dict=False)[0]


FAMILIES: dict[str, type[Denoiser]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "SanaPipeline": Sana,
}


def open_denoiser(folder: str | Path | PipelineFolder, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                  lora: LoraConfig | None = None, seed: int = 0, gradient_checkpointing: bool = False, channels_last: bool = False,
                  compile: bool = False, resolution: int | None = None, dropout: float = 0.0, user_width: int | None = None,
                  recompute: str = "all") -> Denoiser:
    """The network of a pipeline folder, in training mode, and nothing else of it. With `lora` (enabled) the weights are frozen in `dtype`,
    and an adapter in fp32 is put on them: that of `lora.adapter`, or a fresh one, drawn from `seed`, with which nothing changes yet. So
    they are with a `user_width`, and the adapter is an attention to users.
    `resolution` (pixels of a side) is that of the training, on which a dynamic shift depends; the native one by default.
    `dropout` takes the place of what the network was published with: a reference has none, and would differ from an equal policy.

    UserError for a folder of an unknown pipeline, a missing part, pickled weights, an adapter of another architecture.
    """
    found = open_folder(folder)
    network = found.load(found.network, dtype)
    denoiser = FAMILIES[found.pipeline](found, network, resolution)
    network.to(device, **({"memory_format": torch.channels_last} if channels_last else {}))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    if gradient_checkpointing:
        checkpoint_blocks(network, recompute)
    if lora is not None and lora.enabled:
        from prefopt.policies.lora_export import add_lora

        add_lora(denoiser, lora, seed)
    elif user_width is not None:
        from prefopt.policies.user_branch import add_user_branch

        add_user_branch(denoiser, user_width, seed)
    if compile:
        compile_blocks(network, torch.device(device))
    network.train()
    return denoiser
