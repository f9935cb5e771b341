"""Capture a Hugging Face causal language model, from a folder or in memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open

from fptq_compiler.capture.checkpoint import ReadWhereUsed, empty_tensors, find_sources
from fptq_compiler.capture.dynamic_rope import original_angles
from fptq_compiler.capture.export_dynamic import evaluating, export_dynamic
from fptq_compiler.errors import CaptureError
from fptq_compiler.graph.stored import Source

logger = logging.getLogger(__name__)

_EXAMPLE_SHAPE = (2, 7)
_AGREEMENT = 1e-4  # relative; float32 sums in another order, far below any real difference


class _CausalLogits(torch.nn.Module):
    """input_ids [B, S] → logits [B, S, V], with the parameter names of the model itself.

    It shares the model's tables of parameters, buffers and submodules instead of holding the
    model as a submodule, so no name gets a prefix.
    """

    def __init__(self, model: torch.nn.Module, *, explicit_mask: bool) -> None:
        super().__init__()
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            object.__setattr__(self, table, getattr(model, table))
        object.__setattr__(self, "_language_model", model)
        self._explicit_mask = explicit_mask

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = None
        if self._explicit_mask:
            # Left to itself, transformers looks for packed sequences in the (constant) position
            # ids and builds a mask [B, 1, S, S] by twenty operators. This is the same mask.
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            mask = (positions[None, :] <= positions[:, None])[None, None]
        model = cast(Any, self)._language_model
        output = model.forward(
            input_ids=input_ids, attention_mask=mask, use_cache=False, return_dict=True
        )
        return cast(torch.Tensor, output.logits)


def load_huggingface(
    folder: Path, *, dtype: torch.dtype | None = torch.float32, trust_pickle: bool = False
) -> Any:
    """Load the model of a folder with config.json and safetensors, from this machine only.

    Args:
        folder: a Hugging Face checkpoint folder.
        dtype: type of the weights in memory; None keeps the type in the file. The default makes
            the arithmetic of the compiler exact where the file holds fp16 or bf16.
        trust_pickle: accept a folder that has only pytorch_model.bin.

    Returns:
        The transformers model, in evaluation mode.

    Raises:
        CaptureError: no weights, damaged weights, or weights that do not fit the config.
    """
    has_safetensors = _check_weights(folder, trust_pickle=trust_pickle)
    return load_pretrained(
        folder, {"use_safetensors": has_safetensors}, dtype=dtype or "auto", origin=folder.name
    )


def load_pretrained(
    folder: Path, options: Mapping[str, Any], *, dtype: torch.dtype | str, origin: str
) -> Any:
    """Call transformers and insist that every parameter was found, with its shape.

    Raises:
        CaptureError: naming missing, unexpected and mismatched parameters.
    """

    def load(attention: str) -> Loaded:
        return _from_pretrained(folder, options, dtype, attention)

    return _loaded(load, origin)


def load_unread(folder: Path) -> tuple[Any, dict[str, Source]] | None:
    """The model in float32 without its weights, and where in the folder's files they lie.

    Returns:
        None where the weights must be held, by `load_huggingface`: the files hold other tensors
        than the model, or transformers does not take them as they are.
    """
    if not any(folder.glob("*.safetensors")):
        return None
    _check_weights(folder, trust_pickle=False)
    tensors, places = empty_tensors(folder)

    def load(attention: str) -> Loaded:
        return _from_tensors(folder, tensors, attention)

    try:
        model = _loaded(load, folder.name)
    except CaptureError as error:
        logger.info("the weights are held: %s", error)
        return None
    sources = find_sources(model, tensors, places)
    return None if sources is None else (model, sources)


def _loaded(load: Callable[[str], Loaded], origin: str) -> Any:
    """What `load` makes with the first attention implementation that the model has."""
    try:
        with quiet_transformers():
            try:
                model, report = load("sdpa")
            except ValueError as error:
                if "attention implementation" not in str(error):
                    raise
                # Soft-capped attention, Gemma 2's, has no fused kernel.
                model, report = load("eager")
    except Exception as error:  # transformers raises many types for a wrong folder
        reason = str(error).strip()[:500] or type(error).__name__
        message = (
            f"{origin}: transformers {transformers.__version__} cannot load this causal language "
            f"model: {reason}. Check config.json and the weights, or export the model yourself "
            "with torch.export.save."
        )
        raise CaptureError(message) from error
    _refuse_incomplete(report, origin)
    return model.eval()


Loaded = tuple[Any, Mapping[str, Any]]
"""The model and transformers' report on what it found of it."""


def _from_pretrained(
    folder: Path, options: Mapping[str, Any], dtype: torch.dtype | str, attention: str
) -> Loaded:
    found = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder),
        local_files_only=True,
        trust_remote_code=False,
        attn_implementation=attention,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that the report lists them all
        **options,
    )
    return cast(Loaded, found)


def _from_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], attention: str) -> Loaded:
    """The same with these tensors for its weights, in their memory."""
    config = transformers.AutoConfig.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    if hasattr(config, "quantization_config"):
        message = "quantised weights are turned back as they are loaded"
        raise TypeError(message)
    with torch.device("meta"):
        kind = type(
            transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        )
    found = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        attn_implementation=attention,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return cast(Loaded, found)


def export_causal_lm(
    model: Any,
    example_ids: torch.Tensor | None = None,
    sources: Mapping[str, Source] | None = None,
) -> torch.export.ExportedProgram:
    """Export a transformers causal language model with free batch and sequence.

    Args:
        model: a `PreTrainedModel` whose output has `logits`.
        example_ids: token ids [B, S]; by default a few ids of the vocabulary.
        sources: by parameter name where its values lie, if the model holds none.

    Returns:
        A program input_ids [B, S] → logits [B, S, V] for all positions, without a cache. The
        parameters have the model's own names.

    Raises:
        CaptureError: the model cannot be traced or fixes a dimension.
    """
    origin = type(model).__name__
    if example_ids is None:
        count = _EXAMPLE_SHAPE[0] * _EXAMPLE_SHAPE[1]
        vocabulary = int(model.config.get_text_config().vocab_size)
        example_ids = (torch.arange(count) % vocabulary).reshape(_EXAMPLE_SHAPE)
    with evaluating(model), original_angles(model) as longest:
        with ReadWhereUsed(model, sources or {}):
            explicit_mask = _takes_explicit_mask(model, example_ids)
        wrapper = _CausalLogits(model, explicit_mask=explicit_mask)
        return export_dynamic(wrapper, (example_ids,), origin=origin, longest=longest)


def generation_start(config: Any) -> int | None:
    """The token id that begins a text: bos, else eos, else None."""
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return None


def text_ends(config: Any) -> tuple[int, ...]:
    """The token ids that end a text: one, several or none."""
    value = getattr(config, "eos_token_id", None)
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int))


def context_length(config: Any) -> int | None:
    """The longest sequence, in tokens, or None where the config does not say."""
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _takes_explicit_mask(model: Any, example_ids: torch.Tensor) -> bool:
    """Whether a causal mask [1, 1, S, S] gives what the model computes by itself.

    Models with sliding windows or chunks make other masks and are left alone; for the rest the
    two are compared by running the model on the example.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = ("sliding_window", "attention_chunk_size", "window_size")
    if kinds != {"full_attention"} or any(getattr(config, name, None) for name in windows):
        return False
    try:
        with torch.no_grad():
            own = _CausalLogits(model, explicit_mask=False)(example_ids)
            explicit = _CausalLogits(model, explicit_mask=True)(example_ids)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        logger.info("%s takes no mask of its own making: %s", type(model).__name__, error)
        return False
    scale = float(own.abs().max())
    return float((own - explicit).abs().max()) <= _AGREEMENT * scale


def _check_weights(folder: Path, *, trust_pickle: bool) -> bool:
    """Find the weight files; every safetensors file must be whole and hold no strange types."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled and trust_pickle:
            return False
        found = f"only {pickled[0]}, a pickle, which can run code" if pickled else "none"
        message = (
            f"{folder.name}: expected weights in *.safetensors, found {found}. Save the model "
            "with save_pretrained(safe_serialization=True)"
            + (", or pass --trust-pickle if you trust its author." if pickled else ".")
        )
        raise CaptureError(message)
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError, ValueError) as error:
            message = (
                f"{folder.name}: {path.name} is truncated or damaged ({error}). Copy it again."
            )
            raise CaptureError(message) from None
    return True


def _refuse_incomplete(report: Mapping[str, Any], origin: str) -> None:
    """Transformers fills missing parameters with random numbers and only warns: refuse."""
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        entries = sorted(_describe_key(entry) for entry in report.get(kind) or ())
        if entries:
            more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
            problems.append(f"{kind.replace('_', ' ')}: {', '.join(entries[:3])}{more}")
    if problems:
        message = (
            f"{origin}: the weights do not fit the model of config.json ({'; '.join(problems)}). "
            "Use the config that belongs to these weights."
        )
        raise CaptureError(message)


def _describe_key(entry: object) -> str:
    """A parameter name, with both shapes where they differ."""
    if isinstance(entry, tuple) and len(entry) == 3:
        return f"{entry[0]} (found {list(entry[1])}, expected {list(entry[2])})"
    return str(entry)


def read_config(folder: Path) -> Mapping[str, Any]:
    """The parsed config.json of a folder.

    Raises:
        CaptureError: it is not a JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{folder.name}: config.json cannot be read ({error}). Copy the folder again."
        raise CaptureError(message) from None
    if not isinstance(config, dict) or "model_type" not in config:
        message = (
            f"{folder.name}: config.json names no 'model_type', expected the configuration of a "
            "Hugging Face model."
        )
        raise CaptureError(message)
    return config


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the loading bar and the loading report: `_refuse_incomplete` says the same."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # the GGUF reader's bar asks nobody
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
