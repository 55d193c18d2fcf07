"""Loading of models, with published weights or with the weights of a file."""
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from huggingface_hub import try_to_load_from_cache
from timm.models import get_pretrained_cfg
from timm.utils import reparameterize_model

from .._errors import TimmSpaError
from .._names import check_model_name
from ..checkpoints.config_file import NOT_OF_A_MODEL, class_labels
from ..checkpoints.hub_files import HubFileMissing, locate_file, locate_weights
from ..checkpoints.reading import Weights, check_weights, read_weights
from ..checkpoints.run_arguments import configured_preprocessing, preprocessing, recorded_with, untagged
from ..models._builder import WEIGHTS_FILENAME
from ..models._likely_model import likely_model
from ..training.log import read_classes

__all__ = ['ModelError', 'for_inference', 'load_model', 'numbered', 'on_device']

_logger = logging.getLogger(__name__)

WEIGHTS_SUFFIXES = ('.bin', '.pt', '.pth', '.safetensors', '.tar')


class ModelError(TimmSpaError, RuntimeError):
    """A model cannot be loaded or used."""


def load_model(
        name: Optional[str] = None,
        checkpoint: Optional[Union[str, Path]] = None,
        num_classes: Optional[int] = None,
        device: str = 'cpu',
        fuse: bool = True,
        model_kwargs: Optional[Mapping[str, Any]] = None,
) -> nn.Module:
    """Creates a model for prediction, with its published weights or the weights of a file.

    A checkpoint is loaded into the model that it was trained as. The arguments of that model come from the file, or
    from args.yaml or config.json in the same folder. Class names come from classes.txt or config.json in the same
    folder. ImageNet weights converted by `timm-spa convert` get ImageNet's names. Other classes get numbers.

    Args:
        name: Any name that `timm.create_model` accepts, including 'hf-hub:organization/name' and 'local-dir:folder';
            or a weights file that names its model. If None, the model is read from the checkpoint, or from args.yaml
            or config.json in the same folder.
        checkpoint: Weights file to load instead of the published weights.
        num_classes: Number of classes of the checkpoint, if it is not recorded with the checkpoint.
        device: Device to run on.
        fuse: Return the form for fast inference, see `for_inference`, instead of the form for training.
        model_kwargs: Arguments of the model, if they are not recorded with the checkpoint.

    Returns:
        The model, in eval mode.

    Raises:
        ModelError: The model is unknown, its weights cannot be loaded, an argument is invalid, or the device cannot be
            used.
        HubWeightsError: The Hub cannot be reached, and the weights are not in the cache.
        CheckpointError: The file cannot be read, or does not fit the model.
        RunError: The checkpoint belongs to another model, or its model is not recorded.
    """
    if num_classes is not None and num_classes < 1:
        raise ModelError(f'The number of classes must be at least 1, got {num_classes}.')
    kwargs = dict(model_kwargs or {})
    refused = [key for key in NOT_OF_A_MODEL if key in kwargs]
    if refused:
        raise ModelError(
            f'The model arguments {", ".join(refused)} cannot be set: they choose weights or a form of the model, not '
            'its layers. Leave them out.')
    num_classes = kwargs.pop('num_classes', None) if num_classes is None else num_classes
    if name is not None and checkpoint is None and os.path.isfile(name) and not timm.is_model(untagged(name)):
        name, checkpoint = None, name
    if checkpoint is None:
        if name is None:
            raise ModelError('No model to load. Give the name of a model, or a checkpoint that names its model.')
        model = _published(name, num_classes, kwargs)
    else:
        model = _of_checkpoint(name, Path(checkpoint), num_classes, kwargs)
    return for_inference(model, device) if fuse else on_device(model, device)


def _published(name: str, num_classes: Optional[int], model_kwargs: Dict[str, Any]) -> Any:
    """Creates a model with its published weights."""
    if os.path.isdir(name) and not timm.is_model(untagged(name)):
        raise ModelError(
            f'{name} cannot be loaded as a model: it is a folder. Name the weights file in it, or use '
            f'local-dir:{name} if it has a config.json.')
    if ':' not in name and name.endswith(WEIGHTS_SUFFIXES):
        raise ModelError(f'{name} cannot be loaded: the file does not exist. Check the path of the weights file.')
    check_model_name(name, ModelError)
    located = name
    kwargs: Dict[str, Any] = {}
    try:
        if 'base' not in model_kwargs:  # of `gated`, which finds the weights of its base
            located, kwargs = _located(name)
        model: Any = timm.create_model(located, pretrained=True, **kwargs, **model_kwargs)
    except TimmSpaError:
        raise
    except Exception as e:  # timm, torch and the Hub each raise their own
        cause: Any = e
        if isinstance(e, KeyError) and e.args == ('architecture',):
            cause = 'its config.json does not name an architecture of timm. Use `timm-spa detect` for detectors.'
        raise ModelError(f'{name} could not be loaded: {cause}') from e
    if located != name:  # record the repository, not the path in the cache
        model.pretrained_cfg.update(source='hf-hub', hf_hub_id=name.partition(':')[2])
    if located != name or kwargs:
        model.pretrained_cfg.pop('file', None)
    if num_classes not in (None, model.num_classes):
        raise ModelError(
            f'{name} cannot be loaded with {num_classes} classes: the published weights of {name} have '
            f'{model.num_classes} classes. Leave the number out, or name a checkpoint with that number of classes.')
    return model


def _located(name: str) -> Tuple[str, Dict[str, Any]]:
    """Finds published weights on the Hub or in the cache, within seconds.

    Returns:
        Name and arguments for `timm.create_model`. They refer to files in the cache wherever possible, because timm
        itself would ask the Hub again, with retries that take a minute.
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
    # a custom loader reads its own format
    return name, {} if weights is None or cfg.custom_load else dict(pretrained_cfg_overlay=dict(file=weights))


def _weights_on_hub(repo_id: str, filename: Optional[str], revision: str) -> Optional[str]:
    """Returns the safetensors file of a repository, or None if its weights have another format."""
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


def _of_checkpoint(
        name: Optional[str],
        checkpoint: Path,
        num_classes: Optional[int],
        model_kwargs: Mapping[str, Any],
) -> Any:
    """Creates the model of a weights file, with the arguments of its training."""
    if name is not None:
        check_model_name(name, ModelError)
    weights = read_weights(checkpoint)
    names = (name or '', str(model_kwargs.get('base') or ''))

    def hint(tensors: Mapping[str, torch.Tensor]) -> str:
        return likely_model(tensors, *names)

    name, args, model_args, config, count = recorded_with(weights, checkpoint, name, model_kwargs, hint)
    overlay = preprocessing(args, untagged(name)) if ':' not in name else {}
    if not args:
        overlay.update(configured_preprocessing(config))
    kwargs: Dict[str, Any] = dict(model_args, num_classes=num_classes or count, pretrained_cfg_overlay=overlay)
    try:
        model: Any = timm.create_model(name, **kwargs)
    except TimmSpaError:
        raise
    except Exception as e:  # timm, torch and the Hub each raise their own
        raise ModelError(f'{name} could not be created for the checkpoint {checkpoint}: {e}') from e
    check_weights(weights.state_dict, model, checkpoint, hint)
    # the tag and the class names in the configuration belong to the published weights
    model.pretrained_cfg = dict(model.pretrained_cfg, tag=None, **_labels(model, weights, checkpoint, config))
    return model


def _labels(model: Any, weights: Weights, checkpoint: Path, config: Dict[str, Any]) -> Dict[str, Any]:
    """Returns the configuration fields with the class names of a checkpoint."""
    named = dict(label_names=read_classes(checkpoint.parent), label_descriptions=None)
    if not named['label_names'] and config:
        named.update(class_labels(config))
    if len(named['label_names'] or ()) == model.num_classes:
        return named
    if _is_imagenet(model, weights, checkpoint) and not named['label_names']:
        _logger.warning(
            f'{checkpoint} gets the class names of ImageNet-1k: it was converted from a plain model with 1000 classes. '
            'If the classes are others, list their names in classes.txt in the same folder, one per line.')
        return dict(label_names=None, label_descriptions=None)  # means ImageNet's names
    return dict(label_names=numbered(model.num_classes), label_descriptions=None)


def _is_imagenet(model: Any, weights: Weights, checkpoint: Path) -> bool:
    """Returns whether weights were converted from published ImageNet-1k weights.

    The number of classes alone is not enough. A folder with args.yaml belongs to a training run of the user.
    """
    if model.num_classes != 1000 or weights.converted_from != 'plain':
        return False
    architecture = model.pretrained_cfg.get('architecture') or ''
    tags = [*timm.list_pretrained(f'{architecture}.*'), str(model.pretrained_cfg.get('tag'))]
    return not (checkpoint.parent / 'args.yaml').exists() and any(tag.endswith('in1k') for tag in tags)


def for_inference(model: nn.Module, device: str = 'cpu') -> nn.Module:
    """Moves a model to a device, and on a CPU converts it to fused blocks and channels_last.

    Args:
        model: A timm model. It is changed in place.
        device: Device to run on.

    Returns:
        The model, in eval mode.

    Raises:
        ModelError: torch cannot use the device.
    """
    model = on_device(model, device)
    if torch.device(device).type != 'cpu':
        return model
    return reparameterize_model(model, inplace=True).to(memory_format=torch.channels_last)


def on_device(model: nn.Module, device: str) -> nn.Module:
    """Moves a model to a device in eval mode, and raises ModelError if torch cannot use the device."""
    try:
        torch.zeros(1, device=device).item()
        return model.eval().to(device)
    except Exception as e:  # errors differ between devices
        cause = ' '.join(str(e).split())[:200]
        raise ModelError(f'The device {device!r} cannot be used ({cause}). Try cpu.') from e


def numbered(count: int) -> List[str]:
    """Returns numbered names for unnamed classes."""
    return [f'class {i}' for i in range(count)]
