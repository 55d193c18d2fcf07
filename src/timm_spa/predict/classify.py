"""Classification of images, and labelled batches of image folders."""
import dataclasses
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform, resolve_model_data_config

from .._errors import UsageError
from ..checkpoints.fit import first_few
from ..training.image_folder import split_folders
from .classes import class_names, own_labels
from .image_files import ImageError, image_files, read_image
from .loading import ModelError

__all__ = [
    'Prediction', 'data_config', 'default_split', 'image_reader', 'image_seen', 'labelled_batches', 'likeliest_classes',
    'picture_reader', 'picture_seen', 'predict']


@dataclasses.dataclass
class Prediction:
    """The classes of one image, or the reason why the image could not be classified.

    Attributes:
        path: Image file.
        classes: The likeliest classes first, each with 'index', 'label' (e.g. a WordNet id, if known), 'name' and
            'probability'.
        error: Reason why the image could not be read, else None.
    """
    path: str
    classes: List[Dict[str, Any]] = dataclasses.field(default_factory=list)
    error: Optional[str] = None


def _mode(model: nn.Module) -> str:
    """Returns Pillow's mode for images of a model."""
    channels = getattr(model, 'in_chans', 3)
    if channels not in (1, 3):
        raise ImageError(
            f'Images cannot be read for a model of {channels} channels: image files have 3 channels, or 1 in grey. '
            'Create the model with in_chans=3 or in_chans=1.')
    return 'L' if channels == 1 else 'RGB'


def data_config(model: nn.Module) -> Dict[str, Any]:
    """Returns timm's `resolve_model_data_config`, with a single mean and deviation for models of one channel."""
    config = resolve_model_data_config(model)
    if getattr(model, 'in_chans', 3) == 1:  # timm sums the weights of the first convolution over the channels
        config.update({key: (sum(config[key]) / len(config[key]),) for key in ('mean', 'std')})
    return config


def image_reader(model: nn.Module) -> Callable[[Union[str, Path]], torch.Tensor]:
    """Returns a function that reads and prepares an image for a model.

    Args:
        model: A timm model.

    Returns:
        A function that takes a path and returns the image (C, H, W): upright, cropped, resized and normalized. It
        raises ImageError if the file cannot be read.
    """
    transform: Any = create_transform(**data_config(model), is_training=False)
    mode = _mode(model)

    def read(path: Union[str, Path]) -> torch.Tensor:
        return transform(read_image(path, mode))

    return read


def image_seen(model: nn.Module, pixels: torch.Tensor) -> Image.Image:
    """Returns the cropped and resized image that a model sees, from the prepared tensor (C, H, W)."""
    config = data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    values = ((pixels * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).squeeze(-1).numpy())


picture_reader, picture_seen = image_reader, image_seen  # earlier names


class _LabelledImages(torch.utils.data.Dataset):
    """Images of a timm reader. An unreadable file raises an error; timm's own dataset would return the next image."""

    def __init__(self, reader: Any, mode: str):
        self.reader = reader
        self.mode = mode
        self.transform: Any = None  # timm's loader sets it

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        file, target = self.reader[index]
        with file:
            try:
                return self.transform(read_image(file, self.mode, upright=False)), target
            except ImageError as e:
                path = self.reader.filename(index, absolute=True)
                raise ImageError(f'{path} could not be read: {e}. Replace or remove it.') from e


def default_split(images: Union[str, Path]) -> str:
    """Returns the subfolder of an image folder to measure on if none is named.

    Args:
        images: Image folder.

    Returns:
        The first of 'test', 'validation' and 'val' that exists, otherwise 'test'.
    """
    names = ('test', 'validation', 'val')
    return next((name for name in names if Path(images, name).is_dir()), names[0])


def labelled_batches(model: Any, images: Union[str, Path], split: str, batch_size: int) -> Tuple[Any, int]:
    """Opens an image folder with one subfolder for each class.

    Args:
        model: A timm model. The subfolders are named after its labels (`class_names`). A model without labels of its
            own accepts any names if their number is right.
        images: Image folder.
        split: Subfolder of `images`. It is ignored if `images` contains the class folders directly.
        batch_size: Images per batch.

    Returns:
        An iterable of images (N, C, H, W) with their classes (N,), and the number of images.

    Raises:
        ImageError: The folder does not exist, has other classes, or has other splits only.
        UsageError: `batch_size` is less than 1.
    """
    labels = {entry['label']: i for i, entry in enumerate(class_names(model)) if entry['label']}
    if batch_size < 1:
        raise UsageError(f'The batch size must be at least 1, got {batch_size}.')
    kwargs: Any = dict(root=str(images), split=split)
    try:
        reader: Any = create_dataset('', **kwargs).reader
        files, classes = [file for file, _ in reader.samples], set(reader.class_to_idx)
        if classes <= set(labels):
            reader = create_dataset('', class_map=labels, **kwargs).reader
    except Exception as e:  # timm's folder readers raise several kinds
        cause = str(e) or ('it does not exist.' if not Path(images).exists() else type(e).__name__)
        raise ImageError(f'{images} cannot be read as an image folder: {cause}') from e
    # timm reads the whole folder if it has no folder of the split
    splits = split_folders(images, files) if Path(reader.root) == Path(images) else []
    if splits:
        raise ImageError(
            f'{images} has no folder {split!r}: timm would read all its folders together. Set --split to one of '
            f'{", ".join(splits)}.')
    if '' in classes:
        raise ImageError(
            f'{images} has images outside of its class folders. Move each image to the folder of its class, or name '
            'another folder.')
    unknown = sorted(classes - set(labels))
    if unknown and (own_labels(model) or len(classes) != model.num_classes):
        raise ImageError(
            f'{images} has other classes than the {model.num_classes} of the model: {len(classes)} class folders, '
            f'unknown are {first_few(unknown)}. Name the folders after the labels of the model.')
    config = data_config(model)
    dataset: Any = _LabelledImages(reader, _mode(model))
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
    """Classifies one image.

    Args:
        model: A timm model in eval mode.
        pixels: Image (C, H, W) from `image_reader`.
        names: The model's `class_names`.
        top_k: Number of classes to return, at least 1. A model with fewer classes returns all of them.

    Returns:
        The likeliest classes first, in the form of `Prediction.classes`.

    Raises:
        ModelError: The model was created with `num_classes=0`.
        UsageError: `top_k` is less than 1.
    """
    if top_k < 1:
        raise UsageError(f'top_k must be at least 1, got {top_k}.')
    if not names:
        raise ModelError(
            f'{type(model).__name__} cannot classify images: it was created with num_classes=0. Create it with its '
            'classifier.')
    with torch.inference_mode():
        pixels = pixels.unsqueeze(0).to(next(model.parameters()).device)
        probabilities = model(pixels).float().softmax(1)[0].cpu()
    top = probabilities.topk(min(top_k, len(names)))
    return [dict(index=i, **names[i], probability=probabilities[i].item()) for i in top.indices.tolist()]


def predict(
        model: nn.Module,
        paths: Union[str, Path, Iterable[Union[str, Path]]],
        top_k: int = 5,
) -> Iterator[Prediction]:
    """Classifies images one after another.

    Args:
        model: A timm model in eval mode.
        paths: Image files and folders, or a single path. All images in a folder are classified.
        top_k: Number of classes to return for each image.

    Yields:
        A prediction for each image, in order. Its `error` is set if the image cannot be read.
    """
    names, read = class_names(model), image_reader(model)
    for path in image_files(paths):
        try:
            pixels = read(path)
        except ImageError as e:
            yield Prediction(str(path), error=str(e))
            continue
        yield Prediction(str(path), likeliest_classes(model, pixels, names, top_k))
