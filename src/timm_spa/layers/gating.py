"""Gating of a map, region by region."""
import functools
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from .conditions import is_plain_tensor, is_planar

__all__ = ['gate_regions']

# a gate is enlarged to the whole map if its rows are no longer than this, else to one row of each region
MAX_SHORT_ROW = 16


def gate_regions(
        x: torch.Tensor,
        gate: torch.Tensor,
        shortcut: Optional[torch.Tensor] = None,
        inplace: bool = False,
) -> torch.Tensor:
    """Multiplies a map with a gate that is enlarged to it (nearest), and adds the shortcut of a residual block.

    Args:
        x: Map, (N, C, H, W).
        gate: Gate, (N, C, P, P).
        shortcut: Map to add, of the shape of `x`.
        inplace: Write the result to `x`, if no gradient is wanted.

    Returns:
        The gated map, (N, C, H, W).
    """
    if torch.jit.is_scripting():
        x = x * F.interpolate(gate, size=x.shape[-2:], mode='nearest')
        return x if shortcut is None else x + shortcut
    else:  # noqa: RET505
        size = gate.shape[-1]
        compiling = torch.compiler.is_compiling()
        if compiling or _is_plain(x, gate, shortcut) or x.shape[-2] % size or x.shape[-1] % size:
            if compiling and x.is_cpu and not torch.is_grad_enabled() and not _is_plain(x, gate, shortcut):
                # the compiler would compute it anew for every place, but stores what is seen with other strides
                gate = torch.as_strided(gate, gate.shape, gate.stride())
            x = x * F.interpolate(gate, size=x.shape[-2:], mode='nearest')
            return x if shortcut is None else x + shortcut
        if torch.is_grad_enabled():
            return _GateRegions.apply(x, gate, shortcut)
        return _gate_regions(x, gate, shortcut, x if inplace else None)


def _is_plain(x: torch.Tensor, gate: torch.Tensor, shortcut: Optional[torch.Tensor]) -> bool:
    """Whether only the plain form will do."""
    return (
        not is_plain_tensor(x) or gate.dtype != x.dtype or (shortcut is not None and shortcut.dtype != x.dtype)
        or forward_ad._current_level >= 0)


class _GateRegions(torch.autograd.Function):
    """Keeps the map and the small gate for the gradient, where a product with an enlarged gate would keep two maps."""

    @staticmethod
    def forward(
            ctx: Any,
            x: torch.Tensor,
            gate: torch.Tensor,
            shortcut: Optional[torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, gate)
        # a block may add its shortcut in place, which autograd forbids on a view that a function returns
        return _gate_regions(x, gate, shortcut, torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        x, gate = ctx.saved_tensors
        needs_x, needs_gate, needs_shortcut = ctx.needs_input_grad
        return (
            _gate_regions(grad, gate) if needs_x else None,
            _sum_regions(grad * x, gate.shape[-1]) if needs_gate else None,
            grad if needs_shortcut else None)


def _gate_regions(
        x: torch.Tensor,
        gate: torch.Tensor,
        shortcut: Optional[torch.Tensor] = None,
        out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """As `gate_regions`, for sides that the gate's divide; written to `out`, if that is given."""
    batch, channels, height, width = x.shape
    size = gate.shape[-1]
    # rows, and in one case columns too, are split into regions, over which the gate is broadcast
    shape: Tuple[int, ...] = x.shape
    if (height, width) != (size, size):
        if not x.is_contiguous():
            shape = (batch, channels, size, height // size, size, width // size)
            gate = gate[:, :, :, None, :, None]
        elif width > MAX_SHORT_ROW:
            shape = (batch, channels, size, height // size, width)
            gate = _enlarge_rows(gate, width, 1)
        else:
            gate = _enlarge_rows(gate, width, height // size).view(shape)
    regions = x.view(shape)
    place = None if out is None else out.view(shape)
    if shortcut is None:
        product = torch.mul(regions, gate, out=place)
    else:
        product = torch.addcmul(shortcut.view(shape), regions, gate, out=place)
    return product.reshape(x.shape) if out is None else out


def _sum_regions(x: torch.Tensor, size: int) -> torch.Tensor:
    """Sums each of the regions that `_gate_regions` multiplies with one value."""
    batch, channels, height, width = x.shape
    if (height, width) == (size, size):
        return x
    if not is_planar(x):
        return F.avg_pool2d(x, (height // size, width // size), divisor_override=1)
    rows = x.view(-1, width) @ _repeats(size, width, 1, x.device, x.dtype).t()
    return rows.view(batch, channels, size, height // size, size).sum(3)


def _enlarge_rows(gate: torch.Tensor, width: int, copies: int) -> torch.Tensor:
    """Repeats the places of each row, and the row that comes of it; a product with zeros and ones is the fastest way.

    Args:
        gate: Gate, (N, C, P, P).
        width: Length of the new rows.
        copies: Number of times that each row comes.

    Returns:
        Gate of shape (N, C, P, copies, width).
    """
    size = gate.shape[-1]
    if not is_planar(gate):
        rows = gate[:, :, :, None, :, None].expand(-1, -1, -1, copies, -1, width // size)
    else:
        rows = gate.view(-1, size) @ _repeats(size, width, copies, gate.device, gate.dtype)
    return rows.reshape(*gate.shape[:3], copies, width)


@functools.lru_cache(maxsize=64)
def _repeats(size: int, width: int, copies: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Returns the matrix (size, copies * width) that repeats the places of a row, and then all of it."""
    with torch.inference_mode(False):
        return torch.eye(size, device=device, dtype=dtype).repeat_interleave(width // size, 1).repeat(1, copies)
