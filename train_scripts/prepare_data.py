"""Prepares image folders for timm's loaders.

    pad         stores images with a border, for the paper's random crop of small images
    downsample  reduces images to a small size by averaging, as in downsampled ImageNet
    cifar100    unpacks CIFAR-100 into an image folder
    classes     writes the class names of an image folder, in timm's order

`pad` is needed for the paper's augmentation of small images: "padded with four pixels of zeros on each side, after that
randomly cropped to 32x32" (section IV.B). With `--img-size 32 --scale 0.64 0.64 --ratio 1 1`, timm crops images of
40x40 to 32x32 at a random position, without resampling. The padded training images are stored once, in a lossless
format. Validation images are not padded.

Run the same command again to continue after an interruption. Images are written atomically, and existing ones are kept.

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


def pad(image: Image.Image, border: int) -> Image.Image:
    """Adds a black border of `border` pixels."""
    return ImageOps.expand(image, border=border, fill=0)


def downsample(image: Image.Image, size: int) -> Image.Image:
    """Reduces an image to a square with a box filter, without keeping the aspect ratio.

    Downsampled ImageNet (https://arxiv.org/abs/1707.08819) uses the same filter.
    """
    return image.resize((size, size), Image.Resampling.BOX)


def save(image: Image.Image, target: Path) -> None:
    """Writes a PNG file atomically."""
    with replacing(target) as partial_file:
        image.save(partial_file, format='PNG', compress_level=1)


def convert_image(source: Path, target: Path, operation: Operation) -> Optional[str]:
    """Applies an operation to an image file; returns an error message if the image cannot be read."""
    if target.exists():
        return None
    try:
        with Image.open(source) as image:
            result = operation(image.convert('RGB'))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # Pillow's errors for broken files
        return f'{source} cannot be read as an image: {e}'
    save(result, target)
    return None


def convert_folder(source: Path, target: Path, operation: Operation, workers: int, skip_broken: bool) -> int:
    """Converts every image under a folder to PNG, keeping its subfolders.

    Args:
        source: Folder of images, in any depth of class folders.
        target: Folder to write to; created if missing.
        operation: Function of an RGB image that returns the new image.
        workers: Number of processes.
        skip_broken: Skip images that cannot be read and list them on standard error, instead of stopping.

    Returns:
        Number of images skipped.

    Raises:
        TimmSpaError: No images found, two images would get the same name, an image cannot be read, or a result
            cannot be written.
    """
    # timm's reader follows links to class folders too
    walked = os.walk(source, followlinks=True)
    files = (Path(folder, name) for folder, _, names in walked for name in names)
    images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise TimmSpaError(f'No images found in {source}. Supported suffixes: {", ".join(sorted(IMAGE_SUFFIXES))}.')
    origins: Dict[Path, Path] = {}
    for path in images:
        result = target / path.relative_to(source).with_suffix('.png')
        if result in origins:
            raise TimmSpaError(f'{origins[result]} and {path} would both become {result}. Rename one of them.')
        origins[result] = path
    for folder in {path.parent for path in origins}:
        folder.mkdir(parents=True, exist_ok=True)
    skipped = 0
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(convert_image, origins.values(), origins, [operation] * len(origins), chunksize=64)
        for error in tqdm(results, total=len(origins), unit=' images', mininterval=1):
            if error is None:
                continue
            if not skip_broken:
                pool.shutdown(cancel_futures=True)
                raise TimmSpaError(f'{error}. Remove the file, or skip such images with --broken skip.')
            tqdm.write(f'skipped: {error}', file=sys.stderr)
            skipped += 1
    return skipped


def unpack_cifar100(source: Path, target: Path, download: bool) -> None:
    """Writes CIFAR-100 as an image folder: `train` (50,000 images) and `validation` (10,000) by class.

    Args:
        source: Folder of `cifar-100-python.tar.gz`, or folder to download it to.
        target: Folder to write to; created if missing.
        download: Download the archive if it is missing.

    Raises:
        TimmSpaError: The archive is missing, damaged or could not be downloaded; or an image cannot be written.
    """
    from torchvision.datasets import CIFAR100

    archive = source / CIFAR100.filename
    if not archive.exists() and not (source / CIFAR100.base_folder).is_dir() and not download:
        raise TimmSpaError(f'{archive} not found. Copy it to this path, or add --download.')
    try:
        # unpacks an existing archive too, after a check of its digest
        CIFAR100(str(source), download=True)
        splits = {'train': CIFAR100(str(source)), 'validation': CIFAR100(str(source), train=False)}
    except (OSError, RuntimeError) as e:
        raise TimmSpaError(
            f'CIFAR-100 cannot be read from {source}: {e}. Delete its files in this folder and add --download.') from e
    for split, dataset in splits.items():
        for name in dataset.classes:
            (target / split / name).mkdir(parents=True, exist_ok=True)
        for i, (image, label) in enumerate(tqdm(dataset, desc=split, unit=' images', mininterval=1)):
            path = target / split / dataset.classes[label] / f'{i:05}.png'
            if not path.exists():
                save(image, path)


def write_class_names(source: Path, target: Path, overwrite: bool = False) -> int:
    """Writes the class names of an image folder, one per line, as a `--class-map` for timm's scripts.

    Returns:
        Number of classes.

    Raises:
        TimmSpaError: No class folders found.
        WriteError: The file exists, and `overwrite` is False.
    """
    refuse_replacing([target], overwrite)
    from timm.data.readers.reader_image_folder import find_images_and_targets

    _, class_to_index = find_images_and_targets(str(source))
    if not class_to_index:
        raise TimmSpaError(f'No class folders with images found in {source}. Give a folder of class folders.')
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
            help='stop at an image that cannot be read, or skip and list it (default: %(default)s)')
        verb.add_argument(
            '--workers', type=_positive, default=os.cpu_count() or 1,
            help='number of processes (default: one per core)')
    verb = verbs.add_parser('cifar100')
    verb.add_argument('source', type=Path, help='folder with cifar-100-python.tar.gz')
    verb.add_argument('target', type=Path, help='folder to write train/ and validation/ to')
    verb.add_argument('--download', action='store_true', help='download the archive if it is missing')
    verb = verbs.add_parser('classes')
    verb.add_argument('source', type=Path, help='folder of class folders')
    verb.add_argument('target', type=Path, help='text file to write')
    verb.add_argument('--overwrite', action='store_true', help='replace an existing file')
    return parser, parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns its exit code."""
    parser, args = _parse(argv)
    if not args.source.is_dir() and not (args.verb == 'cifar100' and args.download):
        parser.error(f'{args.source} is not a folder. Give an existing one.')
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
