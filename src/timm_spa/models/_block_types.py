"""Block types of timm that `add_attention` knows, and the last layer of their residual branches."""
import re
from fnmatch import fnmatchcase
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch.nn as nn
from timm.layers import ConvNormAct
from timm.models import FeatureDictNet, FeatureHookNet
from timm.models._efficientnet_blocks import ConvBnAct
from timm.models.ghostnet import GhostModule
from timm.models.vgg import VGG

from .._names import did_you_mean

__all__ = ['BLOCK_TYPES', 'default_places', 'named_places']

# timm's file -> class of block -> names of the branch's last norm layer or convolution; the first one found is gated.
# An empty path is the block itself, which sums its branches (RepVGG) or has none (VGG).
BLOCK_TYPES: Dict[str, Dict[str, Tuple[str, ...]]] = {
    'timm.models.resnet': {'BasicBlock': ('bn2',), 'Bottleneck': ('bn3',)},  # also of HRNet
    'timm.models.resnetv2': {'PreActBasic': ('conv2',), 'PreActBottleneck': ('conv3',), 'Bottleneck': ('norm3',)},
    'timm.models.resnest': {'ResNestBottleneck': ('bn3',)},
    'timm.models.res2net': {'Bottle2neck': ('bn3',)},
    'timm.models.senet': {
        'SEBottleneck': ('bn3',), 'SEResNetBottleneck': ('bn3',), 'SEResNeXtBottleneck': ('bn3',),
        'SEResNetBlock': ('bn2',)},
    'timm.models.sknet': {'SelectiveKernelBasic': ('conv2',), 'SelectiveKernelBottleneck': ('conv3',)},
    'timm.models.tresnet': {'BasicBlock': ('conv2',), 'Bottleneck': ('conv3',)},
    'timm.models.regnet': {'Bottleneck': ('conv3',), 'PreBottleneck': ('conv3',)},
    'timm.models.byobnet': {
        'BasicBlock': ('conv2_kxk',), 'BottleneckBlock': ('conv3_1x1',), 'DarkBlock': ('conv2_kxk',),
        'EdgeBlock': ('conv2_1x1',), 'RepVggBlock': ('',)},
    'timm.models._efficientnet_blocks': {  # also of MobileNetV2 to V4, MnasNet, FBNet
        'ConvBnAct': ('bn1',), 'DepthwiseSeparableConv': ('bn2',), 'InvertedResidual': ('bn3',),
        'CondConvResidual': ('bn3',), 'EdgeResidual': ('bn2',), 'UniversalInvertedResidual': ('dw_end', 'pw_proj')},
    'timm.models.ghostnet': {'GhostBottleneck': ('ghost2',)},
    'timm.models.rexnet': {'LinearBottleneck': ('conv_pwl',)},
    'timm.models.cspnet': {'BottleneckBlock': ('conv3',), 'DarkBlock': ('conv2',), 'EdgeBlock': ('conv2',)},
    'timm.models.vovnet': {'OsaBlock': ('conv_concat',)},
    'timm.models.dla': {'DlaBasic': ('bn2',), 'DlaBottleneck': ('bn3',), 'DlaBottle2neck': ('bn3',)},
    'timm.models.densenet': {'DenseLayer': ('conv2',)},
    'timm.models.rdnet': {'Block': ('layers',), 'BlockESE': ('layers',)},
    'timm.models.convnext': {'ConvNeXtBlock': ('conv_dw',)},  # its pointwise layers may have channels last
    'timm.models.starnet': {'Block': ('dwconv2',)},
    'timm.models.xception': {'Block': ('rep',)},
    'timm.models.xception_aligned': {
        'XceptionModule': ('stack.conv3.bn_pw',), 'PreXceptionModule': ('stack.conv3.conv_pw',)},
    'timm.models.vgg': {'VGG': ('',)},
}


def default_places(model: nn.Module) -> Iterator[str]:
    """Yields the names of the modules that are followed by a gate, for every block of a known type in a model."""
    for name, module in model.named_modules():
        if isinstance(module, VGG):
            yield from _flat_places(_join(name, 'features'), module.features)
        elif (isinstance(module, (FeatureDictNet, FeatureHookNet))
              and isinstance(getattr(module, 'features_0', None), nn.Conv2d)):
            yield from _flat_places(name, module)  # a feature extractor of VGG
        elif name.rpartition('.')[2] != 'stem':  # RepVGG's is one of its blocks
            place = _place_in_block(name, module)
            if place is not None:
                yield place


def named_places(modules: Dict[str, nn.Module], where: Any) -> List[str]:
    """Returns the names of the modules that are followed by a gate, for the `where` of `add_attention`.

    Args:
        modules: Modules of the model by name.
        where: Names, wildcards or regular expressions, or one of these. Only '' is the model itself.

    Raises:
        ValueError: No module matches, or `where` is empty.
    """
    names: List[str] = []
    patterns = [where] if isinstance(where, (str, re.Pattern)) else list(where)
    if not patterns:
        raise ValueError(
            'where is empty. Give names of blocks, norm layers or convolutions, or leave it out for all blocks.')
    for pattern in patterns:
        matches = [
            name for name in modules
            if (fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern.fullmatch(name))
            and (name or pattern == '')]
        if not matches:
            text = pattern if isinstance(pattern, str) else pattern.pattern
            raise ValueError(f'No module of the model matches {text!r}.{did_you_mean(text, modules)}')
        names += [_place_in_block(name, modules[name]) or name for name in matches]
    return list(dict.fromkeys(names))


def _place_in_block(name: str, block: Any) -> Optional[str]:
    """Returns the name of the module that is followed by the gate of a block.

    Args:
        name: Name of the block in its model.
        block: Any module.

    Returns:
        The name in the model; None if the module is no block of a known type, or a single layer without a shortcut.
    """
    if type(block) is ConvBnAct and not block.has_skip:
        return None
    # of exactly this type: the branch of a subclass may end otherwise
    for path in BLOCK_TYPES.get(type(block).__module__, {}).get(type(block).__name__, ()):
        if not path:
            return name if not isinstance(block, VGG) else None
        try:
            found = _last_layer(block.get_submodule(path))
        except AttributeError:
            continue
        if found is not None:
            return _join(name, path, found)
    return None


def _last_layer(module: Any) -> Optional[str]:
    """Returns the path of the last norm layer or convolution in a chain of layers, '' for the module itself."""
    if isinstance(module, (ConvNormAct, nn.Sequential)):
        for name, child in reversed(list(module.named_children())):
            found = _last_layer(child)
            if found is not None:
                return _join(name, found)
        return None
    return '' if hasattr(module, 'weight') or type(module) is GhostModule else None


def _flat_places(name: str, model: nn.Module) -> Iterator[str]:
    """Yields the norm layer of every unit of a flat list of layers, or its convolution if it has none."""
    layers = list(model.named_children())
    for (index, layer), (next_index, follower) in zip(layers, layers[1:], strict=False):
        if isinstance(layer, nn.Conv2d):
            yield _join(name, index if isinstance(follower, nn.ReLU) else next_index)


def _join(*names: str) -> str:
    return '.'.join(filter(None, names))
