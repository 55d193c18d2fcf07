"""Classes of pictures, by any model that timm can create."""
import dataclasses
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform, resolve_model_data_config

from .._errors import UsageError
from ..checkpoints.fit import first_few
from .classes import class_names, find_class, own_labels
from .image_files import PictureError, image_files, in_eight_bits, read_image
from .loading import ModelError, for_inference, load_model, on_device

__all__ = [
    'ModelError', 'PictureError', 'Prediction', 'class_names', 'data_config', 'find_class', 'for_inference',
    'image_files', 'in_eight_bits', 'labelled_batches', 'likeliest_classes', 'load_model', 'on_device',
    'picture_reader', 'picture_seen', 'predict']

SPLITS = frozenset(('train', 'training', 'val', 'valid', 'validation', 'test', 'testing', 'eval', 'evaluation'))


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


def _mode(model: nn.Module) -> str:
    channels = getattr(model, 'in_chans', 3)
    if channels not in (1, 3):
        raise PictureError(f'The model is of {channels} channels, and pictures have 3, or 1 in grey.')
    return 'L' if channels == 1 else 'RGB'


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
        return transform(read_image(path, mode))

    return read


def picture_seen(model: nn.Module, pixels: torch.Tensor) -> Image.Image:
    """Returns a picture (C, H, W) that was prepared for a model as it looks: cropped and resized."""
    config = data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    values = ((pixels * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).squeeze(-1).numpy())


class _LabelledImages(torch.utils.data.Dataset):
    """Images of a reader of timm. One that cannot be read is an error: timm's own dataset takes the next instead."""

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
            except PictureError as e:
                path = self.reader.filename(index, absolute=True)
                raise PictureError(f'{path} could not be read: {e}. Replace or remove it.') from e


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
    if batch_size < 1:
        raise UsageError(f'The batch size must be at least 1, got {batch_size}.')
    kwargs: Any = dict(root=str(images), split=split)
    try:
        reader: Any = create_dataset('', **kwargs).reader
        found = set(reader.class_to_idx)
        if found <= set(labels):
            reader = create_dataset('', class_map=labels, **kwargs).reader
    except Exception as e:  # timm's folder readers raise several kinds
        cause = str(e) or ('it does not exist.' if not Path(images).exists() else type(e).__name__)
        raise PictureError(f'{images} cannot be read as an image folder: {cause}') from e
    # where timm does not find the split, it takes the pictures of all others
    if Path(getattr(reader, 'root', '')) == Path(images):
        splits = sorted(p.name for p in Path(images).iterdir() if p.is_dir() and p.name.lower() in SPLITS - found)
        if splits:
            raise PictureError(f'{images} has no folder {split!r}, but {", ".join(splits)}: choose one by --split.')
    if '' in found:
        raise PictureError(
            f'{images} has images outside of its folders of classes. Move each to the folder of its class, or name '
            'another folder.')
    odd = sorted(found - set(labels))
    if odd and (own_labels(model) or len(found) != model.num_classes):
        raise PictureError(
            f'{images} is of other classes than the {model.num_classes} of the model: {len(found)} folders, '
            f'{first_few(odd)} among them.')
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
    """Classifies one picture.

    Args:
        model: A timm model in eval mode.
        pixels: Picture (C, H, W), as `picture_reader` reads it.
        names: The model's `class_names`.
        top_k: Number of classes to name, at least 1; all if the model has no more.

    Returns:
        The likeliest classes first, as `Prediction` has them.

    Raises:
        ModelError: The model has no classes.
        UsageError: `top_k` is less than 1.
    """
    if top_k < 1:
        raise UsageError(f'top_k must be at least 1, got {top_k}.')
    if not names:
        raise ModelError(f'{type(model).__name__} has no classes: it was created with num_classes=0.')
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
    """Classifies pictures one after another.

    Args:
        model: A timm model in eval mode.
        paths: Picture files, and folders, of which every picture in them is taken; or a single one of them.
        top_k: Number of classes to name.

    Yields:
        A prediction for each picture, in order; one that can't be read carries the error.
    """
    names, read = class_names(model), picture_reader(model)
    for path in image_files(paths):
        try:
            pixels = read(path)
        except PictureError as e:
            yield Prediction(str(path), error=str(e))
            continue
        yield Prediction(str(path), likeliest_classes(model, pixels, names, top_k))
