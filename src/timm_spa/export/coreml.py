"""Export to Core ML."""
import contextlib
import io
import warnings
from pathlib import Path
from typing import Any, Dict

import torch
import torch.nn as nn

from ..layers.pyramid_formulas import fixed_sizes
from ..layers.torchscript import trace
from .format import INPUT, OUTPUT, Format

__all__ = ['FORMAT']


def _write(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    import coremltools

    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), fixed_sizes():  # bars of its progress
        warnings.simplefilter('ignore')
        converted: Any = coremltools.convert(
            trace(model, example),
            inputs=[coremltools.TensorType(INPUT, tuple(example.shape))],
            outputs=[coremltools.TensorType(OUTPUT)],
            convert_to='mlprogram',
            compute_precision=coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32,
            skip_model_load=True)
        converted.save(str(path))


FORMAT = Format('.mlpackage', 'coreml', ('coremltools',), _write, None, ('float32', 'float16'), dynamic=(None,))
