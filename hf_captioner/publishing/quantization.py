"""Weights of ONNX graphs in 8 bits.

There are two kinds: products whose weights and inputs have 8 bits at run time, which are fast; and weights that have 8
bits in the file alone, which are exact to 1/254 of the largest weight of a channel.
"""

from __future__ import annotations

import logging
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

# The input that holds the weights, by the operator.
WEIGHTS = {"Conv": 1, "Gather": 0, "Gemm": 1, "MatMul": 1}
SMALLEST = 2**14  # numbers in a tensor that is stored in 8 bits; smaller ones are much work for few bytes


def quantize_products(path: Path) -> None:
    """Quantize the weights of matrix products in an ONNX file to 8 bits, and their inputs at run time.

    Weights have one scale per column. Only 7 of the 8 bits are used. Processors with AVX2 but without VNNI add two
    8-bit products in 16 bits, which overflows with larger weights (ONNX Runtime, "Quantize ONNX models"):
    log-probabilities would be off by more than 2.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().addHandler(logging.NullHandler())  # else its first message would have every library's shown
    model = onnx.load(path)
    # A vector, such as the weights that turn additive attention's keys into scores, has no columns. It is small, too.
    vectors = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) < 2}
    excluded = [node.name for node in model.graph.node if node.op_type == "MatMul" and vectors.intersection(node.input)]
    # So that it doesn't advise to optimize the graph first, which onnxruntime does when it loads it.
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    quantize_dynamic(
        model,
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        nodes_to_exclude=excluded,
    )


def store_in_8_bits(path: Path) -> None:
    """Store the large weights of an ONNX file, such as convolutions and embeddings, in 8 bits with a scale per channel.

    `OnnxCaptioner` has onnxruntime compute the weights in single precision when it loads the graph. By default, it
    would do that at every step.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    channels = {}  # the axis of output channels, words or columns, by the name of the weights
    for node in graph.node:
        name = node.input[WEIGHTS[node.op_type]] if node.op_type in WEIGHTS else None
        tensor = weights.get(name)
        if tensor is not None and tensor.data_type == TensorProto.FLOAT and prod(tensor.dims) >= SMALLEST:
            channels.setdefault(name, _channel_axis(node, len(tensor.dims)))
    decoding = []
    for name, axis in channels.items():
        tensor = weights[name]
        values = numpy_helper.to_array(tensor)
        others = tuple(number for number in range(values.ndim) if number != axis)
        scale = np.abs(values).max(others, keepdims=True) / np.float32(127)
        integers = np.rint(values / np.where(scale == 0, 1, scale)).astype(np.int8)
        graph.initializer.remove(tensor)
        parts = {f"{name}_int8": integers, f"{name}_scale": scale.flatten()}
        graph.initializer.extend(numpy_helper.from_array(part, part_name) for part_name, part in parts.items())
        decoding.append(helper.make_node("DequantizeLinear", list(parts), [name], axis=axis))
    nodes = [*decoding, *graph.node]  # operators come after those whose results they read
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)


def _channel_axis(node: Any, num_axes: int) -> int:
    """Return the axis of the weights of a node along which each channel has a scale of its own."""
    if node.op_type == "MatMul":
        return num_axes - 1
    is_transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 1 if node.op_type == "Gemm" and not is_transposed else 0
