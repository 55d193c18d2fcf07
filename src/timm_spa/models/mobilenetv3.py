"""MobileNetV4 with attention at the end of every block: timm's networks with `add_attention`.

Papers:
  * `Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576
  * `MobileNetV4: Universal Models for the Mobile Ecosystem` - https://arxiv.org/abs/2404.10518

The gate stands behind the last norm layer of a block, before layer scale. Its reduction is 8, as the SPA paper's for
MobileNetV2 is. There is no fused form for inference.
"""
from typing import Any, Dict

import torch.nn as nn

from ._builder import warm_cfgs
from ._entrypoints import Family
from .gated import create_gated


def _create_mobilenetv4(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create_gated(variant, pretrained, **dict(dict(rd_ratio=1. / 8), **kwargs))


def _cfgs(name: str) -> Dict[str, Any]:
    return warm_cfgs(name, name.removeprefix('spa_'))


def _describe(base: str) -> str:
    return f'MobileNetV4, {base.rpartition("_")[2]}, convolutions only,'


default_cfgs: Dict[str, Any] = {}
register = Family(
    __name__, _create_mobilenetv4, ('mobilenetv4_conv_small', 'mobilenetv4_conv_medium'), _describe, _cfgs)

spa_mobilenetv4_conv_small = register('spa_mobilenetv4_conv_small')
spa_mobilenetv4_conv_medium = register('spa_mobilenetv4_conv_medium')
