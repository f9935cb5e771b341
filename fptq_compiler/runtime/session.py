"""Open a compiled model in ONNX Runtime, set up as its session file says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime

from fptq_compiler.errors import RuntimeLoadError
from fptq_compiler.runtime.model import Model
from fptq_compiler.runtime.model_file import ModelFile, read_model_file

_ERRORS_ONLY = 3  # of ONNX Runtime's log


def load(path: str | Path, *, provider: str | None = None, threads: int | None = None) -> Model:
    """Opens a model.

    Args:
        path: the ONNX file; its session file and external data lie beside it.
        provider: an execution provider, in full or short ("cpu", "cuda"), in place of those of
            the session file.
        threads: within one operator; None leaves it to ONNX Runtime.

    Raises:
        RuntimeLoadError: the model is not whole, a provider is missing, or ONNX Runtime
            refuses it.
    """
    file = read_model_file(Path(path))
    return Model(open_session(file, provider, threads), file.signature, file.settings)


def open_session(
    file: ModelFile,
    provider: str | None = None,
    threads: int | None = None,
    profile_prefix: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Opens ONNX Runtime's session on a model, set up as its session file says.

    Args:
        file: the model.
        provider: as for `load`.
        threads: as for `load`.
        profile_prefix: how the name of ONNX Runtime's profile begins; None writes none.

    Raises:
        RuntimeLoadError: a provider is missing or does not work, or ONNX Runtime refuses the
            model.
    """
    providers = available_providers((provider,) if provider else file.settings.providers)
    options = session_options(file.settings.session_config, threads)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    try:
        session = onnxruntime.InferenceSession(str(file.path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        message = (
            f"{file.path}: ONNX Runtime {onnxruntime.__version__} cannot open it with "
            f"{', '.join(providers)}: {error}"
        )
        raise RuntimeLoadError(message) from error
    used = session.get_providers()
    if used[0] != providers[0]:  # it falls back to the CPU where a library is missing
        message = (
            f"{providers[0]} is installed but does not work here: ONNX Runtime fell back to "
            f"{used[0]}. Its log on stderr says which library is missing."
        )
        raise RuntimeLoadError(message)
    return session


def session_options(
    config: Mapping[str, str], threads: int | None = None
) -> onnxruntime.SessionOptions:
    """Makes the options of a session.

    Args:
        config: session config entries by key.
        threads: within one operator; None leaves it to ONNX Runtime.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return options


def available_providers(wanted: Sequence[str]) -> list[str]:
    """Gives the providers' full names.

    Args:
        wanted: in full or short, in any case: "CUDAExecutionProvider" or "cuda".

    Raises:
        RuntimeLoadError: one is not in this build of ONNX Runtime; those that are, are listed.
    """
    available = onnxruntime.get_available_providers()
    full = {_short(name): name for name in available}
    for name in wanted:
        if _short(name) not in full:
            message = (
                f"{name} is not available in ONNX Runtime {onnxruntime.__version__}; available: "
                f"{', '.join(available)}. GPUs need the package onnxruntime-gpu."
            )
            raise RuntimeLoadError(message)
    return [full[_short(name)] for name in wanted]


def _short(name: str) -> str:
    return name.lower().removesuffix("executionprovider")
