"""The names of our keys in the files of PEFT's method comparison."""

from __future__ import annotations

from typing import Any

from peftsweep.study.reading import TEXT

DEFAULTS: dict[str, Any] = {  # the defaults of PEFT's comparison on MetaMathQA
    "max_seq_length": 768,
    "batch_size": 4,
    "max_steps": 5000,
    "eval_steps": 250,
    "use_gc": False,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
}
KEYS = {  # names in their files -> our keys with the same value
    "max_seq_length": "dataset.max_length",
    "query_template": "dataset.prompt",
    "batch_size": "train.batch_size",
    "max_steps": "train.steps",
    "use_gc": "train.checkpointing",
    "grad_norm_clip": "train.clip",
    "autocast_adapter_dtype": "train.autocast_adapter_dtype",
    "dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "seed": "seed",
}
OPTIMIZERS = {
    "lora+": "peft.optimizers.create_loraplus_optimizer",
    "lora-fa": "peft.optimizers.create_lorafa_optimizer",
    "riemannian": "peft.optimizers.create_riemannian_optimizer",
}
MODEL = "model.name_or_path"
EVALUATIONS = "eval.*."  # keys of all evaluations that have such an option
OTHER_FIELDS = (
    *("model_id", "batch_size_eval", "eval_steps", "compile", "generation_kwargs"),
    *("optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp", "init_kv_cache_prefix"),
)
# Types of the fields that are read here. Other fields are only copied to a key, which checks its own value.
PARAMETERS = {
    "model_id?": TEXT,
    "dtype?": TEXT,
    "optimizer_type?": str,
    "optimizer_kwargs?": {"lr?": (int, float), "weight_decay?": (int, float), "*": object},
    "lr_scheduler?": TEXT,
    "generation_kwargs?": (dict, type(None)),
    "max_steps?": int,
    "eval_steps?": (int, type(None)),
    "batch_size_eval?": int,
    "use_amp?": bool,
    "compile?": (bool, type(None)),
    "query_template?": str,
    "init_kv_cache_prefix?": TEXT,
}
BENCHMARK = {
    "model_id?": TEXT,
    "dtype?": TEXT,
    "category_generation_params?": (dict, type(None)),
    "max_new_tokens?": (int, type(None)),
    "num_inference_runs?": (int, type(None)),
    "num_prompt_samples?": (int, type(None)),
    "prompts_file?": TEXT,
    "seed?": (int, type(None)),
    "use_8bit?": (bool, type(None)),
    "use_4bit?": (bool, type(None)),
}
BITSANDBYTES = "transformers.BitsAndBytesConfig"
# int8 and int4 in the comparison: the defaults of bitsandbytes, for 4 bits fp4 without double quantisation.
QUANTISED = {
    "int8": {"_target_": BITSANDBYTES, "load_in_8bit": True},
    "int4": {
        "_target_": BITSANDBYTES,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
    },
}
INFERENCE = {  # fields of a benchmark_params.json -> our keys
    "num_inference_runs": "inference.runs",
    "num_prompt_samples": "inference.samples",
    "prompts_file": "inference.prompts_file",
    "seed": "seed",
    "model_id": MODEL,
}
CATEGORIES = ("short", "medium", "long")  # the categories of prompts that the benchmark runs
