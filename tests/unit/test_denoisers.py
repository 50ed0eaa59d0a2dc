"""Families of diffusers behind one interface: each test compares with what the pipeline of diffusers itself computes."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prefopt.config.schema import LoraConfig
from prefopt.errors import UserError
from prefopt.policies.denoisers import FAMILIES as CLASSES
from prefopt.policies.denoisers import open_denoiser, process_of
from prefopt.policies.encoders import NotFinite, open_encoders
from prefopt.policies.lora_export import _renamed, export_lora, matrices
from tests import tiny_pipelines
from tests.tiny_pipelines import FAMILIES, LATENT

PROMPT = "a red circle on the left"
UNETS = ("sd15", "sd21", "sdxl")
NETWORKS = [family for family in FAMILIES if family not in ("sd3-no-t5", "pixart-alpha")]
ALL = LoraConfig(enabled=True, r=4, alpha=8, targets="attention")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """family -> its folder, written once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny_pipelines.save(family, tmp_path_factory.mktemp("pipelines") / family)
        return made[family]

    return get


def pipeline(folder):
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text())
    absent = [name for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]]
    pipe = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, family, **more):
    """Two steps of the pipeline, wider than high."""
    side = 2 * LATENT * (2 if family == "sana" else 1)
    settings = {"height": side, "width": 2 * side, "num_inference_steps": 2, "output_type": "latent",
                "generator": torch.Generator().manual_seed(0)}
    if family.startswith(("pixart", "sana")):
        settings["use_resolution_binning"] = False
    if family == "sdxl":
        settings |= {"original_size": (1001, 1365), "crops_coords_top_left": (3, 5), "target_size": (1023, 771)}
    return pipe(PROMPT, **(settings | more)).images


def unpack(family, latents):
    from diffusers import FluxPipeline

    return FluxPipeline._unpack_latents(latents, 2 * LATENT, 4 * LATENT, 2) if family == "flux" else latents


def batch(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def encoders_of(folder):
    return open_encoders(folder)


def condition(folder, *texts):
    return batch(encoders_of(folder).captions(list(texts)))


@functools.cache
def plain(folder):
    """For tests that change nothing about it."""
    return open_denoiser(folder)


def noisy(denoiser, rows=2, seed=1):
    side = LATENT * (2 if denoiser.family == "sana" else 1)
    x = torch.randn(rows, denoiser.latent_channels, side, side, generator=torch.Generator().manual_seed(seed))
    return x, torch.full((rows,), 0.5) if denoiser.process.kind == "flow" else torch.full((rows,), 501)


def disturb(network):
    """Second matrices of fresh adapters are zero; with others something is left to compare."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def alike(images, others):
    """But for the rounding of a level."""
    assert len(images) == len(others) and images[0].size == others[0].size
    for image, other in zip(images, others, strict=True):
        assert (np.asarray(image).astype(int) - np.asarray(other)).__abs__().max() <= 1


def asked(pipe, family):
    """(inputs, output) of the network's last call in two steps of the pipeline."""
    seen = []
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = network.register_forward_hook(lambda module, args, kwargs, out: seen.append((args, kwargs, out[0])), with_kwargs=True)
    run(pipe, family)
    handle.remove()
    return seen[-1]


# ---- the network -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prediction_is_what_the_pipeline_computes(folder, family):
    """Inside a sampling step, with its own captions, the one without a caption included."""
    denoiser = plain(folder(family))
    args, kwargs, out = asked(pipeline(folder(family)), family)
    x = args[0] if args else kwargs["hidden_states"]
    t = args[1] if len(args) > 1 else kwargs["timestep"]
    t = t.reshape(-1).expand(len(x))
    if family == "flux":
        cond, x, out = condition(folder(family), PROMPT), unpack(family, x), unpack(family, out)
    else:
        cond = condition(folder(family), "", PROMPT)
        t = t / 1000 if denoiser.process.kind == "flow" else t
        out = out[:, :4]
    sizes = torch.tensor([[1001, 1365, 3, 5, 1023, 771]] * len(x)) if family == "sdxl" else None
    with torch.no_grad():
        mine = denoiser.predict(x, t, cond, sizes)
    assert mine.shape == x.shape
    torch.testing.assert_close(mine, out, atol=2e-5, rtol=1e-4)
    assert out.std() > 1e-3


def test_families_are_told_apart(folder):
    wanted = {"sd3-no-t5": "sd3", "pixart-alpha": "pixart"}
    for family in FAMILIES:
        denoiser = plain(folder(family))
        assert denoiser.family == wanted.get(family, family)
        assert denoiser.latent_channels == 4 and denoiser.factor == 2
        assert denoiser.network.training
    assert plain(folder("sd15")).resolution == 16 and plain(folder("flux")).resolution == 256


@pytest.mark.parametrize("autocast", [True, False])
def test_sizes_are_not_rounded_under_bf16(folder, autocast):
    """1001 would become 1000, 1023 become 1024 and 1365 become 1368."""
    denoiser = open_denoiser(folder("sdxl"), dtype=torch.bfloat16)
    told = []
    denoiser.network.add_time_proj.register_forward_pre_hook(lambda module, args: told.append(args[0].clone()))
    x, t = noisy(denoiser)
    sizes = torch.tensor([[1001, 1365, 3, 5, 1023, 771], [640, 480, 0, 0, 1023, 771]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = denoiser.predict(x, t, condition(folder("sdxl"), PROMPT, ""), sizes)
    assert told[0].dtype == torch.float32 and told[0].tolist() == sizes.flatten().tolist()
    assert out.isfinite().all()


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "sana", "pixart"])
def test_half_precision_stays_near(folder, family):
    exact, rough = plain(folder(family)), open_denoiser(folder(family), dtype=torch.bfloat16, lora=ALL)
    cond = condition(folder(family), PROMPT, "a blue square")
    x, t = noisy(exact)
    with torch.no_grad():
        wanted = exact.predict(x, t, cond)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close = rough.predict(x, t, cond)
    assert {p.dtype for p in rough.network.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in rough.network.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert (close - wanted).std() < 0.1 * wanted.std()


def test_flux_is_told_the_pipelines_guidance(folder):
    denoiser = open_denoiser(folder("flux"))
    cond = condition(folder("flux"), PROMPT, PROMPT)
    x, t = noisy(denoiser)
    assert denoiser.guidance == 3.5
    with torch.no_grad():
        first = denoiser.predict(x, t, cond)
        denoiser.guidance = 1.0
        assert (denoiser.predict(x, t, cond) - first).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_checkpointing_and_memory_layout_change_no_gradient(folder, family):
    grads = []
    for settings in ({}, {"gradient_checkpointing": True}, {"channels_last": True}):
        denoiser = open_denoiser(folder(family), **settings)
        x, t = noisy(denoiser)
        denoiser.predict(x, t, condition(folder(family), PROMPT, "")).square().sum().backward()
        grads.append({name: p.grad for name, p in denoiser.network.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        for other in grads[1:]:
            torch.testing.assert_close(other[name], grad, atol=1e-4 * float(grad.abs().max()) + 1e-7, rtol=1e-3)
    assert len(grads[0]) > 20


@pytest.mark.parametrize(("family", "block"), [("sd15", "BasicTransformerBlock"), ("sd3", "JointTransformerBlock"),
                                               ("sana", "SanaTransformerBlock"), ("pixart", "BasicTransformerBlock")])
def test_blocks_are_compiled(folder, family, block):
    denoiser = open_denoiser(folder(family), compile=True)
    compiled = {type(m).__name__ for m in denoiser.network.modules() if m._compiled_call_impl is not None}
    assert block in compiled and type(denoiser.network).__name__ not in compiled


# ---- the process -------------------------------------------------------------------------------------


def test_processes_are_those_of_the_schedulers(folder):
    kinds = {family: plain(folder(family)).process for family in FAMILIES}
    assert [kinds[f].kind for f in FAMILIES] == ["epsilon", "v", "epsilon", "epsilon", "epsilon", "flow", "flow", "flow", "flow"]
    assert kinds["sd21"].alphas_cumprod[-1] == 0 and kinds["sd15"].alphas_cumprod[-1] > 0  # zero terminal SNR
    x, eps, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([17, 800])
    for family in ("sd15", "sd21", "sdxl", "pixart"):
        scheduler = pipeline(folder(family)).scheduler
        assert torch.equal(kinds[family].alphas_cumprod.float(), scheduler.alphas_cumprod) and kinds[family].steps == 1000
        if family.startswith("sd2") or family == "sd15":  # the others add noise to pictures that are not scaled down
            torch.testing.assert_close(kinds[family].noised(x, eps, t), scheduler.add_noise(x, eps, t))
    assert kinds["sd3"].shift == kinds["sana"].shift == 3


def test_a_dynamic_shift_is_that_of_the_pipelines_schedule(folder):
    """The sigmas that FLUX samples with, at two sizes."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = pipeline(folder("flux")).scheduler
    for resolution in (64, 256):
        process = open_denoiser(folder("flux"), resolution=resolution).process
        u = torch.linspace(1, 0.1, 10)
        scheduler.set_timesteps(sigmas=u.tolist(), mu=calculate_shift((resolution // 4) ** 2))
        torch.testing.assert_close(process.times(u).float()[1:], scheduler.sigmas[1:-1], atol=1e-6, rtol=1e-5)
    told = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert float(process_of(told).times(torch.tensor([0.5]))) == pytest.approx(0.75)
    assert process_of({**told, "use_dynamic_shifting": True, "time_shift_type": "linear"}).shift == pytest.approx(1.15)


@pytest.mark.parametrize(("config", "said"), [
    ({"_class_name": "NoScheduler"}, "NoScheduler"),
    ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}, "num_train_timesteps=500"),
])
def test_unknown_processes_are_refused(config, said):
    with pytest.raises(UserError, match=said):
        process_of(config)


# ---- pictures and captions ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_encoded_and_decoded_as_the_pipeline_does(folder, family):
    pipe, encoders = pipeline(folder(family)), open_encoders(folder(family), dtype=torch.bfloat16)
    latents, images = unpack(family, run(pipe, family)), run(pipe, family, output_type="pil")
    alike(encoders.decode(latents), images)
    pixels = torch.rand(2, 3, 16, 32) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, std = encoders.latents(pixels)
    assert mean.dtype == std.dtype == torch.float32 and mean.shape == std.shape == (2, 4, 8, 16)
    with torch.no_grad():
        made = pipe.vae.encode(pixels)
        raw = made.latent if family == "sana" else made.latent_dist.mode()
        back = pipe.vae.decode(raw, return_dict=False)[0]
    alike(encoders.decode(mean), pipe.image_processor.postprocess(back))
    config = pipe.vae.config
    shift = config.get("shift_factor") or 0.0
    torch.testing.assert_close(mean, (raw - shift) * config.scaling_factor, atol=1e-5, rtol=1e-5)
    if family == "sana":
        assert std.abs().max() == 0
    else:
        torch.testing.assert_close(std, made.latent_dist.std * config.scaling_factor, atol=1e-5, rtol=1e-5)


def test_latents_with_a_mean_and_deviation_for_each_channel(folder, tmp_path):
    model = shutil.copytree(folder("sdxl"), tmp_path / "model")
    about = json.loads((model / "vae" / "config.json").read_text())
    about |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    (model / "vae" / "config.json").write_text(json.dumps(about))
    pipe, encoders = pipeline(model), open_encoders(model)
    images = run(pipe, "sdxl", output_type="pil")
    alike(encoders.decode(run(pipe, "sdxl")), images)
    mean, _ = encoders.latents(torch.zeros(1, 3, 16, 16))
    with torch.no_grad():
        raw = pipe.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mean
    wanted = (raw - torch.tensor([0.1, -0.2, 0.3, 0.0]).view(1, 4, 1, 1)) / torch.arange(1, 5).view(1, 4, 1, 1) * 0.13025
    torch.testing.assert_close(mean, wanted, atol=1e-6, rtol=1e-5)


def test_a_picture_that_is_not_finite_is_named(folder):
    encoders = open_encoders(folder("sdxl"))
    pixels = torch.zeros(3, 3, 16, 16)
    pixels[1, 0, 4, 4] = torch.nan
    with pytest.raises(NotFinite, match="picture 1 of its batch") as caught:
        encoders.latents(pixels)
    assert caught.value.place == 1
    with pytest.raises(NotFinite):
        encoders.decode(torch.full((1, 4, 8, 8), torch.inf))


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_do_not_depend_on_what_they_are_encoded_with(folder, family):
    encoders = open_encoders(folder(family))
    texts = [PROMPT, "", "a blue square", PROMPT, " "]
    together = encoders.captions(texts)
    assert len(together) == 5 and together[0].keys() == together[1].keys()
    for text, made in zip(texts, together, strict=True):
        for name, value in encoders.captions([text])[0].items():
            torch.testing.assert_close(value, made[name], atol=1e-5, rtol=1e-4)
    assert (together[0]["prompt_embeds"] - together[2]["prompt_embeds"]).abs().max() > 1e-3
    assert "mask" in together[0] if family.startswith(("pixart", "sana")) else "mask" not in together[0]
    assert encoders.cut == 0


def test_no_caption_is_what_the_pipeline_has_for_it(folder, tmp_path):
    """Zeros of SDXL models that say so, and the encoding of "" of those that do not."""
    zeros = open_encoders(folder("sdxl")).captions([""])[0]
    assert not zeros["prompt_embeds"].any() and not zeros["pooled"].any()
    model = shutil.copytree(folder("sdxl"), tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    made, pipe = open_encoders(model).captions([""])[0], pipeline(model)
    _, negative, _, pooled = pipe.encode_prompt(PROMPT, device="cpu")
    torch.testing.assert_close(made["prompt_embeds"], negative[0])
    torch.testing.assert_close(made["pooled"], pooled[0])
    assert open_encoders(model).fingerprint["text"] != open_encoders(folder("sdxl")).fingerprint["text"]


@pytest.mark.parametrize(("family", "words", "limit"), [
    ("sd15", 14, 16), ("sdxl", 14, 16), ("sd3-no-t5", 14, 16), ("sd3", 255, 256), ("pixart", 299, 300), ("pixart-alpha", 119, 120),
    ("flux", 511, 512), ("sana", 298, 300),
])
def test_captions_over_the_limit_are_counted_and_told_once(folder, family, words, limit, capsys):
    encoders = open_encoders(folder(family))
    short, long = "red " * words, "red " * (words + 1)
    assert encoders.limit == limit
    assert encoders.too_long([short, long]) == [1]
    encoders.captions([short])
    assert encoders.cut == 0 and not capsys.readouterr().err
    encoders.captions([long, PROMPT])
    assert encoders.cut == 1 and f"read {limit} tokens" in capsys.readouterr().err
    encoders.captions([long])
    assert encoders.cut == 2 and not capsys.readouterr().err


def test_fingerprints_follow_the_contents(folder, tmp_path):
    here = open_encoders(folder("sd15")).fingerprint
    model = shutil.copytree(folder("sd15"), tmp_path / "model")
    assert open_encoders(model).fingerprint == here and set(here) == {"vae", "text"}
    weights = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    next(iter(weights.values())).add_(1)
    from safetensors.torch import save_file

    save_file(weights, model / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    there = open_encoders(model).fingerprint
    assert there["vae"] != here["vae"] and there["text"] == here["text"]


def test_encoders_are_let_go_of(folder):
    encoders = open_encoders(folder("sd15"))
    before = encoders.captions([PROMPT])[0]["prompt_embeds"]
    assert "texts" in encoders.__dict__ and "vae" not in encoders.__dict__
    encoders.free()
    assert "texts" not in encoders.__dict__
    torch.testing.assert_close(encoders.captions([PROMPT])[0]["prompt_embeds"], before)


# ---- LoRA and saving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NETWORKS)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_can_be_switched_off(folder, family):
    base, denoiser = plain(folder(family)), open_denoiser(folder(family), lora=ALL, seed=3)
    cond = condition(folder(family), PROMPT, "")
    x, t = noisy(base)
    with torch.no_grad():
        with denoiser.without_adapter():
            wanted = denoiser.predict(x, t, cond)
        torch.testing.assert_close(wanted, base.predict(x, t, cond), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(denoiser.predict(x, t, cond), wanted, atol=1e-6, rtol=1e-6)
        disturb(denoiser.network)
        assert (denoiser.predict(x, t, cond) - wanted).abs().max() > 1e-4
        with denoiser.without_adapter():
            assert torch.equal(denoiser.predict(x, t, cond), wanted)
    trained = {name for name, p in denoiser.network.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    again = open_denoiser(folder(family), lora=ALL, seed=3)
    first = {n: p for n, p in again.network.named_parameters() if "lora_A" in n}
    assert all(torch.equal(p, dict(denoiser.network.named_parameters())[n]) for n, p in first.items())


def test_switching_off_between_forward_and_backward_keeps_gradients(folder):
    """As a reference does; blocks are computed anew in the backward pass, with the adapter on."""
    grads = []
    for checkpointing in (False, True):
        denoiser = open_denoiser(folder("sd15"), lora=ALL, gradient_checkpointing=checkpointing)
        disturb(denoiser.network)
        cond = condition(folder("sd15"), PROMPT, "")
        x, t = noisy(denoiser)
        out = denoiser.predict(x, t, cond)
        with denoiser.without_adapter(), torch.no_grad():
            reference = denoiser.predict(x, t, cond)
        (out - reference).square().sum().backward()
        grads.append({n: p.grad for n, p in denoiser.network.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)
        assert grad.abs().max() > 0


@pytest.mark.parametrize("family", NETWORKS)
def test_saved_adapters_load_into_a_plain_pipeline_and_again(folder, family, tmp_path):
    denoiser = open_denoiser(folder(family), lora=ALL)
    disturb(denoiser.network)
    denoiser.save(tmp_path / "lora")
    cond = condition(folder(family), PROMPT, "")
    x, t = noisy(denoiser)
    with torch.no_grad():
        wanted = denoiser.predict(x, t, cond)
    pipe, theirs = pipeline(folder(family)), copy.copy(plain(folder(family)))
    if family.startswith("pixart"):
        from peft import PeftModel

        theirs.network = PeftModel.from_pretrained(pipe.transformer, tmp_path / "lora").base_model.model
    else:
        pipe.load_lora_weights(tmp_path / "lora")
        theirs.network = pipe.unet if family in UNETS else pipe.transformer
    again = open_denoiser(folder(family), lora=LoraConfig(enabled=True, adapter=str(tmp_path / "lora")))
    fresh = open_denoiser(folder(family), lora=ALL, seed=9)
    fresh.restore(tmp_path / "lora")
    with torch.no_grad():
        for other in (theirs, again, fresh):
            torch.testing.assert_close(other.predict(x, t, cond), wanted, atol=1e-6, rtol=1e-5)
    trained = [{n for n, p in made.network.named_parameters() if p.requires_grad} for made in (again, denoiser)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("family", ["sd15", "sd3", "sana"])
def test_saved_networks_load_into_a_plain_pipeline_and_again(folder, family, tmp_path):
    denoiser = open_denoiser(folder(family))
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter.add_(0.01)
    denoiser.save(tmp_path / "part")
    denoiser.save(tmp_path / "whole", complete=True)
    assert [f.name for f in (tmp_path / "part").iterdir()] == [denoiser.folder.network]
    pipe, again, restored = pipeline(tmp_path / "whole"), open_denoiser(tmp_path / "whole"), open_denoiser(folder(family))
    restored.restore(tmp_path / "part")
    for network in (getattr(pipe, denoiser.folder.network), again.network, restored.network):
        for name, parameter in denoiser.network.state_dict().items():
            assert torch.equal(network.state_dict()[name], parameter)
    assert len(run(pipe, family, output_type="pil")) == 1


@pytest.mark.parametrize("style", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize("family", NETWORKS)
def test_exports_are_read_by_diffusers(folder, family, style, tmp_path):
    """Into a plain pipeline with the same predictions, where diffusers reads the style; alpha is not the rank."""
    # diffusers reads FLUX's other blocks in kohya's style at the published width only; they have a test of their own.
    double = "transformer_blocks.0.attn."
    targets = f"{double}to_q,{double}to_v,{double}add_k_proj,ff.net.2" if family == "flux" else "attention"
    denoiser = open_denoiser(folder(family), lora=LoraConfig(enabled=True, r=4, alpha=12, targets=targets))
    disturb(denoiser.network)
    file = tmp_path / f"{family}-{style}.safetensors"
    if family in ("sana", "pixart") and (style == "kohya" or family == "sana") and style != "diffusers":
        with pytest.raises(UserError, match=f"{style} has no LoRA keys for {family}"):
            export_lora(denoiser, file, style)
        return
    export_lora(denoiser, file, style)
    keys = set(load_file(file))
    if style == "kohya" or (style == "comfyui" and family in UNETS):
        assert all(key.startswith("lora_unet_") and key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")) for key in keys)
    else:
        assert all(key.startswith(("unet.", "transformer.")) for key in keys)
    if family == "sdxl":
        assert ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in keys) == (style == "kohya")
        assert ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in keys) == (style == "comfyui")
    cond = condition(folder(family), PROMPT, "")
    x, t = noisy(denoiser)
    if family == "sd3" and style == "kohya":
        check_sd3_by_its_checkpoint_converter(denoiser, load_file(file))
        return
    others = [open_denoiser(folder(family), lora=LoraConfig(enabled=True, adapter=str(file)))]
    if family != "pixart":
        pipe = pipeline(folder(family))
        pipe.load_lora_weights(file)
        others.append(copy.copy(plain(folder(family))))
        others[-1].network = pipe.unet if family in UNETS else pipe.transformer
    with torch.no_grad():
        wanted = denoiser.predict(x, t, cond)
        for other in others:
            torch.testing.assert_close(other.predict(x, t, cond), wanted, atol=2e-6, rtol=1e-4)


def check_sd3_by_its_checkpoint_converter(denoiser, made):
    """diffusers reads no LoRA in this style, but it reads original checkpoints, whose names these are: what is added to the original
    matrices is taken apart by its converter."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    class Partial(dict):
        def pop(self, key, *default):
            return super().pop(key, torch.zeros(6))

    dots = {"x_block_attn_": "x_block.attn.", "x_block_attn2_": "x_block.attn2.", "context_block_attn_": "context_block.attn."}
    checkpoint = Partial({"context_embedder.weight": torch.zeros(16, 32)})
    for key in made:
        if key.endswith(".lora_up.weight"):
            stem = key.removesuffix(".lora_up.weight")
            name = stem.removeprefix("lora_unet_joint_blocks_").replace("_", ".", 1)
            for old, new in dots.items():
                name = name.replace(old, new)
            scale = float(made[f"{stem}.alpha"]) / len(made[f"{stem}.lora_down.weight"])
            checkpoint[f"joint_blocks.{name}.weight"] = scale * made[key] @ made[f"{stem}.lora_down.weight"]
    converted = convert(checkpoint)
    own = matrices(denoiser.network)
    assert len(own) == 2 * 8 - 1 + 4  # the last block has no way out for the text; the first has a second attention
    for name, (down, up) in own.items():
        torch.testing.assert_close(converted[f"{name}.weight"], up @ down, atol=1e-6, rtol=1e-5)


def test_flux_single_blocks_are_exported_to_kohya():
    """diffusers' reader knows the widths of the published model only, so on layers of that size, without their weights."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=0, num_single_layers=1)
    block = "single_transformer_blocks.0"
    names = [f"{block}.{name}" for name in ("attn.to_q", "attn.to_v", "proj_mlp", "proj_out", "norm.linear")]
    shapes = {name: network.get_submodule(name).weight.shape for name in names}
    pairs = {name: (torch.randn(2, shape[1]), torch.randn(shape[0], 2)) for name, shape in shapes.items()}
    stub = SimpleNamespace(family="flux", network=network, folder=SimpleNamespace(network="transformer"))
    made = _renamed(stub, pairs, "kohya")
    assert "lora_unet_single_blocks_0_linear1.alpha" in made
    read = _convert_kohya_flux_lora_to_diffusers(dict(made))
    for name, (down, up) in pairs.items():
        x = torch.randn(down.shape[1])
        got = read[f"transformer.{name}.lora_B.weight"] @ (read[f"transformer.{name}.lora_A.weight"] @ x)
        torch.testing.assert_close(got, up @ (down @ x), atol=1e-2, rtol=1e-4)
    without = f"transformer.{block}.attn.to_k.lora_"  # a member that has no adapter
    assert not (read[f"{without}B.weight"] @ (read[f"{without}A.weight"] @ torch.randn(3072))).any()


# ---- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "part"), [("sdxl", "text_encoder_2"), ("sd15", "vae"), ("flux", "transformer"), ("pixart", "tokenizer"),
                                              ("sd3", "text_encoder_3"), ("sana", "scheduler")])
def test_a_missing_part_is_named(folder, family, part, tmp_path):
    model = shutil.copytree(folder(family), tmp_path / "model")
    shutil.rmtree(model / part)
    for opener in (open_denoiser, open_encoders):
        with pytest.raises(UserError, match=f"has no {part},"):
            opener(model)


def test_folders_that_are_none_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="holds no model_index.json"):
        open_denoiser(tmp_path)
    model = shutil.copytree(folder("sd15"), tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    for changes, said in (({"_class_name": "KandinskyPipeline"}, "KandinskyPipeline"), ({"unet": ["my_code", "UNet"]}, "my_code.UNet"),
                          ({"vae": [None, None]}, "has no vae")):
        (model / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(UserError, match=said):
            open_denoiser(model)
    (model / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        open_denoiser(model)


def test_weights_that_are_pickles_missing_or_damaged_are_refused(folder, tmp_path):
    model = shutil.copytree(folder("sd15"), tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.move(weights, weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="diffusion_pytorch_model.bin, a pickle"):
        open_denoiser(model)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match="the unet of .* has no weights"):
        open_denoiser(model)
    state = load_file(folder("sd15") / "unet" / weights.name)
    from safetensors.torch import save_file

    save_file({name: value for name, value in state.items() if name != "conv_in.weight"}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="conv_in.weight"):
        open_denoiser(model)
    weights.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="the unet of .* cannot be loaded"):
        open_denoiser(model)


def test_weights_of_one_variant_are_found(folder, tmp_path):
    model = shutil.copytree(folder("sd15"), tmp_path / "model")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        shutil.move(model / part / f"{name}.safetensors", model / part / f"{name}.fp16.safetensors")
    mine, theirs = open_denoiser(model).network.state_dict(), open_denoiser(folder("sd15")).network.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    torch.testing.assert_close(condition(model, PROMPT), condition(folder("sd15"), PROMPT))


def test_an_inpainting_network_is_refused(folder, tmp_path):
    model = shutil.copytree(folder("sd15"), tmp_path / "model")
    with torch.random.fork_rng(devices=[]):
        tiny_pipelines.unet(in_channels=9).save_pretrained(model / "unet")
    with pytest.raises(UserError, match="takes 9 channels"):
        open_denoiser(model)


def test_adapters_of_other_architectures_are_refused(folder, tmp_path):
    made = {}
    for family in ("sd15", "sdxl", "sd3", "flux", "pixart"):
        made[family] = tmp_path / family
        open_denoiser(folder(family), lora=ALL).save(made[family])
    for family, other in (("sd15", "sdxl"), ("sdxl", "sd15"), ("sd15", "sd3"), ("sd3", "sd15"), ("flux", "sd3"), ("sd3", "flux"),
                          ("pixart", "sd15"), ("sd15", "pixart")):
        with pytest.raises(UserError, match="of another architecture"):
            open_denoiser(folder(family), lora=LoraConfig(enabled=True, adapter=str(made[other])))
    kohya = tmp_path / "sdxl.safetensors"
    export_lora(open_denoiser(folder("sdxl"), lora=ALL), kohya, "kohya")
    for family in ("sd15", "flux", "sd3"):
        with pytest.raises(UserError, match="of another architecture"):
            open_denoiser(folder(family), lora=LoraConfig(enabled=True, adapter=str(kohya)))
    with pytest.raises(UserError, match="holds no LoRA weights"):
        open_denoiser(folder("sd15"), lora=LoraConfig(enabled=True, adapter=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match="of another rank"):
        open_denoiser(folder("sd15"), lora=LoraConfig(enabled=True, r=2, targets="attention")).restore(made["sd15"])
    with pytest.raises(UserError, match="of other layers"):
        open_denoiser(folder("sd15"), lora=LoraConfig(enabled=True, r=4, targets="to_q")).restore(made["sd15"])


def test_what_cannot_be_exported_is_said(folder, tmp_path):
    with pytest.raises(UserError, match="no LoRA weights to export"):
        export_lora(open_denoiser(folder("sd15")), tmp_path / "x.safetensors", "kohya")
    with pytest.raises(UserError, match="not webui"):
        export_lora(open_denoiser(folder("sd15"), lora=ALL), tmp_path / "x.safetensors", "webui")
    everything = open_denoiser(folder("sdxl"), lora=LoraConfig(enabled=True, r=2, targets="all-linear"))
    with pytest.raises(UserError, match="attention blocks only, not for"):
        export_lora(everything, tmp_path / "x.safetensors", "kohya")
    with pytest.raises(UserError, match="model.lora.targets=nowhere"):
        open_denoiser(folder("sd15"), lora=LoraConfig(enabled=True, targets="nowhere"))


def test_every_known_pipeline_has_a_class():
    from prefopt.policies.pipeline_folder import NEEDED

    assert set(CLASSES) == set(NEEDED)
