"""LoRA on diffusion networks, and what is saved: plain pipelines of diffusers read it and compute the same."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from prefopt.config.schema import LoraConfig
from prefopt.errors import UserError
from prefopt.policies.denoisers import open_denoiser
from prefopt.policies.lora_export import _renamed, export_lora, matrices
from tests.tiny_pipelines import ALL, NETWORKS, PROMPT, UNETS, condition, disturb, folders, noisy, pipeline, plain, run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return folders(tmp_path_factory)


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


def test_trap_4_23_switching_off_between_forward_and_backward_keeps_gradients(folder):
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


def test_trap_4_32_an_adapter_has_the_dropout_that_is_asked_for(folder, tmp_path):
    """Whatever it was trained with, and whether or not its file says so: kohya's style has no place for it."""
    trained = open_denoiser(folder("sd15"), lora=LoraConfig(enabled=True, r=4, targets="attention", dropout=0.4))
    trained.save(tmp_path / "saved")
    export_lora(trained, tmp_path / "kohya.safetensors", "kohya")
    for adapter in (tmp_path / "saved", tmp_path / "kohya.safetensors"):
        for dropout in (0.0, 0.2):
            again = open_denoiser(folder("sd15"), lora=LoraConfig(enabled=True, adapter=str(adapter), dropout=dropout))
            layers = [module.lora_dropout["default"] for module in again.network.modules() if hasattr(module, "lora_dropout")]
            assert layers and {getattr(layer, "p", 0.0) for layer in layers} == {dropout}, adapter
            assert all(layer.training for layer in layers)


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
