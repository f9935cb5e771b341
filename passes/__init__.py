"""The passes, one file each, and their order. Imported as `fptq_compiler.passes` only."""

from __future__ import annotations

if __name__ != "fptq_compiler.passes":
    message = "import fptq_compiler.passes, not passes: one module must not be loaded twice"
    raise ImportError(message)

from fptq_compiler.passes.canonicalize import Canonicalize
from fptq_compiler.passes.find_attention import FindAttention
from fptq_compiler.passes.find_mlp import FindMlp
from fptq_compiler.passes.find_residual import FindResidual
from fptq_compiler.passes.fold_constants import FoldConstants
from fptq_compiler.passes.raise_attention import RaiseAttention
from fptq_compiler.passes.raise_norms import RaiseNorms

FIND_SITES = (
    Canonicalize(),
    FoldConstants(),
    RaiseNorms(),
    RaiseAttention(),
    FindAttention(),
    FindMlp(),
    FindResidual(),
)
