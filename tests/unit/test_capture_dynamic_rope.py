"""Dynamic RoPE is captured as it is up to the original length, and no further."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fptq_compiler.capture import export_causal_lm
from fptq_compiler.graph.evaluate import longest_sequence
from fptq_compiler.graph.unlift import unlift

LONGEST = 24


def _model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )
    return LlamaForCausalLM(config).eval()


def test_up_to_the_original_length() -> None:
    model = _model()
    program = unlift(export_causal_lm(model))
    assert longest_sequence(program.module) == LONGEST
    for length in (2, 9, LONGEST):
        tokens = torch.arange(2 * length).reshape(2, length) % 40
        with torch.no_grad():
            expected = model(tokens).logits
        torch.testing.assert_close(program.run(tokens), expected, rtol=1e-5, atol=1e-6)


def test_the_model_stays_dynamic() -> None:
    """Beyond it the model itself has other angles, before and after the export."""
    model, tokens = _model(), torch.arange(LONGEST + 8)[None] % 40
    with torch.no_grad():
        before = model(tokens).logits
        export_causal_lm(model)
        assert torch.equal(model(tokens).logits, before)
        unlifted = unlift(export_causal_lm(model))
    assert not torch.allclose(unlifted.run(tokens), before, rtol=1e-3)
