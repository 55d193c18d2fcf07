"""DenseNet with attention on the new channels of every layer, on timm's DenseNet.

Papers:
  * `Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576
  * `Densely Connected Convolutional Networks` - https://arxiv.org/abs/1608.06993

The gate acts on the raw output of a layer's last convolution, before it is concatenated; variants B and C read all
channels that come into the layer, as they are. Transitions have none. The reduction is 3, in the 32x32 networks of the
authors as in the ImageNet networks here, for which there is no precedent. There is no fused form for inference.
"""
import re
from typing import Any, Callable, Dict, List, Mapping

import torch
import torch.nn as nn
from timm.models.densenet import DenseBlock, DenseLayer, DenseNet

from ..layers.torchscript import is_scripting
from ._base import GatedNet, adopt, divide_reduction
from ._builder import build_model, cifar_cfg, warm_cfgs
from ._entrypoints import Family

__all__ = ['GatedDenseLayer', 'GatedDenseNet']


class GatedDenseLayer(DenseLayer):
    """timm's dense layer with a gate on its new channels."""
    gated_parameters = ('conv2.weight',)

    def __init__(self, layer: DenseLayer, attn: Any):
        """
        Args:
            layer: The layer as timm's block made it; its parts are taken over.
            attn: Gate, called with the new channels and with all that come into the layer.
        """
        adopt(self, layer)
        self.attn = attn
        self.reads_block_input = bool(attn.reads_block_input)  # TorchScript sees no attribute of another class

    def forward(self, x: List[torch.Tensor]) -> torch.Tensor:
        """Makes new channels.

        Args:
            x: What the layers before made, (N, C_i, H, W) each.

        Returns:
            The new channels, (N, growth_rate, H, W).
        """
        if not is_scripting() and self.grad_checkpointing and self.any_requires_grad(x):
            bottleneck = self.call_checkpoint_bottleneck(x)
        else:
            bottleneck = self.bottleneck_fn(x)
        new = self.conv2(self.norm2(bottleneck))
        new = self.attn(new, torch.cat(x, 1) if self.reads_block_input else new)
        if self.drop_rate > 0:
            new = nn.functional.dropout(new, p=self.drop_rate, training=self.training)
        return new


class GatedDenseNet(GatedNet, DenseNet):
    """timm's DenseNet with a gate in every dense layer."""

    def __init__(
            self,
            *,
            make_gate: Callable[..., nn.Module],
            cifar: bool = False,
            in_chans: int = 3,
            norm_layer: Any = 'batchnorm2d',
            device=None,
            dtype=None,
            **kwargs: Any,
    ):
        """
        Args:
            make_gate: Makes the gate of a layer, see `build_model`.
            cifar: Build the network for 32x32 images: a stem of one 3x3 convolution that keeps the resolution.
            in_chans: Channels of the images.
            norm_layer: Norm layer, of the gates too.
            **kwargs: Arguments of timm's DenseNet.
        """
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__(in_chans=in_chans, norm_layer=norm_layer, **kwargs, **dd)
        if cifar:
            self.features.conv0 = nn.Conv2d(
                in_chans, self.features.conv0.out_channels, 3, padding=1, bias=False, **dd)
            self.features.norm0 = nn.Identity()
            self.features.pool0 = nn.Identity()
            divide_reduction(self.feature_info, 2, 4)
        for block in self.features.children():
            if isinstance(block, DenseBlock):
                for name, layer in list(block.items()):
                    attn = make_gate(
                        layer.conv2.out_channels, layer.conv1.in_channels, reduce_source=True, norm_layer=norm_layer,
                        **dd)
                    block[name] = GatedDenseLayer(layer, attn)
        self.init_weights()

    def init_convs(self) -> None:
        """Initializes convolutions as timm does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


_BASES: Dict[str, Dict[str, Any]] = {
    'densenet121': dict(growth_rate=32, block_config=(6, 12, 24, 16)),
    'densenet161': dict(growth_rate=48, block_config=(6, 12, 36, 24)),
    'densenet169': dict(growth_rate=32, block_config=(6, 12, 32, 32)),
    'densenet201': dict(growth_rate=32, block_config=(6, 12, 48, 32)),
    'densenet_cifar': dict(growth_rate=12, block_config=(6, 12, 24, 16), cifar=True, pyramid_sizes=(1, 2, 4)),
    'densenet121_cifar': dict(growth_rate=32, block_config=(6, 12, 24, 16), cifar=True, pyramid_sizes=(1, 2, 4)),
}


def rename_torchvision(state_dict: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Renames torchvision's first files, which have 'denselayer1.norm.1.weight' for 'denselayer1.norm1.weight'."""
    return {re.sub(r'\.(norm|conv)\.(\d)\.', r'.\1\2.', key): value for key, value in state_dict.items()}


def _create_densenet(variant: str, pretrained: bool, base: str, **kwargs: Any) -> GatedDenseNet:
    return build_model(
        GatedDenseNet,
        variant,
        pretrained,
        feature_cfg=dict(flatten_sequential=True),
        plain_filter=rename_torchvision,
        **dict(dict(rd_ratio=1. / 3, **_BASES[base]), **kwargs),
    )


def _cfgs(name: str) -> Dict[str, Any]:
    if name.endswith('_cifar'):
        return {f'{name}.untrained': cifar_cfg(first_conv='features.conv0', classifier='classifier')}
    return warm_cfgs(name, name.removeprefix('spa_'))


def _describe(base: str) -> str:
    config = _BASES[base]
    size = ' for 32x32 images' if config.get('cifar') else ''
    return f'DenseNet of growth {config["growth_rate"]}, blocks {config["block_config"]}{size},'


default_cfgs: Dict[str, Any] = {}
register = Family(__name__, _create_densenet, _BASES, _describe, _cfgs)

spa_densenet121 = register('spa_densenet121')
spa_densenet161 = register('spa_densenet161')
spa_densenet169 = register('spa_densenet169')
spa_densenet201 = register('spa_densenet201')
densenet_cifar = register('densenet_cifar')
spa_densenet_cifar = register('spa_densenet_cifar')
spa_b_densenet_cifar = register('spa_b_densenet_cifar')
spa_c_densenet_cifar = register('spa_c_densenet_cifar')
se_densenet_cifar = register('se_densenet_cifar')
ge_densenet_cifar = register('ge_densenet_cifar')
densenet121_cifar = register('densenet121_cifar')
spa_densenet121_cifar = register('spa_densenet121_cifar')
spa_b_densenet121_cifar = register('spa_b_densenet121_cifar')
spa_c_densenet121_cifar = register('spa_c_densenet121_cifar')
se_densenet121_cifar = register('se_densenet121_cifar')
ge_densenet121_cifar = register('ge_densenet121_cifar')
