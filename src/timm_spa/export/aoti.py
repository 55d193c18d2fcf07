"""Export to a package of AOTInductor, compiled for this machine."""
from pathlib import Path
from typing import Dict

import torch
import torch.nn as nn

from .format import Format
from .torch_export import exported_program

__all__ = ['FORMAT']


def _write(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    torch._inductor.aoti_compile_and_package(exported_program(model, example, axes), package_path=str(path))


FORMAT = Format('.pt2', '', (), _write, lambda path: torch._inductor.aoti_load_package(str(path)))
