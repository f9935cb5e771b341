"""The stages between capture and lowering, a file each.

taking_in -> transforming -> quantizing, with training in it, and measuring for the report
-> caching. Each runs its passes through proof.
"""

from fptq_compiler.stages.caching import cache
from fptq_compiler.stages.quantizing import needs_calibration, quantize, quantizer_placement
from fptq_compiler.stages.taking_in import look_into, take_in, vocabulary_of
from fptq_compiler.stages.transforming import (
    Untrained,
    refuse_without_sites,
    transform,
    transform_insertion,
)

__all__ = [
    "Untrained",
    "cache",
    "look_into",
    "needs_calibration",
    "quantize",
    "quantizer_placement",
    "refuse_without_sites",
    "take_in",
    "transform",
    "transform_insertion",
    "vocabulary_of",
]
