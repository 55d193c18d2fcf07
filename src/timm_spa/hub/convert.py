"""Conversion of weights from elsewhere to a safetensors file of one of our models."""
import dataclasses
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.models.efficientnet import EfficientNet

from .. import __version__
from .._errors import UsageError
from .._names import check_model_name
from ..checkpoints.files import replacing
from ..checkpoints.fit import compare_tensors, first_few
from ..checkpoints.reading import CheckpointError, check_weights, read_weights, write_tensors
from ..checkpoints.run_arguments import as_json, trained_with, untagged
from ..checkpoints.warm_start import gate_weights, gated_modules, has_gates, warm_start
from ..layers import SpatialPyramidAttention
from ..models import GATES, GatedDenseNet, GatedEfficientNet, GatedVGG
from ..models.densenet import rename_torchvision
from .authors import rename_authors, rename_efficientnet, reorder_authors

__all__ = ['DTYPES', 'KINDS', 'Conversion', 'convert']

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
# what a file may be of
KINDS = ('same', 'plain', 'authors')
# layers that give out classes, in any of the layouts
CLASSIFIERS = ('fc', '_fc', 'linear', 'classifier', 'classifier.1', 'classifier.6', 'head.fc', 'head')


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        kind: What the source was of, one of `KINDS`.
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
        overwrite: bool = False,
        with_classifier: bool = True,
        **kwargs: Any,
) -> Conversion:
    """Converts a file of weights to a safetensors file for a model.

    Args:
        source: A file of torch.save or of safetensors: of the model itself, of timm's, torchvision's or
            EfficientNet-PyTorch's plain net, or of the authors' code.
        output: File to write, with the suffix .safetensors.
        model_name: Model that the file is for.
        dtype: How to store parameters, a key of `DTYPES`; the statistics of norm layers stay as they are.
        kind: What the source is of, one of `KINDS`; found out if None.
        overwrite: Replace `output` if it is there.
        with_classifier: Convert the classifier. If False, the source may have none, or one of any name.
        **kwargs: Further arguments of the model, e.g. `pyramid_sizes`.

    Returns:
        What was converted.

    Raises:
        CheckpointError: The source can't be read, is of none of these, or cannot be converted; a value is not finite,
            or too large for `dtype`; or `output` is there.
        RunError: args.yaml beside the source contradicts it.
        UsageError: An argument is none of those that are known.
    """
    output = Path(output)
    if output.suffix != '.safetensors':
        raise UsageError(f'The output should be a .safetensors file, and is {output}.')
    if dtype not in DTYPES:
        raise UsageError(f'dtype must be one of {", ".join(DTYPES)}, got {dtype!r}.')
    if kind not in (None, *KINDS):
        raise UsageError(f'The kind of the source must be one of {", ".join(KINDS)}, got {kind!r}.')
    check_model_name(model_name, UsageError)
    if output.exists() and not overwrite:
        raise CheckpointError(f'{output} is there already; --overwrite replaces it.')
    weights = read_weights(source)
    num_classes = _count_classes(weights.state_dict, source) if with_classifier else 0
    args, named = trained_with(weights, Path(source))
    trained = weights.arch or args.get('model')
    if 'in_chans' in named:  # every tensor of a model of any gate has it: no need to be told
        kwargs.setdefault('in_chans', named['in_chans'])
    try:
        model = timm.create_model(model_name.partition('.')[0], num_classes=num_classes, **kwargs).eval()
    except Exception as e:  # timm's, for arguments that are not the model's
        raise UsageError(f'{model_name} cannot be made with {kwargs}: {e}') from e
    said = _described(trained, named)
    wanted = _described(model_name, kwargs)
    if trained and said != wanted and has_gates(weights.state_dict, model):
        # another model may have the same names and shapes, and compute something else
        raise CheckpointError(f'{source} says that it is of {said}, and not of {wanted}.')
    state_dict = weights.state_dict if with_classifier else _without_classifier(weights.state_dict, model)
    converted, kind, description = _converted(state_dict, model, str(source), kind)
    check_weights(converted, model, source)
    stored, error, error_in = _stored(converted, DTYPES[dtype], dtype)
    metadata = dict(
        format='pt', model=model_name, timm_spa=__version__, source_sha256=weights.sha256, converted_from=kind)
    if weights.epoch is not None and kind == 'same':
        metadata['epoch'] = str(weights.epoch)
    metadata['model_args'] = as_json(kwargs)
    with replacing(output) as partial:
        write_tensors(partial, stored, metadata)
    if description.startswith('the plain net') and next(gated_modules(model), None):
        description += ': a warm start, every gate is 1/2'
    notes = _notes(description, model)
    return Conversion(kind, description, len(stored), output.stat().st_size, error, error_in, notes)


def _converted(
        weights: Mapping[str, torch.Tensor],
        model: Any,
        source: str,
        kind: Optional[str],
) -> Tuple[Dict[str, torch.Tensor], str, str]:
    """Returns the weights for the model, the kind of the source, and a description of it."""
    failures = {}
    for of_kind, description, read in _readings(weights, model):
        if kind in (None, of_kind):
            converted, misfit = read()
            if not misfit:
                return converted, of_kind, description
            failures[description] = misfit
    closest = min(failures, key=lambda description: _count(failures[description]))
    raise CheckpointError(
        f'{source} is of nothing that {model.pretrained_cfg["architecture"]} can be made of. Read as weights of '
        f'{closest}, it has tensors {failures[closest]}.')


def _readings(weights: Mapping[str, torch.Tensor], model: nn.Module) -> List[Tuple[str, str, Callable]]:
    """Returns the kinds of source: name, description, and a function that returns renamed weights and what is wrong."""
    def plain(named: Mapping[str, torch.Tensor]) -> Tuple[Dict[str, torch.Tensor], str]:
        fitted, misfit = _fitted(named, _without_gates(model))
        return ({}, misfit) if misfit else (warm_start(fitted, model, GATES), '')

    def authors(gated: bool) -> Tuple[Dict[str, torch.Tensor], str]:
        if has_gates(weights, model):
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

    return [
        ('same', 'the model itself', lambda: _fitted(weights, model.state_dict())),
        ('plain', 'the plain net', lambda: plain(weights)),
        ('plain', "the plain net under torchvision's names", lambda: plain(_rename_torchvision(weights, model))),
        ('plain', 'the plain net under the names of EfficientNet-PyTorch', efficientnet),
        ('authors', "the authors' code", lambda: authors(True)),
        ('authors', "the plain net of the authors' code", lambda: authors(False)),
    ]


def _count(misfit: str) -> float:
    """Returns the number of tensors in a message of `compare_tensors`, infinity for any other message."""
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
    return fitted, compare_tensors(fitted, own)


def _without_gates(model: nn.Module) -> Dict[str, torch.Tensor]:
    gates = set(gate_weights(model))
    return {name: value for name, value in model.state_dict().items() if name not in gates}


def _described(name: Optional[str], kwargs: Mapping[str, Any]) -> str:
    return ' '.join([untagged(name), *(f'{key}={as_json(kwargs[key])}' for key in sorted(kwargs))])


def _count_classes(weights: Mapping[str, torch.Tensor], source: Union[str, Path]) -> int:
    for name in CLASSIFIERS:
        if f'{name}.weight' in weights and weights[f'{name}.weight'].ndim:
            return len(weights[f'{name}.weight'])
    raise CheckpointError(
        f'{source} has no classifier: none of {", ".join(CLASSIFIERS)} is in it, but '
        f'{first_few(list(weights), 4)}.')


def _without_classifier(weights: Mapping[str, torch.Tensor], model: Any) -> Dict[str, torch.Tensor]:
    """Leaves out the head that a model without classes lacks, by timm's name of its classifier or a usual one."""
    given = model.pretrained_cfg.get('classifier') or ()
    layers = [*CLASSIFIERS, *((given,) if isinstance(given, str) else given)]
    heads = tuple(f'{name.rpartition(".")[0] or name}.' for name in layers[len(CLASSIFIERS):])  # with its norm layer
    own = model.state_dict()
    return {
        name: tensor for name, tensor in weights.items()
        if name in own or not (name.rpartition('.')[0] in layers or name.startswith(heads))}


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
        # statistics take little room, and running variances many sizes
        keeps = not tensor.is_floating_point() or name.endswith(('.running_mean', '.running_var'))
        stored[name] = tensor.to(tensor.dtype if keeps else dtype)
        if not stored[name].isfinite().all():
            too_large.append(f'{name} ({tensor.abs().max().item():g})')
        elif tensor.numel():
            errors[name] = (stored[name].double() - tensor.double()).abs().max().item()
    if too_large:
        raise CheckpointError(
            f'{len(too_large)} tensors have values beyond the largest of {dtype_name}, {torch.finfo(dtype).max:g}: '
            f'{first_few(too_large)}. Store them as bfloat16 or float32.')
    error_in = max(errors, key=lambda name: errors[name])
    return stored, errors[error_in], error_in


def _notes(description: str, model: nn.Module) -> List[str]:
    sizes = {tuple(m.pyramid_sizes) for m in model.modules() if isinstance(m, SpatialPyramidAttention)}
    if description != "the authors' code" or not sizes:
        return []
    said = ' and '.join(str(s) for s in sorted(sizes))
    return [f'Their files do not say the sizes of the pyramid: these are taken to be {said} (pyramid_sizes).']
