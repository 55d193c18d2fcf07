"""A literal implementation of the SPA equations, as a baseline for measurements.

    cd tests/benchmarks && timm-spa bench spa_resnet50 straightforward_spa_resnet50 --import straightforward
"""
from typing import Any, Optional

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_model

import timm_spa

__all__ = ['straightforward_spa_mobilenetv2', 'straightforward_spa_resnet50']


class StraightforwardAttention(timm_spa.SpatialPyramidAttention):
    """SPA with one adaptive pooling per size, upsampled to the finest size, and a gate upsampled to the feature map."""

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates a feature map (N, C, H, W) like the layer of the package."""
        source = self.matcher(block_input if self.reads_block_input else x)
        levels = [
            F.interpolate(F.adaptive_avg_pool2d(source, size), size=self.pyramid_sizes[0], mode='nearest')
            for size in self.pyramid_sizes]
        pyramid = (torch.stack(levels) * self.pyramid_weight.view(-1, 1, 1, 1, 1)).sum(0)
        gate = self.gate(self.fc2(self.act(self.bn(self.fc1(pyramid)))))
        return x * F.interpolate(gate, size=x.shape[-2:], mode='nearest')


def _create(name: str, **kwargs: Any) -> nn.Module:
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if type(module) is timm_spa.SpatialPyramidAttention:
            module.__class__ = StraightforwardAttention
    return model


@register_model
def straightforward_spa_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with SPA-A."""
    return _create('spa_resnet50', pretrained=pretrained, **kwargs)


@register_model
def straightforward_spa_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 with SPA-A."""
    return _create('spa_mobilenetv2', pretrained=pretrained, **kwargs)
