"""Checked reading of the small YAML and JSON files of a training run."""
import json
import os
import reprlib
from pathlib import Path
from typing import Any, Dict, Optional, Union

import yaml

from .._errors import TimmSpaError
from .files import ReadError, read_text

__all__ = ['NUMBER', 'TEXT', 'RunError', 'check', 'checked', 'load_yaml', 'read_mapping']

LARGEST_DOCUMENT = 100_000  # values
NUMBER = (int, float)
TEXT = (str, int, float)  # a name that YAML reads as a number is one


class RunError(TimmSpaError, ValueError):
    """A file of a training run is invalid. The message names the file and the cause."""


def read_mapping(path: Path) -> Dict[str, Any]:
    """Reads a YAML or JSON file with names and values, empty if the file does not exist."""
    if not os.path.lexists(path):
        return {}
    try:
        text = read_text(path)
        content = json.loads(text) if path.suffix == '.json' else load_yaml(text)
    except (ReadError, ValueError, RecursionError, yaml.YAMLError) as e:
        cause = ' '.join(str(e).split())
        raise RunError(cause if isinstance(e, ReadError) else f'{path} cannot be read: {cause}') from e
    if not isinstance(content, dict):
        raise RunError(f'{path}: expected names with values, got a {type(content).__name__}.')
    return content


class _Loader(yaml.SafeLoader):
    """A YAML loader without merge keys, which can grow without limit."""

    def flatten_mapping(self, node: Any) -> None:
        """Keeps a merge key, which is then an error."""


def load_yaml(text: str) -> Any:
    """Reads an untrusted YAML document.

    Raises:
        ValueError: The document is nested too deeply, or too large once its aliases are written out.
    """
    try:
        content = yaml.load(text, _Loader)  # noqa: S506  derived from SafeLoader
        _count(content, {})
    except RecursionError:
        raise ValueError('It is nested too deeply.') from None
    return content


def _count(value: Any, counted: Dict[int, Optional[int]]) -> int:
    """Counts the values of a document once its YAML aliases are written out."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in counted:
        counted[id(value)] = None  # until its parts are counted
        counted[id(value)] = 1 + sum(
            _count(part, counted) for part in (value.values() if isinstance(value, dict) else value))
    size = counted[id(value)]
    if size is None or size > LARGEST_DOCUMENT:
        raise ValueError(
            'It contains a recursive YAML alias.' if size is None else
            f'It has {size:,} values (limit {LARGEST_DOCUMENT:,}).')
    return size


def checked(content: Dict[str, Any], kinds: Dict[str, Any], path: Union[str, Path]) -> Dict[str, Any]:
    """Checks the types of some values of a file, where they are not None, and returns the content."""
    for key, kind in kinds.items():
        if content.get(key) is not None:
            check(content[key], kind, key, path)
    return content


def check(value: Any, kind: Any, name: str, path: Union[str, Path]) -> None:
    """Raises a RunError if a value is not of the expected kind: a type, a list of one kind, or kinds by key."""
    if isinstance(kind, dict):
        unknown = [k for k in value if k not in kind] if isinstance(value, dict) else [value]
        if unknown:
            shown = ', '.join(str(k)[:60] for k in unknown[:6])
            raise RunError(f'{path}: {name!r} takes {", ".join(kind)}, got {shown}.')
        for key, part in value.items():
            check(part, kind[key], f'{name}: {key}', path)
    elif isinstance(kind, list) and isinstance(value, (list, tuple)):
        for part in value:
            check(part, kind[0], f'an entry of {name}', path)
    elif isinstance(kind, list) or not isinstance(value, kind) or isinstance(value, bool):
        right = {NUMBER: 'number', TEXT: 'text'}.get(kind) if isinstance(kind, tuple) else (
            'list' if isinstance(kind, list) else kind.__name__)
        raise RunError(f'{path}: {name!r} must be a {right}, got {reprlib.repr(value)}.')
