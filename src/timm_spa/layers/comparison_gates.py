"""Gates to compare with: what the paper holds Spatial Pyramid Attention against, in the same place of the same block.

Each takes the map to gate and the block's input, as `SpatialPyramidAttention` does. Where timm has the layer, it is
timm's; what is left here is what timm lacks.
"""
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from .spatial_pyramid_attention import ChannelMatcher

__all__ = ['GatherExcite', 'GatherExciteConv', 'NoGate', 'SelfGate', 'SqueezeExcite']


class NoGate(nn.Module):
    """The plain net's gate: none."""
    reads_block_input = False

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Returns `x` as it is."""
        return x


class SelfGate(nn.Module):
    """One of timm's attention layers, which read the map that they gate, called as the gates of this package are."""
    reads_block_input = False

    def __init__(self, layer: nn.Module):
        """
        Args:
            layer: A layer that maps (N, C, H, W) to the same shape.
        """
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates (N, C, H, W); the block's input is not read."""
        return self.layer(x)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation in the three connections of the paper: SE, SE+ and SE++ of table IV.

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
            norm_layer: Any = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            channels: Channels of the gated map.
            in_channels: Channels of the block's input, for variants b and c; `channels` if None.
            variant: What is squeezed: 'a' the gated map (SE), 'b' the block's input (SE+), 'c' the block's input with
                its channels matched (SE++).
            rd_ratio: Reduced width over `channels`, rounded down, at least 1.
            rd_channels: That width itself, overrides `rd_ratio`.
            matcher_rd_channels: Width inside the channel matcher; that between the two convolutions if None.
            norm_layer: Norm layer of the channel matcher.
        """
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__()
        in_channels = channels if in_channels is None or variant == 'a' else in_channels
        rd_channels = max(1, int(channels * rd_ratio)) if rd_channels is None else rd_channels
        self.reads_block_input = variant != 'a'
        if variant == 'c' and in_channels != channels:
            self.matcher: nn.Module = ChannelMatcher(
                in_channels, channels, matcher_rd_channels or rd_channels, norm_layer=norm_layer, **dd)
            in_channels = channels
        else:
            self.matcher = nn.Identity()
        self.fc1 = nn.Conv2d(in_channels, rd_channels, kernel_size=1, bias=False, **dd)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(rd_channels, channels, kernel_size=1, bias=False, **dd)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates (N, channels, H, W), with one value a channel.

        Raises:
            ValueError: Variant b or c was called without `block_input`.
        """
        source = x
        if self.reads_block_input:
            if block_input is None:
                raise ValueError('Variants b and c of SqueezeExcite need block_input, got None.')
            source = block_input
        squeezed = self.matcher(source).mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.fc1(squeezed))))


class GatherExcite(nn.Module):
    """Gather-excite without parameters, of global extent: every channel is gated by the sigmoid of its own mean.

    Paper: `Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks`, https://arxiv.org/abs/1810.12348
    timm's layer of that name computes the same, and can't be compiled by TorchScript in timm 1.0.28 to 1.0.31.
    """
    reads_block_input = False

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates (N, C, H, W), with one value a channel."""
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class GatherExciteConv(nn.Module):
    """Gather-excite with learned gathering over an extent of 8: depthwise convolutions of stride 2, three of them.

    Paper: `Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks`, https://arxiv.org/abs/1810.12348
    (GE-theta, E8). With it MobileNetV2 has the parameters of the SPA paper's table III: 33 a channel, 0.050 M in all.
    timm's `GatherExcite(extra_params=True)` can't be built in timm 1.0.28 to 1.0.31.
    """
    reads_block_input = False

    def __init__(self, channels: int, norm_layer: Any = nn.BatchNorm2d, device=None, dtype=None):
        """
        Args:
            channels: Channels of the gated map.
            norm_layer: Norm layer after each convolution.
        """
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__()
        layers = []
        for i in range(3):
            layers += [
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False, **dd),
                norm_layer(channels, **dd),
            ]
            if i < 2:
                layers.append(nn.ReLU(inplace=True))
        self.gather = nn.Sequential(*layers)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates (N, channels, H, W); the gathered map is enlarged to it (nearest)."""
        return x * self.gate(F.interpolate(self.gather(x), size=x.shape[-2:], mode='nearest'))
