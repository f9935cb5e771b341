"""Speed, memory and kernels of one or two ONNX files in ONNX Runtime, side by side."""
