"""Run compiled models in ONNX Runtime: decode with a KV cache, sample, stream text.

    from fptq_compiler.runtime.generate import generate
    from fptq_compiler.runtime.session import load

    model = load("model.onnx")
    for token in generate(model, [1, 2, 3], max_new_tokens=16):
        ...

`session_file` needs the standard library alone, so that the compiler can write what this reads.
"""
