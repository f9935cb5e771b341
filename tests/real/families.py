"""Transformers models with random weights, tiny: the spellings that real checkpoints bring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ONE_PLUS = ("Gemma", "Gemma2", "Gemma3Text")
"""Where the gain of a norm is 1 + w."""


@dataclass(frozen=True)
class Family:
    """A transformers architecture and the settings that make it what it is.

    Attributes:
        name: of `<name>Config` and `<name>ForCausalLM`.
        settings: of the configuration, over `SIZES`; ... leaves one of those out.
        attention: "sdpa" or "eager".
        dtype: of the weights.
        model: class of the model where it is not `<name>ForCausalLM`.
    """

    name: str = "Llama"
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32
    model: str = ""


def make_model(family: Family, seed: int = 0) -> Any:
    """The model in evaluation mode; every gain and bias is random, none 1 or 0."""
    given = {k: v for k, v in {**SIZES, **family.settings}.items() if v is not ...}
    config = getattr(transformers, f"{family.name}Config")(**given)
    config._attn_implementation = family.attention
    model = getattr(transformers, family.model or f"{family.name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        value = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or (parameter.dim() == 1 and name.endswith("weight")):
            value = torch.rand(parameter.shape, generator=generator) + 0.5
            value = value - 1 if family.name in ONE_PLUS else value
        elif name.endswith("bias"):
            value = value / 2
        elif "embed" not in name:
            value = value / parameter.shape[-1] ** 0.5
        parameter.data = value
    return model.to(family.dtype).eval().requires_grad_(False)


class Plain(torch.nn.Module):
    """What a user wraps a model in to export it: token ids in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, use_cache=False).logits


def export_plainly(model: Any) -> torch.export.ExportedProgram:
    """Export as the manuals of torch and transformers say, with nothing prepared.

    transformers then looks for packed sequences in the positions, and RoPE stands behind an
    operator that only switches gradients off.
    """
    free = torch.export.Dim.DYNAMIC
    return torch.export.export(
        Plain(model),
        (torch.arange(14).reshape(2, 7),),
        dynamic_shapes={"input_ids": {0: free, 1: free}},
        strict=False,
    )
