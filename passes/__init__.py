"""The passes, one file each, and their order. Imported as `fptq_compiler.passes` only."""

from __future__ import annotations

if __name__ != "fptq_compiler.passes":
    message = "import fptq_compiler.passes, not passes: one module must not be loaded twice"
    raise ImportError(message)

from collections.abc import Collection, Sequence

from fptq_compiler.graph.pipeline import Pass
from fptq_compiler.passes.canonicalize import Canonicalize
from fptq_compiler.passes.center_norms import CenterNorms
from fptq_compiler.passes.expand_einsum import ExpandEinsum
from fptq_compiler.passes.find_attention import FindAttention
from fptq_compiler.passes.find_mlp import FindMlp
from fptq_compiler.passes.find_residual import FindResidual
from fptq_compiler.passes.find_routers import FindRouters
from fptq_compiler.passes.fold_constants import FoldConstants
from fptq_compiler.passes.fold_norms import FoldNorms
from fptq_compiler.passes.insert_heads import InsertHeads
from fptq_compiler.passes.insert_keys import InsertKeys
from fptq_compiler.passes.insert_kronecker import InsertKronecker
from fptq_compiler.passes.insert_smooth import InsertSmooth
from fptq_compiler.passes.insert_transforms import (
    InsertHadamard,
    InsertPrerope,
    InsertResidual,
    InsertUpdown,
    InsertValue,
)
from fptq_compiler.passes.raise_attention import RaiseAttention
from fptq_compiler.passes.raise_experts import RaiseExperts
from fptq_compiler.passes.raise_linears import RaiseLinears
from fptq_compiler.passes.raise_norms import RaiseNorms
from fptq_compiler.passes.real_numbers import RealNumbers
from fptq_compiler.passes.scale_residual import ScaleResidual
from fptq_compiler.passes.unpack_heads import UnpackHeads
from fptq_compiler.passes.untie_weights import UntieWeights
from fptq_compiler.passes.widen import Widen

FIND_SITES: tuple[Pass, ...] = (
    Widen(),
    Canonicalize(),
    RaiseExperts(),
    RealNumbers(),
    ExpandEinsum(),
    RaiseLinears(),
    FoldConstants(),
    RaiseNorms(),
    RaiseAttention(),
    UnpackHeads(),
    FindAttention(),
    FindMlp(),
    FindRouters(),
    FindResidual(),
)


def insertion(
    transforms: Collection[str],
    *,
    seed: int,
    scaling_places: Sequence[str],
    hadamard_block: int = 0,
    value_map: str = "affine",
) -> tuple[Pass, ...]:
    """The passes that prepare the graph and insert the named transforms, in order."""
    steps: list[Pass] = [UntieWeights(), CenterNorms(), FoldNorms()]
    if "scaling" in transforms:
        steps.append(ScaleResidual(scaling_places))
    if "value" in transforms:
        steps.append(InsertValue(seed, value_map))
    if "prerope" in transforms:
        steps.append(InsertPrerope())
    if "updown" in transforms:
        steps.append(InsertUpdown())
    if "hadamard" in transforms:
        steps.append(InsertHadamard(hadamard_block))
    if "heads" in transforms:
        steps.append(InsertHeads())
    if "keys" in transforms:
        steps.append(InsertKeys())
    if "residual" in transforms:
        steps.append(InsertResidual(seed))
    if "smooth" in transforms:
        steps.append(InsertSmooth())
    if "kronecker" in transforms:
        steps.append(InsertKronecker(seed))
    return tuple(steps)
