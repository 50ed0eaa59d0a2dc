"""Models that no process could hold as a whole: split while they are read, gathered layer by layer to be sampled, scored and saved."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file

from prefopt.policies.tiny_lm import ensure_tiny_lm
from prefopt.tracking.tracker import read_jsonl
from tests.distributed.launching import torchrun
from tests.distributed.split_runs import SHARD
from tests.distributed.test_zero_runs import ADAM, STEPS, TOLERANCE, config_of, same
from tests.toy_runs import train

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed; the extra `test` brings it")

LAYERS = 12
SMALL = ["data.limit=8", "data.eval_limit=4", "train.batch_size=4", "evaluation.prompts=3", "sampler.max_new_tokens=3",
         "train.micro_batch_tokens=256"]  # three prompts for two processes
# DeepSpeed's own buckets and limits are made for models a thousand times as large.
DEEPSPEED = {"zero_optimization": {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 100_000,
                                   "stage3_max_live_parameters": 1_000_000, "stage3_max_reuse_distance": 100_000,
                                   "stage3_param_persistence_threshold": 1000}}


def large(folder):
    """A Llama of 60 MB, in two files, with the tokenizer of tiny-lm."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ensure_tiny_lm())
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=320, intermediate_size=864, num_hidden_layers=LAYERS,
                         num_attention_heads=5, num_key_value_heads=5, max_position_embeddings=512, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="40MB")
    tokenizer.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


CASES = {
    "dpo": ["algo=dpo", "optim.weight_decay=1"],  # of the large model; it goes first
    "tdpo with a live reference": ["algo=tdpo", "reference.store=off"],  # which hands its head over
    "reward_bt": ["algo=reward_bt", "evaluation.prompts=0"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_lm):
    """(folder of the runs of one process and of two, bytes of the large model, peaks of both processes)."""
    root, monkeypatch = tmp_path_factory.mktemp("split"), pytest.MonkeyPatch()
    size = large(root / "large")
    (root / "deepspeed.json").write_text(json.dumps(DEEPSPEED))
    jobs = []
    monkeypatch.setenv("PREFOPT_STORE", str(root / "store-one"))
    for number, words in enumerate(CASES.values()):
        words = [*SMALL, *words, *STEPS, *ADAM, *([] if number else ["model=tiny-lm", f"model.path={root / 'large'}"])]
        assert train(root / f"one-{number}", *words) == 0
        config = config_of(root / f"two-{number}", monkeypatch, *words, "hardware=2xcpu", "hardware.zero=3",
                           f"hardware.deepspeed={root / 'deepspeed.json'}")
        jobs.append({"config": config, "algo": config["algo"].get("name", "algo"), "kill": None})
    (root / "jobs.json").write_text(json.dumps(jobs))
    monkeypatch.setenv("PREFOPT_STORE", str(root / "store-two"))  # to be filled by two
    torchrun("-m", "tests.distributed.split_runs", str(root / "jobs.json"), str(root / "peaks"))
    monkeypatch.undo()
    return root, size, [json.loads((root / f"peaks.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_runs_that_never_gather_a_model_end_where_one_process_ends(number, made):
    one, two = made[0] / f"one-{number}", made[0] / f"two-{number}"
    same(one, two)
    files = {folder: load_folder(folder / "model") for folder in (one, two)}
    assert set(files[one]) == set(files[two]) and len(files[one]) > 3
    for name, weight in files[one].items():
        assert weight.shape == files[two][name].shape and float((weight - files[two][name]).abs().max()) <= TOLERANCE, name
    ours, theirs = ([r for r in read_jsonl(folder / "metrics.jsonl") if r["split"] == "eval"] for folder in (one, two))
    assert len(ours) == len(theirs) == 2
    held_out = [name for name in ours[0] if name.startswith(("loss", "logp/"))]
    for a, b in zip(ours, theirs, strict=True):
        assert {n: a[n] for n in held_out} == pytest.approx({n: b[n] for n in held_out}, rel=1e-3, abs=1e-4)
        assert ("kl" in a) == ("kl" in b)


def load_folder(folder):
    return {name: weight for path in sorted(folder.glob("*.safetensors")) for name, weight in load_file(path).items()}


def test_no_process_ever_holds_a_whole_model(made):
    """Bytes beyond what a part of the run began with, in units of the model. With two processes a part of the weights is 0.5, and a layer
    that is gathered 0.2, with what was sent; training has AdamW's moments and gradients beside it."""
    _, size, peaks = made
    for rank, found in enumerate(peaks):
        first = {name: calls[0] / size for name, calls in found.items()}  # the large model's run is the first
        assert 0.45 < first["load"] < 0.85
        assert 0.05 < first["fill"] < 0.35
        assert 0.45 < first["measure"] < 0.95  # half of it a second copy, for KL
        assert 1.0 < first["step"] < 1.8
        assert rank or 0.05 < first["save"] < 0.6


def test_the_saved_model_is_one_that_transformers_reads(made):
    """Files of bounded size with an index, which hold what the checkpoint holds."""
    from transformers import AutoModelForCausalLM

    root = made[0]
    folder = root / "two-0" / "model"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))] and len(names) > 5
    assert all(path.stat().st_size < SHARD + 10_000 for path in folder.glob("*.safetensors"))
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    mine = load_folder(root / "one-0" / "model")
    assert max(float((mine[n] - p).abs().max()) for n, p in model.state_dict().items()) <= TOLERANCE
    assert {p.name for p in (root / "one-0" / "model").glob("*.json")} <= {p.name for p in folder.glob("*.json")}
