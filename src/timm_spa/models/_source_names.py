"""Names of published weights of plain models that differ from timm's: torchvision's and EfficientNet-PyTorch's."""
import re
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Tuple

import torch
from timm.models.efficientnet import EfficientNet

from .densenet import GatedDenseNet, rename_torchvision
from .efficientnet import GatedEfficientNet
from .vgg import GatedVGG

__all__ = ['SOURCE_NAMES', 'SourceNames']

Rules = List[Tuple[str, str]]
StateDict = Mapping[str, torch.Tensor]


class SourceNames(NamedTuple):
    """A naming scheme of published weights.

    Attributes:
        description: Description of the weights, for messages.
        applies: Returns whether a model can have weights with such names.
        rename: Maps tensors and a model to tensors under timm's names.
    """
    description: str
    applies: Callable[[Any], bool]
    rename: Callable[[StateDict, Any], Dict[str, torch.Tensor]]


# MobileNetV2 for ImageNet, laid out as torchvision's: feature 0 is the stem, 1 the block without expansion, 18 the head
_TORCHVISION_MOBILENETV2: Rules = [
    (r'^features\.0\.0\.', 'conv_stem.'),
    (r'^features\.0\.1\.', 'bn1.'),
    (r'^features\.18\.0\.', 'conv_head.'),
    (r'^features\.18\.1\.', 'bn2.'),
    (r'^classifier\.1\.', 'classifier.'),
    (r'^features\.1\.conv\.0\.0\.', 'features.1.conv_dw.'),
    (r'^features\.1\.conv\.0\.1\.', 'features.1.bn1.'),
    (r'^features\.1\.conv\.1\.', 'features.1.conv_pw.'),
    (r'^features\.1\.conv\.2\.', 'features.1.bn2.'),
    (r'\.conv\.0\.0\.', '.conv_pw.'),
    (r'\.conv\.0\.1\.', '.bn1.'),
    (r'\.conv\.1\.0\.', '.conv_dw.'),
    (r'\.conv\.1\.1\.', '.bn2.'),
    (r'\.conv\.2\.', '.conv_pwl.'),
    (r'\.conv\.3\.', '.bn3.'),
]

# VGG for ImageNet, of torchvision
_TORCHVISION_VGG: Rules = [
    (r'^classifier\.0\.', 'pre_logits.fc1.'),
    (r'^classifier\.3\.', 'pre_logits.fc2.'),
    (r'^classifier\.6\.', 'head.fc.'),
]

# EfficientNet-PyTorch (https://github.com/lukemelas/EfficientNet-PyTorch), and what shares its names
_EFFICIENTNET_RULES: Rules = [
    (r'^_conv_(stem|head)\.', r'conv_\1.'),
    (r'^_bn1\.', 'bn2.'),
    (r'^_bn0\.', 'bn1.'),
    (r'^_fc\.', 'classifier.'),
]
_EXPANDED_LAYERS: Rules = [
    ('_expand_conv', 'conv_pw'), ('_bn0', 'bn1'), ('_depthwise_conv', 'conv_dw'), ('_bn1', 'bn2'),
    ('_project_conv', 'conv_pwl'), ('_bn2', 'bn3')]
_SEPARABLE_LAYERS: Rules = [
    ('_depthwise_conv', 'conv_dw'), ('_bn1', 'bn1'), ('_project_conv', 'conv_pw'), ('_bn2', 'bn2')]


def renamed(name: str, rules: Rules) -> str:
    """Applies substitutions to a name, one after another."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _rename_torchvision(weights: StateDict, model: Any) -> Dict[str, torch.Tensor]:
    if isinstance(model, GatedDenseNet):
        return rename_torchvision(weights)
    own = model.state_dict()
    rules = [*_TORCHVISION_VGG]
    if isinstance(model, GatedEfficientNet):
        blocks = [(stage, i) for stage, blocks in enumerate(model.blocks) for i, _ in enumerate(blocks.children())]
        rules = [*_TORCHVISION_MOBILENETV2, *(
            (rf'^features\.{number}\.', f'blocks.{stage}.{i}.') for number, (stage, i) in enumerate(blocks, start=1))]
    named = {renamed(name, rules): tensor for name, tensor in weights.items()}
    return {  # some of torchvision's linear layers are convolutions in timm
        name: tensor.reshape(own[name].shape)
        if name in own and tensor.ndim == 2 and own[name].ndim == 4 and tensor.numel() == own[name].numel() else tensor
        for name, tensor in named.items()}


def _rename_efficientnet(weights: StateDict, model: Any) -> Dict[str, torch.Tensor]:
    """Renames weights of EfficientNet-PyTorch, such as '_blocks.0._bn1.weight'."""
    rules = [*_EFFICIENTNET_RULES]
    blocks = [(stage, i, block) for stage, blocks in enumerate(model.blocks) for i, block in enumerate(blocks)]
    for number, (stage, i, block) in enumerate(blocks):
        layers = _EXPANDED_LAYERS if hasattr(block, 'conv_pwl') else _SEPARABLE_LAYERS
        rules += [(rf'^_blocks\.{number}\.{theirs}\.', f'blocks.{stage}.{i}.{ours}.') for theirs, ours in layers]
    return {renamed(name, rules): tensor for name, tensor in weights.items()}


SOURCE_NAMES = (
    SourceNames(
        "the plain model under torchvision's names",
        lambda model: isinstance(model, (GatedDenseNet, GatedEfficientNet, GatedVGG)), _rename_torchvision),
    SourceNames(
        'the plain model under the names of EfficientNet-PyTorch',
        lambda model: isinstance(model, EfficientNet), _rename_efficientnet),
)
