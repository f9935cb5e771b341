"""Hugging Face folders and GGUF files: names, numbers, free sizes, and what is refused."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from fptq_compiler.capture import capture, export_causal_lm
from fptq_compiler.capture.gguf_header import check_gguf
from fptq_compiler.capture.huggingface import load_huggingface
from fptq_compiler.errors import CaptureError

VOCABULARY = 40


def tiny_llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def folder(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    path = tmp_path / "llama"
    model.save_pretrained(path)
    return path


def ids(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, columns), generator=generator)


def test_a_folder_keeps_names_and_numbers(
    model: LlamaForCausalLM, folder: Path, seed: int
) -> None:
    captured = capture(folder)
    assert captured.kind == "huggingface"
    assert captured.generation_start == 1
    assert captured.tokenizer is None
    assert set(captured.program.state_dict) == set(load_file(folder / "model.safetensors"))
    run = captured.program.module(check_guards=False)
    for rows, columns in ((2, 7), (1, 1), (3, 12), (1, 64)):
        tokens = ids(rows, columns, seed)
        with torch.no_grad():
            expected = model(tokens).logits
            found = run(tokens)
        assert found.shape == (rows, columns, VOCABULARY)
        # float32 sums over at most 64 positions in another kernel
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_mask_depends_on_the_length_only(model: LlamaForCausalLM) -> None:
    """[1, 1, S, S]: not the [B, 1, S, S] with packed-sequence detection that is the default."""
    program = export_causal_lm(model)
    attention = [
        node
        for node in program.graph.nodes
        if node.target is torch.ops.aten.scaled_dot_product_attention.default
    ]
    assert len(attention) == 2
    shape = attention[0].args[3].meta["val"].shape
    assert list(shape[:2]) == [1, 1]
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.cumsum.default" not in targets
    assert not any("wrap_with" in target for target in targets)


def test_a_model_in_training_is_left_in_training() -> None:
    model = tiny_llama().train()
    model.model.norm.eval()
    export_causal_lm(model)
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training


def test_tied_weights_have_both_names(tmp_path: Path) -> None:
    tiny_llama(tied=True).save_pretrained(tmp_path / "tied")
    program = capture(tmp_path / "tied").program
    table = program.state_dict["model.embed_tokens.weight"]
    assert program.state_dict["lm_head.weight"].data_ptr() == table.data_ptr()


def test_a_sliding_window_keeps_its_own_mask(seed: int) -> None:
    torch.manual_seed(5)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"],
        eos_token_id=[2, 3],
        bos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = "sdpa"
    model = Gemma3ForCausalLM(config).eval()
    captured = capture(model)
    assert captured.generation_start == 2
    tokens = ids(3, 13, seed)
    with torch.no_grad():
        found, expected = captured.program.module(check_guards=False)(tokens), model(tokens).logits
    # float32 sums in another kernel
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_become_float32(model: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_huggingface(tmp_path / "half").dtype == torch.float32
    assert load_huggingface(tmp_path / "half", dtype=None).dtype == torch.bfloat16


def change_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_parameter_is_named(folder: Path) -> None:
    change_weights(folder, "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(CaptureError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj"):
        capture(folder)


def test_an_unexpected_parameter_is_named(folder: Path) -> None:
    change_weights(folder, "model.layers.1.mlp.odd.weight", torch.ones(2))
    with pytest.raises(CaptureError, match=r"unexpected keys: model\.layers\.1\.mlp\.odd"):
        capture(folder)


def test_a_parameter_of_another_shape_is_named(folder: Path) -> None:
    change_weights(folder, "model.layers.0.mlp.up_proj.weight", torch.ones(25, 16))
    with pytest.raises(CaptureError, match=r"up_proj\.weight \(found \[25, 16\], expected \[24"):
        capture(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(folder: Path, value: float) -> None:
    tensor = torch.ones(16)
    tensor[3] = value
    change_weights(folder, "model.norm.weight", tensor)
    with pytest.raises(CaptureError, match=r"model\.norm\.weight has 1 values that are NaN"):
        capture(folder)


def test_truncated_weights_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CaptureError, match=r"model\.safetensors is truncated or damaged"):
        capture(folder)


def test_pickled_weights_are_refused(folder: Path, model: LlamaForCausalLM) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CaptureError, match=r"expected weights in \*\.safetensors, found none"):
        capture(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CaptureError, match=r"found only pytorch_model\.bin, a pickle"):
        capture(folder)
    assert capture(folder, trust_pickle=True).kind == "huggingface"


def test_a_config_without_a_model_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(CaptureError, match="names no 'model_type'"):
        capture(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CaptureError, match=r"config\.json cannot be read"):
        capture(folder)


def test_code_in_the_folder_does_not_run(folder: Path) -> None:
    marker = folder / "ran"
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()")
    with pytest.raises(CaptureError, match="cannot load this causal language model"):
        capture(folder)
    assert not marker.exists()


def write_gguf(path: Path, model: LlamaForCausalLM) -> Path:
    """The tiny Llama as llama.cpp would write it (rows of q and k interleaved for its RoPE)."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            kind = names[rest]
            if kind in heads:
                rows, columns = tensor.shape
                split = tensor.reshape(heads[kind], 2, rows // heads[kind] // 2, columns)
                tensor = split.transpose(1, 2).reshape(rows, columns)
            stem = f"blk.{layer}.{kind}"
        else:
            stem = {
                "model.embed_tokens": "token_embd",
                "model.norm": "output_norm",
                "lm_head": "output",
            }[stem]
        writer.add_tensor(f"{stem}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_keeps_names_and_numbers(
    model: LlamaForCausalLM, tmp_path: Path, seed: int
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model)
    captured = capture(path)
    assert (captured.kind, captured.tokenizer) == ("gguf", path)
    assert captured.generation_start == 1
    assert set(captured.program.state_dict) == set(model.state_dict())
    tokens = ids(2, 9, seed)
    with torch.no_grad():
        found, expected = captured.program.module(check_guards=False)(tokens), model(tokens).logits
    # float32 sums in another kernel; the weights are stored as float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert capture(tmp_path).kind == "gguf"  # the only GGUF file of a folder


def test_a_truncated_gguf_file_names_the_tensor(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model)
    data = path.read_bytes()
    path.write_bytes(data[:-2000])
    with pytest.raises(CaptureError, match=r"tiny\.gguf: tensor '.*' ends at byte \d+, but the"):
        capture(path)
    path.write_bytes(data[:300])
    with pytest.raises(CaptureError, match="the file ends inside its tables"):
        capture(path)


def test_another_gguf_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(64))
    with pytest.raises(CaptureError, match="GGUF version 1, expected 2 or 3"):
        capture(path)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 64)
    with pytest.raises(CaptureError, match="the tables are damaged"):
        check_gguf(path)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(64))
    with pytest.raises(CaptureError, match="holds no tensors"):
        check_gguf(path)
    path.write_bytes(b"ABCD")
    with pytest.raises(CaptureError, match="does not begin with 'GGUF'"):
        check_gguf(path)


def test_the_example_model_is_captured(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260K"
    captured = capture(folder)
    assert captured.tokenizer == folder
    assert captured.generation_start == 1
