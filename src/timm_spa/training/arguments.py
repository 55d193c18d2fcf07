"""Checks of single arguments of timm's scripts: files, devices and models."""
import glob
import os
from pathlib import Path
from typing import Any, List, Optional

import timm.models
import torch
import yaml

from .._errors import UsageError
from .._names import check_model_name
from .._shipped import shipped_files
from ..checkpoints.files import ReadError, read_text
from ..checkpoints.fit import first_few
from ..checkpoints.reading import read_weights

__all__ = [
    'FILE_OPTIONS', 'cause_of', 'check_config', 'check_device', 'check_file', 'check_model', 'check_output',
    'check_writable', 'checkpoints_in', 'outputs_of', 'read_valid_labels']

# options that name a file to read
FILE_OPTIONS = ('checkpoint', 'resume', 'initial_checkpoint', 'pretrained_path', 'real_labels', 'valid_labels')


def _option(name: str) -> str:
    return f'--{name.replace("_", "-")}'


def cause_of(error: Exception) -> str:
    """Returns the message of an error in one line, without a final period."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text.rstrip('.') if len(text) < 400 else f'{text[:400]} ...'


def read_valid_labels(path: str, outputs: int) -> List[int]:
    """Reads the file of --valid-labels: the outputs of the model that validate.py compares with the class folders."""
    try:
        labels = [int(line) for line in read_text(path).splitlines()]
    except (ReadError, ValueError) as e:
        raise UsageError(f'--valid-labels {path} cannot be read: {cause_of(e)}. Expected one number per line.') from e
    invalid = [label for label in labels if not 0 <= label < outputs]
    if invalid:
        raise UsageError(
            f'--valid-labels {path} has the number {invalid[0]}, but the model has the outputs 0 to {outputs - 1}. '
            'Remove other numbers.')
    return labels


def outputs_of(path: str, model_name: str) -> Optional[int]:
    """Returns the number of outputs of the model of a checkpoint, None if unknown."""
    weights = read_weights(path)
    classifier = getattr(timm.models.get_pretrained_cfg(model_name), 'classifier', None)
    tensor = weights.state_dict.get(f'{classifier}.weight')
    return len(tensor) if tensor is not None and tensor.ndim else weights.args.get('num_classes')


def checkpoints_in(folder: str) -> List[str]:
    """Returns the checkpoints in a folder that validate.py evaluates."""
    return sorted(glob.glob(f'{glob.escape(folder)}/*.pth.tar') + glob.glob(f'{glob.escape(folder)}/*.pth'))


def check_model(name: str, script: str) -> None:
    """Raises if timm does not have a model."""
    if script in ('validate', 'benchmark') and (
            name == 'all' or os.path.isfile(name) or timm.models.list_models(name)):  # lists and patterns of models
        return
    check_model_name(name, UsageError)


def check_file(option: str, path: str, script: str) -> None:
    """Raises if a file does not exist."""
    if option == 'checkpoint' and script == 'validate' and os.path.isdir(path):
        if not checkpoints_in(path):
            raise UsageError(
                f'--checkpoint {path} is a folder without files *.pth.tar or *.pth. Give the path of a checkpoint.')
        return
    if os.path.isfile(path) or (option, path) == ('resume', 'auto'):
        return
    cause = 'is a folder' if os.path.isdir(path) else 'does not exist'
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    names = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    nearby = f' Files in {folder.resolve()}: {first_few(names)}.' if names else ''
    raise UsageError(f'{_option(option)} {path} {cause}. Give the path of a file.{nearby}')


def check_config(path: str) -> None:
    """Raises if a file does not contain options."""
    if not os.path.isfile(path):
        hint = f'recipe:{path}' if path in shipped_files() else 'recipe:NAME for a recipe of `timm-spa recipes`'
        raise UsageError(f'--config {path} is not a file. Give the path of a YAML file, or {hint}.')
    try:
        content = yaml.safe_load(read_text(path))
    except (ReadError, yaml.YAMLError) as e:
        raise UsageError(f'--config {path} cannot be read as YAML: {cause_of(e)}. Correct the file.') from e
    if not isinstance(content, dict):
        raise UsageError(f'--config {path}: expected lines "option: value", got a {type(content).__name__}.')


def check_device(args: Any) -> None:
    """Raises if this machine does not have the device."""
    device = getattr(args, 'device', None)
    if not device or getattr(args, 'device_modules', None) and not device.startswith('cuda'):
        return  # modules for other devices are not imported yet
    try:
        if device.startswith('cuda'):  # no tensor: each process of a launch would take memory of the first GPU
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if (torch.device(device).index or 0) >= count:
                raise RuntimeError(f'torch {torch.__version__} finds {count} CUDA devices')
        else:
            torch.zeros(1, device=device).item()
    except Exception as e:  # each kind of device raises its own
        raise UsageError(f'--device {device} cannot be used: {cause_of(e)}. Try --device cpu.') from e


def check_output(args: Any) -> None:
    """Raises if train.py cannot write to its folder, or would overwrite the checkpoints of another training."""
    folder = Path(args.output or './output/train', args.experiment or '')
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        cause = 'is not writable' if existing.is_dir() else 'is not a folder'
        raise UsageError(f'--output {folder} cannot be used: {existing} {cause}. Choose another folder.')
    resumed = args.resume == 'auto' or args.resume and Path(args.resume).resolve().parent == folder.resolve()
    checkpoints = sorted(
        p.name for p in folder.glob('*.pth.tar') if not p.name.startswith(('tmp', 'recovery'))
    ) if args.experiment and not resumed else []
    if checkpoints:
        raise UsageError(
            f'{folder} has checkpoints of an earlier training ({first_few(checkpoints)}), which would be overwritten. '
            f'Choose another --experiment, or resume with --resume {folder / "last.pth.tar"}.')


def check_writable(option: str, path: Optional[str]) -> None:
    """Raises if results cannot be written to a path, before they are computed."""
    if not path:
        return
    folder = Path(path) if option == 'results_dir' else Path(path).parent
    if folder.exists() and not folder.is_dir() or option == 'results_file' and (
            os.path.isdir(path) or not folder.exists()):
        cause = 'it is a folder' if os.path.isdir(path) else f'{folder} is not a folder'
        raise UsageError(f'{_option(option)} {path} cannot be written: {cause}. Choose another path.')
