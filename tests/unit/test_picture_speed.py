"""FLOPs of denoisers and of steps on pictures, against known figures and torch's own counter; how fast a run on pictures says it is."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prefopt.errors import UserError
from prefopt.policies import denoiser_flops
from prefopt.policies.denoiser_flops import DrawShape, caption_shapes, counted, meta_denoiser
from prefopt.policies.encoders import open_encoders
from prefopt.policies.pipeline_folder import PipelineFolder, open_folder
from prefopt.tracking.tracker import read_jsonl
from prefopt.training.engine import Engine
from prefopt.training.progress import Progress
from prefopt.training.throughput import Effort, Speed
from tests import tiny_pipelines
from tests.toy_runs import train

# The published architectures, as far as their configs differ from diffusers' defaults.
KNOWN = {
    "sd15": ("StableDiffusionPipeline", "UNet2DConditionModel", {
        "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)}),
    "sd35-medium": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}),
    "pixart": ("PixArtSigmaPipeline", "PixArtTransformer2DModel", {
        "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
        "cross_attention_dim": 1152, "sample_size": 128, "patch_size": 2, "caption_channels": 4096, "use_additional_conditions": False}),
    "sana": ("SanaPipeline", "SanaTransformer2DModel", {}),
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
# name, pixels, TFLOP of a forward pass, tokens of a caption where the figure belongs to others than the pipeline's
FIGURES = [("sd15", 512, 0.803, None), ("sd35-medium", 512, 2.224, 205), ("pixart", 1024, 6.63, None), ("sana", 1024, 2.97, None)]


def described(folder: Path, name: str) -> PipelineFolder:
    """A pipeline folder with configs and no weights."""
    pipeline, network, config = KNOWN[name]
    part = "unet" if network.startswith("UNet") else "transformer"
    deep = name == "sana"
    vae = {"latent_channels": 32 if deep else 16 if name == "sd35-medium" else 4,
           ("encoder_block_out_channels" if deep else "block_out_channels"): [128] * (6 if deep else 4)}
    flow = name in ("sana", "sd35-medium")
    files = {f"{part}/config": config, "scheduler/scheduler_config": FLOW if flow else DDIM, "vae/config": vae,
             "text_encoder/config": {"max_position_embeddings": 77}}
    for file, said in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{file}.json").write_text(json.dumps(said))
    return PipelineFolder(folder, pipeline, {part: ["diffusers", network]})


@pytest.mark.parametrize(("name", "pixels", "wanted", "tokens"), FIGURES, ids=[figure[0] for figure in FIGURES])
def test_forward_passes_cost_what_is_known_of_them(tmp_path, monkeypatch, name, pixels, wanted, tokens):
    if tokens:
        shapes = {"prompt_embeds": (tokens, 4096), "pooled": (2048,)}
        monkeypatch.setattr(denoiser_flops, "caption_shapes", lambda _: shapes)
    shape, _ = counted(meta_denoiser(described(tmp_path, name), pixels), pixels)
    assert shape.forward(1) / 1e12 == pytest.approx(wanted, rel=2e-3)
    assert shape.step(2) == 6 * shape.forward(1)


@pytest.fixture(scope="module", params=tiny_pipelines.FAMILIES)
def family(request, tmp_path_factory):
    return tiny_pipelines.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("longest", [None, 7])
def test_captions_have_the_shapes_that_encoders_make(family, longest):
    folder = open_folder(family, longest)
    if longest and folder.pipeline in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        with pytest.raises(UserError, match="model.max_sequence_length=7: a StableDiffusion(XL)?Pipeline has no such setting"):
            open_encoders(folder).captions(["a red circle"])
        return
    encoders = open_encoders(folder)
    real = {name: tuple(value.shape) for name, value in encoders.captions(["a red circle"])[0].items()}
    assert caption_shapes(meta_denoiser(folder, 16)) == real
    if longest:
        usual = open_encoders(family)
        assert encoders.limit in (7, usual.limit) and encoders.fingerprint["text"] != usual.fingerprint["text"]
        clip = folder.config("text_encoder")["max_position_embeddings"] if folder.pipeline == "StableDiffusion3Pipeline" else 0
        assert real["prompt_embeds"][0] == clip + 7


def test_every_family_can_be_counted(family):
    shape, places = counted(meta_denoiser(open_folder(family), 16), 16)
    assert shape.matrices > shape.parameters and shape.products > 0 and places


def test_what_cannot_be_counted_is_said(capsys, monkeypatch, tmp_path):
    denoiser = meta_denoiser(described(tmp_path, "sd15"), 512)
    monkeypatch.setattr(denoiser_flops, "counted", lambda *a: torch.empty(1, device="meta").item())
    assert denoiser_flops.shape_of_denoiser(denoiser, 512) is None
    assert "the FLOPs of its UNet2DConditionModel are not counted" in capsys.readouterr().err


def test_of_what_is_trained_beside_the_network_only_the_adapter_is_counted():
    """An objective's own module (DPOK's critic) stands beside no layer."""
    sizes = {"network.a.lora_A.default.weight": (2, 3), "network.a.lora_B.default.weight": (4, 2), "owned.layers.0.weight": (7, 7)}
    trained = {name: torch.nn.Parameter(torch.ones(size)) for name, size in sizes.items()}
    assert denoiser_flops.low_rank(trained, {"a": 5.0}) == 2 * 5 * (2 * 3 + 4 * 2)


# ---- steps ---------------------------------------------------------------------------------------

SMALL = ["model.resolution=16", "model.latent=[4,2]", "data=tiny-pictures", "data.limit=8", "data.eval_limit=2", "train.batch_size=4",
         "train.steps=2", "evaluation.prompts=0", "evaluation.kl=false", "train.self_check=false",
         "model.gradient_checkpointing=false"]
EXACT = 1e-3
INPUTS = 0.06  # nothing is differentiated with respect to latents, times and captions, which count as any other input
RECOMPUTED = 0.10  # and torch runs a block again only as far as its last product
BELOW = 0.30  # nothing is differentiated below the first adapter, which of two blocks is a good part
SETTINGS = {
    "live reference": ("sd15", [], INPUTS), "flow": ("sd3", [], INPUTS), "stored": ("sd15", ["noise=pool"], INPUTS),
    "checkpointing": ("sd15", ["model.gradient_checkpointing=true"], RECOMPUTED),
    "cheap checkpointing": ("sd15", ["model.gradient_checkpointing=true", "model.recompute=cheap"], RECOMPUTED),
    "lora": ("sd15", ["adapter=lora"], BELOW),
    "two draws": ("sd15", ["noise.draws=2"], INPUTS),
}


@contextmanager
def counting(seen: list):
    """Steps with the efforts that they state and the FLOPs that torch counts."""
    step = Engine.step

    def watched(self, *args):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the counter does not know the CPU's kernel
            result = step(self, *args)
        seen.append((result.effort, counter.get_total_flops()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", watched)
        yield


@pytest.mark.parametrize("setting", SETTINGS)
def test_executed_flops_are_those_that_torch_counts(tmp_path, capsys, setting):
    name, words, above = SETTINGS[setting]
    folder, seen = tiny_pipelines.save(name, tmp_path / "model"), []
    with counting(seen):
        assert train(tmp_path / "run", "algo=dpo", "model=tiny-diffusion", f"model.path={folder}", *SMALL, *words) == 0
    pictures = 16 if "noise.draws=2" in words else 8
    for effort, flops in seen:
        assert -EXACT < effort.executed / flops - 1 < above
        assert 0 < effort.useful <= effort.executed
        assert effort.tokens == effort.slots == pictures
        assert effort.rows == 4
    if setting == "stored":
        assert seen[0][0].useful == seen[0][0].executed
    row = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"][-1]
    assert row["pictures"] == 2 * pictures and row["pictures_per_second"] > 0 and row["useful_mfu"] > 0
    assert not {"tokens", "tokens_per_second", "padding"} & row.keys()
    said = capsys.readouterr().err
    assert "pictures/s" in said and "tok/s" not in said and "pad " not in said
    status = json.loads((tmp_path / "run" / "status.json").read_text())["speed"]
    assert status["pictures_per_second"] > 0 and "padding" not in status
    report = (tmp_path / "run" / "report.html").read_text()
    assert "pictures/s" in report and "Pictures trained on" in report and "tokens/s" not in report


def test_a_step_of_frozen_weights_costs_less():
    shape = DrawShape(matrices=100.0, products=10.0, parameters=1, adapter=1.0)
    assert shape.step(2) == 2 * 3 * 111 and shape.step(2, frozen=True) == 2 * (200 + 33)
    assert shape.forward(2) == 222 and shape.forward(2, adapted=False) == 220


def test_pictures_have_a_rate_and_no_padding():
    speed = Speed(1e9, 1, "pairs", "pictures")
    found = speed.step(Effort(rows=4.0, tokens=8.0, slots=8.0, useful=1.0, executed=2.0), 100)
    assert found["pictures_per_second"] == 2 * found["rows_per_second"]
    assert not {"padding", "tokens_per_second"} & found.keys()
    assert "8.0 pictures/s" in Progress(2, 0, False, "pairs").line(1, {"loss": 0.5, "pictures_per_second": 8.0}, "")


# ---- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["", "all", "cheap"])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_fake_tensors_take_what_real_ones_take(tmp_path, name, recompute):
    """And two small micro-batches tell of a larger one."""
    from prefopt.config.schema import ModelConfig
    from prefopt.policies.denoisers import open_denoiser
    from prefopt.training.memory import Live
    from prefopt.training.plan_pictures import dry_run

    folder, draws = tiny_pipelines.save(name, tmp_path), 5
    model = ModelConfig(name="x", resolution=16, gradient_checkpointing=bool(recompute), recompute=recompute or "all")
    cfg = SimpleNamespace(model=model, hardware=SimpleNamespace(precision="fp32"))
    planned, unknown = dry_run(open_folder(folder), cfg, draws)
    assert not unknown
    denoiser = open_denoiser(folder, gradient_checkpointing=bool(recompute), resolution=16, recompute=recompute or "all")
    for parameter in denoiser.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, t = torch.zeros(draws, 4, 8, 8), torch.zeros(draws) if name == "sd3" else torch.zeros(draws, dtype=torch.long)
    cond = {key: torch.zeros(draws, *shape) for key, shape in caption_shapes(denoiser).items()}
    with Live() as live:
        for tensor in (x, t, *cond.values(), *denoiser.network.buffers(), *(p for q in denoiser.network.parameters() for p in (q, q.grad))):
            live._note(tensor.untyped_storage())
        start = live.now
        made = denoiser.predict(x, t, cond).float().sub(x).flatten(1).square().sum()
        kept = live.peak = live.now
        made.backward()
        worst = live.peak - kept
    assert planned.activations == pytest.approx(kept - start, rel=0.1)
    assert 0.9 < (planned.activations + planned.working) / (kept - start + worst) < 1.5, "rather too much than too little"
