"""Classes of pictures, by any model that timm can create."""
import dataclasses
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import timm
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import (
    ImageNetInfo,
    create_dataset,
    create_loader,
    create_transform,
    resolve_model_data_config,
)
from timm.utils import reparameterize_model

from ._errors import TimmSpaError
from .hub.checkpoint import check_weights, read_weights
from .hub.trained import preprocessing, trained_with, untagged
from .models.names import check_model_name, did_you_mean
from .models.tensors import first_few
from .training_log import read_classes

__all__ = [
    'ModelError', 'PictureError', 'Prediction', 'class_names', 'data_config', 'find_class', 'for_inference',
    'image_files', 'in_eight_bits', 'labelled_batches', 'likeliest_classes', 'load_model', 'on_device',
    'picture_reader', 'picture_seen', 'predict']

SPLITS = frozenset(('train', 'training', 'val', 'valid', 'validation', 'test', 'testing', 'eval', 'evaluation'))


class ModelError(TimmSpaError, RuntimeError):
    """A model could not be loaded; the message names it."""


class PictureError(TimmSpaError, OSError):
    """A picture, or a folder of them, cannot be used; the message names it and says why."""


@dataclasses.dataclass
class Prediction:
    """The classes of one picture, or why it could not be classified.

    Attributes:
        path: The picture.
        classes: The likeliest classes first, each with 'index', 'label' (WordNet id or the like, if known), 'name' and
            'probability'.
        error: Why the picture could not be read, else None.
    """
    path: str
    classes: List[Dict[str, Any]] = dataclasses.field(default_factory=list)
    error: Optional[str] = None


def load_model(
        name: str,
        checkpoint: Optional[Union[str, Path]] = None,
        num_classes: Optional[int] = None,
        device: str = 'cpu',
        fuse: bool = True,
) -> nn.Module:
    """Creates a model for prediction, with its published weights or those of a file.

    Args:
        name: Whatever `timm.create_model` takes: a name, 'hf-hub:organization/name', 'local-dir:folder'.
        checkpoint: Weights to load in place of the published ones.
        num_classes: Classes of the checkpoint, if neither the arguments of its training nor the model have it right.
        device: Device to run on.
        fuse: Take the form that is fastest on a CPU, see `for_inference`; else the one that is trained.

    Returns:
        The model, in eval mode. That of a checkpoint is made as it was trained, where the file or `args.yaml` beside it
        says how; its classes are named by `classes.txt` beside it, else by numbers.

    Raises:
        ModelError: There is no such model, or no such device, or its weights could not be had.
        CheckpointError: The file cannot be read, or does not fit the model.
        RunError: By the file or by `args.yaml` the weights are of another model.
    """
    check_model_name(name, ModelError)
    kwargs: Dict[str, Any] = {}
    if checkpoint is not None:
        weights = read_weights(checkpoint)
        args, model_args = trained_with(weights, Path(checkpoint), '' if ':' in name else name)
        overlay = {} if ':' in name else preprocessing(args, untagged(name))
        kwargs = dict(
            model_args, num_classes=num_classes or args.get('num_classes'), pretrained_cfg_overlay=overlay)
    try:
        model: Any = timm.create_model(name, pretrained=checkpoint is None, **kwargs)
    except TimmSpaError:
        raise
    except Exception as e:  # timm, torch and the Hub each raise their own
        cause: Any = e
        if isinstance(e, KeyError) and e.args == ('architecture',):
            cause = 'its config.json names no architecture of timm. Detectors are for `timm-spa detect`.'
        raise ModelError(f'{name} could not be loaded: {cause}') from e
    if checkpoint is None and num_classes not in (None, model.num_classes):
        raise ModelError(
            f'The published weights of {name} have {model.num_classes} classes: the number is for a checkpoint of '
            'another one.')
    if checkpoint is not None:
        check_weights(weights.state_dict, model, checkpoint)
        # the tag and the names in the configuration are those of other weights' classes
        labels = read_classes(Path(checkpoint).parent)
        if len(labels) != model.num_classes:
            labels = _numbered(model.num_classes)
        model.pretrained_cfg = dict(
            model.pretrained_cfg, tag=None, label_names=labels, label_descriptions=None)
    return for_inference(model, device) if fuse else on_device(model, device)


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


def class_names(model: nn.Module) -> List[Dict[str, Optional[str]]]:
    """Names the classes of a model.

    Args:
        model: A timm model.

    Returns:
        For each class its 'label' and its 'name': from the model's configuration, else ImageNet's for 1000 classes,
        else numbers.
    """
    cfg: Any = model.pretrained_cfg
    count: Any = model.num_classes
    labels = _own_labels(model)
    if labels:
        descriptions = cfg.get('label_descriptions') or {}
        return [dict(label=label, name=descriptions.get(label, label)) for label in labels]
    if count == 1000 and not cfg.get('label_names'):
        imagenet = ImageNetInfo()
        return [
            dict(label=imagenet.index_to_label_name(i), name=imagenet.index_to_description(i)) for i in range(count)]
    return [dict(label=None, name=name) for name in _numbered(count)]


def _numbered(count: int) -> List[str]:
    return [f'class {i}' for i in range(count)]


def _own_labels(model: Any) -> List[str]:
    """Returns the labels in a model's configuration, none if they are of another number or only the numbers."""
    labels = list(model.pretrained_cfg.get('label_names') or ())
    return labels if len(labels) == model.num_classes and labels != _numbered(len(labels)) else []


def find_class(model: nn.Module, label: str) -> int:
    """Finds a class of a model.

    Args:
        model: A timm model.
        label: Name or label, as `class_names` has them, in any case, or a number.

    Returns:
        Its number.

    Raises:
        ModelError: There is none of this name; the message has the nearest.
    """
    names = class_names(model)
    for i, entry in enumerate(names):
        if label.lower() in (str(i), str(entry['label']).lower(), str(entry['name']).lower()):
            return i
    hint = did_you_mean(label, [str(entry['name']) for entry in names], 1)
    raise ModelError(f'The model has no class {label!r}.{hint} Its {len(names)} classes have numbers too, from 0.')


def image_files(paths: Iterable[Union[str, Path]]) -> Iterator[Path]:
    """Yields files, and for a folder the pictures in it, in the order of their names."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for path in map(Path, paths):
        files: List[Path] = []
        seen = set()
        for folder, subfolders, names in os.walk(path, followlinks=True):
            subfolders.sort()
            if os.path.realpath(folder) in seen:  # a link to a folder above would lead round and round
                subfolders.clear()
            else:
                files += (Path(folder, name) for name in names if Path(name).suffix.lower() in suffixes)
            seen.add(os.path.realpath(folder))
        yield from sorted(files) or [path]


def _mode(model: nn.Module) -> str:
    channels = getattr(model, 'in_chans', 3)
    if channels not in (1, 3):
        raise PictureError(f'The model is of {channels} channels, and pictures have 3, or 1 in grey.')
    return 'L' if channels == 1 else 'RGB'


def in_eight_bits(image: Image.Image) -> Image.Image:
    """Returns a picture with values of 8 bits: Pillow would cut off at 255 what has 16."""
    if image.mode == 'F':
        raise PictureError('its values are floating-point numbers, whose range a picture does not say')
    if not image.mode.startswith('I'):
        return image
    values = np.asarray(image).astype(np.float64) / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def data_config(model: nn.Module) -> Dict[str, Any]:
    """Returns timm's `resolve_model_data_config` of a model, with one mean and deviation for one channel."""
    config = resolve_model_data_config(model)
    if getattr(model, 'in_chans', 3) == 1:  # as timm sums the weights of the first convolution
        config.update({key: (sum(config[key]) / len(config[key]),) for key in ('mean', 'std')})
    return config


def picture_reader(model: nn.Module) -> Callable[[Union[str, Path]], torch.Tensor]:
    """Makes a function that reads a picture as a model wants it.

    Args:
        model: A timm model.

    Returns:
        A function of a file, which returns the picture (C, H, W), upright, cropped, resized and normalized. It raises
        PictureError if the file cannot be read.
    """
    transform: Any = create_transform(**data_config(model), is_training=False)
    mode = _mode(model)

    def read(path: Union[str, Path]) -> torch.Tensor:
        try:
            with Image.open(path) as image:
                return transform(in_eight_bits(ImageOps.exif_transpose(image)).convert(mode))
        except IsADirectoryError as e:
            raise PictureError('it is a folder, and has no picture in it') from e
        except Exception as e:  # decoders raise all kinds of exceptions for a broken file
            raise PictureError(f'{type(e).__name__}: {e}' if not isinstance(e, OSError) else str(e)) from e

    return read


def picture_seen(model: nn.Module, pixels: torch.Tensor) -> Image.Image:
    """Returns a picture (C, H, W) that was prepared for a model as it looks: cropped and resized."""
    config = data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    values = ((pixels * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).squeeze(-1).numpy())


def labelled_batches(model: Any, images: Union[str, Path], split: str, batch_size: int) -> Tuple[Any, int]:
    """Opens an image folder whose folders are named after the classes of a model.

    Args:
        model: A timm model; the names are its labels (`class_names`), or any of the right number if it has none of its
            own.
        images: Image folder, a folder for each class.
        split: Subfolder of `images`, which may be left out where it has no folders of splits at all.
        batch_size: Pictures at a time.

    Returns:
        An iterable of pictures (N, C, H, W) and their classes, and the number of pictures.

    Raises:
        PictureError: There is no such folder, it is of other classes, or it has other splits only.
    """
    labels = {entry['label']: i for i, entry in enumerate(class_names(model)) if entry['label']}
    kwargs: Any = dict(root=str(images), split=split, input_img_mode=_mode(model))
    try:
        dataset: Any = create_dataset('', **kwargs)
        found = set(dataset.reader.class_to_idx)
        if found <= set(labels):
            dataset = create_dataset('', class_map=labels, **kwargs)
    except Exception as e:  # timm's folder readers raise several kinds
        cause = str(e) or ('it does not exist.' if not Path(images).exists() else type(e).__name__)
        raise PictureError(f'{images} cannot be read as an image folder: {cause}') from e
    # where timm does not find the split, it takes the pictures of all others
    if Path(getattr(dataset.reader, 'root', '')) == Path(images):
        splits = sorted(p.name for p in Path(images).iterdir() if p.is_dir() and p.name.lower() in SPLITS - found)
        if splits:
            raise PictureError(f'{images} has no folder {split!r}, but {", ".join(splits)}: choose one by --split.')
    odd = sorted(found - set(labels))
    if odd and (_own_labels(model) or len(found) != model.num_classes):
        raise PictureError(
            f'{images} is of other classes than the {model.num_classes} of the model: {len(found)} folders, '
            f'{first_few(odd)} among them.')
    config = data_config(model)
    return create_loader(
        dataset, input_size=config['input_size'], batch_size=batch_size, use_prefetcher=False, num_workers=0,
        persistent_workers=False, mean=config['mean'], std=config['std'], interpolation=config['interpolation'],
        crop_pct=config['crop_pct'], crop_mode=config['crop_mode']), len(dataset)


def likeliest_classes(
        model: nn.Module,
        pixels: torch.Tensor,
        names: Sequence[Dict[str, Optional[str]]],
        top_k: int,
) -> List[Dict[str, Any]]:
    """Classifies one picture.

    Args:
        model: A timm model in eval mode.
        pixels: Picture (C, H, W), as `picture_reader` reads it.
        names: The model's `class_names`.
        top_k: Number of classes to name.

    Returns:
        The likeliest classes first, as `Prediction` has them.
    """
    with torch.inference_mode():
        pixels = pixels.unsqueeze(0).to(next(model.parameters()).device)
        probabilities = model(pixels).float().softmax(1)[0].cpu()
    top = probabilities.topk(min(top_k, len(names)))
    return [dict(index=i, **names[i], probability=probabilities[i].item()) for i in top.indices.tolist()]


def predict(model: nn.Module, paths: Iterable[Union[str, Path]], top_k: int = 5) -> Iterator[Prediction]:
    """Classifies pictures one after another.

    Args:
        model: A timm model in eval mode.
        paths: Picture files, and folders, of which every picture in them is taken.
        top_k: Number of classes to name.

    Yields:
        A prediction for each picture, in order; one that can't be read carries the error.
    """
    read, names = picture_reader(model), class_names(model)
    for path in image_files(paths):
        try:
            pixels = read(path)
        except PictureError as e:
            yield Prediction(str(path), error=str(e))
            continue
        yield Prediction(str(path), likeliest_classes(model, pixels, names, top_k))
