"""Checks of single arguments of timm's scripts: files, devices and models, each with one message."""
import glob
import os
from pathlib import Path
from typing import Any, List, Optional

import timm.models
import torch
import yaml

from .._errors import TimmSpaError, UsageError
from .._names import check_model_name
from .._shipped import shipped_files
from ..checkpoints.files import ReadError, read_text
from ..checkpoints.fit import first_few
from ..checkpoints.reading import read_weights

__all__ = [
    'FILE_OPTIONS', 'ScriptError', 'cause_of', 'check_class_map', 'check_config', 'check_device', 'check_file',
    'check_model', 'check_output', 'check_writable', 'checkpoints_in', 'outputs_of', 'valid_labels']

# options that name a file to read
FILE_OPTIONS = ('checkpoint', 'resume', 'initial_checkpoint', 'pretrained_path', 'real_labels', 'valid_labels')


class ScriptError(TimmSpaError, RuntimeError):
    """One of timm's scripts cannot be run or cannot continue."""


def _option(name: str) -> str:
    return f'--{name.replace("_", "-")}'


def cause_of(error: Exception) -> str:
    """Returns the text of an error in one line."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text.rstrip('.') if len(text) < 400 else f'{text[:400]} ...'


def valid_labels(path: str, outputs: int) -> List[int]:
    """Reads the outputs of a model that validate.py compares with the class folders."""
    try:
        labels = [int(line) for line in read_text(path).splitlines()]
    except (ReadError, ValueError) as e:
        raise UsageError(f'--valid-labels {path} must hold one number a line: {cause_of(e)}.') from e
    if not all(0 <= label < outputs for label in labels):
        raise UsageError(
            f'--valid-labels {path} has numbers up to {max(labels)}, and the outputs of the model are 0 to '
            f'{outputs - 1}. Remove the others.')
    return labels


def outputs_of(path: str, model_name: str) -> Optional[int]:
    """Returns the number of outputs of the model of a checkpoint, None if the file does not say it."""
    weights = read_weights(path)
    classifier = getattr(timm.models.get_pretrained_cfg(model_name), 'classifier', None)
    tensor = weights.state_dict.get(f'{classifier}.weight')
    return len(tensor) if tensor is not None and tensor.ndim else weights.args.get('num_classes')


def checkpoints_in(folder: str) -> List[str]:
    """Returns the checkpoints that validate.py takes of a folder."""
    return sorted(glob.glob(f'{glob.escape(folder)}/*.pth.tar') + glob.glob(f'{glob.escape(folder)}/*.pth'))


def check_model(name: str, script: str) -> None:
    """Refuses a model that timm does not have."""
    if script in ('validate', 'benchmark') and (
            name == 'all' or os.path.isfile(name) or timm.models.list_models(name)):  # lists and patterns of models
        return
    check_model_name(name, ScriptError)


def check_file(option: str, path: str, script: str) -> None:
    """Refuses a file that does not exist."""
    if option == 'checkpoint' and script == 'validate' and os.path.isdir(path):
        if not checkpoints_in(path):
            raise UsageError(f'--checkpoint {path} is a folder without a file *.pth.tar or *.pth. Name a checkpoint.')
        return
    if os.path.isfile(path) or (option, path) == ('resume', 'auto'):
        return
    cause = 'is a folder' if os.path.isdir(path) else 'does not exist'
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    names = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    nearby = f' The files in {folder.resolve()} are {first_few(names)}.' if names else ''
    raise UsageError(f'{_option(option)} {path} {cause}. Give the path of a file.{nearby}')


def check_class_map(path: str, root: str) -> None:
    """Refuses a file that timm does not find, or does not read as a class map."""
    found = [p for p in (path, os.path.join(root, path)) if os.path.isfile(p)]
    if not found:
        raise UsageError(f'--class-map {path} does not exist, neither here nor in {root or "the folder of the data"}.')
    if os.path.splitext(path)[1].lower() not in ('.txt', '.pkl'):
        raise UsageError(
            f'--class-map {path} has an unsupported suffix. timm reads NAME.txt with one class folder a line, and '
            'NAME.pkl.')


def check_config(path: str) -> None:
    """Refuses a file that does not hold options."""
    if not os.path.isfile(path):
        hint = f'recipe:{path}' if path in shipped_files() else 'recipe:NAME for a recipe of `timm-spa recipes`'
        raise UsageError(f'--config {path} is no file. Give the path of a YAML file, or {hint}.')
    try:
        content = yaml.safe_load(read_text(path))
    except (ReadError, yaml.YAMLError) as e:
        raise UsageError(f'--config {path} cannot be read as YAML: {cause_of(e)}') from e
    if not isinstance(content, dict):
        raise UsageError(f'--config {path} must hold lines "option: value", and holds a {type(content).__name__}.')


def check_device(args: Any) -> None:
    """Refuses a device that this machine does not have."""
    device = getattr(args, 'device', None)
    if not device or getattr(args, 'device_modules', None) and not device.startswith('cuda'):
        return  # modules for other devices are not imported yet
    if device.startswith('cuda') and not torch.cuda.is_available():
        raise UsageError(f'--device {device}: torch {torch.__version__} finds no CUDA device. Try --device cpu.')
    try:
        if device.startswith('cuda'):  # no tensor: each process of a launch would take memory of the first GPU
            if (torch.device(device).index or 0) >= torch.cuda.device_count():
                raise RuntimeError(f'there are {torch.cuda.device_count()} CUDA devices')
        else:
            torch.zeros(1, device=device).item()
    except Exception as e:  # each kind of device raises its own
        raise UsageError(f'--device {device} cannot be used ({cause_of(e)}). Try --device cpu.') from e


def check_output(args: Any) -> None:
    """Refuses a folder that train.py cannot write to, or one with the checkpoints of another training."""
    folder = Path(args.output or './output/train', args.experiment or '')
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        cause = 'cannot be written' if existing.is_dir() else 'is no folder'
        raise UsageError(f'--output {folder} cannot be used: {existing} {cause}. Name another folder.')
    resumed = args.resume == 'auto' or args.resume and Path(args.resume).resolve().parent == folder.resolve()
    kept = sorted(
        p.name for p in folder.glob('*.pth.tar') if not p.name.startswith(('tmp', 'recovery'))
    ) if args.experiment and not resumed else []
    if kept:
        raise UsageError(
            f'{folder} has the checkpoints of a training ({first_few(kept)}), which a new one would overwrite. Choose '
            f'another --experiment, or continue with --resume {folder / "last.pth.tar"}.')


def check_writable(option: str, path: Optional[str]) -> None:
    """Refuses a path where results cannot be written, before they are computed."""
    if not path:
        return
    folder = Path(path) if option == 'results_dir' else Path(path).parent
    if folder.exists() and not folder.is_dir() or option == 'results_file' and (
            os.path.isdir(path) or not folder.exists()):
        cause = f'{folder} is no folder' if not os.path.isdir(path) else 'it is a folder'
        raise UsageError(f'{_option(option)} {path} cannot be written: {cause}. Name another path.')
