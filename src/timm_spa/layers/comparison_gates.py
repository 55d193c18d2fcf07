"""The gates that the paper compares with SPA, for the same position in a block.

Each is called with the map to gate, (N, C, H, W), and the block's input, as `SpatialPyramidAttention` is.
"""
from typing import Any, Optional

import torch
import torch.nn as nn
from timm.layers import LayerType, get_norm_layer

from .spatial_pyramid_attn import apply_gate, channel_matcher

__all__ = ['GatherExcite', 'GatherExciteConv', 'NoGate', 'SelfGate', 'SqueezeExcite']

torch.fx.wrap('apply_gate')


class NoGate(nn.Module):
    """No gate, for the plain network."""
    reads_block_input = False

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Returns `x`."""
        return x


class SelfGate(nn.Module):
    """One of timm's attention layers, which read the feature map that they gate."""
    reads_block_input = False

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates `x`."""
        return self.layer(x)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation without biases in the three positions of the paper's table IV: SE, SE+ and SE++.

    Paper: `Squeeze-and-Excitation Networks`, https://arxiv.org/abs/1709.01507
    """

    def __init__(
            self,
            channels: int,
            in_channels: Optional[int] = None,
            variant: str = 'a',
            rd_ratio: float = 1. / 16,
            rd_channels: Optional[int] = None,
            matcher_rd_channels: Optional[int] = None,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """See `SpatialPyramidAttention` for the arguments."""
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__()
        in_channels = channels if in_channels is None or variant == 'a' else in_channels
        rd_channels = max(1, int(channels * rd_ratio)) if rd_channels is None else rd_channels
        self.variant, self.reads_block_input = variant, variant != 'a'
        self.matcher: nn.Module = nn.Identity()
        if variant == 'c' and in_channels != channels:
            self.matcher = channel_matcher(
                in_channels, channels, matcher_rd_channels or rd_channels, norm_layer=norm_layer, **dd)
            in_channels = channels
        self.fc1 = nn.Conv2d(in_channels, rd_channels, kernel_size=1, bias=False, **dd)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(rd_channels, channels, kernel_size=1, bias=False, **dd)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates `x` with one value a channel; variants b and c raise a ValueError without the block's input."""
        source = block_input if self.reads_block_input else x
        if source is None:
            raise ValueError('Variants b and c of SqueezeExcite need block_input, got None.')
        squeezed = self.matcher(source).mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.fc1(squeezed))))


class GatherExcite(nn.Module):
    """Gather-excite without parameters, of global extent: every channel is gated by the sigmoid of its own mean.

    Paper: `Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks`, https://arxiv.org/abs/1810.12348
    timm's layer of that name computes the same, and cannot be scripted in timm 1.0.31.
    """
    reads_block_input = False

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates `x` with one value a channel."""
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class GatherExciteConv(nn.Module):
    """Gather-excite with learned gathering over an extent of 8: three depthwise convolutions of stride 2.

    It has 33 parameters a channel, as the SPA paper's table III counts them. timm's `GatherExcite(extra_params=True)`
    cannot be built in timm 1.0.31.
    """
    reads_block_input = False

    def __init__(self, channels: int, norm_layer: LayerType = nn.BatchNorm2d, device=None, dtype=None):
        """See `SpatialPyramidAttention` for the arguments."""
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__()
        layers = []
        for _ in range(3):
            conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False, **dd)
            layers += [conv, get_norm_layer(norm_layer)(channels, **dd), nn.ReLU(inplace=True)]
        self.gather = nn.Sequential(*layers[:-1])
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates `x` by the gathered map, which is resized to it (nearest)."""
        return apply_gate(x, self.gate(self.gather(x)))
