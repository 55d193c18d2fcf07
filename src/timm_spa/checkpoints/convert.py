"""Conversion of weight files to safetensors files for a model."""
import dataclasses
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch

from .. import __version__
from .._errors import UsageError
from .._names import check_model_name
from .files import replacing
from .fit import Mismatch, compare_tensors, first_few
from .reading import CheckpointError, check_weights, no_hint, read_weights, write_tensors
from .run_arguments import as_json, config_of_folder, of_config, recorded_model, trained_with, untagged
from .warm_start import gate_weights, gated_modules, has_gates, warm_start

__all__ = ['DTYPES', 'KINDS', 'Conversion', 'convert']

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
# weights of the model itself, or of the plain model
KINDS = ('same', 'plain')
# usual names of classifiers, in timm, torchvision and EfficientNet-PyTorch
CLASSIFIERS = ('fc', '_fc', 'linear', 'classifier', 'classifier.1', 'classifier.6', 'head.fc', 'head')


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        kind: Kind of the source, one of `KINDS`.
        description: The kind in words.
        tensors: Number of tensors.
        size: Size of the written file in bytes.
        error: Largest difference between a value and how it is stored.
        error_in: Tensor with this difference; empty if every value is stored exactly.
    """
    kind: str
    description: str
    tensors: int
    size: int
    error: float
    error_in: str


def convert(
        source: Union[str, Path],
        output: Union[str, Path],
        model_name: Optional[str],
        gates: Mapping[str, Any],
        source_names: Sequence[Any],
        dtype: str = 'float32',
        kind: Optional[str] = None,
        overwrite: bool = False,
        with_classifier: bool = True,
        hint: Callable[[Mapping[str, torch.Tensor]], str] = no_hint,
        **kwargs: Any,
) -> Conversion:
    """Converts a weight file to a safetensors file. See `timm_spa.hub.convert.convert` for the other arguments.

    Args:
        gates: The table of gates, `timm_spa.models.GATES`.
        source_names: Other naming schemes of plain models, `timm_spa.models.SOURCE_NAMES`.
        hint: Returns a sentence about the model that tensors are of, for messages.

    Raises:
        CheckpointError: The source cannot be read or does not fit, a value is invalid, or `output` exists.
        RunError: args.yaml next to the source contradicts it, or its model is unknown and not given.
        UsageError: An argument is invalid.
    """
    output = Path(output)
    if output.suffix != '.safetensors':
        raise UsageError(f'output must end in .safetensors, got {output}.')
    if dtype not in DTYPES:
        raise UsageError(f'dtype must be one of {", ".join(DTYPES)}, got {dtype!r}.')
    if kind not in (None, *KINDS):
        raise UsageError(f'kind must be one of {", ".join(KINDS)}, got {kind!r}.')
    if model_name is not None:
        check_model_name(model_name, UsageError)
    if output.exists() and not overwrite:
        raise CheckpointError(f'{output} exists already. Add --overwrite to replace it.')
    weights = read_weights(source)
    if model_name is None:
        model_name = recorded_model(weights, Path(source), hint)
    num_classes = _count_classes(weights.state_dict, source) if with_classifier else 0
    args, named = trained_with(weights, Path(source))
    trained = weights.arch or args.get('model')
    config = config_of_folder(Path(source))
    if not trained and not args and config.get('architecture') == untagged(model_name):
        trained, named = model_name, of_config(config)
    if untagged(trained) == untagged(model_name):
        kwargs = {**named, **kwargs}
    elif 'in_chans' in named:
        kwargs.setdefault('in_chans', named['in_chans'])
    try:
        model = timm.create_model(model_name.partition('.')[0], num_classes=num_classes, **kwargs).eval()
    except Exception as e:  # timm raises several types for invalid arguments
        raise UsageError(f'{model_name} cannot be created with {kwargs}: {e}') from e
    recorded, requested = _described(trained, named), _described(model_name, kwargs)
    if trained and recorded != requested and has_gates(weights.state_dict, model):
        # another model may have the same names and shapes, and compute something else
        raise CheckpointError(
            f'{source} contains weights of {recorded}, not of {requested}. Convert it for that model.')
    state_dict = weights.state_dict if with_classifier else _without_classifier(weights.state_dict, model)
    converted, kind, description = _converted(state_dict, model, source, kind, gates, source_names, hint)
    check_weights(converted, model, source)
    stored, error, error_in = _stored(converted, DTYPES[dtype], dtype)
    metadata = dict(
        format='pt', model=model_name, timm_spa=__version__, source_sha256=weights.sha256, converted_from=kind)
    if weights.epoch is not None and kind == 'same':
        metadata['epoch'] = str(weights.epoch)
    metadata['model_args'] = as_json(kwargs)
    with replacing(output) as partial:
        write_tensors(partial, stored, metadata)
    if kind == 'plain' and next(gated_modules(model), None):
        description += ': a warm start, every gate is 1/2'
    return Conversion(kind, description, len(stored), output.stat().st_size, error, error_in)


def _converted(
        weights: Mapping[str, torch.Tensor],
        model: Any,
        source: Union[str, Path],
        kind: Optional[str],
        gates: Mapping[str, Any],
        source_names: Sequence[Any],
        hint: Callable[[Mapping[str, torch.Tensor]], str],
) -> Tuple[Dict[str, torch.Tensor], str, str]:
    """Returns the weights for the model, the kind of the source, and its description."""
    closest: Optional[Tuple[str, Mismatch]] = None
    for candidate, description, named in _candidates(weights, model, source_names):
        if kind not in (None, candidate):
            continue
        expected = model.state_dict() if candidate == 'same' else _without_gates(model)
        # old files lack these counters
        counters = {name: value for name, value in expected.items() if name.endswith('.num_batches_tracked')}
        completed = {**counters, **named}
        mismatch = compare_tensors(completed, expected)
        if not mismatch:
            return (completed if candidate == 'same' else warm_start(completed, model, gates)), candidate, description
        if closest is None or len(mismatch) < len(closest[1]):
            closest = description, mismatch
    assert closest is not None  # every model has a candidate of each kind
    raise CheckpointError(
        f'{source} does not fit {model.pretrained_cfg["architecture"]}. Compared with {closest[0]}, it has tensors '
        f'{closest[1]}. {hint(weights) or "Choose the model and the arguments that it was trained with."}')


def _candidates(
        weights: Mapping[str, torch.Tensor],
        model: Any,
        source_names: Sequence[Any],
) -> Iterator[Tuple[str, str, Mapping[str, torch.Tensor]]]:
    """Yields kind, description and weights under timm's names, for every kind of source that a model can have."""
    yield 'same', 'the model itself', weights
    yield 'plain', 'the plain model', weights
    for scheme in source_names:
        if scheme.applies(model):
            yield 'plain', scheme.description, scheme.rename(weights, model)


def _without_gates(model: Any) -> Dict[str, torch.Tensor]:
    gates = set(gate_weights(model))
    return {name: value for name, value in model.state_dict().items() if name not in gates}


def _described(name: Optional[str], kwargs: Mapping[str, Any]) -> str:
    return ' '.join([untagged(name), *(f'{key}={as_json(kwargs[key])}' for key in sorted(kwargs))])


def _count_classes(weights: Mapping[str, torch.Tensor], source: Union[str, Path]) -> int:
    for name in CLASSIFIERS:
        if f'{name}.weight' in weights and weights[f'{name}.weight'].ndim:
            return len(weights[f'{name}.weight'])
    raise CheckpointError(
        f'{source} has no classifier: expected one of {", ".join(CLASSIFIERS)}, got {first_few(list(weights), 4)}.')


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
