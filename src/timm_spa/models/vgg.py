"""VGG with attention after every convolution, on timm's VGG.

Papers:
  * `Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576
  * `Very Deep Convolutional Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1409.1556

The gate acts on the output of each conv - norm - ReLU unit. For 32x32 images (the paper's table I) the head is a single
linear layer. Table I also has SPA-B and SPA-C on VGG16, of which the authors published no code: here they follow
equations (4) and (5), with the input of the unit's convolution as the block's input. The first unit reads the image's 3
channels; reduced widths are those of its output. There is no fused form for inference.
"""
from typing import Any, Callable, Dict, List, Sequence

import torch
import torch.nn as nn
from timm.layers import ClassifierHead, get_norm_layer
from timm.models.vgg import VGG

from ._base import GatedNet
from ._builder import build_model, cifar_cfg, warm_cfgs
from ._entrypoints import Family

__all__ = ['CifarVGG', 'GatedConvUnit', 'GatedVGG']

VGG16: List[Any] = [64, 64, 'M', 128, 128, 'M', 256, 256, 256, 'M', 512, 512, 512, 'M', 512, 512, 512, 'M']


def _init_convs(model: nn.Module) -> None:
    """Initializes convolutions and linear layers as timm does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


class _GatedActivation(nn.Module):
    """An activation with a gate on its output, in the activation's place of timm's flat list of layers."""
    gated_parameters = ('weight', 'bias')
    gated_activation = 'act'

    def __init__(self, act: nn.Module, attn: nn.Module, norm_name: str):
        super().__init__()
        self.gated_prefix = norm_name
        self.inplace = getattr(act, 'inplace', False)  # timm's feature extractors ask for it
        self.act = act
        self.attn = attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(self.act(x))


class GatedVGG(GatedNet, VGG):
    """timm's VGG with norm layers and a gate after every unit. The gate reads the feature map that it rescales."""
    init_convs = _init_convs

    def __init__(
            self,
            cfg: Sequence[Any] = VGG16,
            *,
            make_gate: Callable[..., nn.Module],
            norm_layer: Any = None,
            **kwargs: Any,
    ):
        """
        Args:
            cfg: Channels of each unit, and 'M' for a max pooling.
            make_gate: Makes the gate of a unit, see `build_model`; it has to read the feature map that it rescales.
            norm_layer: Norm layer, of the gates too; batch norm if None.
            **kwargs: Arguments of timm's VGG.

        Raises:
            ValueError: The gate reads the block's input.
        """
        norm_layer = get_norm_layer(norm_layer) or nn.BatchNorm2d
        super().__init__(list(cfg), norm_layer=norm_layer, **kwargs)
        dd: Any = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        for i, layer in enumerate(self.features):
            if isinstance(layer, nn.Conv2d):
                attn = make_gate(layer.out_channels, layer.out_channels, norm_layer=norm_layer, **dd)
                if attn.reads_block_input:
                    raise ValueError(
                        'gate must read the map that it gates in GatedVGG; SPA-B, SPA-C, SE+ and SE++ read the '
                        "block's input.")
                # conv, norm, activation: the gate goes with the third, so that timm's names stay
                self.features[i + 2] = _GatedActivation(self.features[i + 2], attn, f'features.{i + 1}')
                _init_convs(attn)


class GatedConvUnit(nn.Module):
    """conv 3x3 - norm - ReLU - gate."""
    gated_parameters = ('bn.weight', 'bn.bias')
    gated_activation = 'act'

    def __init__(
            self,
            in_channels: int,
            channels: int,
            norm_layer: Any = nn.BatchNorm2d,
            device=None,
            dtype=None,
            *,
            make_gate: Callable[..., nn.Module],
    ):
        """
        Args:
            in_channels: Channels of the input.
            channels: Channels of the output.
            norm_layer: Norm layer.
            make_gate: Makes the gate, see `build_model`.
        """
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, **dd)
        self.bn = norm_layer(channels, **dd)
        self.act = nn.ReLU(inplace=True)
        self.attn = make_gate(channels, in_channels, norm_layer=norm_layer, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, in_channels, H, W) to (N, channels, H, W)."""
        return self.attn(self.act(self.bn(self.conv(x))), x)


class CifarVGG(GatedNet, VGG):
    """VGG16 for 32x32 images, with a gate after every unit and one linear layer as its head."""
    init_convs = _init_convs

    def __init__(
            self,
            cfg: Sequence[Any] = VGG16,
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            norm_layer: Any = nn.BatchNorm2d,
            device=None,
            dtype=None,
            *,
            make_gate: Callable[..., nn.Module],
    ):
        """
        Args:
            cfg: Channels of each unit, and 'M' for a max pooling.
            num_classes: Number of classes.
            in_chans: Channels of the images.
            global_pool: Kind of global pooling.
            drop_rate: Dropout before the linear layer.
            norm_layer: Norm layer, of the gates too.
            make_gate: Makes the gate of a unit, see `build_model`.
        """
        norm_layer = get_norm_layer(norm_layer)
        dd: Any = {'device': device, 'dtype': dtype}
        # only timm's methods are needed: build its smallest layers, and replace them below
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
                layers.append(GatedConvUnit(channels, v, norm_layer, make_gate=make_gate, **dd))
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


def _create_vgg(variant: str, pretrained: bool, base: str, **kwargs: Any) -> VGG:
    cifar = base == 'vgg16_cifar'
    return build_model(
        CifarVGG if cifar else GatedVGG,
        variant,
        pretrained,
        # timm's VGG ends with a sixth map, behind the last pooling
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3, 4, 5)),
        **dict(dict(pyramid_sizes=(1, 2, 4) if cifar else (1, 4, 7)), **kwargs),
    )


def _cfgs(name: str) -> Dict[str, Any]:
    if name.endswith('_cifar'):
        return {f'{name}.untrained': cifar_cfg(pool_size=(1, 1), first_conv='features.0.conv', classifier='head.fc')}
    return warm_cfgs(name, name.removeprefix('spa_'))


def _describe(base: str) -> str:
    return f'VGG-16 for {"32x32" if base == "vgg16_cifar" else "224x224"} images'


default_cfgs: Dict[str, Any] = {}
register = Family(__name__, _create_vgg, ('vgg16_bn', 'vgg16_cifar'), _describe, _cfgs)

spa_vgg16_bn = register('spa_vgg16_bn')
vgg16_cifar = register('vgg16_cifar')
spa_vgg16_cifar = register('spa_vgg16_cifar')
spa_b_vgg16_cifar = register('spa_b_vgg16_cifar')
spa_c_vgg16_cifar = register('spa_c_vgg16_cifar')
se_vgg16_cifar = register('se_vgg16_cifar')
ge_vgg16_cifar = register('ge_vgg16_cifar')
