"""Export to ExecuTorch, for its XNNPACK backend."""
from pathlib import Path
from typing import Dict

import torch
import torch.nn as nn

from .format import Format, Runner
from .torch_export import exported_program

__all__ = ['FORMAT']


def _write(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = to_edge_transform_and_lower(
        exported_program(model, example, axes), partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(program.buffer)


def _run(path: Path) -> Runner:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method('forward')
    # the runtime reuses the memory of its output
    return lambda x: method.execute([x.contiguous()])[0].clone()


FORMAT = Format('.pte', 'executorch', ('executorch',), _write, _run, dynamic=(None,))
