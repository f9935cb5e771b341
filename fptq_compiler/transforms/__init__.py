"""Invertible maps with parameters and the ports where they meet weights: torch only, no graph."""

from __future__ import annotations

from fptq_compiler.transforms.affine import Affine
from fptq_compiler.transforms.compose import Compose
from fptq_compiler.transforms.dense import DenseBlocks, shared_evaluation
from fptq_compiler.transforms.diagonal import Diagonal
from fptq_compiler.transforms.factored import Factored, factored
from fptq_compiler.transforms.hadamard import Hadamard, random_signs
from fptq_compiler.transforms.hadamard_factors import factors, has_hadamard
from fptq_compiler.transforms.identity import Identity
from fptq_compiler.transforms.kronecker import Kronecker
from fptq_compiler.transforms.map import Map
from fptq_compiler.transforms.port import Port, Side, apply
from fptq_compiler.transforms.rope_pairs import RopePairs
from fptq_compiler.transforms.rotation import Rotation

__all__ = [
    "Affine",
    "Compose",
    "DenseBlocks",
    "Diagonal",
    "Factored",
    "Hadamard",
    "Identity",
    "Kronecker",
    "Map",
    "Port",
    "RopePairs",
    "Rotation",
    "Side",
    "apply",
    "factored",
    "factors",
    "has_hadamard",
    "random_signs",
    "shared_evaluation",
]
