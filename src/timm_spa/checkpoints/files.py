"""Atomic writes of files and folders, and size-limited reads."""
import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Iterator, List, Union

from safetensors import SafetensorError

from .._errors import TimmSpaError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ['ReadError', 'WriteError', 'finish_interrupted', 'interrupted', 'read_text', 'replacing']

LARGEST_TEXT = 2_000_000  # bytes; the files of a training run have a few thousand
STAGING = '.timm_spa-'  # prefix of the folders for files that are moved later
OLD, NEW = '.old', '.new'


class WriteError(TimmSpaError, OSError):
    """A file could not be written. The message names the file and the cause."""


class ReadError(TimmSpaError, OSError):
    """A file could not be read as text. The message names the file and the cause."""


def read_text(path: Union[str, Path]) -> str:
    """Reads a small UTF-8 text file, with or without a byte order mark. Raises ReadError with the cause."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ReadError(f'{path} cannot be read: it is not a regular file.')
        if path.stat().st_size > LARGEST_TEXT:
            raise ReadError(f'{path} is too large: {path.stat().st_size:,} bytes (limit {LARGEST_TEXT:,}).')
        return path.read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as e:
        if isinstance(e, ReadError):
            raise
        raise ReadError(f'{path} cannot be read: {getattr(e, "strerror", None) or e}.') from e


@contextlib.contextmanager
def replacing(path: Union[str, Path]) -> Iterator[Path]:
    """Yields a temporary path to write a file or a folder to, and moves it to `path` once it is complete.

    A file replaces the earlier file in one step. A new folder appears in one step. The files of a folder are moved into
    an existing folder, which keeps its other files:

    - After an error, also Ctrl-C or a full disk, the folder has all of its earlier files and none of the new ones.
    - If the process is killed, the folder may lack files, but never mixes earlier and new files of these names. The
      missing files lie in a hidden subfolder. The next call for the folder restores the earlier files, or moves in the
      rest of the new ones if all of the earlier ones were out of the way.
    - Of several processes that write at the same time, the last one to finish wins with all of its files, where the
      file system has locks.

    Files are not flushed to the disk, so that none of this holds if the machine loses power.

    Args:
        path: File or folder to write.

    Yields:
        A path in the same folder or in the folder itself, which does not exist yet.

    Raises:
        WriteError: The file system, or safetensors on a full disk, cannot write. Errors of other kinds are passed on.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        raise WriteError(f'{path} cannot be written: it is not a regular file.')
    token = f'{os.getpid()}-{secrets.token_hex(4)}'
    # in an existing folder, which may be on another device than its parent, or in a parent that cannot be written
    partial = path / f'{STAGING}{token}' if path.is_dir() else path.with_name(f'.{path.name}.{token}')
    try:
        yield partial
        if not partial.is_dir():
            partial.replace(path)
        elif path.is_dir() or not _became(partial, path):
            _move_in(partial, path, token)
    except (OSError, SafetensorError) as e:
        if isinstance(e, TimmSpaError):
            raise
        raise WriteError(f'{path} cannot be written: {getattr(e, "strerror", None) or e}.') from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            partial.unlink()


def _became(partial: Path, folder: Path) -> bool:
    """Renames a folder; returns False if another process has made the folder in the meantime."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        return False
    return True


def _move_in(partial: Path, folder: Path, token: str) -> None:
    """Moves all files of a folder into another one, or none.

    The earlier files are moved to a folder `.old` first, then the new ones wait in a folder `.new`, whose existence
    shows `finish_interrupted` that the earlier files can be removed.
    """
    names = _names(partial)
    old, new = (folder / f'{STAGING}{token}{end}' for end in (OLD, NEW))
    with _locked(folder):
        _finish(folder)
        for name in names:
            if (folder / name).exists() and not (folder / name).is_file():
                kind = 'a folder' if (folder / name).is_dir() else 'not a regular file'
                raise WriteError(f'{folder / name} cannot be written: it is {kind}.')
        try:
            old.mkdir()
            for name in names:
                if os.path.lexists(folder / name):
                    _move(name, folder, old)
            os.rename(partial, new)
            for name in names:
                _move(name, new, folder)
        except BaseException:
            _undo(names, folder, partial, old, new)
            raise
        _discard(old, new)


def _undo(names: List[str], folder: Path, partial: Path, old: Path, new: Path) -> None:
    try:
        if new.is_dir():
            for name in set(names) - set(_names(new)):
                _move(name, folder, new)
            for parent in {os.path.dirname(name) for name in names} - {''}:
                with contextlib.suppress(OSError):  # it has other files
                    os.rmdir(folder / parent)
            os.rename(new, partial)
        if old.is_dir():
            _empty(old, folder)
    except OSError as e:
        raise WriteError(
            f'{folder} could not be restored ({e.strerror or e}): its earlier files are in {old}. Run the same command '
            'again to restore them.') from e


def _names(folder: Path) -> List[str]:
    """Returns the paths of all files in a folder, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_symlink() or not path.is_dir())


def _move(name: str, source: Path, folder: Path) -> None:
    parent = os.path.dirname(name)
    if parent:
        os.makedirs(folder / parent, exist_ok=True)
    os.replace(source / name, folder / name)


def _empty(source: Path, folder: Path) -> None:
    for name in _names(source):
        _move(name, source, folder)
    _remove_empty(source)


def _remove_empty(folder: Path) -> None:
    for path in sorted(folder.rglob('*'), reverse=True):
        path.rmdir()
    folder.rmdir()


def _discard(old: Path, new: Path) -> None:
    """Removes the earlier files, then the folder `.new`, which marks them as removable."""
    shutil.rmtree(old, ignore_errors=True)
    if not old.exists():
        with contextlib.suppress(OSError):
            _remove_empty(new)


def interrupted(folder: Union[str, Path]) -> List[Path]:
    """Returns the hidden folders that a killed process left while it replaced the files of a folder."""
    return sorted(path for end in (OLD, NEW) for path in Path(folder).glob(f'{STAGING}*{end}'))


def finish_interrupted(folder: Union[str, Path]) -> None:
    """Completes or undoes the replacement of a folder's files by a process that was killed.

    Args:
        folder: The folder, which need not exist.

    Raises:
        WriteError: A file cannot be moved.
    """
    folder = Path(os.path.realpath(folder))
    try:
        if interrupted(folder):
            with _locked(folder):
                _finish(folder)
    except OSError as e:
        raise WriteError(f'{folder} cannot be restored: {e.strerror or e}.') from e


def _finish(folder: Path) -> None:
    for new in folder.glob(f'{STAGING}*{NEW}'):
        for name in _names(new):
            _move(name, new, folder)
        _discard(new.with_suffix(OLD), new)
    for old in folder.glob(f'{STAGING}*{OLD}'):
        if not old.with_suffix(NEW).exists():
            _empty(old, folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process or thread at a time replace the files of a folder, where the file system has locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
