"""Images and boxes of a dataset in COCO's format.

What is odd in a file is dealt with as follows, and counted; `CocoDataset.describe` says the counts.

- A box that reaches beyond the image is clipped to it.
- A box without area inside the image is left out, of training and of evaluation.
- An image without a box is kept: there is nothing in it to find.
- A crowd (iscrowd of 1, with a mask as run lengths or without) is not trained on; in evaluation a detection in it
  counts neither for nor against, as COCO does. Masks are not read: one in run lengths alone makes no crowd.
- Ids of categories may have gaps and may start from 0: labels are 0 .. n - 1 in the order of the ids.
- An image of 16 bits is brought to 8 by its full range. Others become RGB as Pillow does it, but for those of
  floating-point numbers, which are an error.
- An image that its EXIF data rotate is rotated if the file's width and height are those of the rotated image, and
  read as it is stored if they are those of the stored one. If both are the same, it is read as it is stored.

Everything else that does not add up is an error: a file that is missing, an id that is there twice, an annotation of a
image or category that the file does not have, an image of another size than the file says.
"""
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from ..checkpoints.fit import first_few
from ..predict import in_eight_bits
from .backbone import DetectionError

__all__ = ['CocoDataset', 'Mirrored', 'collate', 'find_dataset', 'read_batches', 'read_image']

SMALLEST_SIDE = 0.01  # pixels: less may be nothing once an image is resized in float32
SPLITS = {'train': ('train',), 'val': ('val', 'valid', 'validation')}

Example = Tuple[torch.Tensor, Dict[str, torch.Tensor]]


def read_image(path: Union[str, Path], size: Optional[Tuple[int, int]] = None) -> torch.Tensor:
    """Reads an image as RGB.

    Args:
        path: The file.
        size: Width and height that it should have, with or without the rotation in its EXIF data; if None it is
            rotated as these say.

    Returns:
        The image (3, H, W), uint8.

    Raises:
        DetectionError: It cannot be read, or has another size.
    """
    try:
        with Image.open(path) as opened:
            image: Image.Image = opened
            if size is None or image.size != size:
                stored, image = image.size, ImageOps.exif_transpose(image)
                if size not in (None, image.size):
                    raise DetectionError(
                        f'{path} has {stored[0]} x {stored[1]} pixels, and the annotations say {size[0]} x {size[1]}. '
                        'They are of another copy of the image.')
            return pil_to_tensor(in_eight_bits(image).convert('RGB'))
    except DetectionError:
        raise
    except IsADirectoryError as e:
        raise DetectionError(f'{path} cannot be read as an image: it is a folder without images.') from e
    except Exception as e:  # decoders raise all kinds of exceptions for a broken file
        raise DetectionError(f'{path} cannot be read as an image: {getattr(e, "strerror", None) or e}.') from e


class CocoDataset(Dataset):
    """Images and boxes of a folder and a JSON file in COCO's format; see the head of this module for odd ones.

    Attributes:
        categories: 'id' and 'name' of each class, in the order of the labels. The id is None where a category was
            asked for that the file does not have.
        image_ids: Id of each image.
        annotations: Of each image 'bbox' (left, top, width, height in pixels), 'label', 'area' and 'iscrowd'.
        counts: How many boxes were clipped or left out, and the like.
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
            annotations: The JSON file.
            categories: Classes of a detector, 'id' and 'name' of each; labels follow their order, by their names. The
                file's own if None.

        Raises:
            DetectionError: The file is none of COCO's format or contradicts itself, an image is missing, or a
                category of the file is none of `categories`.
        """
        self.folder, self.source = Path(images), Path(annotations)
        self.counts = dict(clipped=0, without_area=0, crowds=0, empty=0)
        content = _read_json(self.source)
        try:
            self._read(content, categories)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
            if isinstance(e, DetectionError):
                raise
            lacks = f'an entry lacks {e}' if isinstance(e, KeyError) else str(e)
            raise DetectionError(f'{self.source} is not in the format of COCO: {lacks}.') from e
        missing = [name for name in self.file_names if not (self.folder / name).is_file()]
        if missing:
            raise DetectionError(
                f'{len(missing)} of {len(self.file_names)} images of {self.source} are not in {self.folder}: '
                f'{first_few(missing)}.')

    def _read(self, content: Dict[str, Any], wanted: Optional[Sequence[Dict[str, Any]]]) -> None:
        own = sorted(content['categories'], key=lambda category: category['id'])
        self._refuse_twice([c['id'] for c in own], 'category id')
        self._refuse_twice([_class_name(c['name'], self.source) for c in own], 'category name')
        if wanted is None:
            self.categories = [dict(id=c['id'], name=str(c['name'])) for c in own]
        else:
            by_name = {str(c['name']): c['id'] for c in own}
            names = [c['name'] for c in wanted]
            if len(set(names)) < len(names):  # boxes would get the last label of a name
                raise DetectionError(f'Categories of {self.source} must have different names, got {first_few(names)}.')
            unknown = sorted(by_name.keys() - {c['name'] for c in wanted})
            if unknown:
                raise DetectionError(
                    f'{self.source} has categories that the detector was not trained on: {first_few(unknown)}. It '
                    f'knows {first_few([c["name"] for c in wanted])}.')
            self.categories = [dict(id=by_name.get(c['name']), name=c['name']) for c in wanted]
        labels = {c['id']: label for label, c in enumerate(self.categories) if c['id'] is not None}
        self.image_ids = [image['id'] for image in content['images']]
        self._refuse_twice(self.image_ids, 'image id')
        self.file_names = [str(image['file_name']) for image in content['images']]
        self.sizes = [(self._side(image, 'width'), self._side(image, 'height')) for image in content['images']]
        self.annotations: List[List[Dict[str, Any]]] = [[] for _ in self.image_ids]
        places = {image_id: place for place, image_id in enumerate(self.image_ids)}
        self._refuse_twice([a['id'] for a in content['annotations'] if 'id' in a], 'annotation id')
        for a in content['annotations']:
            named = f'{self.source}: annotation {a.get("id", a)}'
            lacking = [key for key in ('image_id', 'category_id', 'bbox') if key not in a]
            if lacking:
                raise DetectionError(f'{named} has no {lacking[0]}.')
            if isinstance(a['image_id'], bool) or a['image_id'] not in places:  # True equals 1
                raise DetectionError(f'{named} is of an image {a["image_id"]!r}, which the file does not have.')
            if isinstance(a['category_id'], bool) or a['category_id'] not in labels:
                raise DetectionError(f'{named} is of a category {a["category_id"]!r}, which the file does not have.')
            place = places[a['image_id']]
            box = self._clipped(a['bbox'], self.sizes[place], named)
            if box is None:
                continue
            crowd = int(_number(a.get('iscrowd') or 0, f'{named} has the iscrowd') != 0)
            self.counts['crowds'] += crowd
            area = _number(a.get('area') or 0, f'{named} has the area')
            self.annotations[place].append(dict(
                bbox=box, label=labels[a['category_id']], iscrowd=crowd,
                area=area if 0 < area < math.inf else box[2] * box[3]))
        self.counts['empty'] = sum(not of_image for of_image in self.annotations)

    def _refuse_twice(self, ids: Sequence[Any], what: str) -> None:
        seen = set()
        for one in ids:
            if one in seen:
                raise DetectionError(f'{self.source} has the {what} {one!r} twice.')
            seen.add(one)

    def _side(self, image: Dict[str, Any], key: str) -> int:
        said = f'{self.source}: image {image["id"]!r} has the {key}'
        value = _number(image.get(key), said)
        if value < 1 or not value.is_integer():
            raise DetectionError(f'{said} {image[key]!r}, which is no number of pixels.')
        return int(value)

    def _clipped(self, box: Any, size: Tuple[int, int], named: str) -> Optional[List[float]]:
        """Returns a box inside the image, None if nothing is left of it."""
        if not isinstance(box, list) or len(box) != 4 or not all(
                type(value) in (int, float) and abs(value) <= sys.float_info.max for value in box):
            raise DetectionError(f'{named} has a bbox that is not four numbers: {box!r}.')
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
        """Says in one line what the dataset has, and what was left out of it."""
        boxes = sum(map(len, self.annotations))
        names = dict(
            clipped='clipped to the image', without_area='without area left out',
            crowds='crowds, which are not trained on')
        odd = [f'{self.counts[key]} {name}' for key, name in names.items() if self.counts[key]]
        return (
            f'{self.source}: {len(self)} images, {self.counts["empty"]} without a box; {boxes} boxes of '
            f'{len(self.categories)} categories{"; " if odd else ""}{", ".join(odd)}')

    def check_images(self, places: Iterable[int]) -> None:
        """Compares the sizes in the heads of image files with those of the annotations; nothing is decoded.

        Args:
            places: Places of the images in the dataset.

        Raises:
            DetectionError: An image cannot be opened, or has another size.
        """
        for place in places:
            path = self.folder / self.file_names[place]
            try:
                with Image.open(path) as image:
                    fits = image.size == self.sizes[place]
            except Exception:  # decoders raise all kinds of exceptions for a broken file
                fits = False
            if not fits:
                read_image(path, self.sizes[place])  # says what is wrong with it, unless it is rotated

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Example:
        """Returns an image (3, H, W) from 0 to 1, and 'boxes' (T, 4: left, top, right, bottom) and 'labels' (T,)."""
        image = read_image(self.folder / self.file_names[index], self.sizes[index]).float() / 255
        found = [a for a in self.annotations[index] if not a['iscrowd']]
        boxes = torch.tensor([a['bbox'] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return image, dict(boxes=boxes, labels=torch.tensor([a['label'] for a in found], dtype=torch.long))


class Mirrored(Dataset):
    """View of a dataset with half of the images mirrored, as training reads it in one epoch.

    The draws depend on seed, epoch and index only, so that neither a resume nor the number of workers changes them.
    """

    def __init__(self, dataset: CocoDataset, seed: int, epoch: int):
        """
        Args:
            dataset: Images and boxes, which are not changed.
            seed: Seed of the draws.
            epoch: Epoch, which has draws of its own.
        """
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        """Returns the example of the dataset, mirrored or not."""
        image, target = self.dataset[index]
        seed = (self.seed * 100_003 + self.epoch) * 1_000_003 + index
        if torch.rand((), generator=torch.Generator().manual_seed(seed % 2 ** 63)).item() < 0.5:
            image = image.flip(-1)
            boxes = target['boxes'].clone()
            boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
            target = dict(target, boxes=boxes)
        return image, target


def collate(examples: Sequence[Example]) -> Tuple[List[torch.Tensor], List[Dict[str, torch.Tensor]]]:
    """Makes a batch as detectors take it: a list of images, and a list of what is in them."""
    images, targets = zip(*examples, strict=True)
    return list(images), list(targets)


def read_batches(loader: Any) -> Iterator[Any]:
    """Yields the batches of a DataLoader; an error of a worker has its own message, without the worker's traceback."""
    try:
        yield from loader
    except DetectionError as e:
        raise DetectionError(str(e).rpartition('DetectionError: ')[2].strip()) from e


def _class_name(name: Any, source: Path) -> str:
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise DetectionError(f'{source} has a category with the name {name!r}. Give each category a text as its name.')
    return str(name)


def _number(value: Any, said: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise DetectionError(f'{said} {value!r}, which is no number.') from None


def find_dataset(folder: Union[str, Path], split: str) -> Tuple[Path, Path]:
    """Finds images and annotations of a part of a dataset.

    Args:
        folder: The dataset: COCO's own layout (train2017, annotations/instances_train2017.json), or train and
            train.json, or train/_annotations.coco.json; the year is any or none.
        split: 'train' or 'val'.

    Returns:
        Folder of the images, and JSON file.

    Raises:
        DetectionError: There is none, or more than one.
    """
    folder = Path(folder)
    found = []
    for name in SPLITS[split]:
        for pattern in (f'annotations/instances_{name}*.json', f'annotations/{name}*.json', f'{name}*.json'):
            for file in sorted(folder.glob(pattern)):
                stem = file.stem.removeprefix('instances_')
                places = [folder / stem, folder / 'images' / stem, *(folder / n for n in SPLITS[split])]
                found += [(place, file) for place in places if place.is_dir()][:1]
        found += [(file.parent, file) for file in folder.glob(f'{name}/_annotations.coco.json')]
    found = list(dict.fromkeys(found))
    if len(found) != 1:
        said = 'none' if not found else first_few([os.path.relpath(file, folder) for _, file in found])
        raise DetectionError(
            f'{folder} should have one JSON file of the part {split!r}, and a folder of images that is named like '
            f'it, e.g. annotations/instances_{split}2017.json and {split}2017: found {said}. Or name both with '
            f'--{split}-images and --{split}-json.')
    return found[0]


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        with open(path, encoding='utf-8-sig') as f:
            content = json.load(f)
    except (OSError, ValueError) as e:
        raise DetectionError(f'{path} cannot be read as JSON: {getattr(e, "strerror", None) or e}.') from e
    lists = ('images', 'annotations', 'categories')
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise DetectionError(
            f'{path} is not in the format of COCO: it should have the lists {", ".join(lists)} (of a detection '
            'dataset, with boxes).')
    if not content['images'] or not content['categories']:
        raise DetectionError(f'{path} has no {"images" if not content["images"] else "categories"}.')
    return content
