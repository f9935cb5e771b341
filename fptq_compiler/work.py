"""The work folder: what a stopped compilation had finished, so that the next one goes on there.

Each result carries the fingerprint of the model and the recipe that it belongs to; anything else
in the folder is left alone and not used. Of several ranks the first alone writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fptq_compiler.errors import LoweringError, RecipeError
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.ranks import rank
from fptq_compiler.recipe import Recipe

logger = logging.getLogger(__name__)
SAMPLES = 1024


class WorkFolder:
    """Results by name in one folder; without a folder nothing is kept."""

    def __init__(
        self,
        folder: Path | None,
        recipe: Recipe,
        program: Program,
        device: str = "cpu",
    ) -> None:
        """Make the folder; results belong to this recipe, model and device.

        Raises:
            LoweringError: it cannot be made.
        """
        self._folder = folder
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot make the work folder {folder}: {error.strerror}"
            raise LoweringError(message) from error
        self._fingerprint = fingerprint(recipe, program, device)

    def load_ids(self) -> Tensor | None:
        """Token ids of an earlier run, or None."""
        path = self._path("calibration", "npy")
        if path is None or not path.exists():
            return None
        try:
            ids = torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            logger.warning("%s cannot be read (%s); calibration starts again", path.name, error)
            return None
        logger.info("calibration tokens from %s", path.name)
        return ids

    def save_ids(self, ids: Tensor) -> None:
        """Keep token ids.

        Raises:
            LoweringError: they cannot be written.
        """
        path = self._path("calibration", "npy")
        if path is not None and rank() == 0:
            with _whole(path) as partial, partial.open("wb") as file:
                np.save(file, ids.numpy(), allow_pickle=False)

    def load_maps(
        self, program: Program, ids: Tensor | None
    ) -> dict[str, list[float]] | None:
        """Put maps trained on these ids back; gives their curves, or None if there are none."""
        path = self._path("maps", "safetensors", ids)
        if path is None or not path.exists():
            return None
        try:
            state = load_file(path)
            with safe_open(path, "pt") as opened:
                curves = json.loads(opened.metadata()["curves"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("%s cannot be read (%s); optimising again", path.name, error)
            return None
        for name, transform in program.maps.items():
            prefix = f"{name}/"
            mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            transform.load_state_dict(mine)
        logger.info("trained transforms from %s", path.name)
        return dict(curves)

    def save_maps(
        self, program: Program, ids: Tensor | None, curves: dict[str, list[float]]
    ) -> None:
        """Keep maps trained on these ids, and their curves.

        Raises:
            LoweringError: they cannot be written.
        """
        path = self._path("maps", "safetensors", ids)
        if path is None or rank() != 0:
            return
        state = {
            f"{name}/{key}": value.contiguous().clone()
            for name, transform in program.maps.items()
            for key, value in transform.state_dict().items()
        }
        with _whole(path) as partial:
            save_file(state, partial, {"curves": json.dumps(curves)})

    def load_choice(self, ids: Tensor, rows: Tensor) -> tuple[Recipe, list[str]] | None:
        """The recipe that trials on these tokens chose, and why; None if there is none."""
        path = self._path("choice", "json", ids, rows)
        if path is None or not path.exists():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            found = Recipe.from_toml(kept["recipe"], path.name), list(kept["decisions"])
        except (OSError, KeyError, TypeError, ValueError, RecipeError) as error:
            logger.warning("%s cannot be read (%s); choosing again", path.name, error)
            return None
        logger.info("choice of transforms from %s", path.name)
        return found

    def save_choice(
        self, ids: Tensor, rows: Tensor, recipe: Recipe, decisions: Sequence[str]
    ) -> None:
        """Keep what trials chose.

        Raises:
            LoweringError: it cannot be written.
        """
        content = {"recipe": recipe.to_toml(), "decisions": [*decisions]}
        self._save_json("choice", content, ids, rows)

    def load_trials(self, ids: Tensor, rows: Tensor) -> dict[str, float]:
        """The losses of the trials on these tokens that were finished, by recipe as TOML."""
        path = self._path("trials", "json", ids, rows)
        if path is None or not path.exists():
            return {}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            found = {str(recipe): float(loss) for recipe, loss in kept.items()}
        except (OSError, AttributeError, TypeError, ValueError) as error:
            logger.warning("%s cannot be read (%s); trying again", path.name, error)
            return {}
        logger.info("%d trials from %s", len(found), path.name)
        return found

    def save_trials(self, ids: Tensor, rows: Tensor, losses: Mapping[str, float]) -> None:
        """Keep the losses of finished trials, by recipe as TOML.

        Raises:
            LoweringError: they cannot be written.
        """
        self._save_json("trials", dict(losses), ids, rows)

    def training(self, ids: Tensor, rows: Tensor) -> TrainingFile:
        """Where the state of the end-to-end training is kept.

        Args:
            ids: calibration tokens.
            rows: tokens that are trained on.
        """
        return TrainingFile(self._path("training", "pt", ids, rows))

    def _save_json(self, name: str, content: object, *tokens: Tensor) -> None:
        path = self._path(name, "json", *tokens)
        if path is not None and rank() == 0:
            with _whole(path) as partial:
                partial.write_text(json.dumps(content), encoding="utf-8")

    def _path(self, name: str, suffix: str, *tokens: Tensor | None) -> Path | None:
        """The file of a result; `tokens` are what it also belongs to."""
        if self._folder is None:
            return None
        digest = hashlib.sha256(self._fingerprint.encode())
        for ids in tokens:
            if ids is not None:
                digest.update(f"{tuple(ids.shape)}".encode())
                digest.update(ids.cpu().contiguous().numpy().tobytes())
        return self._folder / f"{name}-{digest.hexdigest()[:16]}.{suffix}"


@dataclass(frozen=True)
class TrainingFile:
    """Keeps the state of a training; without a path nothing is kept."""

    path: Path | None

    def load(self) -> dict[str, Any] | None:
        """The last state that was kept, or None."""
        if self.path is None or not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            logger.warning("%s cannot be read (%s); training again", self.path.name, error)
            return None
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state, whole or not at all.

        Raises:
            LoweringError: it cannot be written.
        """
        if self.path is not None and rank() == 0:
            with _whole(self.path) as partial:
                torch.save(state, partial)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` when all is written.

    Raises:
        LoweringError: the folder is full, or may not be written to.
    """
    partial = path.with_suffix(".partial")
    try:
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        message = (
            f"cannot write {path.name} to the work folder {path.parent}: {reason}; free space "
            "there, name another folder, or leave --work-dir out"
        )
        raise LoweringError(message) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def fingerprint(recipe: Recipe, program: Program, device: str) -> str:
    """Of the recipe, the device, and names, shapes and samples of the parameters."""
    digest = hashlib.sha256(recipe.to_toml().encode())
    digest.update(torch.device(device).type.encode())
    for name, _ in program.module.named_parameters(remove_duplicate=False):
        value = program.parameter(name)
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLES)].float().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
