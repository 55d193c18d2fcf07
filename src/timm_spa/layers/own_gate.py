"""Any attention layer as a gate: the difference that it makes is scaled by one learned number per channel."""
import math
from collections import Counter
from typing import Any, Callable, Iterable, Optional, Tuple

import torch
import torch.nn as nn

from .._errors import UsageError
from .torchscript import is_tracing

__all__ = ['OwnGate', 'check_gate_function', 'check_not_shared', 'create_own_gate']

TRIAL_SIZES = ((4, 8), (14, 14))  # of feature maps, the first as small as layers that halve it twice allow


@torch.fx.wrap
def _check_output(x: torch.Tensor, y: torch.Tensor) -> None:
    if not isinstance(y, torch.Tensor):
        raise ValueError(f'The layer of a gate must return a tensor, got {type(y)}.')
    if not is_tracing() and y.shape != x.shape:
        raise ValueError(
            f'The layer of a gate must keep the shape of its feature map, {list(x.shape)}, got {list(y.shape)}.')


class OwnGate(nn.Module):
    """A layer that maps (N, C, H, W) to the same shape, used as `x + scale * (layer(x) - x)`.

    The gate is the layer itself if the scales are one. It returns `x` exactly if they are zero and the layer's outputs
    are finite. The scales have a gradient then, and the parameters of the layer once the scales are not zero any more.
    They are part of the graph from the first step, so that DistributedDataParallel needs no `find_unused_parameters`.

    `zeros` and `doublings` are the neutral setting, as in the table of gates. A layer that returns `x` itself until it
    is trained, e.g. because its last weights are zero, is neutral with scales of one. It could not learn with zeros.
    """
    reads_block_input = False
    gate_name = 'own'
    doublings = 0

    def __init__(self, layer: nn.Module, channels: int, device=None, dtype=None):
        """
        Args:
            layer: Attention layer.
            channels: Channels of the feature map.
        """
        super().__init__()
        self.layer = layer
        self.zeros: Tuple[str, ...] = ('scale',)
        # 1-D, as optimizers expect of parameters that are exempt from weight decay
        self.scale = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the scales to one."""
        nn.init.ones_(self.scale)

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates `x`.

        Raises:
            ValueError: The layer returns another shape.
        """
        y = self.layer(x)
        _check_output(x, y)
        # autocast may compute the layer in another type
        return x + (self.scale.view(-1, 1, 1) * (y - x)).to(x.dtype)


def check_gate_function(gate: Any) -> None:
    """Raises a UsageError unless `gate` can be called with a number of channels."""
    if isinstance(gate, nn.Module):
        kind = type(gate).__name__
        raise UsageError(
            f'gate is a module, a {kind}, but each block needs its own. Give a class or a function that makes a module '
            f'from a number of channels, e.g. gate={kind}, or gate=lambda channels: {kind}(...).')
    if not callable(gate):
        raise UsageError(
            f'gate must be the name of a gate, or a class or function that makes a module from a number of channels, '
            f'got {gate!r}.')


def create_own_gate(gate: Callable[[int], nn.Module], channels: int, device=None, dtype=None) -> OwnGate:
    """Creates a gate from a class or function that makes an attention layer from a number of channels.

    Raises:
        UsageError: No such class or function, it fails, or its layer changes its input or the shape of a feature map.
    """
    check_gate_function(gate)
    name = _name(gate)
    try:
        layer = gate(channels)
    except Exception as e:
        raise UsageError(
            f'The gate {name} could not be created for {channels} channels: {type(e).__name__}: {e}. gate must be a '
            'class or function with the number of channels as its only required argument.') from e
    if not isinstance(layer, nn.Module):
        raise UsageError(
            f'The gate {name} returned {type(layer).__name__} for {channels} channels, not a module. gate must make an '
            'nn.Module that maps (N, C, H, W) to the same shape.')
    own = OwnGate(layer.to(device=device, dtype=dtype), channels, device, dtype)
    if all(_is_identity(own.layer, name, channels, size, own.scale) for size in TRIAL_SIZES):
        own.zeros = ()
    return own


def check_not_shared(gate: Any, gates: Iterable[nn.Module]) -> None:
    """Raises a UsageError if the gates of several blocks share parameters or buffers."""
    uses = Counter(id(tensor) for attn in gates for tensor in {*attn.parameters(), *attn.buffers()})
    if max(uses.values(), default=0) > 1:
        raise UsageError(
            f'The gate {_name(gate)} shares parameters or buffers between blocks, which would be trained as one. Make '
            'a new module in every call.')


def _name(gate: Any) -> str:
    return getattr(gate, '__qualname__', repr(gate))


def _is_identity(layer: nn.Module, name: str, channels: int, size: Tuple[int, int], like: torch.Tensor) -> bool:
    """Returns whether a layer returns its feature map unchanged, as far as a single one can show.

    Raises:
        UsageError: The layer changes its input, or returns something else than a feature map of the same shape.
    """
    x = torch.linspace(-2, 3, channels * math.prod(size), device=like.device, dtype=like.dtype)
    x = x.reshape(1, channels, *size)
    given = x.clone()
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()  # statistics stay
    try:
        with torch.no_grad():
            y = layer(given)
    except Exception:
        return False  # it may need feature maps of another size; the forward pass checks the shape
    finally:
        for module, mode in modes:
            module.training = mode
    try:
        _check_output(x, y)
    except ValueError as e:
        raise UsageError(f'The gate {name} cannot be used. {e} Return (N, C, H, W) for (N, C, H, W).') from e
    if x.is_meta:
        return False
    if not torch.equal(x, given):
        raise UsageError(
            f'The gate {name} cannot be used: it writes to its input, which the gate reads again. Use inplace=False in '
            'its first layers.')
    return torch.equal(x, y)
