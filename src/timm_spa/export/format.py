"""Definitions that all export formats share."""
import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
import torch.nn as nn

from .._errors import TimmSpaError

__all__ = ['AXES', 'INPUT', 'OUTPUT', 'ExportError', 'Format', 'Runner', 'as_export_error', 'padded']

INPUT, OUTPUT = 'image', 'logits'
AXES = {None: {}, 'batch': {0: 'batch'}, 'size': {0: 'batch', 2: 'height', 3: 'width'}}  # dynamic axes

Runner = Callable[[torch.Tensor], torch.Tensor]


class ExportError(TimmSpaError, RuntimeError):
    """A model cannot be exported, or the exported file computes other values."""


@dataclasses.dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        suffix: Suffix of the file.
        extra: Extra of timm_spa that installs the packages.
        packages: Packages that writing and running need.
        write: Writes a model to a path, for an example input and names of dynamic axes, in float16 if the last
            argument is true.
        run: Opens a file and returns a function that computes its output; None if the file cannot be run here.
        dtypes: Supported values of `ExportReport.dtype`.
        companions: Suffixes of further files that belong to the file.
        dynamic: Supported dynamic axes, keys of `AXES`.
        options: Options of the runtime that make `run` compute in the type of the file.
        run_at_default: Opens a file without these options. Returns the type in which the runtime then computes, and a
            function that computes the output; None if `options` is empty or has no effect on the type.
        quantize: Quantizes a float32 file to 8 bits: reads the first path and writes the second, calibrated on images.
        int8_packages: Packages that `quantize` needs in addition. The extra 'int8' installs them.
    """
    suffix: str
    extra: str
    packages: Tuple[str, ...]
    write: Callable[[nn.Module, Path, torch.Tensor, Dict[int, str], bool], None]
    run: Optional[Callable[[Path], Runner]]
    dtypes: Tuple[str, ...] = ('float32',)
    companions: Tuple[str, ...] = ()
    dynamic: Tuple[Optional[str], ...] = (None, 'batch', 'size')
    options: Dict[str, Any] = dataclasses.field(default_factory=dict)
    run_at_default: Optional[Callable[[Path], Tuple[str, Runner]]] = None
    quantize: Optional[Callable[[Path, Path, Any], None]] = None
    int8_packages: Tuple[str, ...] = ()


@contextlib.contextmanager
def as_export_error(failure: str) -> Iterator[None]:
    """Turns any error of an exporter or runtime into an ExportError, except errors of the file system."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        lines = str(e).strip().splitlines() or ['']
        raise ExportError(f'{failure}: {type(e).__name__}: {lines[0]}') from e


def padded(x: torch.Tensor, batch_size: Optional[int]) -> torch.Tensor:
    """Pads a batch (N, C, H, W) to the fixed batch size of a file; None means that any batch size is allowed."""
    if batch_size is None or len(x) == batch_size:
        return x
    return torch.cat([x, x[:1].expand(batch_size - len(x), *x.shape[1:])])
