"""Conversion of weights from elsewhere to a safetensors file of one of our models."""
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import safetensors.torch
import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from timm.models.efficientnet import EfficientNet

from .. import __version__
from .._errors import UsageError
from .._files import replacing
from ..layers import SpatialPyramidAttention
from ..models import GatedDenseNet, GatedEfficientNet, GatedVGG
from ..models._pretrained import misfits, shortened
from ..models._warm_start import gated_modules, warm_start
from ..models.densenet import rename_torchvision
from .authors import rename_authors, rename_efficientnet, reorder_authors
from .checkpoint import CheckpointError, Weights, check_weights, read_weights
from .variants import convert_variant

__all__ = ['DTYPES', 'KINDS', 'Conversion', 'convert']

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
# what a file may be of, in the order in which it is tried
KINDS = {
    'same': 'the model itself',
    'plain': 'the plain net: a warm start, every gate is 1/2',
    'torchvision': "the plain net under torchvision's names: a warm start, every gate is 1/2",
    'efficientnet-pytorch': 'the plain net under the names of EfficientNet-PyTorch: a warm start, every gate is 1/2',
    'authors': "the authors' code",
    'authors-plain': "the plain net of the authors' code: a warm start, every gate is 1/2",
    'variant': 'the same net with another gate',
}
# layers that give out classes, in any of the layouts
CLASSIFIERS = ('fc', '_fc', 'linear', 'classifier', 'classifier.1', 'classifier.6', 'head.fc', 'head')


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        kind: What the source was of, a key of `KINDS`.
        description: The same in words.
        tensors: Number of tensors.
        size: Size of the written file in bytes.
        error: Largest difference between a value and how it is stored.
        error_in: Tensor that has it; empty if every value is stored exactly.
        notes: Remarks for the reader, a line each.
    """
    kind: str
    description: str
    tensors: int
    size: int
    error: float
    error_in: str
    notes: List[str]


def convert(
        source: Union[str, Path],
        output: Union[str, Path],
        model_name: str,
        dtype: str = 'float32',
        kind: Optional[str] = None,
        source_model: Optional[str] = None,
        overwrite: bool = False,
        **kwargs: Any,
) -> Conversion:
    """Converts a file of weights to a safetensors file for a model.

    Args:
        source: A file of torch.save or of safetensors: of the model itself, of timm's, torchvision's or
            EfficientNet-PyTorch's plain net, of the authors' code, or of the same net with another gate, if the gates
            can compute the same.
        output: File to write, '*.safetensors'.
        model_name: Model that the file is for.
        dtype: How to store values, a key of `DTYPES`.
        kind: What the source is of, a key of `KINDS`; found out if None.
        source_model: Model that the source is of, for 'variant', if the file does not say it.
        overwrite: Replace `output` if it is there.
        **kwargs: Further arguments of the model, e.g. `pyramid_sizes`.

    Returns:
        What was converted.

    Raises:
        CheckpointError: The source can't be read, is of none of these, or cannot be converted; a value is not finite,
            or too large for `dtype`; or `output` is there.
        UsageError: An argument is none of those that are known.
    """
    output = Path(output)
    if output.suffix != '.safetensors':
        raise UsageError(f'The output should be a .safetensors file, and is {output}.')
    if dtype not in DTYPES:
        raise UsageError(f'dtype must be one of {", ".join(DTYPES)}, got {dtype!r}.')
    if kind not in (None, *KINDS):
        raise UsageError(f'The kind of the source must be one of {", ".join(KINDS)}, got {kind!r}.')
    if not timm.is_model(model_name.partition('.')[0]):
        raise UsageError(f'There is no model {model_name!r}.')
    if output.exists() and not overwrite:
        raise CheckpointError(f'{output} is there already; --overwrite replaces it.')
    weights = read_weights(source)
    num_classes = _count_classes(weights.state_dict, source)
    try:
        model = timm.create_model(model_name.partition('.')[0], num_classes=num_classes, **kwargs).eval()
    except Exception as e:  # timm's, for arguments that are not the model's
        raise UsageError(f'{model_name} cannot be made with {kwargs}: {e}') from e
    name, origin_kwargs = _origin(source, weights)
    origin = (source_model or name, origin_kwargs)
    # another model may have the names and shapes of this one
    known_other = origin[0] is not None and _said(*origin) != _said(model_name.partition('.')[0], kwargs)
    converted, kind = _converted(weights.state_dict, model, str(source), kind, origin, known_other)
    check_weights(converted, model, source)
    stored, error, error_in = _stored(converted, DTYPES[dtype], dtype)
    metadata = dict(
        format='pt', model=model_name, timm_spa=__version__, source_sha256=weights.sha256, converted_from=kind)
    if weights.epoch is not None and kind == 'same':
        metadata['epoch'] = str(weights.epoch)
    if kwargs:
        metadata['model_args'] = json.dumps(kwargs)
    with replacing(output) as partial:
        safetensors.torch.save_file(stored, partial, metadata=metadata)
    description = KINDS[kind] if next(gated_modules(model), None) else KINDS[kind].partition(':')[0]
    return Conversion(
        kind, description, len(stored), output.stat().st_size, error, error_in, _notes(kind, model))


def _converted(
        weights: Mapping[str, torch.Tensor],
        model: Any,
        source: str,
        kind: Optional[str],
        origin: Tuple[Optional[str], Dict[str, Any]],
        known_other: bool,
) -> Tuple[Dict[str, torch.Tensor], str]:
    """Returns the weights for the model, and what they were of."""
    architecture = model.pretrained_cfg['architecture']
    failures = {}
    for name, read in _readings(weights, model).items():
        if kind not in (None, name) or (kind is None and name == 'same' and known_other and _has_gates(weights)):
            continue
        converted, misfit = read()
        if not misfit:
            return converted, name
        failures[name] = misfit
    if kind in (None, 'variant'):
        outside = {name: tensor for name, tensor in weights.items() if '.attn.' not in name}
        failures['variant'] = _fitted(outside, _without_gates(model))[1]
        if _has_gates(weights) and not failures['variant']:
            if origin[0] is None:
                raise CheckpointError(
                    f'{source} is of the same net as {architecture}, and has other gates. Say of which model it is '
                    '(--from-model NAME), so that the gates can be compared.')
            return _from_variant(weights, model, source, *origin), 'variant'
    closest = min((name for name in failures if failures[name]), key=lambda name: _count(failures[name]), default=None)
    if closest is None:
        raise CheckpointError(f'{source} has no gates: it is of no variant of {architecture}.')
    raise CheckpointError(
        f'{source} is of nothing that {architecture} can be made of. Read as weights of {KINDS[closest]}, it has '
        f'tensors {failures[closest]}.')


Reading = Callable[[], Tuple[Dict[str, torch.Tensor], str]]


def _readings(weights: Mapping[str, torch.Tensor], model: nn.Module) -> Dict[str, Reading]:
    """Returns for each kind what gives the weights under our names, and what does not fit."""
    def same() -> Tuple[Dict[str, torch.Tensor], str]:
        return _fitted(weights, model.state_dict())

    def plain(named: Mapping[str, torch.Tensor]) -> Tuple[Dict[str, torch.Tensor], str]:
        fitted, misfit = _fitted(named, _without_gates(model))
        if misfit:
            return {}, misfit
        try:
            return warm_start(fitted, model), ''
        except ValueError as e:  # its gate cannot be neutral
            raise CheckpointError(str(e)) from e

    def authors(gated: bool) -> Tuple[Dict[str, torch.Tensor], str]:
        if _has_gates(weights):
            return {}, 'under the names of this package'
        try:
            named = rename_authors(weights, model)
        except CheckpointError as e:
            return {}, str(e)
        fitted, misfit = _fitted(named, model.state_dict() if gated else _without_gates(model))
        if misfit:
            return {}, misfit
        ordered = reorder_authors(fitted, model)
        return (ordered, '') if gated else plain(ordered)

    def efficientnet() -> Tuple[Dict[str, torch.Tensor], str]:
        if not isinstance(model, EfficientNet):
            return {}, 'of an EfficientNet'
        return plain(rename_efficientnet(weights, model))

    return {
        'same': same,
        'plain': lambda: plain(weights),
        'torchvision': lambda: plain(_rename_torchvision(weights, model)),
        'efficientnet-pytorch': efficientnet,
        'authors': lambda: authors(True),
        'authors-plain': lambda: authors(False),
    }


def _count(misfit: str) -> float:
    """Adds up the tensors of a message of `misfits`; a message of another kind is of all of them."""
    return sum(map(int, re.findall(r'(?:^|; )(\d+) ', misfit))) or float('inf')


def _rename_torchvision(weights: Mapping[str, torch.Tensor], model: nn.Module) -> Mapping[str, torch.Tensor]:
    if isinstance(model, GatedDenseNet):
        return rename_torchvision(weights)
    if isinstance(model, (GatedEfficientNet, GatedVGG)) and any(name.startswith('features.') for name in weights):
        return rename_authors(weights, model)
    return weights


def _fitted(
        named: Mapping[str, torch.Tensor],
        own: Mapping[str, torch.Tensor],
) -> Tuple[Dict[str, torch.Tensor], str]:
    """Adds the counters that old files lack, and says what else does not fit."""
    counters = {name: value for name, value in own.items() if name.endswith('.num_batches_tracked')}
    fitted = {**counters, **named}
    return fitted, misfits(fitted, own)


def _without_gates(model: nn.Module) -> Dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if '.attn.' not in name}


def _has_gates(weights: Mapping[str, torch.Tensor]) -> bool:
    return any('.attn.' in name for name in weights)


def _from_variant(
        weights: Mapping[str, torch.Tensor],
        model: Any,
        source: str,
        name: Optional[str],
        kwargs: Dict[str, Any],
) -> Dict[str, torch.Tensor]:
    if not timm.is_model(name or ''):
        raise CheckpointError(f'{source} is said to be of {name!r}, and there is no model of this name.')
    other = timm.create_model(name, num_classes=model.num_classes, **kwargs).eval()
    check_weights(_fitted(weights, other.state_dict())[0], other, source)
    try:
        return convert_variant(other, model)
    except CheckpointError as e:
        raise CheckpointError(f'{source} is of {name}. {e}') from None


def _origin(source: Union[str, Path], weights: Weights) -> Tuple[Optional[str], Dict[str, Any]]:
    """Returns the model and its arguments that the file says it is of."""
    if weights.arch:
        return weights.arch.partition('.')[0], dict(weights.args.get('model_kwargs') or {})
    try:
        with safe_open(source, 'pt') as f:
            metadata = f.metadata() or {}
    except SafetensorError:  # a file of torch.save
        return None, {}
    name = metadata.get('model', '').partition('.')[0]
    return name or None, json.loads(metadata.get('model_args', '{}'))


def _said(name: Optional[str], kwargs: Mapping[str, Any]) -> str:
    return json.dumps([name, kwargs], sort_keys=True)


def _count_classes(weights: Mapping[str, torch.Tensor], source: Union[str, Path]) -> int:
    for name in CLASSIFIERS:
        if f'{name}.weight' in weights:
            return len(weights[f'{name}.weight'])
    raise CheckpointError(
        f'{source} has no classifier: none of {", ".join(CLASSIFIERS)} is in it, but '
        f'{shortened(list(weights), 4)}.')


def _stored(
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        dtype_name: str,
) -> Tuple[Dict[str, torch.Tensor], float, str]:
    """Returns the tensors as they are stored, the largest error and the tensor that has it."""
    stored, errors = {}, {'': 0.0}
    too_large = []
    for name, tensor in weights.items():
        tensor = tensor.detach()
        stored[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous().clone()
        if not stored[name].isfinite().all():
            too_large.append(f'{name} ({tensor.abs().max().item():g})')
        elif tensor.numel():
            errors[name] = (stored[name].double() - tensor.double()).abs().max().item()
    if too_large:
        raise CheckpointError(
            f'{len(too_large)} tensors have values beyond the largest of {dtype_name}, {torch.finfo(dtype).max:g}: '
            f'{shortened(too_large)}. Store them as bfloat16 or float32.')
    error_in = max(errors, key=lambda name: errors[name])
    return stored, errors[error_in], error_in


def _notes(kind: str, model: nn.Module) -> List[str]:
    sizes = {tuple(m.pyramid_sizes) for m in model.modules() if isinstance(m, SpatialPyramidAttention)}
    if kind != 'authors' or not sizes:
        return []
    said = ' and '.join(str(s) for s in sorted(sizes))
    return [f'Their files do not say the sizes of the pyramid: these are taken to be {said} (pyramid_sizes).']
