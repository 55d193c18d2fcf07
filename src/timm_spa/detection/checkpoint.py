"""Checkpoints of detectors: a folder with model.safetensors and a config.json that rebuilds the detector."""
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
    """Writes a checkpoint: weights, and what rebuilds the detector. Both files are written or none.

    Args:
        model: Detector of `retinanet` or `cascade_rcnn`.
        folder: Folder to write to. The checkpoint of a detector in it is replaced.
        categories: 'id' and 'name' of each class, in the order of the labels.
        overwrite: Replace the weights and configuration of anything else, too.

    Raises:
        DetectionError: The number of categories is not that of the classes, two have the same name, or an argument of
            the detector cannot be written.
        WriteError: A file cannot be written, or is not of a detector; the earlier files are left then.
    """
    finish_interrupted(folder)
    refuse_replacing((Path(folder, name) for name in (WEIGHTS, CONFIG)), overwrite or is_own(folder))
    config = model.detector_config
    if len(categories) != config['num_classes']:
        raise DetectionError(f'{len(categories)} categories for a detector of {config["num_classes"]} classes.')
    check_config(config, 'The detector')
    named = _named_categories(list(categories), 'The detector')
    try:
        text = json.dumps(dict(config, categories=named, timm_spa=__version__), indent=2)
    except (TypeError, ValueError) as e:
        raise DetectionError(f'The detector cannot be described in {CONFIG}: {e}. Ids must be texts or numbers.') from e
    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        write_tensors(partial / WEIGHTS, model.state_dict(), dict(format='pt'))
        (partial / CONFIG).write_text(f'{text}\n', encoding='utf-8')


def is_detector(folder: Union[str, Path]) -> bool:
    """Tells whether the config.json of a folder describes a detector, whatever else is wrong with it."""
    try:
        fields = json.loads(read_text(Path(folder) / CONFIG))
    except (ReadError, ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and 'detector' in fields


def is_own(folder: Union[str, Path]) -> bool:
    """Tells whether a folder has a detector that this package wrote, which a newer one may replace."""
    return has_mark(folder) and is_detector(folder)


def load_detector(source: Union[str, Path], device: Union[str, torch.device] = 'cpu') -> Any:
    """Loads a checkpoint of `save_detector`.

    Args:
        source: The folder, or a repository of the Hub, 'hf-hub:organization/name', '@revision' behind it if wanted.
        device: Device to run on.

    Returns:
        The detector in eval mode. Its `categories` has 'id' and 'name' of each class, in the order of the labels.

    Raises:
        DetectionError: The folder is no checkpoint of a detector, or the repository cannot be downloaded.
        CheckpointError: The weights cannot be read, or do not fit.
    """
    folder = _download(str(source)) if str(source).startswith(HUB) else Path(source)
    fields, categories = _read_config(folder)
    model = create_detector(**fields, pretrained_backbone=False)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f'{folder} has no {WEIGHTS}.')
    check_weights(read_checkpoint(folder / WEIGHTS), model, folder / WEIGHTS)
    model.categories = categories
    return model.eval().to(device)


def _read_config(folder: Path) -> Tuple[Dict[str, Any], List[Dict[str, Any]]]:
    """Returns the arguments and the categories of a detector, which may come from an untrusted file."""
    path = folder / CONFIG
    try:
        fields = json.loads(read_text(path))
    except ReadError as e:
        raise DetectionError(
            f'{folder} is no checkpoint of a detector, a folder with {WEIGHTS} and {CONFIG}: {e}') from e
    except (ValueError, RecursionError) as e:
        raise DetectionError(f'{path} does not describe a detector of this package: it is not JSON ({e}).') from e
    needed = ('detector', 'backbone', 'num_classes', 'categories')
    missing = [key for key in needed if key not in fields] if isinstance(fields, dict) else list(needed)
    if missing:
        raise DetectionError(
            f'{path} does not describe a detector of this package: {", ".join(missing)} missing. Give a folder written '
            'by `timm-spa detect train` or save_detector.')
    fields.pop('timm_spa', None)
    categories = fields.pop('categories')
    # an untrusted file must not make us open or fetch anything else
    given = fields.get('backbone_kwargs')
    foreign = {'pretrained_backbone', *NOT_OF_A_MODEL} & {*fields, *(given if isinstance(given, dict) else ())}
    if foreign:
        raise DetectionError(f'{path} has {", ".join(sorted(foreign))}, which a checkpoint cannot ask for.')
    check_config(fields, path)
    categories = _named_categories(categories, path)
    if len(categories) != fields['num_classes']:
        raise DetectionError(f'{path} has {len(categories)} categories for {fields["num_classes"]} classes.')
    return fields, categories


def _named_categories(categories: Any, source: Union[str, Path]) -> List[Dict[str, Any]]:
    listed = isinstance(categories, list) and all(isinstance(c, dict) and 'id' in c for c in categories)
    names = [c.get('name') for c in categories] if listed else [None]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise DetectionError(f'{source}: categories must be a list of classes with an id and a name of their own.')
    return [dict(id=c['id'], name=c['name']) for c in categories]


def _download(source: str) -> Path:
    repo_id, _, revision = source.removeprefix(HUB).partition('@')
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as e:  # huggingface_hub's, and whatever the HTTP library of the day raises
        cause = without_password(' '.join(str(e).split()))
        raise DetectionError(f'{source} cannot be had from {endpoint()}: {type(e).__name__}: {cause}') from e
