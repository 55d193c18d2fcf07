"""Conditions on which a form that is faster than the plain one may be taken."""
from typing import Any, Callable

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ['is_known', 'is_plain_tensor', 'is_planar', 'multiplies_fast']

_is_exporting: Callable[[], bool] = getattr(torch.compiler, 'is_exporting', bool)  # since torch 2.7


def is_plain_tensor(x: torch.Tensor) -> bool:
    """Tells whether a map is just numbers in memory, not a stand-in for others or for what is recorded.

    Args:
        x: Map.

    Returns:
        Whether a form may be chosen by its shape and layout, and written in place. A compiler's maps count: it does
        both well. An exporter's do not: its graphs are for all shapes.
    """
    return not (
        type(x) is not torch.Tensor or x.is_meta or torch.jit.is_tracing() or _is_exporting()
        or torch._C._are_functorch_transforms_active())


def is_known(condition: Any) -> bool:
    """Tells whether a condition on the shape of a map holds for sure.

    Args:
        condition: Comparison of numbers, or while compiling of what stands for them.

    Returns:
        False also if it is not known: compiled code for all shapes must not become code for some.
    """
    return statically_known_true(condition) if torch.compiler.is_compiling() else condition


def multiplies_fast(x: torch.Tensor) -> bool:
    """Tells whether matrix products are a good way to work on a map.

    Args:
        x: Map.

    Returns:
        Whether they are as exact as sums, and on this device often faster than the layers that do the same.
    """
    return (
        x.is_cpu and (x.dtype is torch.float32 or x.dtype is torch.float64) and not torch.is_autocast_enabled('cpu'))


def is_planar(x: torch.Tensor) -> bool:
    """Whether the rows of a map lie one behind the other, and may be multiplied.

    In compiled code they do not, whatever they look like: torch's compiler lets the channels of every map on a CPU lie
    side by side, if there is a convolution in the code.
    """
    return x.is_contiguous() and multiplies_fast(x) and not torch.compiler.is_compiling()
