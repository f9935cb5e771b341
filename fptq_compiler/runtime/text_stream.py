"""Tokens to text as they come: a character of several tokens appears once it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"
"""What a tokenizer gives for bytes that are no character, or not yet one."""


class TextStream:
    """The text that follows a prompt.

    A token's text depends on the tokens before it (bytes of one character, the space that a
    text does not begin with), so each piece is decoded together with the one before, and what
    is new is what the longer of both texts has more. Bytes that never become text may show
    otherwise than in a decode of the whole: what was said before them is not taken back.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        """Begins behind a prompt.

        Args:
            tokenizer: a transformers tokenizer.
            prompt: token ids.
        """
        self._tokenizer = tokenizer
        self._before = list(prompt)
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Takes one token and gives the text that it completes, often one word, maybe none."""
        self._pending.append(token)
        text = self._new_text()
        if not text or text.endswith(_BROKEN):
            return ""
        self._before, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """Gives what is left, also where it is half a character."""
        text = self._new_text()
        self._pending = []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._before)
        return self._decode(self._before + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
