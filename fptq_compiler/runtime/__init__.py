"""Run compiled models in ONNX Runtime: decode with a KV cache, sample, stream text.

    from fptq_compiler.runtime import load
    from fptq_compiler.runtime.generate import generate

    model = load("model.onnx")
    for token in generate(model, [1, 2, 3], max_new_tokens=16):
        ...

The session is set up as the file beside the model says.
"""

from __future__ import annotations

from fptq_compiler.runtime.session import load

__all__ = ["load"]
