"""Tiny random models of many architectures, made from transformers' configuration classes without a download."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from peftsweep.models.model import load_tokenizer
from peftsweep.schema import ModelConfig

SIZES = {
    "vocab_size": 533,  # the embedded tokenizer has as many
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS: dict[str, Any] = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": HEADS,
    "qwen3_moe": HEADS | EXPERTS,
    "qwen3_next": HEADS | SHARED | LINEAR | {"num_hidden_layers": 4},
    "qwen3_5_text": HEADS | LINEAR | {"num_hidden_layers": 4},
    "qwen2_moe": SHARED,
    "gpt_oss": HEADS | EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "mixtral": EXPERTS,
    "gemma3_text": HEADS,
    "gemma3": {
        "text_config": SIZES | HEADS | {"model_type": "gemma3_text"},
        "vision_config": VISION | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"max_position_embeddings": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mamba": {"state_size": 4},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"mamba_d_state": 4, "num_experts": 4, "num_hidden_layers": 4},
    },
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": HEADS | MAMBA | {"mamba_d_ssm": 32, "mamba_d_head": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "bert": {},
}
# Of further types what the sizes by name do not say, see small_config.
LATENT = {"num_key_value_heads": 4}  # of multi-head latent attention
FOUR = {"num_hidden_layers": 4}  # of which the last one is attention
FURTHER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "mistral4", "youtu", "dots3_note", "dots3_note_text"), LATENT),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "lfm3"), FOUR),
    "bailing_hybrid": LATENT | {"layer_group_size": 2, "n_group": 1, "topk_group": 1},
    "codegen": {"rotary_dim": 8},
    "esmc": LATENT,
    "gemma3n_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 533, "laurel_rank": 4},
        **{"hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    },
    "gemma4_text": {"vocab_size_per_layer_input": 533, "hidden_size_per_layer_input": 8},
    "kimi_linear": FOUR
    | LATENT
    | {"linear_head_dim": 8, "linear_num_heads": 4}
    | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "luke": {"entity_vocab_size": 16},
    "xlm": {"emb_dim": 32, "causal": True},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "n_mamba_heads": 4},
    "longcat_flash": LATENT | {"expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 2},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"is_decoder": True},
}
GENERATING = [kind for kind in ARCHITECTURES if kind != "bert"]


def make(kind: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model of random weights, in eval mode."""
    sizes = {} if "text_config" in ARCHITECTURES[kind] else SIZES
    config = AutoConfig.for_model(kind, **sizes | ARCHITECTURES[kind] | options)
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return made


_WRITTEN_IN = tempfile.TemporaryDirectory(prefix="checkpoints-of-tests-")  # removed when the process ends
_WRITTEN: dict[str, tuple[Path, torch.Tensor]] = {}  # with the state of the random numbers after each was made


def write(kind: str, folder: Path, **options: Any) -> Path:
    """The model as a checkpoint with the embedded tokenizer beside it; written once a process, and copied."""
    key = repr((kind, options))
    if key not in _WRITTEN:
        place = Path(_WRITTEN_IN.name, str(len(_WRITTEN)))
        make(kind, **options).save_pretrained(place)
        load_tokenizer(ModelConfig(name_or_path="tiny")).save_pretrained(place)
        _WRITTEN[key] = place, torch.get_rng_state()
    place, state = _WRITTEN[key]
    torch.set_rng_state(state)  # as if the weights had been drawn now
    shutil.copytree(place, folder, dirs_exist_ok=True)
    return folder


# ---- any architecture ------------------------------------------------------------------------------

# Small values by the names that configurations give to sizes. Weights are drawn so widely that each layer matters to
# the logits: with the usual 0.02 a model of this width gives nearly the same whatever its layers do.
SMALL: dict[str, Any] = SIZES | HEADS | SHARED | LINEAR | MAMBA | {
    **dict.fromkeys(("d_model", "n_embd", "dim", "embed_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "hidden_dim"), 64),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("n_positions", "max_seq_len", "n_ctx"), 128),
    **{"n_routed_experts": 4, "moe_num_experts": 4, "moe_k": 2, "moe_topk": 2, "n_shared_experts": 1, "n_group": 1},
    **{"topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    **{"v_head_dim": 8, "rotary_dim": 4, "state_size": 4, "sliding_window": 16, "max_window_layers": 1},
    **{"image_size": 28, "patch_size": 14, "initializer_range": 0.2, "init_std": 0.2, "vocab_size": 533},
    "num_experts_per_token": 2,
}  # fmt: skip


def small_config(kind: str, **options: Any) -> PreTrainedConfig:
    """A small configuration of any type that transformers knows: its own default with other sizes."""
    default = AutoConfig.for_model(kind).to_dict()
    sizes = {name: size for name, size in SMALL.items() if name in default}
    for name, part in default.items():
        if name.endswith("_config") and isinstance(part, dict):
            own = {key: size for key, size in SMALL.items() if key in part}
            kept = {key: part[key] for key in ("model_type",) if key in part}
            sizes[name] = own | kept | FURTHER.get(part.get("model_type", ""), {})
    return AutoConfig.for_model(kind, **sizes | ARCHITECTURES.get(kind, {}) | FURTHER.get(kind, {}) | options)
