"""Export to a program of torch.export."""
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch
import torch.nn as nn

from .format import Format

__all__ = ['FORMAT', 'exported_program']


def exported_program(
        model: nn.Module,
        example: torch.Tensor,
        axes: Dict[int, str],
        largest: Optional[Sequence[int]] = None,
) -> torch.export.ExportedProgram:
    """Returns the exported program of a model, without local paths.

    Args:
        model: Model.
        example: Example of the input.
        axes: Dynamic axes.
        largest: Largest shape of the input; None for no limit.
    """
    dims: Any = {i: torch.export.Dim.AUTO(max=largest[i]) if largest else torch.export.Dim.DYNAMIC for i in axes}
    program = torch.export.export(model, (example,), dynamic_shapes=(dims,) if axes else None)
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # contains local paths
    return program


def _write(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    torch.export.save(exported_program(model, example, axes), path)


FORMAT = Format('.pt2', '', (), _write, lambda path: torch.export.load(path).module())
