"""Export to LiteRT."""
import contextlib
import io
from pathlib import Path
from typing import Any, Dict

import torch
import torch.nn as nn

from .format import Format, Runner

__all__ = ['FORMAT']


def _write(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    import litert_torch

    with contextlib.redirect_stdout(io.StringIO()):  # the converter reports its progress
        converted: Any = litert_torch.convert(model, (example,))
        converted.export(str(path))


def _run(path: Path) -> Runner:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    runner = interpreter.get_signature_runner()
    name = next(iter(runner.get_input_details()))
    return lambda x: torch.from_numpy(next(iter(runner(**{name: x.numpy()}).values())))


FORMAT = Format('.tflite', 'litert', ('litert_torch', 'ai_edge_litert'), _write, _run, dynamic=(None,))
