"""A model that is open for measurement, and its steps: calls whose inputs stay where they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from fptq_compiler.bench.measure import Step
from fptq_compiler.errors import RuntimeInputError
from fptq_compiler.runtime.model_file import ModelFile
from fptq_compiler.runtime.placement import ELEMENTS, device_of
from fptq_compiler.runtime.session import open_session
from fptq_compiler.runtime.signature import LOGITS, MASK, Signature

Array = np.ndarray[Any, Any]

_SEED: Final = 0


class OpenModel:
    """A session on a model, and its steps; `open_model` makes one.

    Attributes:
        file: what the file says of itself.
        session: of ONNX Runtime.
        provider: the preferred execution provider, under its full name.
        vocabulary: width of the logits.

    Raises:
        RuntimeInputError: ONNX Runtime fails on one token.
    """

    def __init__(self, file: ModelFile, session: Any) -> None:
        self.file = file
        self.session = session
        self.provider: str = session.get_providers()[0]
        self._device = device_of(session)
        self.vocabulary = self._vocabulary()

    @property
    def has_cache(self) -> bool:
        """Whether the model can decode step by step."""
        return self.file.signature.layers > 0

    def step(self, batch: int, tokens: int, past: int) -> Step:
        """Binds one call: in each row `tokens` new ones after `past` positions.

        Ids, keys and values are drawn here and lie on the device; every call reads the same
        ones, and its outputs stay on the device until the next call overwrites them.
        """
        generator = np.random.default_rng(_SEED)
        ids = generator.integers(0, self.vocabulary, (batch, tokens), np.int64)
        binding = self._bind(ids, past)
        return lambda: self._run(binding)

    def _bind(self, ids: Array, past: int) -> Any:
        """Binds token ids (B, S) after a past, and outputs that ONNX Runtime allocates."""
        signature = self.file.signature
        batch, tokens = ids.shape
        feeds = {signature.ids: ids, **random_past(signature, batch, past)}
        if signature.takes_mask:
            feeds[MASK] = np.ones((batch, past + tokens), np.int64)
        binding = self.session.io_binding()
        for name, array in feeds.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0)
            binding.bind_ortvalue_input(name, value)
        for name in (LOGITS, *signature.present_names):
            binding.bind_output(name, self._device, 0)
        return binding

    def _run(self, binding: Any) -> None:
        """Runs what is bound and waits for its outputs."""
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            message = f"{self.file.path.name}: ONNX Runtime failed on it: {error}"
            raise RuntimeInputError(message) from error
        binding.synchronize_outputs()

    def _vocabulary(self) -> int:
        """Runs one token and looks at its logits (1, 1, V)."""
        binding = self._bind(np.zeros((1, 1), np.int64), 0)
        self._run(binding)
        return int(binding.get_outputs()[0].shape()[-1])


def random_past(signature: Signature, batch: int, positions: int) -> dict[str, Array]:
    """Draws keys and values (B, H_kv, P, D), int4 (B, H_kv, P, D/2), by the names of their inputs.

    Floats are normal, codes uniform over their type's range. Nothing for a model without a cache.
    """
    if signature.cache_type is None:
        return {}
    dtype = np.dtype(ELEMENTS[signature.cache_type][0])
    shape = signature.cache_shape(batch, positions)
    generator = np.random.default_rng(_SEED)
    if dtype.kind == "f":
        return {n: generator.standard_normal(shape).astype(dtype) for n in signature.past_names}
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return {
        name: generator.integers(low, high, shape, dtype, endpoint=True)
        for name in signature.past_names
    }


def open_model(
    file: ModelFile,
    provider: str | None = None,
    threads: int | None = None,
    profile_prefix: Path | None = None,
) -> OpenModel:
    """Opens a model for measurement, set up as its session file says.

    Args:
        file: the model.
        provider: as `runtime.session.load` takes it; None leaves it to the session file.
        threads: within one operator; None leaves it to ONNX Runtime.
        profile_prefix: how the name of ONNX Runtime's profile begins; None writes none.

    Raises:
        RuntimeLoadError: the provider is missing or does not work, or ONNX Runtime refuses the
            model.
        RuntimeInputError: ONNX Runtime fails on one token.
    """
    return OpenModel(file, open_session(file, provider, threads, profile_prefix))
