"""Files that are written as a whole or not at all, and read only if they are what they should be."""
import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Iterator, Union

from safetensors import SafetensorError

from ._errors import TimmSpaError

__all__ = ['ReadError', 'WriteError', 'read_text', 'replacing']

LARGEST_TEXT = 2_000_000  # bytes; files of a run have some thousand


class WriteError(TimmSpaError, OSError):
    """A file could not be written; the message names it and the cause."""


class ReadError(TimmSpaError, OSError):
    """A file could not be read as text; the message names it and the cause."""


def read_text(path: Union[str, Path]) -> str:
    """Reads a small text file in UTF-8, with a byte order mark or without; a ReadError says why it cannot be read."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ReadError(f'{path} cannot be read: it is no regular file.')
        if path.stat().st_size > LARGEST_TEXT:
            raise ReadError(f'{path} cannot be read: {path.stat().st_size:,} bytes are no file of this kind.')
        return path.read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as e:
        if isinstance(e, ReadError):
            raise
        raise ReadError(f'{path} cannot be read: {getattr(e, "strerror", None) or e}.') from e


@contextlib.contextmanager
def replacing(path: Union[str, Path]) -> Iterator[Path]:
    """Gives a path beside `path` to write to, a file or a folder, and renames what is written there once it is whole.

    Files are added to a folder that is there. After an error nothing is left; that of the file system, or of
    safetensors on one that is full, becomes a WriteError.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f'.{path.name}.{os.getpid()}-{secrets.token_hex(4)}')
    if path.exists() and not path.is_file() and not path.is_dir():
        raise WriteError(f'{path} cannot be written: it is no regular file.')
    try:
        yield partial
        if partial.is_dir() and path.is_dir():
            for file in partial.iterdir():
                if (path / file.name).is_dir():  # before any other is replaced
                    raise WriteError(f'{path / file.name} cannot be written: it is a folder.')
            for file in partial.iterdir():
                file.replace(path / file.name)
        else:
            partial.replace(path)
    except (OSError, SafetensorError) as e:
        if isinstance(e, TimmSpaError):
            raise
        raise WriteError(f'{path} cannot be written: {getattr(e, "strerror", None) or e}.') from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            partial.unlink()
