"""Functions of TorchScript with stand-ins for a torch without it. No other file uses `torch.jit`."""
from typing import Any, Callable

import torch
import torch.nn as nn

__all__ = ['ignore', 'is_scripting', 'is_tracing', 'trace']

# torch has announced the removal of TorchScript
_jit: Any = getattr(torch, 'jit', None)
is_scripting: Callable[[], bool] = getattr(_jit, 'is_scripting', lambda: False)
is_tracing: Callable[[], bool] = getattr(_jit, 'is_tracing', lambda: False)
ignore: Callable[[Any], Any] = getattr(_jit, 'ignore', lambda function: function)


def trace(model: nn.Module, example: torch.Tensor) -> Any:
    """Traces a model without running it again.

    Raises:
        ValueError: This torch has no TorchScript.
    """
    if not hasattr(_jit, 'trace'):
        raise ValueError(f'torch {torch.__version__} cannot trace a model. Install a version with TorchScript')
    return _jit.trace(model, example, check_trace=False)
