"""Networks of diffusers behind one interface: each test compares with what the pipeline of diffusers itself computes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from prefopt.errors import UserError
from prefopt.policies.denoisers import FAMILIES as CLASSES
from prefopt.policies.denoisers import open_denoiser, process_of
from prefopt.policies.encoders import open_encoders
from tests import tiny_pipelines
from tests.tiny_pipelines import ALL, FAMILIES, NETWORKS, PROMPT, asked, condition, folders, noisy, pipeline, plain, unpack


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return folders(tmp_path_factory)


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


def test_trap_4_30_a_folders_name_says_nothing_of_its_family(folder, tmp_path):
    place = shutil.copytree(folder("sdxl"), tmp_path / "sd15-turbo-refiner-flux")
    assert open_denoiser(place).family == "sdxl"


def test_families_are_told_apart(folder):
    wanted = {"sd3-no-t5": "sd3", "pixart-alpha": "pixart"}
    for family in FAMILIES:
        denoiser = plain(folder(family))
        assert denoiser.family == wanted.get(family, family)
        assert denoiser.latent_channels == 4 and denoiser.factor == 2
        assert denoiser.network.training
    assert plain(folder("sd15")).resolution == 16 and plain(folder("flux")).resolution == 256


@pytest.mark.parametrize("autocast", [True, False])
def test_trap_4_11_sizes_are_not_rounded_under_bf16(folder, autocast):
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


@pytest.mark.parametrize("family", NETWORKS)
def test_trap_4_16_a_picture_is_denoised_alike_in_any_batch(folder, family):
    """Beside pictures at other times, with other captions and of other sizes."""
    denoiser, cond = plain(folder(family)), condition(folder(family), PROMPT, "", "a blue square")
    x, _ = noisy(denoiser, 3)
    t = torch.tensor([0.1, 0.5004, 0.9]) if denoiser.process.kind == "flow" else torch.tensor([3, 501, 900])
    sizes = torch.tensor([[16, 16, 0, 0, 16, 16], [640, 480, 0, 8, 16, 16], [1001, 1365, 3, 5, 16, 16]])
    with torch.no_grad():
        together = denoiser.predict(x, t, cond, sizes)
        for i in range(3):
            alone = denoiser.predict(x[i : i + 1], t[i : i + 1], {name: value[i : i + 1] for name, value in cond.items()}, sizes[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)
    assert together.isfinite().all()


@pytest.mark.parametrize("family", NETWORKS)
def test_trap_4_30_times_are_told_unrounded(folder, family):
    """In thousandths, which are no whole numbers of a flow; bf16 would make 501 a 500. FLUX's own code rounds, in its pipeline too."""
    denoiser = open_denoiser(folder(family), dtype=torch.bfloat16)
    told = []
    sinusoids = next(m for m in denoiser.network.modules() if type(m).__name__ == "Timesteps")
    sinusoids.register_forward_pre_hook(lambda module, args: told.append(args[0].clone()))
    x, _ = noisy(denoiser)
    flow = denoiser.process.kind == "flow"
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        denoiser.predict(x, torch.tensor([0.5004, 0.1237]) if flow else torch.tensor([501, 77]), condition(folder(family), PROMPT, ""))
    assert told[0].tolist() == pytest.approx([500.4, 123.7] if flow else [501, 77], rel=2**-8 if family == "flux" else 1e-6)


def test_trap_4_34_flux_is_told_the_pipelines_guidance(folder):
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
    for settings in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "recompute": "cheap"}, {"channels_last": True}):
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


def test_trap_4_14_a_dynamic_shift_is_that_of_the_pipelines_schedule(folder):
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


def test_every_known_pipeline_has_a_class():
    from prefopt.policies.pipeline_folder import NEEDED

    assert set(CLASSES) == set(NEEDED)
