"""Names of the authors' checkpoints and those of this package.

The authors' repository (https://github.com/13952522076/SPANet_TMM) saves `.pth.tar` files of its own modules. The names
below are facts of that repository; the tensors are taken over unchanged, but for the pyramid weights, which it keeps in
five dimensions.
"""
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple, Union

import torch
import torch.nn as nn

from timm_spa.checkpoints.fit import compare_tensors
from timm_spa.checkpoints.reading import CheckpointError, read_checkpoint
from timm_spa.models import CifarVGG, GatedDenseNet, GatedEfficientNet, GatedPreActResNet, GatedResNet, GatedVGG
from timm_spa.models._source_names import _TORCHVISION_MOBILENETV2, _TORCHVISION_VGG, renamed

__all__ = ['ConversionError', 'convert_state_dict', 'rename_authors', 'reorder_authors']

ConversionError = CheckpointError  # one exception to catch for files and tensors that do not fit
Rules = List[Tuple[str, str]]

# names inside a block's attention; its attribute is called spa, SPA3, SPAB, SPAC, se, ...
_ATTN_RULES: Rules = [
    (r'\.(?:spa|SPA\w?|se)\.', '.attn.'),
    (r'\.attn\.weight$', '.attn.pyramid_weight'),
    (r'\.attn\.transform\.0\.', '.attn.fc1.'),
    (r'\.attn\.transform\.1\.', '.attn.bn.'),
    (r'\.attn\.transform\.3\.', '.attn.fc2.'),
    (r'\.attn\.fc\.0\.', '.attn.fc1.'),
    (r'\.attn\.fc\.2\.', '.attn.fc2.'),
    (r'\.attn\.matcher\.0\.', '.attn.matcher.fc1.'),
    (r'\.attn\.matcher\.1\.', '.attn.matcher.bn1.'),
    (r'\.attn\.matcher\.3\.', '.attn.matcher.fc2.'),
    (r'\.attn\.matcher\.4\.', '.attn.matcher.bn2.'),
]

# MobileNetV2 for CIFAR
_LAYERS_RULES: Rules = [
    (r'^conv1\.', 'conv_stem.'),
    (r'^conv2\.', 'conv_head.'),
    (r'^linear\.', 'classifier.'),
    (r'^(layers\.\d+)\.conv1\.', r'\1.conv_pw.'),
    (r'^(layers\.\d+)\.conv2\.', r'\1.conv_dw.'),
    (r'^(layers\.\d+)\.conv3\.', r'\1.conv_pwl.'),
]


# pre-activation ResNet for CIFAR
_PREACT_RULES: Rules = [
    (r'\.shortcut\.0\.', '.downsample.'),
    (r'^linear\.', 'fc.'),
]

# DenseNet for CIFAR
_DENSE_RULES: Rules = [
    (r'^conv1\.', 'features.conv0.'),
    (r'^bn\.', 'features.norm5.'),
    (r'^linear\.', 'classifier.'),
    (r'^trans(\d)\.bn\.', r'features.transition\1.norm.'),
    (r'^trans(\d)\.conv\.', r'features.transition\1.conv.'),
    (r'^(dense\d\.\d+)\.bn(\d)\.', r'\1.norm\2.'),
]

def convert_state_dict(checkpoint: Union[str, Path, Mapping[str, Any]], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Renames the weights of one of the authors' models to those of this package.

    Args:
        checkpoint: The authors' state dict, also inside a dict under 'state_dict' and with the 'module.' of a
            data-parallel model before each name; or a file of it, see `read_checkpoint`.
        model: The model of this package, with the same number of classes.

    Returns:
        Weights that `model.load_state_dict` takes strictly.

    Raises:
        ConversionError: There is no rule for the model, the file cannot be read, or a tensor is missing, unexpected
            or of another shape; the message names the tensors.
    """
    if isinstance(checkpoint, (str, Path)):
        checkpoint = read_checkpoint(checkpoint)
    weights = checkpoint.get('state_dict', checkpoint)
    if not isinstance(weights, Mapping) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ConversionError("The checkpoint is not a state dict, and holds none under 'state_dict'.")
    weights = {name.removeprefix('module.'): tensor for name, tensor in weights.items()}

    converted = rename_authors(weights, model)
    misfit = compare_tensors(converted, model.state_dict())
    if misfit:
        raise ConversionError(f'The checkpoint does not fit {type(model).__name__}; tensors {misfit}.')
    return reorder_authors(converted, model)


def rename_authors(weights: Mapping[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Renames weights of the authors' models, gated or plain, or of torchvision's, to our names and shapes."""
    rules = [*_rules_for(model, weights), *_ATTN_RULES]
    own = model.state_dict()
    converted = {}
    for name, tensor in weights.items():
        name = renamed(name, rules)
        if tensor.ndim == 5:
            tensor = tensor.reshape(-1)
        elif tensor.ndim == 2 and name in own and own[name].ndim == 4 and own[name].numel() == tensor.numel():
            tensor = tensor.reshape(own[name].shape)  # a linear layer of theirs that is a convolution of ours
        converted[name] = tensor
    return converted


def _rules_for(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Rules:
    if isinstance(model, GatedPreActResNet):
        return _PREACT_RULES
    if isinstance(model, CifarVGG):
        return _vgg_rules(model)
    if isinstance(model, GatedDenseNet):
        blocks = [(b, i) for b in range(1, 5) for i in range(len(getattr(model.features, f'denseblock{b}')))]
        return [*_DENSE_RULES, *(
            (rf'^dense{b}\.{i}\.', f'features.denseblock{b}.denselayer{i + 1}.') for b, i in blocks)]
    if isinstance(model, GatedResNet):
        return []  # timm and the authors both kept torchvision's names
    if isinstance(model, GatedVGG):
        return _TORCHVISION_VGG
    if isinstance(model, GatedEfficientNet):
        torchvision_layout = any(name.startswith('features.') for name in weights)
        rules, container, first = (
            (_TORCHVISION_MOBILENETV2, 'features', 1) if torchvision_layout else (_LAYERS_RULES, 'layers', 0))
        places = [(stage, i) for stage, blocks in enumerate(model.blocks) for i, _ in enumerate(blocks.children())]
        numbering = [
            (rf'^{container}\.{number}\.', f'blocks.{stage}.{i}.')
            for number, (stage, i) in enumerate(places, start=first)]
        return [*rules, *numbering]
    raise ConversionError(f'There are no rules to convert a checkpoint to a {type(model).__name__}.')


def _vgg_rules(model: CifarVGG) -> Rules:
    rules = [(r'^classifier\.', 'head.fc.')]
    block, unit = 1, 0
    for i, layer in enumerate(model.features):
        if isinstance(layer, nn.MaxPool2d):
            block, unit = block + 1, 0
        else:
            rules.append((rf'^vggblock{block}\.{unit}\.', f'features.{i}.'))
            unit += 1
    return rules


def reorder_authors(weights: Mapping[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Reorders the input channels of a DenseNet's layers: the authors concatenate new channels first, timm last."""
    out = dict(weights)
    if not isinstance(model, GatedDenseNet):
        return out

    def reorder(prefix: str, first: int, layers: int, growth: int) -> None:
        # the authors' channels are those of the last layer, ..., of the first layer, of the block's input
        parts = torch.arange(first + layers * growth).split([growth] * layers + [first])
        order = torch.cat(parts[::-1])
        for key in weights:
            if key.startswith(prefix) and weights[key].ndim:
                out[key] = weights[key][order] if weights[key].ndim == 1 else weights[key][:, order]

    for number in range(1, 5):
        block = getattr(model.features, f'denseblock{number}')
        name = f'features.denseblock{number}'
        growth = block['denselayer1'].conv2.out_channels
        first = block['denselayer1'].conv1.in_channels
        for i, layer in enumerate(block.values()):
            prefix = f'{name}.denselayer{i + 1}'
            reads_input = layer.attn.reads_block_input
            matched = f'{prefix}.attn.matcher.fc1.weight' in weights
            readers = ['norm1', 'conv1', *((['attn.matcher.fc1'] if matched else ['attn.fc1']) if reads_input else [])]
            for reader in readers:
                reorder(f'{prefix}.{reader}.', first, i, growth)
        readers = [f'features.transition{number}.norm.', f'features.transition{number}.conv.']
        for reader in readers if number < 4 else ['features.norm5.', 'classifier.weight']:
            reorder(reader, first, len(block), growth)
    return out
