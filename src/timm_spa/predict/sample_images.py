"""Photographs of scikit-image, for the demo, the page, the figures and the tests. timm_spa itself ships none."""
import importlib.util
from pathlib import Path
from typing import List

from .._names import did_you_mean
from .image_files import ImageError

__all__ = ['SAMPLES', 'sample_image', 'sample_images']

# Files in the wheel of scikit-image, by name. Terms, by the docstrings of skimage.data: chelsea and coffee are CC0,
# astronaut and rocket are in the public domain, coins has no known copyright restrictions. Figures in the repository do
# not show motorcycle_left, whose terms are not stated.
SAMPLES = {
    'astronaut': 'astronaut.png', 'chelsea': 'chelsea.png', 'coffee': 'coffee.png', 'coins': 'coins.png',
    'motorcycle_left': 'motorcycle_left.png', 'rocket': 'rocket.jpg'}


def sample_image(name: str) -> Path:
    """Returns the file of a photograph of scikit-image. Nothing is downloaded, and scikit-image is not imported.

    Args:
        name: Key of `SAMPLES`.

    Raises:
        ImageError: The name is unknown, or scikit-image is not installed.
    """
    if name not in SAMPLES:
        raise ImageError(
            f'Unknown photograph {name!r}.{did_you_mean(name, SAMPLES, 1)} Choose from {", ".join(SAMPLES)}.')
    package = importlib.util.find_spec('skimage')
    for folder in package.submodule_search_locations or () if package else ():
        path = Path(folder, 'data', SAMPLES[name])
        if path.is_file():
            return path
    raise ImageError(
        f'The photograph {SAMPLES[name]} was not found: it is a file of scikit-image. Install it with: '
        'pip install scikit-image')


def sample_images(*names: str) -> List[Path]:
    """Returns the files of several photographs, by default of all; see `sample_image`."""
    return [sample_image(name) for name in names or SAMPLES]
