"""Recognize files that this package wrote. Other files are replaced only on request."""
import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Union

from .files import ReadError, WriteError, read_text

__all__ = ['MARK', 'has_mark', 'is_own_figure', 'png_mark', 'refuse_replacing', 'starts_with']

# in config.json of a repository; timm, transformers and the Hub ignore the key
MARK: Dict[str, str] = dict(written_by='timm_spa')
SOFTWARE = 'Software'  # PNG keyword for the program that made an image


def refuse_replacing(
        paths: Iterable[Union[str, Path]],
        overwrite: bool = False,
        is_own: Callable[[Path], bool] = lambda path: False,
) -> None:
    """Refuses to replace files that this package did not write; empty files may be replaced.

    Args:
        paths: Files that are going to be written.
        overwrite: Allow all of them.
        is_own: Returns True for a file that may be replaced.

    Raises:
        WriteError: A file exists. The message names it.
    """
    for path in map(Path, paths):
        if not overwrite and path.is_file() and path.stat().st_size and not is_own(path):
            raise WriteError(f'{path} exists already. Add --overwrite to replace it, or choose another path.')


def has_mark(folder: Union[str, Path]) -> bool:
    """Returns whether config.json marks a folder as written by this package: a repository or a detector."""
    try:
        config = json.loads(read_text(Path(folder) / 'config.json'))
    except (ReadError, ValueError, RecursionError):
        return False
    # the config.json of a detector has the version of the package
    return isinstance(config, dict) and (MARK.items() <= config.items() or 'timm_spa' in config)


def png_mark() -> Any:
    """Returns the metadata of a PNG file that `is_own_figure` recognizes, for the argument `pnginfo` of Pillow."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(SOFTWARE, MARK['written_by'])
    return info


def is_own_figure(path: Path) -> bool:
    """Returns whether a PNG or SVG file is marked as written by this package."""
    from PIL import Image

    try:
        if path.suffix == '.svg':
            return f'<dc:title>{MARK["written_by"]}</dc:title>' in _beginning(path)
        with Image.open(path) as image:
            return image.info.get(SOFTWARE) == MARK['written_by']
    except (OSError, SyntaxError, ValueError):
        return False


def starts_with(path: Path, text: str) -> bool:
    """Returns whether a file begins with a text, e.g. the header of a table."""
    return _beginning(path).startswith(text)


def _beginning(path: Path) -> str:
    with open(path, 'rb') as f:
        return f.read(4096).decode(errors='replace').replace('\r\n', '\n')
