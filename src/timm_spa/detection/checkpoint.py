"""Checkpoints of detectors: a folder with model.safetensors and a config.json that rebuilds the detector."""
import json
from pathlib import Path
from typing import Any, Dict, List, Sequence, Union

import safetensors.torch
import torch

from .. import __version__
from .._files import ReadError, read_text, replacing
from ..hub.checkpoint import CheckpointError, check_weights, read_checkpoint
from ..hub.config_file import NOT_OF_A_MODEL
from .backbone import DetectionError
from .models import create_detector

__all__ = ['CONFIG', 'WEIGHTS', 'load_detector', 'save_detector']

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'


def save_detector(model: Any, folder: Union[str, Path], categories: Sequence[Dict[str, Any]]) -> None:
    """Writes a checkpoint: weights, and what rebuilds the detector.

    Args:
        model: Detector of `retinanet` or `cascade_rcnn`.
        folder: Folder to write, or to replace the files in.
        categories: 'id' and 'name' of each class, in the order of the labels.

    Raises:
        DetectionError: The number of categories is not that of the classes.
        WriteError: A file cannot be written; what was there before is left then.
    """
    config = model.detector_config
    if len(categories) != config['num_classes']:
        raise DetectionError(f'{len(categories)} categories for a detector of {config["num_classes"]} classes.')
    named = [dict(id=c['id'], name=c['name']) for c in categories]
    text = json.dumps(dict(config, categories=named, timm_spa=__version__), indent=2)
    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(tensors, partial / WEIGHTS, metadata=dict(format='pt'))
        (partial / CONFIG).write_text(f'{text}\n', encoding='utf-8')


def load_detector(folder: Union[str, Path], device: Union[str, torch.device] = 'cpu') -> Any:
    """Loads a checkpoint of `save_detector`.

    Args:
        folder: The folder.
        device: Device to run on.

    Returns:
        The detector in eval mode. Its `categories` has 'id' and 'name' of each class, in the order of the labels.

    Raises:
        DetectionError: The folder is no checkpoint of a detector.
        CheckpointError: The weights cannot be read, or do not fit.
    """
    folder = Path(folder)
    try:
        fields = json.loads(read_text(folder / CONFIG))
        categories: List[Dict[str, Any]] = [dict(id=c['id'], name=c['name']) for c in fields.pop('categories')]
        fields.pop('timm_spa', None)
        named = {'detector', 'backbone', 'num_classes'} <= fields.keys()
        # a file of somebody else must not say what else is opened or fetched
        foreign = {'pretrained_backbone', *NOT_OF_A_MODEL}
        asked = foreign & {*fields, *(fields.get('backbone_kwargs') or {})}
    except ReadError as e:
        raise DetectionError(
            f'{folder} is no checkpoint of a detector, a folder with {WEIGHTS} and {CONFIG}: {e}') from e
    except (ValueError, TypeError, KeyError, AttributeError):
        named = False
    if named and asked:
        raise DetectionError(f'{folder / CONFIG} has {", ".join(sorted(asked))}, which a checkpoint cannot ask for.')
    if not named:
        raise DetectionError(f'{folder / CONFIG} does not describe a detector of this package.')
    model = create_detector(**fields, pretrained_backbone=False)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f'{folder} has no {WEIGHTS}.')
    check_weights(read_checkpoint(folder / WEIGHTS), model, folder / WEIGHTS)
    model.categories = categories
    return model.eval().to(device)
