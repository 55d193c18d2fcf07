"""Export to ONNX, and quantization by ONNX Runtime."""
import contextlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn

from ..layers.pyramid_formulas import fixed_sizes
from .calibration import CalibrationImages
from .format import INPUT, OUTPUT, Format, Runner

__all__ = ['FORMAT', 'add_metadata', 'trace']


def trace(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str]) -> None:
    """Writes a float32 ONNX file with torch's exporter; every ONNX file of this package is written here."""
    names = {INPUT: axes, OUTPUT: {i: axis for i, axis in axes.items() if i == 0}}
    # constant matrices if height and width are fixed
    sizes = contextlib.nullcontext() if {2, 3} & axes.keys() else fixed_sizes()
    with warnings.catch_warnings(), sizes:
        # The older exporter. Both are right at every batch and size (spa_resnet18, spa_mobilenetv2_050,
        # spa_densenet_cifar, resnet18: 3e-7 to 1e-6), but the newer one took 13, 30, 156 and 6 seconds for these
        # models, this one 1.1, 1.2, 5.1 and 0.4. The newer one also writes stack traces with local paths.
        warnings.simplefilter('ignore')
        torch.onnx.export(
            model, (example,), str(path), dynamo=False, input_names=[INPUT], output_names=[OUTPUT], dynamic_axes=names)
    _fold_constants(path)


def _fold_constants(path: Path) -> None:
    """Stores constants as initializers, also those that torch's exporter leaves as chains of nodes (for padding)."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    loaded = onnx.load(path)
    if any(attribute.HasField('g') for node in loaded.graph.node for attribute in node.attribute):
        return  # a branch or loop, whose nodes may read any constant
    nodes: List[Any] = []
    constants: Dict[str, Any] = {}
    # of equal constants, torch's exporter keeps one, and adds an Identity for each other one
    names = {tensor.name: tensor.name for tensor in loaded.graph.initializer}
    outputs_of_file = {output.name for output in loaded.graph.output}
    for node in loaded.graph.node:
        if not node.input and node.op_type == 'Constant' or node.input and all(map(constants.__contains__, node.input)):
            outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
            graph = onnx.helper.make_graph([node], 'constants', [], outputs, [constants[name] for name in node.input])
            values = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=loaded.opset_import)).run(None, {})
            for name, value in zip(node.output, values, strict=True):
                constants[name] = onnx.numpy_helper.from_array(value, name)
        elif node.op_type == 'Identity' and node.input[0] in names and node.output[0] not in outputs_of_file:
            names[node.output[0]] = names[node.input[0]]
        else:
            inputs = [names.get(name, name) for name in node.input]
            del node.input[:]
            node.input.extend(inputs)
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    del loaded.graph.node[:]
    loaded.graph.node.extend(nodes)
    loaded.graph.initializer.extend(tensor for name, tensor in constants.items() if name in used)
    onnx.save(loaded, path)


def _write(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    trace(model, path, example, axes)
    if half:
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        # torch's exporter would keep the weights of a float16 model in float32
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


def _run(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])


def _quantize(path: Path, quantized: Path, images: CalibrationImages) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.remaining = iter(images)

        def get_next(self) -> Optional[Dict[str, Any]]:
            pixels = next(self.remaining, None)
            return None if pixels is None else {INPUT: pixels.numpy()}

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # ONNX Runtime recommends a preprocessing that fused models do not need
    try:
        # MatMul stays in float32: the pyramid's averages are products with constant matrices. The classifier is a Gemm.
        quantize_static(
            path, quantized, Reader(), per_channel=True, activation_type=QuantType.QUInt8,
            op_types_to_quantize=['Conv', 'Gemm', 'Add', 'Mul', 'Relu', 'Clip', 'MaxPool', 'GlobalAveragePool'])
    finally:
        logger.setLevel(level)


FORMAT = Format(
    '.onnx', 'export', ('onnx', 'onnxruntime'), _write, _run, ('float32', 'float16', 'int8'), quantize=_quantize)


def add_metadata(path: Path, description: Dict[str, Any]) -> None:
    """Adds a description, as JSON under 'timm_spa', to the metadata of an ONNX file."""
    import onnx

    loaded = onnx.load(path)
    onnx.helper.set_model_props(loaded, {'timm_spa': json.dumps(description)})
    onnx.save(loaded, path)
