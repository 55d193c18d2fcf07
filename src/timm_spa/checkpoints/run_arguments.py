"""Recover the model arguments from a training run.

They are needed because two models with the same tensors can compute different functions.
"""
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg

from .config_file import NOT_OF_A_MODEL, config_problems
from .files import ReadError, read_text
from .reading import Weights, no_hint
from .run_files import NUMBER, RunError, checked, read_mapping

__all__ = [
    'Recorded', 'as_json', 'config_of_folder', 'configured_preprocessing', 'model_arguments', 'of_config',
    'preprocessing', 'read_arguments', 'recorded_model', 'recorded_with', 'trained_with', 'untagged']

# the keys of args.yaml that are read, with their types
ARGUMENTS: Dict[str, Any] = dict(
    model=str, model_kwargs=dict, num_classes=int, in_chans=int, img_size=int, input_size=[int], gp=str, bn_eps=NUMBER,
    mean=[NUMBER], std=[NUMBER], interpolation=str, crop_pct=NUMBER, seed=int, dataset=str, val_split=str)
# arguments of timm's train.py that prepare images
PREPROCESSING = ('mean', 'std', 'interpolation', 'crop_pct')
# fields of config.json that do so
CONFIGURED = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


def read_arguments(folder: Path) -> Dict[str, Any]:
    """Reads args.yaml of a folder, if it has one; raises a RunError for what it should not hold."""
    return checked(read_mapping(folder / 'args.yaml'), ARGUMENTS, folder / 'args.yaml')


def untagged(name: Any) -> str:
    """Returns the architecture in a model's name, '' for None."""
    return str(name or '').partition('.')[0]


def model_arguments(args: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the arguments of `timm.create_model`, except the number of classes, from those of a training."""
    named = dict(in_chans=args.get('in_chans'), global_pool=args.get('gp'), bn_eps=args.get('bn_eps'))
    return {**{key: value for key, value in named.items() if value is not None}, **(args.get('model_kwargs') or {})}


def preprocessing(args: Mapping[str, Any], architecture: str) -> Dict[str, Any]:
    """Returns the fields of a pretrained_cfg that describe how a training prepared its images."""
    found: Dict[str, Any] = {
        key: tuple(args[key]) if isinstance(args[key], list) else args[key] for key in PREPROCESSING if args.get(key)}
    cfg = get_pretrained_cfg(architecture) or PretrainedCfg()
    channels, size = args.get('in_chans') or cfg.input_size[0], args.get('img_size')
    if args.get('input_size') or size:
        found['input_size'] = tuple(args.get('input_size') or (channels, size, size))
    elif channels != cfg.input_size[0]:
        found['input_size'] = (channels, *cfg.input_size[1:])
    for key in ('mean', 'std'):
        values = found.get(key) or getattr(cfg, key)
        if channels == 1 and len(values) > 1:  # as timm has it for the weights of the first convolution
            found[key] = (sum(values) / len(values),)
    return found


def configured_preprocessing(config: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the fields of the pretrained_cfg in a config.json that describe how images are prepared."""
    cfg = config.get('pretrained_cfg') or {}
    return {
        key: tuple(cfg[key]) if isinstance(cfg[key], list) else cfg[key]
        for key in CONFIGURED if cfg.get(key) is not None}


def trained_with(
        weights: Weights,
        checkpoint: Path,
        model_name: str = '',
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Recovers the arguments of the model in a weight file.

    Args:
        weights: The weights.
        checkpoint: The weight file. An args.yaml in the same folder belongs to the same training.
        model_name: Expected model; '' for any.

    Returns:
        The arguments of the training, from args.yaml or else from the file, and those of `timm.create_model` except
        the number of classes. Both are empty if unknown.

    Raises:
        RunError: File and args.yaml name different models, or the weights belong to another model.
    """
    own, recorded = checked(weights.args, ARGUMENTS, checkpoint), read_arguments(checkpoint.parent)
    names = [(str(checkpoint), weights.arch), (f'args.yaml in {checkpoint.parent}', recorded.get('model'))]
    for source, model in names:
        if model and model_name and untagged(model) != untagged(model_name):
            raise RunError(
                f'{source} names the model {untagged(model)}, expected {untagged(model_name)}. Choose the model with '
                '--model.')
    file_args = model_arguments(own) if own else weights.model_args
    run_args = model_arguments(recorded) if recorded else None
    for origin, kwargs in ((checkpoint, file_args), (f'args.yaml in {checkpoint.parent}', run_args)):
        forbidden = [key for key in NOT_OF_A_MODEL if key in (kwargs or {})]
        if forbidden:  # timm would read another file, or load other weights
            raise RunError(
                f'{origin} has the model arguments {", ".join(forbidden)}, which are not arguments of a model. Remove '
                'them.')
    if file_args is not None and run_args is not None and as_json(file_args) != as_json(run_args):
        raise RunError(
            f'{checkpoint} was trained with the model arguments {file_args}, but args.yaml in the same folder has '
            f'{run_args}. The files belong to different runs: move one of them to another folder.')
    return recorded or own, run_args or file_args or {}


def config_of_folder(checkpoint: Path) -> Dict[str, Any]:
    """Reads config.json next to a checkpoint, as a repository of the Hub has it; empty if it describes no model."""
    try:
        config = json.loads(read_text(checkpoint.parent / 'config.json'))
    except (ReadError, ValueError, RecursionError):
        return {}
    return {} if config_problems(config) else config


class Recorded(NamedTuple):
    """What a weight file and the files in its folder say about its model.

    Attributes:
        name: Name of the model.
        args: Arguments of the training, from args.yaml or the file; empty if unknown.
        model_args: Arguments of `timm.create_model`, except the number of classes.
        config: config.json in the folder, if it describes this model; else empty.
        num_classes: Number of classes, if recorded.
    """
    name: str
    args: Dict[str, Any]
    model_args: Dict[str, Any]
    config: Dict[str, Any]
    num_classes: Optional[int]


def recorded_with(
        weights: Weights,
        checkpoint: Path,
        name: Optional[str] = None,
        model_kwargs: Optional[Mapping[str, Any]] = None,
        hint: Callable[[Mapping[str, Any]], str] = no_hint,
) -> Recorded:
    """Recovers the model of a weight file, from the file and from args.yaml and config.json in the same folder.

    Args:
        weights: The weights.
        checkpoint: The weight file.
        name: Name of the model; None for the recorded one.
        model_kwargs: Arguments of the model that are not recorded.
        hint: Returns a sentence about the model that tensors are of, for the message.

    Returns:
        Name and arguments.

    Raises:
        RunError: The model is unknown or another one, or `model_kwargs` contradict the record.
    """
    config = config_of_folder(checkpoint)
    if name is None:
        name = recorded_model(weights, checkpoint, hint)
    args, model_args = trained_with(weights, checkpoint, name if ':' not in name else '')
    if config.get('architecture') != untagged(name):
        config = {}  # describes other weights
    is_known = bool(args) or weights.model_args is not None
    if not is_known and config:
        is_known, model_args = True, of_config(config)
    given = dict(model_kwargs or {})
    if is_known and any(key not in model_args or as_json(model_args[key]) != as_json(given[key]) for key in given):
        # another model may have the same names and shapes, and compute something else
        raise RunError(
            f'{checkpoint} contains weights of {untagged(name)} with the arguments {as_json(model_args)}, but '
            f'--model-kwargs has {as_json(given)}. Leave out --model-kwargs, or choose another file.')
    return Recorded(
        name, args, {**given, **model_args}, config, args.get('num_classes') or config.get('num_classes'))


def of_config(config: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the arguments of the model in a config.json, except the number of classes."""
    return {key: value for key, value in (config.get('model_args') or {}).items() if key != 'num_classes'}


def recorded_model(
        weights: Weights,
        checkpoint: Path,
        hint: Callable[[Mapping[str, Any]], str] = no_hint,
) -> str:
    """Returns the architecture named by a weight file, or by args.yaml or config.json in the same folder.

    Raises:
        RunError: No model of timm is named, or several are.
    """
    folder = checkpoint.parent
    names = [
        (str(checkpoint), weights.arch), (str(checkpoint), weights.args.get('model')),
        (f'args.yaml in {folder}', read_arguments(folder).get('model')),
        (f'config.json in {folder}', config_of_folder(checkpoint).get('architecture'))]
    recorded = {source: untagged(model) for source, model in reversed(names) if model}
    known = {source: model for source, model in recorded.items() if timm.is_model(model)}
    if len(set(known.values())) > 1:
        raise RunError(
            f'The model of {checkpoint} is ambiguous: {_listed(known)}. Choose one with --model, or move the files of '
            'the others to another folder.')
    if not known:
        unknown = f' ({_listed(recorded)}, unknown to timm)' if recorded else ''
        raise RunError(
            f'The model of {checkpoint} is unknown: neither the file nor args.yaml or config.json in the same folder '
            f'names it{unknown}. {hint(weights.state_dict) or "Choose it with --model."}')
    return next(iter(known.values()))


def _listed(models: Mapping[str, str]) -> str:
    names: List[str] = [f'{source} names {model}' for source, model in models.items()]
    return ', '.join(names)


def as_json(kwargs: Any) -> str:
    """Returns arguments as text, for comparison and storage."""
    return json.dumps(kwargs, sort_keys=True, default=str)
