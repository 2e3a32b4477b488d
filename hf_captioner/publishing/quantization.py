"""Weights of ONNX graphs in 8 bits: a quarter of the size, for computing in single precision."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

# The input that holds the weights, by the operator.
WEIGHTS = {"Conv": 1, "Gather": 0, "Gemm": 1, "MatMul": 1}
GROUP = 64  # numbers with a scale of their own
# Numbers in a tensor from which on it is stored in 8 bits, and in half precision. Few large tensors hold most of a
# captioner's bytes, and the errors of all others, one layer after the other, would change more captions.
SMALLEST, SMALLEST_HALF = 200_000, 4096


def store_in_8_bits(path: Path) -> None:
    """Store the large weights of an ONNX file in 8 bits, and those of middle size in half precision.

    `OnnxCaptioner` has onnxruntime compute them in single precision when it loads the graph. By default, it would do
    that at every step.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    names = {node.input[WEIGHTS[node.op_type]] for node in graph.node if node.op_type in WEIGHTS}
    decoding = []
    for tensor in [tensor for tensor in graph.initializer if tensor.name in names]:
        name, size = tensor.name, prod(tensor.dims)
        if tensor.data_type != TensorProto.FLOAT or size < SMALLEST_HALF:
            continue
        values = numpy_helper.to_array(tensor)
        if size >= SMALLEST and size % GROUP == 0:
            integers, scales = _quantized(values.reshape(-1, GROUP))
            parts = {"int8": integers, "scale": scales, "shape": np.array(values.shape)}
            decoding += [
                helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [f"{name}_groups"], axis=0),
                helper.make_node("Reshape", [f"{name}_groups", f"{name}_shape"], [name]),
            ]
        else:
            parts = {"half": values.astype(np.float16)}
            decoding.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
        graph.initializer.remove(tensor)
        graph.initializer.extend(numpy_helper.from_array(part, f"{name}_{kind}") for kind, part in parts.items())
    nodes = [*decoding, *graph.node]  # operators come after those whose results they read
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)


def _quantized(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return groups of weights, one in each row, as whole numbers from -127 to 127, and the scale of each group."""
    scales = np.abs(groups).max(1) / np.float32(127)
    return np.rint(groups / np.where(scales == 0, 1, scales)[:, None]).astype(np.int8), scales
