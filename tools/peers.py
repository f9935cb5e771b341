"""INT4 weights in blocks of 32 by other tools, from a float32 ONNX file to another.

    python3 tools/peers.py NAME SOURCE TARGET IDS

compare_methods.py --peers runs it, with a Python that has the tool. NAME is ort-rtn (ONNX
Runtime's own rounding to nearest; the head, as the embedding, stays float) or nncf (NNCF's AWQ and
scale estimation, calibrated on the rows of IDS, an .npy; head and embedding get 8 bits).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

BITS, BLOCK = 4, 32


def folded(source: Path) -> onnx.ModelProto:
    """The file with its constants folded: both tools look for weights that nothing transposes.

    ONNX Runtime leaves casts of constants, with which NNCF stops.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        options.add_session_config_entry(  # weights that lie beside the file come along
            "session.optimized_model_external_initializers_file_name", "folded.data"
        )
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [n for n in model.graph.node if n.op_type == "Cast" and n.input[0] in values]:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx.helper.get_node_attr_value(node, "to"))
        value = onnx.numpy_helper.to_array(values[node.input[0]]).astype(dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, node.output[0]))
        model.graph.node.remove(node)
    return model


def ort_rtn(source: Path, target: Path, ids: Path) -> None:
    """ONNX Runtime's MatMulNBitsQuantizer, asymmetric; it needs no calibration."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = folded(source)
    head = [node.name for node in model.graph.node if node.op_type == "MatMul"][-1]
    quantizer = MatMulNBitsQuantizer(
        model, bits=BITS, block_size=BLOCK, is_symmetric=False, nodes_to_exclude=[head]
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=False)


def nncf(source: Path, target: Path, ids: Path) -> None:
    """NNCF's compress_weights."""
    import nncf

    model = folded(source)
    (name,) = (value.name for value in model.graph.input)
    rows = [{name: row[None]} for row in np.load(ids)]
    compressed = nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=BLOCK, ratio=1.0,
        awq=True, scale_estimation=True, dataset=nncf.Dataset(rows), subset_size=len(rows),
    )
    onnx.save(compressed, target)


def refuse_float(path: Path) -> None:
    """Raise ValueError where a file has no INT4 weight: the tool then recognised nothing."""
    graph = onnx.load(path).graph
    nibbles = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    found = any(node.op_type == "MatMulNBits" for node in graph.node)
    if not found and not any(tensor.data_type in nibbles for tensor in graph.initializer):
        message = f"{path.name} has no INT4 weight: the tool recognised none in the float file"
        raise ValueError(message)


PEERS: dict[str, Callable[[Path, Path, Path], None]] = {"ort-rtn": ort_rtn, "nncf": nncf}


if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    source, target, ids = map(Path, paths)
    PEERS[name](source, target, ids)
    refuse_float(target)
