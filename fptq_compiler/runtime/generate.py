"""Continue a sequence of tokens, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from fptq_compiler.errors import RuntimeInputError
from fptq_compiler.runtime.model import Model
from fptq_compiler.runtime.sampling import Sampling, choose


def generate(
    model: Model,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Continues a sequence until a stop token, the number asked for, or the end of the context.

    With a KV cache each token costs one step; without one the model reads the whole sequence
    again for each.

    Args:
        model: what runs.
        ids: the prompt, at least one token.
        max_new_tokens: the most tokens to give.
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens; None is all of them.
        top_p: draw from the smallest set of tokens that holds this probability together.
        seed: of the draws.
        stop_ids: tokens that end the sequence; they are not given.

    Returns:
        An iterator over the new tokens, each as soon as it is known.

    Raises:
        RuntimeInputError: a setting that does not exist, or a prompt that is empty or leaves no
            room in the context; at once, before the first token is asked for.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if not ids:
        message = "the prompt has no tokens, expected at least one"
        raise RuntimeInputError(message)
    if max_new_tokens < 1:
        message = f"max_new_tokens is {max_new_tokens}, expected at least 1"
        raise RuntimeInputError(message)
    count = max_new_tokens
    if model.context_length is not None:
        count = min(count, model.context_length - len(ids))
        if count < 1:
            message = (
                f"the prompt has {len(ids)} tokens and leaves no room in the model's context of "
                f"{model.context_length}"
            )
            raise RuntimeInputError(message)
    generator = np.random.default_rng(seed)
    return _tokens(model, list(ids), count, sampling, generator, stop_ids)


def _tokens(
    model: Model,
    ids: list[int],
    count: int,
    sampling: Sampling,
    generator: np.random.Generator,
    stop_ids: Collection[int],
) -> Iterator[int]:
    cache = model.start(1)
    read = ids
    for _ in range(count):
        logits, cache = model.step([read], cache)
        token = choose(logits[0, -1], sampling, generator)
        if token in stop_ids:
            return
        yield token
        ids.append(token)
        read = [token] if model.has_cache else ids
