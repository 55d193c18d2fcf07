"""Export to OpenVINO, and quantization by NNCF."""
import contextlib
import io
import logging
import tempfile
from pathlib import Path
from typing import Any, Dict, Tuple

import torch
import torch.nn as nn

from .calibration import CalibrationImages
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


TYPES = {'f32': 'float32', 'bf16': 'bfloat16', 'f16': 'float16'}
# by default, the plug-in for CPUs computes in bfloat16 or float16 if the processor supports it
OPTIONS = {'INFERENCE_PRECISION_HINT': 'f32'}


def _compile(path: Path, options: Dict[str, Any]) -> Tuple[str, Runner]:
    import openvino

    compiled = openvino.Core().compile_model(path, 'CPU', options)
    precision = compiled.get_property('INFERENCE_PRECISION_HINT').get_type_name()
    return TYPES.get(precision, precision), lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


def _quantize(path: Path, quantized: Path, images: CalibrationImages) -> None:
    import nncf
    import openvino

    model: Any = openvino.Core().read_model(path)
    dataset = nncf.Dataset(images, lambda x: x.numpy())
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # NNCF reports its progress
        model = nncf.quantize(model, dataset, preset=nncf.QuantizationPreset.MIXED, subset_size=len(images))
    openvino.save_model(model, quantized, compress_to_fp16=False)


FORMAT = Format(
    '.xml', 'openvino', ('onnx', 'openvino'), _write, lambda path: _compile(path, OPTIONS)[1],
    ('float32', 'float16', 'int8'), ('.bin',), options=OPTIONS, run_at_default=lambda path: _compile(path, {}),
    quantize=_quantize, int8_packages=('nncf',))
