"""Data layouts that timm's loaders need made beforehand.

    pad         stores images with a border, for the paper's random crop of small images
    downsample  reduces images to a small size by averaging, as downsampled ImageNet is made
    cifar100    unpacks CIFAR-100 into an image folder
    classes     writes the names of an image folder's classes, in timm's order

`pad` makes the training half of the paper's small-image augmentation exact: "padded with four pixels of zeros on each
side, after that randomly cropped to 32x32" (section IV.B). timm crops an image of 40x40 to 32x32 at a random place,
without resampling, when it is told `--img-size 32 --scale 0.64 0.64 --ratio 1 1`: so the padding is stored with the
image, once, in a lossless format. Validation images stay as they are.

Work that was interrupted goes on where it stopped when it is called again: an image appears under its name only when
it is complete, and one that is there is left alone.

    python train_scripts/prepare_data.py downsample IMAGENET/train OUT32/train
    python train_scripts/prepare_data.py downsample IMAGENET/validation OUT32/validation
    python train_scripts/prepare_data.py pad OUT32/train OUT40/train
    ln -s "$(realpath OUT32/validation)" OUT40/validation
"""
import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

from PIL import Image, ImageOps
from tqdm import tqdm

from timm_spa._errors import TimmSpaError
from timm_spa.checkpoints.files import replacing
from timm_spa.checkpoints.own_files import refuse_replacing

IMAGE_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.webp'}

Operation = Callable[[Image.Image], Image.Image]


class PreparationError(TimmSpaError):
    """The work cannot go on; the message names the file and what is wrong with it."""


def pad(image: Image.Image, border: int) -> Image.Image:
    """Adds a black border of so many pixels."""
    return ImageOps.expand(image, border=border, fill=0)


def downsample(image: Image.Image, size: int) -> Image.Image:
    """Reduces an image to a square, each pixel the mean of those that it covers; the aspect ratio is not kept.

    So downsampled ImageNet is made with its box filter (https://arxiv.org/abs/1707.08819).
    """
    return image.resize((size, size), Image.Resampling.BOX)


def save(image: Image.Image, target: Path) -> None:
    """Writes a PNG file, whole or not at all."""
    with replacing(target) as partial_file:
        image.save(partial_file, format='PNG', compress_level=1)


def convert_image(source: Path, target: Path, operation: Operation) -> Optional[str]:
    """Writes what the operation makes of an image, and returns what is wrong with the image, if anything is."""
    if target.exists():
        return None
    try:
        with Image.open(source) as image:
            result = operation(image.convert('RGB'))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # what Pillow raises for broken files
        return f'{source} is no readable image: {e}'
    save(result, target)
    return None


def convert_folder(source: Path, target: Path, operation: Operation, workers: int, skip_broken: bool) -> int:
    """Converts every image under a folder to PNG, keeping its sub-folders.

    Args:
        source: Folder of images, in any depth of class folders.
        target: Folder to write to; made if missing.
        operation: What to make of each image, in RGB.
        workers: Processes.
        skip_broken: Name an image that cannot be read on the standard error and go on, instead of stopping.

    Returns:
        Number of images skipped.

    Raises:
        PreparationError: There is no image, two images would get the same name, one cannot be read, or a result
            cannot be written.
    """
    # folders of classes may be links, which timm's reader follows too
    walked = os.walk(source, followlinks=True)
    files = (Path(folder, name) for folder, _, names in walked for name in names)
    images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise PreparationError(f'{source} holds no image.')
    origins: Dict[Path, Path] = {}
    for path in images:
        result = target / path.relative_to(source).with_suffix('.png')
        if result in origins:
            raise PreparationError(f'{origins[result]} and {path} would both become {result}. Rename one of them.')
        origins[result] = path
    for folder in {path.parent for path in origins}:
        folder.mkdir(parents=True, exist_ok=True)
    skipped = 0
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(convert_image, origins.values(), origins, [operation] * len(origins), chunksize=64)
        for problem in tqdm(results, total=len(origins), unit=' images', mininterval=1):
            if problem is None:
                continue
            if not skip_broken:
                pool.shutdown(cancel_futures=True)
                raise PreparationError(f'{problem}. Remove it, or leave such images out with --broken skip.')
            tqdm.write(f'skipped: {problem}', file=sys.stderr)
            skipped += 1
    return skipped


def unpack_cifar100(source: Path, target: Path, download: bool) -> None:
    """Writes CIFAR-100 as an image folder: `train` (50,000 images) and `validation` (10,000) by class.

    Args:
        source: Folder that holds, or gets, `cifar-100-python.tar.gz`.
        target: Folder to write to; made if missing.
        download: Download the archive if it is not there.

    Raises:
        PreparationError: The archive is missing, damaged or could not be downloaded; or an image cannot be written.
    """
    from torchvision.datasets import CIFAR100

    archive = source / CIFAR100.filename
    if not archive.exists() and not (source / CIFAR100.base_folder).is_dir() and not download:
        raise PreparationError(f'{archive} does not exist. Put it there, or let it be downloaded with --download.')
    try:
        # also unpacks an archive that is there; its digest is checked before it is read
        CIFAR100(str(source), download=True)
        splits = {'train': CIFAR100(str(source)), 'validation': CIFAR100(str(source), train=False)}
    except (OSError, RuntimeError) as e:
        raise PreparationError(f'CIFAR-100 could not be had from {source}: {e}') from e
    for split, dataset in splits.items():
        for name in dataset.classes:
            (target / split / name).mkdir(parents=True, exist_ok=True)
        for i, (image, label) in enumerate(tqdm(dataset, desc=split, unit=' images', mininterval=1)):
            path = target / split / dataset.classes[label] / f'{i:05}.png'
            if not path.exists():
                save(image, path)


def write_class_names(source: Path, target: Path, overwrite: bool = False) -> int:
    """Writes the classes of an image folder, one a line: a `--class-map` for timm's scripts.

    Returns:
        Number of classes.

    Raises:
        PreparationError: The folder holds no class folder.
        WriteError: The file exists, and `overwrite` is False.
    """
    refuse_replacing([target], overwrite)
    from timm.data.readers.reader_image_folder import find_images_and_targets

    _, class_to_index = find_images_and_targets(str(source))
    if not class_to_index:
        raise PreparationError(f'{source} holds no folder with images.')
    with replacing(target) as partial_file:
        partial_file.write_text(''.join(f'{name}\n' for name in class_to_index), encoding='utf-8')
    return len(class_to_index)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {value}')
    return value


def _parse(argv: Optional[List[str]]) -> Tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    verbs = parser.add_subparsers(dest='verb', required=True)
    for name, option, value, meaning in (
            ('pad', '--padding', 4, 'width of the border in pixels'), ('downsample', '--size', 32, 'width and height')):
        verb = verbs.add_parser(name)
        verb.add_argument('source', type=Path, help='folder of class folders')
        verb.add_argument('target', type=Path, help='folder to write to')
        verb.add_argument(
            option, dest='pixels', type=_positive, default=value, help=f'{meaning} (default: %(default)s)')
        verb.add_argument(
            '--broken', choices=['stop', 'skip'], default='stop',
            help='what an image that cannot be read does; it is named either way (default: %(default)s)')
        verb.add_argument(
            '--workers', type=_positive, default=os.cpu_count() or 1, help='processes (default: one a core)')
    verb = verbs.add_parser('cifar100')
    verb.add_argument('source', type=Path, help='folder with cifar-100-python.tar.gz')
    verb.add_argument('target', type=Path, help='folder to write train/ and validation/ to')
    verb.add_argument('--download', action='store_true', help='download the archive if it is not there')
    verb = verbs.add_parser('classes')
    verb.add_argument('source', type=Path, help='folder of class folders')
    verb.add_argument('target', type=Path, help='text file to write')
    verb.add_argument('--overwrite', action='store_true', help='replace the file if it is there')
    return parser, parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line, and returns its exit code."""
    parser, args = _parse(argv)
    if not args.source.is_dir() and not (args.verb == 'cifar100' and args.download):
        parser.error(f'{args.source} is not a folder.')
    try:
        if args.verb == 'cifar100':
            unpack_cifar100(args.source, args.target, args.download)
        elif args.verb == 'classes':
            print(f'{write_class_names(args.source, args.target, args.overwrite)} classes')
        else:
            operation: Operation = (
                partial(pad, border=args.pixels) if args.verb == 'pad' else partial(downsample, size=args.pixels))
            skipped = convert_folder(args.source, args.target, operation, args.workers, args.broken == 'skip')
            if skipped:
                print(f'{skipped} images skipped', file=sys.stderr)
    except TimmSpaError as e:
        print(f'prepare_data: {e}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
