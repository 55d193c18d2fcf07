"""Image files as users have them: in folders, and of every mode that Pillow reads."""
import os
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Union

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .._errors import TimmSpaError

__all__ = ['PictureError', 'image_files', 'in_eight_bits', 'read_image']

EIGHT_BITS, SIXTEEN_BITS = 255, 65535
UNKNOWN_WHITE = 'and the file does not say which is white. Save it with 8 or 16 bits per channel.'
# tags of TIFF
BITS_PER_SAMPLE, PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO = 258, 262, 0


class PictureError(TimmSpaError, OSError):
    """An image, or a folder of images, cannot be used; the message names it and says why."""


def image_files(paths: Union[str, Path, Iterable[Union[str, Path]]]) -> Iterator[Path]:
    """Yields files, and for a folder the images in it, in the order of their names.

    A folder without images, and a path that does not exist, are yielded unchanged: reading them says what is wrong.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
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


def read_image(file: Any, mode: str, upright: bool = True) -> Image.Image:
    """Reads an image file.

    Args:
        file: Path, or a file that is open.
        mode: Mode of Pillow to convert to, 'RGB' or 'L'.
        upright: Turn the image as its EXIF data say.

    Returns:
        The image; of an animation the first frame.

    Raises:
        PictureError: The file cannot be read; the message does not name it.
    """
    try:
        if isinstance(file, (str, os.PathLike)) and os.path.exists(file) and not (
                os.path.isfile(file) or os.path.isdir(file)):
            raise PictureError('it is a pipe or a device, and not a regular file')  # reading it might never end
        with Image.open(file) as image:
            eight = in_eight_bits(image)
            return (ImageOps.exif_transpose(eight) if upright else eight).convert(mode)
    except PictureError:
        raise
    except IsADirectoryError as e:
        raise PictureError('it is a folder, and has no image in it') from e
    except Exception as e:  # decoders raise all kinds of exceptions for a broken file
        raise PictureError(str(e) if isinstance(e, OSError) and str(e) else f'{type(e).__name__}: {e}') from e


def in_eight_bits(image: Image.Image) -> Image.Image:
    """Returns an image with values of 8 bits, of a mode that can be converted to RGB and to grey.

    Pillow itself would cut off 16-bit values at 255.

    Args:
        image: Image of any mode.

    Returns:
        The image itself if it has 8 bits; its orientation is kept.

    Raises:
        PictureError: The file does not say which value is white: its values are floats, or integers beyond 16 bits.
    """
    if image.mode in ('LAB', 'La'):  # which Pillow converts to these only
        return image.convert('RGB' if image.mode == 'LAB' else 'LA')
    if image.mode == 'F':
        raise PictureError(f'its values are floating-point numbers, {UNKNOWN_WHITE}')
    if not image.mode.startswith('I'):
        return image
    image.load()  # some of Pillow's readers turn the image upright here, and only then its size is right
    values = np.asarray(image).astype(np.int64)
    least, most = values.min(), values.max()
    # a PNG or PPM file of this mode has 16 bits; one of another format has 32, which may hold 8 or 16
    if image.mode == 'I' and image.format not in ('PNG', 'PPM') and (
            least < 0 or most > SIXTEEN_BITS or 0 < most <= EIGHT_BITS):
        raise PictureError(f'its values are integers of 32 bits from {least} to {most}, {UNKNOWN_WHITE}')
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
