"""Models that no process could hold as a whole: split while they are read, gathered layer by layer to be sampled, scored and saved."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file, save_file

from prefopt.policies.tiny_lm import ensure_tiny_lm
from prefopt.tracking.tracker import read_jsonl
from tests.distributed.split_runs import SHARD
from tests.distributed.test_two_processes import torchrun
from tests.distributed.test_zero_runs import ADAM, STEPS, TOLERANCE, config_of, same
from tests.toy_runs import train

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed; the extra `test` brings it")

LAYERS = 12
SMALL = ["data.limit=8", "data.eval_limit=4", "train.batch_size=4", "evaluation.prompts=3", "sampler.max_new_tokens=8",
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


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_lm):
    root, monkeypatch = tmp_path_factory.mktemp("split"), pytest.MonkeyPatch()
    size = large(root / "large")
    (root / "deepspeed.json").write_text(json.dumps(DEEPSPEED))
    cases = {"large": ["algo=dpo", "model=tiny-lm", f"model.path={root / 'large'}", "optim.weight_decay=1"]}
    jobs = []
    for name, words in cases.items():
        words = [*words, *SMALL, *STEPS, *ADAM]
        monkeypatch.setenv("PREFOPT_STORE", str(root / "store-one"))
        assert train(root / f"{name}-one", *words) == 0
        config = config_of(root / f"{name}-two", monkeypatch, *words, "hardware=2xcpu", "hardware.zero=3",
                           f"hardware.deepspeed={root / 'deepspeed.json'}")
        jobs.append({"config": config, "algo": words[0].removeprefix("algo="), "kill": None})
    (root / "jobs.json").write_text(json.dumps(jobs))
    monkeypatch.setenv("PREFOPT_STORE", str(root / "store-two"))  # to be filled by two
    torchrun("-m", "tests.distributed.split_runs", str(root / "jobs.json"), str(root / "peaks"))
    monkeypatch.undo()
    return root, size, [json.loads((root / f"peaks.{rank}").read_text()) for rank in (0, 1)]


def test_x(made):
    root, size, peaks = made
    print(size, {k: [round(x / size, 2) for x in v] for k, v in peaks[0].items()}, {k: [round(x / size, 2) for x in v] for k, v in peaks[1].items()})
    same(root / "large-one", root / "large-two")
