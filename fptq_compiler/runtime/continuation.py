"""A continuation as it is made: its tokens, its text, and how long both phases took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fptq_compiler.runtime.text_stream import TextStream


@dataclass(frozen=True)
class Continuation:
    """What was generated, and how fast.

    Attributes:
        tokens: the new token ids.
        text: of them.
        prompt_seconds: from the start to the first new token; 0 if there is none.
        decode_seconds: from the first new token to the last.
    """

    tokens: list[int]
    text: str
    prompt_seconds: float
    decode_seconds: float

    def speeds(self, prompt_tokens: int) -> tuple[float | None, float | None]:
        """Gives tokens a second of the prompt and of decoding; None where none was timed."""
        if not self.tokens:
            return None, None
        steps = len(self.tokens) - 1
        return prompt_tokens / self.prompt_seconds, steps / self.decode_seconds if steps else None


def follow(tokens: Iterable[int], stream: TextStream, say: Callable[[str], None]) -> Continuation:
    """Takes the tokens as they come, says the text of each, and times them.

    Args:
        tokens: from `generate`, of which nothing was asked yet.
        stream: behind the prompt.
        say: called with each piece of text, which may be empty.
    """
    begin = time.perf_counter()
    ids: list[int] = []
    times: list[float] = []
    pieces: list[str] = []
    for token in tokens:
        times.append(time.perf_counter())
        ids.append(token)
        pieces.append(stream.push(token))
        say(pieces[-1])
    pieces.append(stream.finish())
    say(pieces[-1])
    if not times:
        return Continuation([], "", 0.0, 0.0)
    return Continuation(ids, "".join(pieces), times[0] - begin, times[-1] - times[0])
