"""Images and boxes of a dataset in COCO's format.

`CocoDataset` handles unusual entries as follows, and `CocoDataset.describe` reports how many there are.

- A box that reaches beyond the image is clipped to the image.
- A box without area inside the image is ignored in training and evaluation.
- An image without boxes is kept.
- A crowd (iscrowd is 1) is not used for training. In evaluation, detections inside a crowd count neither as right nor
  as wrong, as in COCO. Segmentation masks are not read, so a mask in run lengths does not turn a box into a crowd.
- Category ids may start from 0 and may have gaps: labels are 0 .. n - 1 in the order of the ids.
- 16-bit images are scaled to 8 bits by their full range. Pillow converts all other modes to RGB, except for
  floating-point images, which are an error.
- An image with a rotation in its EXIF data is rotated if the annotations give the rotated size, and read as it is
  stored if they give the stored size. If both sizes are equal, it is read as it is stored.

Everything else is an error: a missing file, a duplicate id, an annotation of an unknown image or category, an image
whose size differs from the annotations.
"""
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from ..checkpoints.fit import first_few
from ..predict import in_eight_bits
from .backbone import DetectionError

__all__ = ['CocoDataset', 'Mirrored', 'create_loader', 'find_dataset', 'read_batches', 'read_image']

SMALLEST_SIDE = 0.01  # pixels: a smaller side may become 0 when an image is resized in float32
SPLITS = {'train': ('train',), 'val': ('val', 'valid', 'validation')}

Example = Tuple[torch.Tensor, Dict[str, torch.Tensor]]
Batch = Tuple[List[torch.Tensor], List[Dict[str, torch.Tensor]]]


def read_image(path: Union[str, Path], size: Optional[Tuple[int, int]] = None) -> torch.Tensor:
    """Reads an image as RGB.

    Args:
        path: Image file.
        size: Expected width and height, before or after the rotation in the EXIF data. If None, the image is rotated
            as its EXIF data say.

    Returns:
        The image (3, H, W), uint8.

    Raises:
        DetectionError: The image cannot be read, or has another size.
    """
    try:
        with Image.open(path) as opened:
            image: Image.Image = opened
            if size is None or image.size != size:
                stored, image = image.size, ImageOps.exif_transpose(image)
                if size not in (None, image.size):
                    raise DetectionError(
                        f'{path} has {stored[0]} x {stored[1]} pixels, but the annotations give {size[0]} x {size[1]}. '
                        'Use the images that were annotated, or correct the sizes in the annotations.')
            return pil_to_tensor(in_eight_bits(image).convert('RGB'))
    except DetectionError:
        raise
    except IsADirectoryError as e:
        raise DetectionError(
            f'{path} cannot be read as an image: it is a folder. Name an image, or a folder that contains images.',
        ) from e
    except Exception as e:  # decoders raise many types of exceptions for a damaged file
        raise DetectionError(f'{path} cannot be read as an image: {getattr(e, "strerror", None) or e}.') from e


class CocoDataset(Dataset):
    """Images of a folder, with boxes from a JSON file in COCO's format.

    Attributes:
        categories: 'id' and 'name' of each class, in the order of the labels. The id is None for a class that the
            file does not define.
        image_ids: Id of each image.
        annotations: For each image, a list of 'bbox' (left, top, width, height in pixels), 'label', 'area', 'iscrowd'.
        counts: Numbers of clipped boxes, boxes without area, crowds and images without boxes.
    """

    def __init__(
            self,
            images: Union[str, Path],
            annotations: Union[str, Path],
            categories: Optional[Sequence[Dict[str, Any]]] = None,
    ):
        """
        Args:
            images: Folder of the images.
            annotations: JSON file.
            categories: Classes of a detector, 'id' and 'name' of each. Labels follow their order; classes are matched
                by name. If None, the categories of the file are used.

        Raises:
            DetectionError: The file is invalid, an image is missing, or `categories` lacks a category of the file.
        """
        self.folder, self.source = Path(images), Path(annotations)
        self.counts = dict(clipped=0, without_area=0, crowds=0, empty=0)
        content = _read_json(self.source)
        try:
            self._read_categories(content['categories'], categories)
            self._read_images(content['images'])
            self._read_annotations(content['annotations'])
        except DetectionError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
            cause = f'an entry lacks {e}' if isinstance(e, KeyError) else str(e)
            raise DetectionError(
                f"{self.source} is not in COCO's format: {cause}. Export the dataset in COCO's detection format.",
            ) from e
        missing = [name for name in self.file_names if not (self.folder / name).is_file()]
        if missing:
            raise DetectionError(
                f'{len(missing)} of {len(self.file_names)} images of {self.source} are missing in {self.folder}: '
                f'{first_few(missing)}. Add them, or name the folder that contains them.')

    def _read_categories(
            self,
            categories: List[Dict[str, Any]],
            detector_categories: Optional[Sequence[Dict[str, Any]]],
    ) -> None:
        categories = sorted(categories, key=lambda category: category['id'])
        self._check_unique([c['id'] for c in categories], 'category id')
        for name in (c['name'] for c in categories):
            if not isinstance(name, (str, int)) or isinstance(name, bool):
                raise DetectionError(
                    f'{self.source}: a category name must be a text or a whole number, got {name!r}. Rename the '
                    'category.')
        self._check_unique([str(c['name']) for c in categories], 'category name')
        if detector_categories is None:
            self.categories = [dict(id=c['id'], name=str(c['name'])) for c in categories]
            return
        ids = {str(c['name']): c['id'] for c in categories}
        names = [c['name'] for c in detector_categories]
        if len(set(names)) < len(names):  # boxes would get the last label of a name
            raise DetectionError(
                f'Categories for {self.source} must have different names, got {first_few(names)}. Rename the '
                'duplicates.')
        unknown = sorted(ids.keys() - set(names))
        if unknown:
            raise DetectionError(
                f'{self.source} has categories that the detector was not trained on: {first_few(unknown)}. The '
                f'detector knows {first_few(names)}. Rename the categories, or remove them from the file.')
        self.categories = [dict(id=ids.get(name), name=name) for name in names]

    def _read_images(self, images: List[Dict[str, Any]]) -> None:
        self.image_ids = [image['id'] for image in images]
        self._check_unique(self.image_ids, 'image id')
        self.file_names = [str(image['file_name']) for image in images]
        self.sizes = [(self._side(image, 'width'), self._side(image, 'height')) for image in images]

    def _read_annotations(self, annotations: List[Dict[str, Any]]) -> None:
        """Reads the boxes, and drops those without area inside their image."""
        labels = {c['id']: label for label, c in enumerate(self.categories) if c['id'] is not None}
        indices = {image_id: index for index, image_id in enumerate(self.image_ids)}
        self.annotations: List[List[Dict[str, Any]]] = [[] for _ in self.image_ids]
        self._check_unique([a['id'] for a in annotations if 'id' in a], 'annotation id')
        for a in annotations:
            where = f'{self.source}: annotation {a.get("id", a)}'
            for key in ('image_id', 'category_id', 'bbox'):
                if key not in a:
                    raise DetectionError(f'{where}: {key} is missing. Add it, or remove the annotation.')
            for key, known, table in (('image_id', indices, 'images'), ('category_id', labels, 'categories')):
                if isinstance(a[key], bool) or a[key] not in known:  # True equals 1
                    raise DetectionError(
                        f'{where}: unknown {key} {a[key]!r}. Add it to the list {table}, or remove the annotation.')
            index = indices[a['image_id']]
            box = self._clip(a['bbox'], self.sizes[index], where)
            if box is None:
                continue
            crowd = int(_number(a.get('iscrowd') or 0, f'{where}: iscrowd') != 0)
            area = _number(a.get('area') or 0, f'{where}: area')
            self.counts['crowds'] += crowd
            self.annotations[index].append(dict(
                bbox=box, label=labels[a['category_id']], iscrowd=crowd,
                area=area if 0 < area < math.inf else box[2] * box[3]))
        self.counts['empty'] = sum(not boxes for boxes in self.annotations)

    def _check_unique(self, values: Sequence[Any], what: str) -> None:
        seen = set()
        for value in values:
            if value in seen:
                raise DetectionError(f'{self.source}: duplicate {what} {value!r}. Rename or remove one of the entries.')
            seen.add(value)

    def _side(self, image: Dict[str, Any], key: str) -> int:
        name = f'{self.source}: image {image["id"]!r}: {key}'
        value = _number(image.get(key), name)
        if value < 1 or not value.is_integer():
            raise DetectionError(f'{name} must be a whole number of pixels from 1, got {image[key]!r}.')
        return int(value)

    def _clip(self, box: Any, size: Tuple[int, int], where: str) -> Optional[List[float]]:
        """Returns the part of a box inside the image, or None if it has no area."""
        if not isinstance(box, list) or len(box) != 4 or not all(
                type(value) in (int, float) and abs(value) <= sys.float_info.max for value in box):
            raise DetectionError(f'{where}: bbox must be four numbers (left, top, width, height), got {box!r}.')
        left, top, width, height = map(float, box)
        x0, x1 = (min(max(x, 0.), size[0]) for x in (left, left + width))
        y0, y1 = (min(max(y, 0.), size[1]) for y in (top, top + height))
        if x1 - x0 < SMALLEST_SIDE or y1 - y0 < SMALLEST_SIDE:
            self.counts['without_area'] += 1
            return None
        if (x0, y0, x1, y1) == (left, top, left + width, top + height):
            return [left, top, width, height]
        self.counts['clipped'] += 1
        return [x0, y0, x1 - x0, y1 - y0]

    def describe(self) -> str:
        """Returns one line with the size of the dataset and the number of unusual boxes."""
        boxes = sum(map(len, self.annotations))
        unusual = dict(
            clipped='clipped to the image', without_area='without area ignored', crowds='crowds not used for training')
        notes = [f'{self.counts[key]} {text}' for key, text in unusual.items() if self.counts[key]]
        return (
            f'{self.source}: {len(self)} images, {self.counts["empty"]} without boxes; {boxes} boxes of '
            f'{len(self.categories)} categories{"; " if notes else ""}{", ".join(notes)}')

    def check_images(self, indices: Iterable[int]) -> None:
        """Compares the sizes in the headers of image files with the annotations, without decoding the images.

        Args:
            indices: Indices of the images in the dataset.

        Raises:
            DetectionError: An image cannot be opened, or has another size.
        """
        for index in indices:
            path = self.folder / self.file_names[index]
            try:
                with Image.open(path) as image:
                    fits = image.size == self.sizes[index]
            except Exception:  # decoders raise many types of exceptions for a damaged file
                fits = False
            if not fits:
                read_image(path, self.sizes[index])  # accepts a rotated image, and raises the right message otherwise

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Example:
        """Returns an image (3, H, W) from 0 to 1, with 'boxes' (T, 4: left, top, right, bottom) and 'labels' (T,)."""
        image = read_image(self.folder / self.file_names[index], self.sizes[index]).float() / 255
        annotations = [a for a in self.annotations[index] if not a['iscrowd']]
        boxes = torch.tensor([a['bbox'] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return image, dict(boxes=boxes, labels=torch.tensor([a['label'] for a in annotations], dtype=torch.long))


class Mirrored(Dataset):
    """View of a dataset in which half of the images are mirrored, for one epoch of training.

    The draws depend only on seed, epoch and index. A resumed training and any number of workers draw the same.
    """

    def __init__(self, dataset: CocoDataset, seed: int, epoch: int):
        """
        Args:
            dataset: Images and boxes. The dataset is not changed.
            seed: Seed of the draws.
            epoch: Epoch. Each epoch mirrors other images.
        """
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        """Returns an example of the dataset, mirrored or unchanged."""
        image, target = self.dataset[index]
        seed = (self.seed * 100_003 + self.epoch) * 1_000_003 + index
        if torch.rand((), generator=torch.Generator().manual_seed(seed % 2 ** 63)).item() < 0.5:
            image = image.flip(-1)
            boxes = target['boxes'].clone()
            boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
            target = dict(target, boxes=boxes)
        return image, target


class _ErrorsAsExamples(Dataset):
    """View of a dataset that returns an error in place of an unreadable example.

    If a worker raised the error, DataLoader would replace its message by the worker's traceback.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Union[Example, DetectionError]:
        try:
            return self.dataset[index]
        except DetectionError as e:
            return e


def _collate(examples: Sequence[Union[Example, DetectionError]]) -> Union[Batch, DetectionError]:
    """Returns a list of images and a list of targets, or the first error."""
    for example in examples:
        if isinstance(example, DetectionError):
            return example
    images, targets = zip(*examples, strict=True)
    return list(images), list(targets)


def create_loader(
        dataset: Dataset,
        indices: Sequence[int],
        batch_size: int,
        workers: int = 0,
        pin_memory: bool = False,
) -> DataLoader:
    """Creates a DataLoader for `read_batches`, which reads the given indices of a dataset in their order."""
    sampler: Any = indices  # any iterable of indices with a length
    return DataLoader(
        _ErrorsAsExamples(dataset), batch_size, sampler=sampler, num_workers=workers, collate_fn=_collate,
        pin_memory=pin_memory)


def read_batches(loader: DataLoader) -> Iterator[Batch]:
    """Yields a list of images and a list of targets for each batch of `create_loader`.

    Raises:
        DetectionError: An image cannot be read, or has another size than its annotations.
    """
    for batch in loader:
        if isinstance(batch, DetectionError):
            raise batch
        yield batch


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise DetectionError(f'{name} must be a number, got {value!r}.') from None


def find_dataset(folder: Union[str, Path], split: str) -> Tuple[Path, Path]:
    """Finds images and annotations of a split of a dataset.

    Args:
        folder: Folder of the dataset, in COCO's layout (train2017 and annotations/instances_train2017.json, with any
            year or none), or with train and train.json, or with train/_annotations.coco.json.
        split: 'train' or 'val'.

    Returns:
        Folder of the images, and JSON file.

    Raises:
        DetectionError: No dataset matches, or more than one.
    """
    folder = Path(folder)
    matches = []
    for name in SPLITS[split]:
        for pattern in (f'annotations/instances_{name}*.json', f'annotations/{name}*.json', f'{name}*.json'):
            for file in sorted(folder.glob(pattern)):
                stem = file.stem.removeprefix('instances_')
                candidates = [folder / stem, folder / 'images' / stem, *(folder / n for n in SPLITS[split])]
                matches += [(images, file) for images in candidates if images.is_dir()][:1]
        matches += [(file.parent, file) for file in folder.glob(f'{name}/_annotations.coco.json')]
    matches = list(dict.fromkeys(matches))
    if len(matches) != 1:
        files = first_few([os.path.relpath(file, folder) for _, file in matches]) or 'none'
        raise DetectionError(
            f'{folder} must contain one JSON file for the split {split!r} and a folder of images with the same name, '
            f'e.g. annotations/instances_{split}2017.json and {split}2017. Found: {files}. Rename the files, or name '
            f'them with --{split}-images and --{split}-annotations.')
    return matches[0]


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        with open(path, encoding='utf-8-sig') as f:
            content = json.load(f)
    except (OSError, ValueError) as e:
        raise DetectionError(f'{path} cannot be read as JSON: {getattr(e, "strerror", None) or e}.') from e
    lists = ('images', 'annotations', 'categories')
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise DetectionError(
            f"{path} is not in COCO's format: it must have the lists {', '.join(lists)}. Export the dataset in COCO's "
            'detection format.')
    for key in ('images', 'categories'):
        if not content[key]:
            raise DetectionError(f'{path}: the list {key} is empty. Add at least one entry.')
    return content
