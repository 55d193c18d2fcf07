"""A model as its training recorded it: two nets may have the same tensors, and compute something else."""
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg

from .config_file import config_problems
from .files import ReadError, read_text
from .reading import Weights
from .run_files import NUMBER, RunError, checked, read_mapping

__all__ = [
    'as_json', 'config_beside', 'model_arguments', 'preprocessing', 'read_arguments', 'recorded_model', 'trained_with',
    'untagged']

# of args.yaml those that a card or a configuration is made of; there may be others
ARGUMENTS: Dict[str, Any] = dict(
    model=str, model_kwargs=dict, num_classes=int, in_chans=int, img_size=int, input_size=[int], gp=str, bn_eps=NUMBER,
    mean=[NUMBER], std=[NUMBER], interpolation=str, crop_pct=NUMBER, seed=int, dataset=str, val_split=str)
# arguments of timm's train.py that pictures must be prepared with as in training
PREPROCESSING = ('mean', 'std', 'interpolation', 'crop_pct')


def read_arguments(folder: Path) -> Dict[str, Any]:
    """Reads args.yaml of a folder, if it has one; raises a RunError for what it should not hold."""
    return checked(read_mapping(folder / 'args.yaml'), ARGUMENTS, folder / 'args.yaml')


def untagged(name: Any) -> str:
    """Returns the architecture of a model's name; nothing for None."""
    return str(name or '').partition('.')[0]


def model_arguments(args: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the arguments of `timm.create_model`, but for the number of classes, in those of a training."""
    named = dict(in_chans=args.get('in_chans'), global_pool=args.get('gp'), bn_eps=args.get('bn_eps'))
    return {**{key: value for key, value in named.items() if value is not None}, **(args.get('model_kwargs') or {})}


def preprocessing(args: Mapping[str, Any], architecture: str) -> Dict[str, Any]:
    """Returns the fields of a pretrained_cfg that say how a training prepared its pictures."""
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


def trained_with(
        weights: Weights,
        checkpoint: Path,
        model_name: str = '',
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Finds out how the model of a file of weights was made.

    Args:
        weights: The weights.
        checkpoint: Their file; args.yaml beside it is of the same training.
        model_name: Model that they are to be of; '' for any.

    Returns:
        The arguments of the training, of args.yaml or else of the file, and those of `timm.create_model` but for the
        number of classes; empty if they are not known.

    Raises:
        RunError: File and args.yaml contradict each other in what the model is, or the weights are of another model.
    """
    own, beside = checked(weights.args, ARGUMENTS, checkpoint), read_arguments(checkpoint.parent)
    said = [(str(checkpoint), weights.arch), (f'args.yaml in {checkpoint.parent}', beside.get('model'))]
    for source, model in said:
        if model and model_name and untagged(model) != untagged(model_name):
            raise RunError(f'{source} names the model {untagged(model)}, and not {untagged(model_name)}.')
    of_file = model_arguments(own) if own else weights.model_args
    of_run = model_arguments(beside) if beside else None
    if of_file is not None and of_run is not None and as_json(of_file) != as_json(of_run):
        raise RunError(
            f'{checkpoint} was trained with the model arguments {of_file}, and args.yaml beside it has {of_run}: it is '
            'of another run. Move one of them to a folder of its own.')
    return beside or own, of_run or of_file or {}


def config_beside(checkpoint: Path) -> Dict[str, Any]:
    """Reads config.json next to a checkpoint, as a repository of the Hub has it; empty if it describes no model."""
    try:
        config = json.loads(read_text(checkpoint.parent / 'config.json'))
    except (ReadError, ValueError, RecursionError):
        return {}
    return {} if config_problems(config) else config


def recorded_model(weights: Weights, checkpoint: Path) -> str:
    """Returns the architecture that a file of weights names, or args.yaml or config.json next to it.

    Raises:
        RunError: None of them names a model of timm, or they name several.
    """
    folder = checkpoint.parent
    said = [
        (str(checkpoint), weights.arch), (str(checkpoint), weights.args.get('model')),
        (f'args.yaml in {folder}', read_arguments(folder).get('model')),
        (f'config.json in {folder}', config_beside(checkpoint).get('architecture'))]
    found = {source: untagged(model) for source, model in reversed(said) if model}
    known = {source: model for source, model in found.items() if timm.is_model(model)}
    if len(set(known.values())) > 1:
        raise RunError(
            f'{checkpoint} may be of several models: {_listed(known)}. Name the right one with --model, or move the '
            'files of the others to another folder.')
    if not known:
        unknown = f' ({_listed(found)}, which timm does not have)' if found else ''
        raise RunError(
            f'{checkpoint} does not say which model its weights are of, and neither does an args.yaml or a config.json '
            f'next to it{unknown}. Name the model with --model.')
    return next(iter(known.values()))


def _listed(models: Mapping[str, str]) -> str:
    names: List[str] = [f'{source} names {model}' for source, model in models.items()]
    return ', '.join(names)


def as_json(kwargs: Mapping[str, Any]) -> str:
    """Returns arguments as text that can be compared and stored."""
    return json.dumps(kwargs, sort_keys=True, default=str)
