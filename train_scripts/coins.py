"""Creates a small detection dataset from the photograph of coins in scikit-image.

    python train_scripts/coins.py DIR

The training images are compositions of the coins in the left half of the photograph: each coin is cut out along a
threshold, rotated, resized and placed on the background of the left half. The validation image is the right half, with
boxes from the same threshold. DIR has COCO's format and can be passed to `timm-spa detect train --data`. Needs
scikit-image and scipy.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

from timm_spa._errors import TimmSpaError
from timm_spa.checkpoints.files import WriteError
from timm_spa.predict import sample_image

COINS = (4, 13)  # fewest and most in an image; some find no free place
SCALES = (0.8, 1.5)
CONTRASTS = (0.8, 1.2)
SMALLEST_COIN = 400  # pixels
SMALLEST_GAP = 3  # pixels between coins


def find_coins(grey: np.ndarray) -> Tuple[np.ndarray, List[Tuple[slice, slice]]]:
    """Finds coins by a threshold above the local background.

    Args:
        grey: Photograph (H, W).

    Returns:
        The number of the coin, from 1, of each pixel, or 0; and the bounding box of each coin.
    """
    background = ndimage.gaussian_filter(ndimage.minimum_filter(ndimage.gaussian_filter(grey, 2), 61), 25)
    above = grey - background
    coins = ndimage.binary_fill_holes(ndimage.binary_closing(above > threshold_otsu(above), iterations=2))
    labels, _ = ndimage.label(ndimage.binary_opening(coins, iterations=4))
    return labels, ndimage.find_objects(labels)


def without_coins(grey: np.ndarray, coins: np.ndarray) -> np.ndarray:
    """Replaces coins by the average of the background around them, with its noise."""
    background = ~ndimage.binary_dilation(coins, iterations=5)
    smooth = ndimage.gaussian_filter(grey * background, 12) / ndimage.gaussian_filter(background.astype(float), 12)
    noise = (grey - smooth)[background].std()
    return smooth + np.random.default_rng(0).normal(0, noise, grey.shape)


def compose(
        background: np.ndarray,
        coins: Sequence[Tuple[np.ndarray, np.ndarray]],
        rng: np.random.Generator,
) -> Tuple[np.ndarray, List[List[int]]]:
    """Places coins on a background.

    Args:
        background: Grey image (H, W).
        coins: Pixels and mask (h, w) of each coin.
        rng: Random generator.

    Returns:
        The composition, and its boxes as (x, y, width, height).
    """
    canvas = background[::rng.choice([1, -1]), ::rng.choice([1, -1])].copy()
    occupied = np.zeros(canvas.shape, bool)
    boxes = []
    for number in rng.integers(len(coins), size=rng.integers(*COINS)):
        angle, scale = rng.uniform(0, 360), rng.uniform(*SCALES)
        pixels, mask = (
            ndimage.zoom(ndimage.rotate(values, angle, order=1, mode=mode), scale, order=1, mode='nearest')
            for values, mode in zip(coins[number], ('nearest', 'constant'), strict=True))
        (rows, columns), = ndimage.find_objects((mask > 0.5).astype(int))
        pixels, mask = pixels[rows, columns], mask[rows, columns]
        height, width = mask.shape
        y, x = (int(rng.integers(side - length)) for side, length in zip(canvas.shape, mask.shape, strict=True))
        place = slice(y, y + height), slice(x, x + width)
        around = tuple(slice(max(0, side.start - SMALLEST_GAP), side.stop + SMALLEST_GAP) for side in place)
        if occupied[around].any():
            continue
        occupied[place] = True
        opacity = ndimage.gaussian_filter(mask, 0.7, mode='constant')
        canvas[place] = opacity * pixels + (1 - opacity) * canvas[place]
        boxes.append([x, y, width, height])
    middle = canvas.mean()
    return (canvas - middle) * rng.uniform(*CONTRASTS) + middle + rng.uniform(-15, 15), boxes


def as_coco(images: Sequence[Tuple[str, Tuple[int, int], Sequence[Sequence[int]]]]) -> Dict[str, Any]:
    """Returns the annotations of images, given as file name, (height, width) and boxes."""
    entries = [
        dict(id=number, file_name=name, height=height, width=width)
        for number, (name, (height, width), _) in enumerate(images, start=1)]
    found = [(number, box) for number, (_, _, boxes) in enumerate(images, start=1) for box in boxes]
    annotations = [
        dict(id=i, image_id=number, category_id=1, bbox=list(map(int, box)), area=int(box[2] * box[3]), iscrowd=0)
        for i, (number, box) in enumerate(found, start=1)]
    return dict(images=entries, annotations=annotations, categories=[dict(id=1, name='coin')])


def create(folder: Path, count: int, seed: int) -> None:
    """Writes the dataset to a new folder."""
    grey = np.asarray(Image.open(sample_image('coins')).convert('L')).astype(float)
    middle = grey.shape[1] // 2
    labels, boxes = find_coins(grey)
    on_the_left = [
        number for number, (_, columns) in enumerate(boxes, start=1) if columns.start + columns.stop < 2 * middle]
    coins = []
    for number in on_the_left:
        box = boxes[number - 1]
        coins.append((grey[box], (labels[box] == number).astype(float)))
    background = without_coins(grey[:, :middle], labels[:, :middle] > 0)
    rng = np.random.default_rng(seed)
    train = [(f'{number:03}.png', *compose(background, coins, rng)) for number in range(count)]
    right = [
        (max(columns.start - middle, 0), rows.start, columns.stop - max(columns.start, middle), rows.stop - rows.start)
        for number, (rows, columns) in enumerate(boxes, start=1) if number not in on_the_left]
    folder.mkdir(parents=True)
    for split, images in (('train', train), ('val', [('right.png', grey[:, middle:], right)])):
        (folder / split).mkdir()
        for name, pixels, _ in images:
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name)
        content = as_coco([(name, pixels.shape, found) for name, pixels, found in images])
        (folder / f'{split}.json').write_text(json.dumps(content), encoding='utf-8')
        print(f'{folder / split}: {len(content["images"])} images, {len(content["annotations"])} coins')


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('folder', type=Path, metavar='DIR', help='folder to create')
    parser.add_argument('--images', type=int, default=64, help='number of training images (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=42, help='default: %(default)s')
    args = parser.parse_args(argv)
    try:
        if args.folder.exists():
            raise WriteError(f'{args.folder} exists already. Name a new folder.')
        create(args.folder, args.images, args.seed)
    except TimmSpaError as e:
        print(f'coins: {e}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
