"""Text as it comes: the pieces join to the whole, and no half character is shown."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fptq_compiler.runtime.text_stream import TextStream


@cache
def byte_level() -> Any:
    """One token for each byte, and an end-of-text token, as GPT-2's family has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@cache
def byte_fallback() -> Any:
    """Words with a leading space, and bytes for all else, as Llama's family has them."""
    words = ["<unk>", "▁the", "▁cat", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_ids(text: str) -> list[int]:
    return [4 + byte for byte in text.encode()]


def whole(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pieces(tokenizer: Any, prompt: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(token) for token in ids), stream.finish()]


@given(st.text(min_size=1, max_size=20), st.text(max_size=20))
def test_pieces_join_to_the_text(prompt: str, text: str) -> None:
    tokenizer = byte_level()
    before, after = (tokenizer(t)["input_ids"] for t in (prompt, text))
    assert "".join(pieces(tokenizer, before, after)) == text


@given(st.lists(st.integers(0, 256), max_size=30))
def test_bytes_that_are_no_text_are_shown_as_the_tokenizer_does(ids: list[int]) -> None:
    tokenizer = byte_level()
    prompt = tokenizer("a")["input_ids"]
    assert "a" + "".join(pieces(tokenizer, prompt, ids)) == whole(tokenizer, prompt + ids)


@given(st.lists(st.sampled_from(["▁the", "▁cat", "s", *"né😀"]), max_size=20))
def test_leading_spaces_are_kept(words: list[str]) -> None:
    tokenizer = byte_fallback()
    known = tokenizer.get_vocab()
    ids = [n for word in words for n in ([known[word]] if word in known else byte_ids(word))]
    found = "the" + "".join(pieces(tokenizer, [known["▁the"]], ids))
    assert found == "the" + "".join(words).replace("▁", " ")


def test_a_character_of_four_tokens_appears_whole() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a😀b")["input_ids"]
    assert pieces(tokenizer, [ids[0]], ids) == ["a", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_is_shown_as_broken() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a😀")["input_ids"][:-1]
    found = pieces(tokenizer, [ids[0]], ids)
    assert found[:-1] == ["a", "", "", ""]
    assert found[-1] == "\ufffd"


@pytest.mark.parametrize("text", ["", "the"])
def test_special_tokens_are_not_shown(text: str) -> None:
    tokenizer = byte_level()
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert "".join(pieces(tokenizer, tokenizer("x")["input_ids"], ids)) == text
