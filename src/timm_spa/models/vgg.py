"""VGG with attention after every convolution, on timm's VGG.

Papers:
  * `Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576
  * `Very Deep Convolutional Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1409.1556

The gate acts on the output of each conv - norm - ReLU unit. For 32x32 images (the paper's table I) the head is a single
linear layer. Table I also has SPA-B and SPA-C on VGG16, of which the authors published no code: here they follow
equations (4) and (5), with the input of the unit's convolution as the block's input. The first unit reads the image's 3
channels; reduced widths are those of its output.
"""
from typing import Any, Dict, List, Sequence

import torch
import torch.nn as nn
from timm.layers import ClassifierHead
from timm.models import generate_default_cfgs
from timm.models.vgg import VGG

from ..layers import create_gate
from ._entrypoints import register_gated
from ._pretrained import build_model, cifar_cfg, reset_parameters, warm_cfg

__all__ = ['CifarVGG', 'GatedConvUnit', 'GatedVGG']

VGG16: List[Any] = [64, 64, 'M', 128, 128, 'M', 256, 256, 256, 'M', 512, 512, 512, 'M', 512, 512, 512, 'M']


class _GatedActivation(nn.Module):
    """An activation with a gate on its output, in the activation's place of timm's flat list of layers."""
    gated_parameters = ('weight', 'bias')

    def __init__(self, act: nn.Module, attn: nn.Module, norm_name: str):
        super().__init__()
        self.gated_prefix = norm_name
        self.act = act
        self.attn = attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(self.act(x))


class GatedVGG(VGG):
    """timm's VGG with norm layers and a gate after every unit. The gate reads the map that it gates."""

    def __init__(
            self,
            cfg: Sequence[Any] = VGG16,
            gate: str = 'spa',
            pyramid_sizes: Sequence[int] = (1, 4, 7),
            rd_ratio: float = 1. / 16,
            **kwargs: Any,
    ):
        """
        Args:
            cfg: Channels of each unit, and 'M' for a max pooling.
            gate: Name of a gate that reads the map that it gates, see `timm_spa.layers.create_gate`.
            pyramid_sizes: Side lengths of the gate's pooled maps, in cells.
            rd_ratio: Reduced width of the gates over their channels.
            **kwargs: Arguments of timm's VGG.

        Raises:
            ValueError: The gate reads the block's input.
        """
        super().__init__(list(cfg), norm_layer=kwargs.pop('norm_layer', None) or nn.BatchNorm2d, **kwargs)
        dd: Any = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        for i, layer in enumerate(self.features):
            if isinstance(layer, nn.Conv2d):
                attn = create_gate(gate, layer.out_channels, layer.out_channels, pyramid_sizes, rd_ratio, **dd)
                if attn.reads_block_input:
                    raise ValueError(f'gate must read the map that it gates in GatedVGG, got {gate!r}.')
                # conv, norm, activation: the gate goes with the third, so that timm's names stay
                self.features[i + 2] = _GatedActivation(self.features[i + 2], attn, f'features.{i + 1}')
                _init_weights(attn)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initializes every parameter and buffer, also of a model made on the meta device and moved by `to_empty`."""
        _init_weights(self)


class GatedConvUnit(nn.Module):
    """conv 3x3 - norm - ReLU - gate."""
    gated_parameters = ('bn.weight', 'bn.bias')

    def __init__(
            self,
            in_channels: int,
            channels: int,
            norm_layer: Any = nn.BatchNorm2d,
            device=None,
            dtype=None,
            **gate_args: Any,
    ):
        """
        Args:
            in_channels: Channels of the input.
            channels: Channels of the output.
            norm_layer: Norm layer.
            **gate_args: Arguments of `timm_spa.layers.create_gate` that do not depend on the unit.
        """
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, **dd)
        self.bn = norm_layer(channels, **dd)
        self.act = nn.ReLU(inplace=True)
        self.attn = create_gate(
            channels=channels, in_channels=in_channels, norm_layer=norm_layer, **gate_args, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, in_channels, H, W) to (N, channels, H, W)."""
        return self.attn(self.act(self.bn(self.conv(x))), x)


class CifarVGG(VGG):
    """VGG16 for 32x32 images, with a gate after every unit and one linear layer as its head."""

    def __init__(
            self,
            cfg: Sequence[Any] = VGG16,
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            gate: str = 'spa',
            pyramid_sizes: Sequence[int] = (1, 2, 4),
            rd_ratio: float = 1. / 16,
            norm_layer: Any = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            cfg: Channels of each unit, and 'M' for a max pooling.
            num_classes: Number of classes.
            in_chans: Channels of the images.
            global_pool: Kind of global pooling.
            drop_rate: Dropout before the linear layer.
            gate: Name of the gate, see `timm_spa.layers.create_gate`.
            pyramid_sizes: Side lengths of the gate's pooled maps, in cells.
            rd_ratio: Reduced width of the gates over their channels.
            norm_layer: Norm layer.
        """
        dd: Any = {'device': device, 'dtype': dtype}
        # timm's methods are wanted, its layers are not: the smallest ones are made, and replaced
        super().__init__([1], num_classes=num_classes, in_chans=in_chans, mlp_ratio=1 / 4096, **dd)
        layers: List[nn.Module] = []
        self.feature_info: List[Dict[str, Any]] = []
        self.feature_ends: List[int] = []
        channels, reduction = in_chans, 1
        for v in cfg:
            if v == 'M':
                self._add_feature(channels, reduction, len(layers) - 1)
                layers.append(nn.MaxPool2d(2, 2))
                reduction *= 2
            else:
                layers.append(GatedConvUnit(
                    channels, v, norm_layer, gate=gate, pyramid_sizes=pyramid_sizes, rd_ratio=rd_ratio, **dd))
                channels = v
        self._add_feature(channels, reduction, len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.num_features = self.head_hidden_size = channels
        self.pre_logits = nn.Identity()
        self.head = ClassifierHead(channels, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.init_weights()

    def _add_feature(self, channels: int, reduction: int, index: int) -> None:
        self.feature_info.append(dict(num_chs=channels, reduction=reduction, module=f'features.{index}'))
        self.feature_ends.append(index)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initializes every parameter and buffer, also of a model made on the meta device and moved by `to_empty`."""
        _init_weights(self)


def _init_weights(model: nn.Module) -> None:
    reset_parameters(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


def _create_vgg(variant: str, pretrained: bool, base: str, **kwargs: Any) -> VGG:
    return build_model(
        CifarVGG if base == 'vgg16_cifar' else GatedVGG,
        variant,
        pretrained,
        feature_cfg=dict(flatten_sequential=True),
        **kwargs,
    )


NAMES = (
    'spa_vgg16_bn', 'vgg16_cifar', 'spa_vgg16_cifar', 'spa_b_vgg16_cifar', 'spa_c_vgg16_cifar', 'se_vgg16_cifar',
    'ge_vgg16_cifar',
)

default_cfgs = generate_default_cfgs({
    'spa_vgg16_bn.warm_tv_in1k': warm_cfg('vgg16_bn.tv_in1k'),
    **{
        f'{name}.untrained': cifar_cfg(pool_size=(1, 1), first_conv='features.0.conv', classifier='head.fc')
        for name in NAMES if name.endswith('_cifar')
    },
})

register_gated(
    globals(), NAMES, _create_vgg, lambda base: 'VGG-16 for ' + ('32x32' if 'cifar' in base else '224x224') + ' images'
)
