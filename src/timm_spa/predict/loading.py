"""Loading of any model that timm can create: with published weights, or with those of a file."""
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from huggingface_hub import try_to_load_from_cache
from timm.models import get_pretrained_cfg
from timm.utils import reparameterize_model

from .._errors import TimmSpaError
from .._names import check_model_name
from ..checkpoints.config_file import class_labels
from ..checkpoints.hub_files import HubFileMissing, locate_file, locate_weights
from ..checkpoints.reading import Weights, check_weights, read_weights
from ..checkpoints.run_arguments import config_of_folder, preprocessing, recorded_model, trained_with, untagged
from ..models._builder import WEIGHTS_FILENAME
from ..training.log import read_classes

__all__ = ['ModelError', 'for_inference', 'load_model', 'numbered', 'on_device']

_logger = logging.getLogger(__name__)

WEIGHTS_SUFFIXES = ('.bin', '.pt', '.pth', '.safetensors', '.tar')
# of a config.json
PREPROCESSING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


class ModelError(TimmSpaError, RuntimeError):
    """A model could not be loaded; the message names it."""


def load_model(
        name: Optional[str] = None,
        checkpoint: Optional[Union[str, Path]] = None,
        num_classes: Optional[int] = None,
        device: str = 'cpu',
        fuse: bool = True,
) -> nn.Module:
    """Creates a model for prediction, with its published weights or those of a file.

    Args:
        name: Whatever `timm.create_model` takes: a name, 'hf-hub:organization/name', 'local-dir:folder'; or a weights
            file that names its model. None for the model that `checkpoint` names, or that args.yaml or config.json
            next to it names.
        checkpoint: Weights to load in place of the published ones.
        num_classes: Classes of the checkpoint, if neither the arguments of its training nor the model have it right.
        device: Device to run on.
        fuse: Take the form that is fastest on a CPU, see `for_inference`; else the one that is trained.

    Returns:
        The model, in eval mode. That of a checkpoint is made as it was trained, where the file, or args.yaml or
        config.json next to it says how. Its classes are named by classes.txt or config.json next to it. Those of
        published ImageNet weights that `timm-spa convert` has converted have ImageNet's names, others have numbers.

    Raises:
        ModelError: There is no such model, or no such device, or its weights could not be had.
        HubWeightsError: The Hub cannot be reached, and the weights are not in its cache.
        CheckpointError: The file cannot be read, or does not fit the model.
        RunError: By the file or by `args.yaml` the weights are of another model, or nothing names their model.
    """
    if num_classes is not None and num_classes < 1:
        raise ModelError(f'The number of classes must be at least 1, got {num_classes}.')
    if name is not None and checkpoint is None and os.path.isfile(name) and not timm.is_model(untagged(name)):
        name, checkpoint = None, name
    if checkpoint is None:
        if name is None:
            raise ModelError('No model to load: give its name, or a checkpoint that names it.')
        model = _published(name, num_classes)
    else:
        model = _of_checkpoint(name, Path(checkpoint), num_classes)
    return for_inference(model, device) if fuse else on_device(model, device)


def _published(name: str, num_classes: Optional[int]) -> Any:
    """Creates a model with its published weights."""
    if os.path.isdir(name) and not timm.is_model(untagged(name)):
        raise ModelError(
            f'{name} is a folder. Name the weights file in it, or with local-dir:{name} a folder that has config.json.')
    if ':' not in name and name.endswith(WEIGHTS_SUFFIXES):
        raise ModelError(f'{name} does not exist, and is no name of a model. Check the path of the weights file.')
    check_model_name(name, ModelError)
    located = name
    kwargs: Dict[str, Any] = {}
    try:
        located, kwargs = _located(name)
        model: Any = timm.create_model(located, pretrained=True, **kwargs)
    except TimmSpaError:
        raise
    except Exception as e:  # timm, torch and the Hub each raise their own
        cause: Any = e
        if isinstance(e, KeyError) and e.args == ('architecture',):
            cause = 'its config.json names no architecture of timm. Detectors are for `timm-spa detect`.'
        raise ModelError(f'{name} could not be loaded: {cause}') from e
    if located != name:  # the path in the cache is not where the model is from
        model.pretrained_cfg.update(source='hf-hub', hf_hub_id=name.partition(':')[2])
    if located != name or kwargs:
        model.pretrained_cfg.pop('file', None)
    if num_classes not in (None, model.num_classes):
        raise ModelError(
            f'The published weights of {name} have {model.num_classes} classes: the number is for a checkpoint of '
            'another one.')
    return model


def _located(name: str) -> Tuple[str, Dict[str, Any]]:
    """Finds published weights on the Hub within seconds, as models of this package do by themselves.

    Returns:
        Name and arguments for `timm.create_model`. They name files in the cache where timm would ask the Hub again,
        with retries that take a minute.
    """
    source, _, address = name.partition(':')
    if source.lower() in ('hf-hub', 'hf_hub'):
        repo_id, _, revision = address.partition('@')
        config = locate_file(repo_id, 'config.json', revision or None)
        weights = _weights_on_hub(repo_id, None, revision)
        in_one_folder = weights is not None and os.path.dirname(weights) == os.path.dirname(config)
        return (f'local-dir:{os.path.dirname(config)}' if in_one_folder else name), {}
    cfg = None if address else get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id or cfg.file or cfg.state_dict or cfg.source:
        return name, {}
    repo_id, _, revision = cfg.hf_hub_id.partition('@')
    weights = _weights_on_hub(repo_id, cfg.hf_hub_filename, revision)
    # a custom loader reads a format of its own
    return name, {} if weights is None or cfg.custom_load else dict(pretrained_cfg_overlay=dict(file=weights))


def _weights_on_hub(repo_id: str, filename: Optional[str], revision: str) -> Optional[str]:
    """Returns a safetensors file of a repository; None if it has weights of another format only."""
    if filename not in (None, WEIGHTS_FILENAME):
        return None
    try:
        return locate_weights(repo_id, WEIGHTS_FILENAME, revision or None)
    except HubFileMissing:
        return None
    except TimmSpaError:
        if isinstance(try_to_load_from_cache(repo_id, 'pytorch_model.bin', revision=revision or None), str):
            return None
        raise


def _of_checkpoint(name: Optional[str], checkpoint: Path, num_classes: Optional[int]) -> Any:
    """Creates the model of a file of weights, as it was trained."""
    if name is not None:
        check_model_name(name, ModelError)
    weights = read_weights(checkpoint)
    config = config_of_folder(checkpoint)
    if name is None:
        name = recorded_model(weights, checkpoint)
    is_name = ':' not in name
    args, model_args = trained_with(weights, checkpoint, name if is_name else '')
    if config.get('architecture') != untagged(name):
        config = {}  # of other weights
    overlay = preprocessing(args, untagged(name)) if is_name else {}
    if not args:
        overlay.update(_preprocessing_of(config))
        if weights.model_args is None:
            model_args = config.get('model_args') or {}
    counts = (num_classes, args.get('num_classes'), config.get('num_classes'))
    kwargs: Dict[str, Any] = dict(
        model_args, num_classes=next(filter(None, counts), None), pretrained_cfg_overlay=overlay)
    try:
        model: Any = timm.create_model(name, **kwargs)
    except TimmSpaError:
        raise
    except Exception as e:  # timm, torch and the Hub each raise their own
        raise ModelError(f'{name} could not be created for {checkpoint}: {e}') from e
    check_weights(weights.state_dict, model, checkpoint)
    # the tag and the names in the configuration are those of other weights' classes
    model.pretrained_cfg = dict(model.pretrained_cfg, tag=None, **_labels(model, weights, checkpoint, config))
    return model


def _preprocessing_of(config: Dict[str, Any]) -> Dict[str, Any]:
    cfg = config.get('pretrained_cfg') or {}
    return {
        key: tuple(cfg[key]) if isinstance(cfg[key], list) else cfg[key]
        for key in PREPROCESSING if cfg.get(key) is not None}


def _labels(model: Any, weights: Weights, checkpoint: Path, config: Dict[str, Any]) -> Dict[str, Any]:
    """Returns the fields of a configuration that name the classes of a checkpoint."""
    named = dict(label_names=read_classes(checkpoint.parent), label_descriptions=None)
    if not named['label_names'] and config:
        named.update(class_labels(config))
    if len(named['label_names'] or ()) == model.num_classes:
        return named
    if _is_imagenet(model, weights, checkpoint) and not named['label_names']:
        _logger.warning(
            f"{checkpoint} is taken for weights of ImageNet-1k: it was converted from a plain network's, and has 1000 "
            'classes. If they are others, name them in classes.txt next to it, one a line.')
        return dict(label_names=None, label_descriptions=None)  # for which timm's names are taken
    return dict(label_names=numbered(model.num_classes), label_descriptions=None)


def _is_imagenet(model: Any, weights: Weights, checkpoint: Path) -> bool:
    """Returns whether weights are published ones of ImageNet-1k, by what `convert` has recorded of their source.

    A thousand classes alone say nothing, and a training of one's own leaves args.yaml.
    """
    if model.num_classes != 1000 or weights.converted_from != 'plain':
        return False
    architecture = model.pretrained_cfg.get('architecture') or ''
    tags = [*timm.list_pretrained(f'{architecture}.*'), str(model.pretrained_cfg.get('tag'))]
    return not (checkpoint.parent / 'args.yaml').exists() and any(tag.endswith('in1k') for tag in tags)


def for_inference(model: nn.Module, device: str = 'cpu') -> nn.Module:
    """Moves a model to a device, on a CPU in the form that is fastest there: fused blocks, channels_last.

    Args:
        model: A timm model, which is changed.
        device: Device to run on.

    Returns:
        The model, in eval mode.

    Raises:
        ModelError: torch has no such device here.
    """
    model = on_device(model, device)
    if torch.device(device).type != 'cpu':
        return model
    return reparameterize_model(model, inplace=True).to(memory_format=torch.channels_last)


def on_device(model: nn.Module, device: str) -> nn.Module:
    """Moves a model to a device, in eval mode; raises a ModelError if torch has no such device here."""
    try:
        torch.zeros(1, device=device).item()
        return model.eval().to(device)
    except Exception as e:  # each kind of device raises its own
        cause = ' '.join(str(e).split())[:200]
        raise ModelError(f'The device {device!r} cannot be used ({cause}). Try cpu.') from e


def numbered(count: int) -> List[str]:
    """Returns names for classes that have none."""
    return [f'class {i}' for i in range(count)]
