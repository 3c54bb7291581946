"""Whether ONNX Runtime's kernels for 8-bit integers are exact on this processor."""

from __future__ import annotations

import functools

REMEDY = (
    "ONNX Runtime's 8-bit kernels cut off large sums on this processor, as those without VNNI instructions do, so that "
    "errors and scores measured here are worse than elsewhere; where the file is to run on such processors, round the "
    "weights to 7 bits first (`quantization/uniform` with `bits: 7`), whose sums fit"
)
"""What to tell when they are not."""


@functools.cache
def saturates() -> bool:
    """Tell whether sums of products of unsigned and signed codes come out wrong, by a trial with the largest.

    Without VNNI, x86 adds pairs of products in 16 bits: 2 x 255 x 127 does not fit, 2 x 255 x 64 does. The trial of
    torch's own operators, which may differ, is `operators.trial`.
    """
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    size = 64
    data = helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", size])
    result = helper.make_tensor_value_info("y", TensorProto.INT32, ["rows", size])
    weight = numpy_helper.from_array(np.full((size, size), 127, np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "trial", [data], [result], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    # kernels for one row and for several may differ
    found = [session.run(None, {"x": np.full((rows, size), 255, np.uint8)})[0] for rows in (1, 16)]
    return any(bool((sums != 255 * 127 * size).any()) for sums in found)
