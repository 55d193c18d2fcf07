"""Export to a program of torch.export."""
from pathlib import Path
from typing import Dict

import torch
import torch.nn as nn

from .format import Format

__all__ = ['FORMAT', 'exported_program']


def exported_program(model: nn.Module, example: torch.Tensor, axes: Dict[int, str]) -> torch.export.ExportedProgram:
    """Returns the exported program of a model, without local paths."""
    dynamic = ({i: torch.export.Dim.DYNAMIC for i in axes},) if axes else None
    program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # contains local paths
    return program


def _write(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    torch.export.save(exported_program(model, example, axes), path)


FORMAT = Format('.pt2', '', (), _write, lambda path: torch.export.load(path).module())
