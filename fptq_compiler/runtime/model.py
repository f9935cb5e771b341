"""A compiled model in a session: token ids in, logits out, the KV cache handed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from fptq_compiler.errors import RuntimeInputError
from fptq_compiler.runtime.placement import ELEMENTS, device_of
from fptq_compiler.runtime.session_file import SessionFile
from fptq_compiler.runtime.signature import LOGITS, MASK, Signature

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
OrtValue = Any  # an onnxruntime.OrtValue


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far. A step leaves it as it is and gives a longer one.

    Attributes:
        values: key and value of each layer in turn, (B, H_kv, P, D) in the model's cache type,
            on the device that the model runs on; empty for a model without a cache.
        mask: (B, P) int64, 1 for a token and 0 for padding.
    """

    values: tuple[OrtValue, ...]
    mask: Ids

    @property
    def length(self) -> int:
        """P, the tokens in the cache, padding included."""
        return int(self.mask.shape[1])


class Model:
    """A model in a session of ONNX Runtime; `session.load` makes one."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        signature: Signature,
        settings: SessionFile,
    ) -> None:
        self._session = session
        self._signature = signature
        self._device = device_of(session)
        self.settings = settings

    @property
    def has_cache(self) -> bool:
        """Whether a step continues the cache, rather than reads the whole sequence again."""
        return self.layers > 0

    @property
    def layers(self) -> int:
        """Layers with a cache; 0 without one."""
        return self._signature.layers

    @property
    def cache_type(self) -> str | None:
        """float32, float16, int8 or int4; None without a cache."""
        return self._signature.cache_type

    @property
    def context_length(self) -> int | None:
        """The most tokens of one sequence; None if not known."""
        return self.settings.context_length

    @property
    def vocabulary(self) -> int | None:
        """V; None where the file does not say."""
        return self._signature.vocabulary

    @property
    def batch(self) -> int | None:
        """B where the file fixes it; None where any number of sequences runs at once."""
        return self._signature.batch

    def start(self, batch: int) -> Cache:
        """Gives the cache of no tokens for `batch` sequences."""
        if self.cache_type is None:
            return Cache((), np.ones((batch, 0), np.int64))
        dtype, _ = ELEMENTS[self.cache_type]
        shape = self._signature.cache_shape(batch, 0)
        values = tuple(
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype)
            for _ in self._signature.past_names
        )
        return Cache(values, np.ones((batch, 0), np.int64))

    def step(
        self, ids: npt.ArrayLike, cache: Cache, attention_mask: npt.ArrayLike | None = None
    ) -> tuple[Logits, Cache]:
        """Runs the model on tokens that follow those in the cache.

        Args:
            ids: (B, S) integers. A model without a cache reads whole sequences.
            cache: of P tokens, from `start` or the step before; it stays as it is.
            attention_mask: (B, P+S), 1 for a token and 0 for padding; None continues the
                cache's mask with tokens.

        Returns:
            Logits (B, S, V), and the cache of P+S tokens; without a cache the one given.

        Raises:
            RuntimeInputError: ids, cache or mask do not fit the model or each other, or ONNX
                Runtime fails on them.
        """
        tokens = self._checked_ids(ids)
        self._check_cache(cache, batch=tokens.shape[0])
        total = cache.length + tokens.shape[1]
        if self.context_length is not None and total > self.context_length:
            message = (
                f"{cache.length} past and {tokens.shape[1]} new tokens are more than the model's "
                f"context of {self.context_length}"
            )
            raise RuntimeInputError(message)
        mask = self._checked_mask(attention_mask, cache, tokens.shape[1])
        logits, values = self._run(tokens, mask, cache)
        return logits, Cache(values, mask) if self.has_cache else cache

    def _run(self, ids: Ids, mask: Ids, cache: Cache) -> tuple[Logits, tuple[OrtValue, ...]]:
        """Runs the session; the cache never leaves its device."""
        signature = self._signature
        binding = self._session.io_binding()
        binding.bind_cpu_input(signature.ids, ids)
        if signature.takes_mask:
            binding.bind_cpu_input(MASK, mask)
        for name, value in zip(signature.past_names, cache.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(LOGITS, "cpu")
        for name in signature.present_names:
            binding.bind_output(name, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            message = (
                f"ONNX Runtime failed on {ids.shape[1]} tokens after {cache.length}, batch "
                f"{ids.shape[0]}: {error}"
            )
            raise RuntimeInputError(message) from error
        logits, *values = binding.get_outputs()
        return logits.numpy().astype(np.float32, copy=False), tuple(values)

    def _checked_ids(self, ids: npt.ArrayLike) -> Ids:
        """The ids as ONNX Runtime takes them."""
        array = np.asarray(ids)
        if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
            message = (
                f"ids are {array.dtype} of shape {array.shape}, expected integers (batch, tokens)"
            )
            raise RuntimeInputError(message)
        low, high = int(array.min()), int(array.max())
        if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
            message = (
                f"token ids from {low} to {high}, expected 0 to below the model's vocabulary of "
                f"{self.vocabulary}: is this the model's own tokenizer?"
            )
            raise RuntimeInputError(message)
        return np.ascontiguousarray(array, np.int64)

    def _check_cache(self, cache: Cache, batch: int) -> None:
        """Refuses a cache of another model, or of another number of sequences."""
        if len(cache.values) != len(self._signature.past_names):
            message = (
                f"the cache holds {len(cache.values)} tensors, the model has "
                f"{len(self._signature.past_names)}: is it another model's?"
            )
            raise RuntimeInputError(message)
        if cache.mask.shape[0] != batch:
            message = f"the ids have batch {batch}, the cache {cache.mask.shape[0]}"
            raise RuntimeInputError(message)
        if self.cache_type is None:
            return
        shape = self._signature.cache_shape(batch, cache.length)
        _, element = ELEMENTS[self.cache_type]
        for name, value in zip(self._signature.past_names, cache.values, strict=True):
            if value.data_type() != element or list(value.shape()) != shape:
                message = (
                    f"{name} is {value.data_type()} of shape {list(value.shape())}, expected "
                    f"{element} of shape {shape}"
                )
                raise RuntimeInputError(message)

    def _checked_mask(self, mask: npt.ArrayLike | None, cache: Cache, new: int) -> Ids:
        """The mask over past and new tokens, (B, P+S) int64."""
        batch = cache.mask.shape[0]
        if mask is None:
            return np.concatenate([cache.mask, np.ones((batch, new), np.int64)], axis=1)
        if not self._signature.takes_mask:
            message = "the model has no input attention_mask: leave it out, and padding with it"
            raise RuntimeInputError(message)
        array = np.asarray(mask)
        shape = (batch, cache.length + new)
        if array.shape != shape or not np.isin(array, (0, 1)).all():
            message = (
                f"the attention mask has shape {array.shape}, expected 0 and 1 of shape {shape}: "
                "one for each past and each new token"
            )
            raise RuntimeInputError(message)
        return np.ascontiguousarray(array, np.int64)
