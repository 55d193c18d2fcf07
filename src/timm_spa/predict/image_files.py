"""Image files: finding them in folders, and reading every mode that Pillow supports."""
import os
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Union

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .._errors import TimmSpaError

__all__ = ['ImageError', 'PictureError', 'image_files', 'in_eight_bits', 'read_image']

EIGHT_BITS, SIXTEEN_BITS = 255, 65535
UNKNOWN_WHITE = 'and the file does not define which value is white. Save it with 8 or 16 bits per channel.'
# tags of TIFF
BITS_PER_SAMPLE, PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO = 258, 262, 0


class ImageError(TimmSpaError, OSError):
    """An image or an image folder cannot be used."""


PictureError = ImageError  # earlier name


def image_files(paths: Union[str, Path, Iterable[Union[str, Path]]]) -> Iterator[Path]:
    """Yields image files, and for a folder the images below it, sorted by name.

    A folder without images and a missing path are yielded unchanged. Reading them raises an error with the cause.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        files: List[Path] = []
        seen = set()
        for folder, subfolders, names in os.walk(path, followlinks=True):
            subfolders.sort()
            if os.path.realpath(folder) in seen:  # a link to a parent folder would never end
                subfolders.clear()
            else:
                files += (Path(folder, name) for name in names if Path(name).suffix.lower() in suffixes)
            seen.add(os.path.realpath(folder))
        yield from sorted(files) or [path]


def read_image(file: Any, mode: str, upright: bool = True) -> Image.Image:
    """Reads an image file.

    Args:
        file: Path or open file.
        mode: Mode of Pillow to convert to, 'RGB' or 'L'.
        upright: Rotate the image by its EXIF orientation.

    Returns:
        The image, or the first frame of an animation.

    Raises:
        ImageError: The file cannot be read. The message does not name the file.
    """
    try:
        if isinstance(file, (str, os.PathLike)) and os.path.exists(file) and not (
                os.path.isfile(file) or os.path.isdir(file)):
            raise ImageError('it is a pipe or a device, not a regular file')  # reading it might never end
        with Image.open(file) as image:
            eight = in_eight_bits(image)
            return (ImageOps.exif_transpose(eight) if upright else eight).convert(mode)
    except ImageError:
        raise
    except IsADirectoryError as e:
        raise ImageError('it is a folder without images') from e
    except Exception as e:  # decoders raise all kinds of exceptions for a broken file
        raise ImageError(str(e) if isinstance(e, OSError) and str(e) else f'{type(e).__name__}: {e}') from e


def in_eight_bits(image: Image.Image) -> Image.Image:
    """Converts an image to 8 bits, in a mode that Pillow can convert to RGB and to grey.

    Pillow itself would clip 16-bit values at 255.

    Args:
        image: Image of any mode.

    Returns:
        The converted image, or the image itself if it has 8 bits. The EXIF orientation is kept.

    Raises:
        ImageError: The white level is unknown: the values are floats, or integers beyond 16 bits.
    """
    if image.mode in ('LAB', 'La'):  # Pillow converts LAB only to RGB, and La only to LA
        return image.convert('RGB' if image.mode == 'LAB' else 'LA')
    if image.mode == 'F':
        raise ImageError(f'its values are floating-point numbers, {UNKNOWN_WHITE}')
    if not image.mode.startswith('I'):
        return image
    image.load()  # some of Pillow's readers rotate the image here, which changes its size
    values = np.asarray(image).astype(np.int64)
    least, most = values.min(), values.max()
    # PNG and PPM files of this mode have 16 bits; other formats have 32, which may hold values of 8 or 16
    if image.mode == 'I' and image.format not in ('PNG', 'PPM') and (
            least < 0 or most > SIXTEEN_BITS or 0 < most <= EIGHT_BITS):
        raise ImageError(f'its values are integers of 32 bits from {least} to {most}, {UNKNOWN_WHITE}')
    tags = getattr(image, 'tag_v2', {})
    largest = min(2 ** tags[BITS_PER_SAMPLE][0] - 1 if BITS_PER_SAMPLE in tags else SIXTEEN_BITS, SIXTEEN_BITS)
    grey = (values / largest * EIGHT_BITS).round().clip(0, EIGHT_BITS).astype(np.uint8)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        grey = EIGHT_BITS - grey
    eight = Image.fromarray(grey)
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation:
        eight.getexif()[ExifTags.Base.Orientation] = orientation
    return eight
