"""Checkpoints of detectors: folders with model.safetensors and a config.json that rebuilds the detector."""
import json
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, Union

import torch
from huggingface_hub import snapshot_download

from .. import __version__
from ..checkpoints.config_file import NOT_OF_A_MODEL
from ..checkpoints.files import ReadError, finish_interrupted, read_text, replacing
from ..checkpoints.hub_files import endpoint, without_password
from ..checkpoints.own_files import has_mark, refuse_replacing
from ..checkpoints.reading import CheckpointError, check_weights, read_checkpoint, write_tensors
from .arguments import check_config
from .backbone import DetectionError
from .models import create_detector

__all__ = ['CONFIG', 'WEIGHTS', 'is_detector', 'is_own', 'load_detector', 'save_detector']

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
HUB = 'hf-hub:'


def save_detector(
        model: Any,
        folder: Union[str, Path],
        categories: Sequence[Dict[str, Any]],
        overwrite: bool = False,
) -> None:
    """Writes a checkpoint of a detector. Either both of its files are written or none.

    Args:
        model: Detector of `retinanet` or `cascade_rcnn`.
        folder: Folder to write to. A checkpoint of a detector in this folder is replaced.
        categories: 'id' and 'name' of each class, in the order of the labels.
        overwrite: Also replace weights and a configuration that are not a detector's.

    Raises:
        DetectionError: The number of categories differs from the number of classes, two categories have the same
            name, or an argument of the detector cannot be written.
        WriteError: A file cannot be written, or an existing file is not a detector's. Existing files are unchanged.
    """
    finish_interrupted(folder)
    refuse_replacing((Path(folder, name) for name in (WEIGHTS, CONFIG)), overwrite or is_own(folder))
    config = model.detector_config
    _check_count(categories, config['num_classes'], 'The detector')
    check_config(config, 'The detector')
    named = _check_categories(list(categories), 'The detector')
    try:
        text = json.dumps(dict(config, categories=named, timm_spa=__version__), indent=2)
    except (TypeError, ValueError) as e:
        raise DetectionError(
            f'The detector cannot be described in {CONFIG}: {e}. Ids of categories must be texts or numbers.') from e
    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        write_tensors(partial / WEIGHTS, model.state_dict(), dict(format='pt'))
        (partial / CONFIG).write_text(f'{text}\n', encoding='utf-8')


def is_detector(folder: Union[str, Path]) -> bool:
    """Returns whether the config.json of a folder names a detector. Its other fields may be invalid."""
    try:
        fields = json.loads(read_text(Path(folder) / CONFIG))
    except (ReadError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and 'detector' in fields


def is_own(folder: Union[str, Path]) -> bool:
    """Returns whether a folder contains a detector that this package wrote. A new checkpoint may replace it."""
    return has_mark(folder) and is_detector(folder)


def load_detector(source: Union[str, Path], device: Union[str, torch.device] = 'cpu') -> Any:
    """Loads a checkpoint of `save_detector`.

    Args:
        source: Folder, or a Hub repository: 'hf-hub:organization/name' or 'hf-hub:organization/name@revision'.
        device: Device to run on.

    Returns:
        The detector in eval mode. Its `categories` are 'id' and 'name' of each class, in the order of the labels.

    Raises:
        DetectionError: The folder is not a checkpoint of a detector, or the repository cannot be downloaded.
        CheckpointError: The weights cannot be read, or do not fit.
    """
    folder = _download(str(source)) if str(source).startswith(HUB) else Path(source)
    fields, categories = _read_config(folder)
    model = create_detector(**fields, pretrained_backbone=False)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f'{folder}: {WEIGHTS} is missing. Name a folder that contains it next to {CONFIG}.')
    check_weights(read_checkpoint(folder / WEIGHTS), model, folder / WEIGHTS)
    model.categories = categories
    return model.eval().to(device)


def _read_config(folder: Path) -> Tuple[Dict[str, Any], List[Dict[str, Any]]]:
    """Returns the arguments and the categories in config.json, which may be untrusted."""
    path = folder / CONFIG
    try:
        fields = json.loads(read_text(path))
    except ReadError as e:
        raise DetectionError(
            f'{folder} is not a checkpoint of a detector, i.e. a folder with {WEIGHTS} and {CONFIG}: {e}') from e
    except (ValueError, RecursionError) as e:
        raise DetectionError(f'{path} does not describe a detector of this package: it is not JSON ({e}).') from e
    required = ('detector', 'backbone', 'num_classes', 'categories')
    missing = [key for key in required if key not in fields] if isinstance(fields, dict) else list(required)
    if missing:
        raise DetectionError(
            f'{path} does not describe a detector of this package: {", ".join(missing)} missing. Name a folder written '
            'by `timm-spa detect train` or save_detector.')
    fields.pop('timm_spa', None)
    categories = fields.pop('categories')
    # an untrusted file must not open or download any other file
    kwargs = fields.get('backbone_kwargs')
    forbidden = {'pretrained_backbone', *NOT_OF_A_MODEL} & {*fields, *(kwargs if isinstance(kwargs, dict) else ())}
    if forbidden:
        raise DetectionError(
            f'{path}: {", ".join(sorted(forbidden))} is not allowed in a checkpoint. Remove it, or use another '
            'checkpoint.')
    check_config(fields, path)
    categories = _check_categories(categories, path)
    _check_count(categories, fields['num_classes'], path)
    return fields, categories


def _check_count(categories: Sequence[Any], num_classes: int, source: Union[str, Path]) -> None:
    if len(categories) != num_classes:
        raise DetectionError(
            f'{source} has {len(categories)} categories for {num_classes} classes. Both numbers must be equal.')


def _check_categories(categories: Any, source: Union[str, Path]) -> List[Dict[str, Any]]:
    """Returns only the ids and names of categories."""
    valid = isinstance(categories, list) and all(isinstance(c, dict) and 'id' in c for c in categories)
    names = [c.get('name') for c in categories] if valid else [None]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise DetectionError(f'{source}: categories must be a list of classes, each with an id and a unique name.')
    return [dict(id=c['id'], name=c['name']) for c in categories]


def _download(source: str) -> Path:
    repo_id, _, revision = source.removeprefix(HUB).partition('@')
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as e:  # the errors of huggingface_hub and of its HTTP library
        cause = without_password(' '.join(str(e).split()))
        raise DetectionError(
            f'{source} cannot be downloaded from {endpoint()}: {type(e).__name__}: {cause} Check the name and the '
            'network, or name a folder.') from e
