"""Files and folders that are there as a whole or not at all."""
import contextlib
import os
import shutil
from pathlib import Path
from typing import Iterator, Union

from safetensors import SafetensorError

from ._errors import TimmSpaError

__all__ = ['WriteError', 'replacing']


class WriteError(TimmSpaError, OSError):
    """A file could not be written; the message names it and the cause."""


@contextlib.contextmanager
def replacing(path: Union[str, Path]) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and renames what is written there once it is whole.

    Args:
        path: File to write or replace, or folder to make, or to add to if it is there.

    Yields:
        The path to write to. If it, or anything in it, cannot be written, nothing is left there.

    Raises:
        WriteError: The file system, or safetensors on a file system that is full, could not write it.
    """
    path = Path(path).absolute()
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        yield partial
        if partial.is_dir() and path.is_dir():
            for file in partial.iterdir():
                file.replace(path / file.name)
        else:
            partial.replace(path)
    except (OSError, SafetensorError) as e:
        if isinstance(e, TimmSpaError):
            raise
        raise WriteError(f'{path} cannot be written: {getattr(e, "strerror", None) or e}.') from e
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                partial.unlink()
