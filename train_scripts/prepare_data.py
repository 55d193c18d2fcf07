"""Data layouts that timm's loaders need made beforehand.

`pad` makes the training half of the paper's small-image augmentation exact: "padded with four pixels of zeros on each
side, after that randomly cropped to 32x32" (section IV.B). timm crops an image of 40x40 to 32x32 at a random place,
without resampling, when it is told `--img-size 32 --scale 0.64 0.64 --ratio 1 1`: so the padding is stored with the
image, once, in a lossless format. Validation images stay as they are.

    python train_scripts/prepare_data.py pad DIR/train OUT/train
    ln -s "$(realpath DIR/validation)" OUT/validation
"""
import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import List, Optional, Tuple

from PIL import Image, ImageOps

IMAGE_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.webp'}


def pad_image(source: Path, target: Path, padding: int) -> Optional[str]:
    """Writes an image with a black border as PNG, and returns what is wrong with it, if anything is.

    A target that exists is complete (it appears under its name only when it is written) and is left alone, so that an
    interrupted run goes on where it stopped.
    """
    if target.exists():
        return None
    partial = target.with_name(f'.{target.name}.{os.getpid()}')
    try:
        with Image.open(source) as image:
            ImageOps.expand(image.convert('RGB'), border=padding, fill=0).save(partial, format='PNG', compress_level=1)
        partial.replace(target)
    except OSError as e:
        partial.unlink(missing_ok=True)
        return f'{source}: {e}'
    return None


def pad_folder(source: Path, target: Path, padding: int, workers: int) -> Tuple[int, List[str]]:
    """Pads every image under a folder, keeping its sub-folders.

    Args:
        source: Folder of images, in any depth of class folders.
        target: Folder to write to; made if missing.
        padding: Width of the border, in pixels.
        workers: Processes.

    Returns:
        Number of images found, and a line for each that could not be read or written.
    """
    images = sorted(path for path in source.rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES)
    targets = [target / path.relative_to(source).with_suffix('.png') for path in images]
    for folder in {path.parent for path in targets}:
        folder.mkdir(parents=True, exist_ok=True)
    problems = []
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(pad_image, images, targets, [padding] * len(images), chunksize=256)
        for done, problem in enumerate(results, start=1):
            if problem:
                problems.append(problem)
            if done % 10000 == 0 or done == len(images):
                print(f'{done} of {len(images)} images', flush=True)
    return len(images), problems


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line, and returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    verbs = parser.add_subparsers(dest='verb', required=True)
    pad = verbs.add_parser('pad', help='store images with a black border, for the exact random crop')
    pad.add_argument('source', type=Path, help='folder of class folders')
    pad.add_argument('target', type=Path, help='folder to write to')
    pad.add_argument('--padding', type=int, default=4, help='width of the border in pixels (default: %(default)s)')
    pad.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes (default: one a core)')
    args = parser.parse_args(argv)

    if not args.source.is_dir():
        parser.error(f'{args.source} is not a folder.')
    if args.padding < 1:
        parser.error(f'--padding must be at least 1, got {args.padding}.')
    count, problems = pad_folder(args.source, args.target, args.padding, args.workers)
    for problem in problems:
        print(f'not padded: {problem}', file=sys.stderr)
    if not count:
        print(f'{args.source} holds no image.', file=sys.stderr)
    return 1 if problems or not count else 0


if __name__ == '__main__':
    sys.exit(main())
