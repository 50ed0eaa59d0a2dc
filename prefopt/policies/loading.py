"""Reads models, tokenizers and adapters of transformers and PEFT, and says in one sentence why one cannot be read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefopt.config.doctor import require_bitsandbytes
from prefopt.config.schema import DataConfig, ModelConfig, TrustConfig
from prefopt.data.tokenise import Tokeniser
from prefopt.errors import UserError
from prefopt.policies.locate import Located, locate, plain
from prefopt.policies.packed import plain_attention
from prefopt.policies.split import reading


def load_tokeniser(cfg: ModelConfig, data: DataConfig, trust: TrustConfig) -> Tokeniser:
    """The tokeniser that `CausalLM` would have, without its weights."""
    if cfg.path is None and cfg.name.startswith("tiny-lm"):
        from prefopt.policies.tiny_lm import MODEL, build_tokenizer

        return Tokeniser(build_tokenizer(), data, MODEL["max_position_embeddings"], cfg.chat_template, cfg.thinking)
    located = locate(cfg, weights=False)
    context = context_of(load_config(located, trust))
    return Tokeniser(load_tokenizer(located, trust), data, context, cfg.chat_template, cfg.thinking)


def context_of(config: Any) -> int:
    """The longest sequence the model has positions for."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def load_tokenizer(located: Located, trust: TrustConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(located.folder, gguf_file=located.gguf_file, trust_remote_code=trust.remote_code)
    except Exception as error:
        raise _refusal("tokenizer", located, error) from error


def load_config(located: Located, trust: TrustConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(located.folder, gguf_file=located.gguf_file, trust_remote_code=trust.remote_code)
    except Exception as error:
        raise _refusal("config", located, error) from error


def load_model(located: Located, cfg: ModelConfig, trust: TrustConfig, dtype: torch.dtype, auto: str = "AutoModelForCausalLM",
               split: dict[str, Any] | None = None, **settings: Any) -> tuple[nn.Module, set[str]]:
    """(model, names of weights that the folder does not have). `auto` is the class of transformers, `settings` go into its config. `split`:
    as in `load.load_policy`."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # the run has one progress line of its own
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks transformers by the old name
    config = load_config(located, trust)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) and cfg.attention not in ("auto", "eager", "flex"):
        # Some versions of transformers leave the cap out without a word, others refuse.
        raise UserError(f"{located.where} caps its attention scores, which model.attention={cfg.attention} does not; "
                        "set model.attention=auto")
    attention = plain_attention(config.get_text_config(), cfg.attention)
    fourbit = _four_bits() if cfg.quantize else {}
    safe = None if located.gguf_file else True
    for name, value in settings.items():
        setattr(config, name, value)
    for part in (config, config.get_text_config()):
        for name, value in list(vars(part).items()):
            # Published checkpoints name it differently: attention_dropout, resid_pdrop, hidden_dropout, ...
            if isinstance(value, (int, float)) and not isinstance(value, bool) and ("dropout" in name or name.endswith("pdrop")):
                setattr(part, name, cfg.dropout)
            elif name == "layerdrop":
                part.layerdrop = 0.0
    try:
        with reading(split, dtype):
            model, report = getattr(transformers, auto).from_pretrained(
                located.folder, config=config, gguf_file=located.gguf_file, dtype=dtype, attn_implementation=attention,
                trust_remote_code=trust.remote_code, use_safetensors=safe, output_loading_info=True, **fourbit,
            )
        for module in model.modules() if fourbit else ():
            # On CPUs with bf16 instructions bitsandbytes packs weights at the first evaluation, in a form that has no gradient.
            module.support_avx512bf16_for_cpu = False
        return plain(model) if located.gguf_file else model, set(report["missing_keys"])
    except Exception as error:
        raise _refusal("model", located, error) from error


def _four_bits() -> dict[str, Any]:
    """Loading straight into nf4 with double quantisation, computing in bf16: QLoRA's setting (arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    require_bitsandbytes()
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    # Quantising is work for the device that will hold the weights.
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}}


def _refusal(what: str, located: Located, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(f"{located.where} wants to run its own Python code; allow it with trust.remote_code=true")
    folder = Path(located.folder)
    pickled = sorted(f.name for f in folder.glob("*.bin") if "model" in f.name)
    if what == "model" and pickled and not any(folder.glob("*.safetensors")):
        return UserError(f"{located.where} has its weights in {pickled[0]}, a pickle, which could run any code when it is loaded; "
                         "prefopt loads safetensors only. If you trust it, load it with transformers and write it anew (save_pretrained).")
    return UserError(f"the {what} of {located.where} cannot be loaded ({type(error).__name__}: {first_line(error)})")


def add_lora(model: nn.Module, cfg: ModelConfig, seed: int, task: str) -> nn.Module:
    """Adapters in fp32 on a frozen model; a fresh one starts as the identity. `task` is PEFT's type; SEQ_CLS trains the head too."""
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

    lora = cfg.lora
    if lora.adapter:
        folder = Path(lora.adapter).expanduser()
        if not (folder / "adapter_config.json").is_file():
            raise UserError(f"model.lora.adapter={lora.adapter}: no adapter_config.json there")
        if (folder / "adapter_model.bin").is_file() and not (folder / "adapter_model.safetensors").is_file():
            raise UserError(f"model.lora.adapter={lora.adapter} has its weights in adapter_model.bin, a pickle; prefopt loads safetensors "
                            "only. If you trust it, load it with peft and write it anew (save_pretrained).")
        try:
            config = PeftConfig.from_pretrained(str(folder))
            config.lora_dropout = lora.dropout  # a saved adapter brings its own, often 0.1
            model = PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=config)
        except Exception as error:  # another base model's shapes, another kind of adapter, a damaged file
            raise UserError(f"model.lora.adapter={lora.adapter} does not load ({type(error).__name__}: {first_line(error)})") from error
    else:
        targets = lora.targets if lora.targets == "all-linear" else [t.strip() for t in lora.targets.split(",")]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                model = get_peft_model(
                    model, LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
                                      task_type=task)
                )
            except ValueError as error:
                raise UserError(f"model.lora.targets={lora.targets}: {first_line(error)}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
