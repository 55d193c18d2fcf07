"""Export to OpenVINO."""
import tempfile
from pathlib import Path
from typing import Dict

import torch
import torch.nn as nn

from .format import Format, Runner
from .onnx import trace

__all__ = ['FORMAT']


def _write(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        # by way of ONNX: OpenVINO reads an exported program in 5 to 13 seconds, an ONNX file in less than one
        onnx_path = Path(folder, 'model.onnx')
        trace(model, onnx_path, example, axes)
        openvino.save_model(openvino.Core().read_model(onnx_path), path, compress_to_fp16=half)


def _run(path: Path) -> Runner:
    import openvino

    # by default, the plug-in for CPUs computes in bfloat16 if the processor supports it
    compiled = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


FORMAT = Format('.xml', 'openvino', ('onnx', 'openvino'), _write, _run, ('float32', 'float16'), ('.bin',))
