"""The families that the compatibility table has, one row each: tiny, with random weights.

`tools/compatibility.py` runs each through the compiler, and a test holds its table to this list.
"""

from __future__ import annotations

from typing import Any

from tests.real.families import Family

SHORT = 5
"""A sliding window, shorter than every sequence that is run here."""

SLIDING_AND_FULL = {
    "sliding_window": SHORT, "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
ALL_HEADS = {"num_key_value_heads": 4}


def _scaled(kind: str, **settings: Any) -> dict[str, Any]:
    """RoPE of that type, and what it needs."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


LONG = {
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0], "factor": 2.0,
    "original_max_position_embeddings": 32,
}
NO_HEAD_DIM = {"head_dim": ...}
"""The configuration computes it, and takes none."""

HALF = {"partial_rotary_factor": 0.5}

ARCHITECTURES: dict[str, Family] = {
    "Llama": Family(),
    "Llama, linear RoPE": Family(settings=_scaled("linear", factor=2.0)),
    "Llama, dynamic RoPE": Family(settings=_scaled("dynamic", factor=2.0)),
    "Llama 3": Family(settings=_scaled(
        "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )),
    "Llama, YaRN": Family(settings=_scaled(
        "yarn", factor=2.0, original_max_position_embeddings=32
    )),
    "Llama, longrope": Family(settings=_scaled("longrope", **LONG)),
    "Mistral": Family("Mistral", {"sliding_window": SHORT}),
    "Qwen2": Family("Qwen2"),
    "Qwen3": Family("Qwen3"),
    "Gemma": Family("Gemma"),
    "Gemma 2": Family("Gemma2", SLIDING_AND_FULL, attention="eager"),
    "Gemma 3": Family("Gemma3Text", SLIDING_AND_FULL, model="Gemma3ForCausalLM"),
    "Phi": Family("Phi", {**ALL_HEADS, **_scaled("default", **HALF)}),
    "Phi-3": Family("Phi3"),
    "Phi-3, longrope": Family("Phi3", {
        "original_max_position_embeddings": 32, **_scaled("longrope", **LONG),
    }),
    "OLMo": Family("Olmo"),
    "OLMo 2": Family("Olmo2"),
    "OLMo 3": Family("Olmo3", SLIDING_AND_FULL),
    "StableLM": Family("StableLm", {"use_qkv_bias": True, **_scaled("default", **HALF)}),
    "Granite": Family("Granite", {
        "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    }),
    "SmolLM3": Family("SmolLM3", {"no_rope_layers": [1, 0]}),
    "StarCoder2": Family("Starcoder2"),
    "Cohere": Family("Cohere"),
    "Cohere 2": Family("Cohere2", SLIDING_AND_FULL),
    "Falcon": Family("Falcon", {**NO_HEAD_DIM, "bias": True}),
    "Falcon, new decoder": Family("Falcon", {
        **NO_HEAD_DIM, "new_decoder_architecture": True, "num_kv_heads": 2,
    }),
    "GPT-NeoX": Family("GPTNeoX", _scaled("default", **HALF)),
    "GPT-J": Family("GPTJ", {"rotary_dim": 4}, attention="eager"),
    "GPT-2": Family("GPT2", model="GPT2LMHeadModel"),
    "OPT": Family("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0}),
    "BLOOM": Family("Bloom", attention="eager"),
    "Mixtral": Family("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": Family("Qwen2Moe", {
        **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24,
    }),
    "Qwen3-MoE": Family("Qwen3Moe", {**EXPERTS, "num_local_experts": 4}),
    "BERT": Family("Bert", {"pad_token_id": 0}, model="BertForMaskedLM"),
    "ViT": Family("ViT", {"image_size": 8, "patch_size": 4}, model="ViTForImageClassification"),
}
PIXELS = "ViT"
"""Takes pictures; files are written of models that take token ids."""

ENCODERS = ("BERT", PIXELS)
"""See all tokens at once, and have no cache."""
