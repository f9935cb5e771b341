"""A tokenizer for the model of cached_model.py: w0 to w22 are the ids 0 to 22."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.cached_model import VOCABULARY


def word_tokenizer(**settings: Any) -> Any:
    """Settings are transformers' own, such as eos_token."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, **settings)
