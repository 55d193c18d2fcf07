"""MobileNetV4 with attention at the end of every block: timm's networks with `add_attention`.

Papers:
  * `Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576
  * `MobileNetV4: Universal Models for the Mobile Ecosystem` - https://arxiv.org/abs/2404.10518

The gate stands behind the last norm layer of a block, before layer scale. Its reduction is 8, as the SPA paper's for
MobileNetV2 is. There is no fused form for inference.
"""
from typing import Any

import torch.nn as nn
from timm.models import generate_default_cfgs

from ._builder import warm_cfgs
from ._entrypoints import register_gated
from .gated import create_gated

NAMES = ('spa_mobilenetv4_conv_small', 'spa_mobilenetv4_conv_medium')


def _create_mobilenetv4(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return create_gated(variant, pretrained, **dict(dict(rd_ratio=1. / 8), **kwargs))


default_cfgs = generate_default_cfgs({
    tag: cfg for name in NAMES for tag, cfg in warm_cfgs(name, name.removeprefix('spa_')).items()})

register_gated(
    globals(), NAMES, _create_mobilenetv4, lambda base: f'MobileNetV4, {base.rpartition("_")[2]}, convolutions only,')
