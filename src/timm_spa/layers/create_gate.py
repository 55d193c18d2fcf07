"""Gates by name: the one place that knows which layer the prefix of a model name stands for."""
from typing import Any, Dict

import torch.nn as nn

from .spatial_pyramid_attention import SpatialPyramidAttention

__all__ = ['create_gate']

_VARIANTS: Dict[str, str] = {'spa': 'a', 'spa_b': 'b', 'spa_c': 'c'}


def create_gate(gate: str, channels: int, in_channels: int, **kwargs: Any) -> nn.Module:
    """Creates the gate of one block.

    Args:
        gate: Name of the gate: 'spa', 'spa_b' or 'spa_c'.
        channels: Channels of the map to gate.
        in_channels: Channels of the block's input.
        **kwargs: Further arguments of the layer.

    Returns:
        A module that takes the map to gate and the block's input, and returns the gated map.

    Raises:
        ValueError: The gate is unknown.
    """
    if gate not in _VARIANTS:
        raise ValueError(f'gate must be one of {", ".join(map(repr, _VARIANTS))}, got {gate!r}.')
    variant = _VARIANTS[gate]
    return SpatialPyramidAttention(channels, channels if variant == 'a' else in_channels, variant=variant, **kwargs)
