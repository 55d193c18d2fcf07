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
    """A file of a run does not hold what it should; the message names the file and what is wrong."""


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
        raise RunError(f'{path} should hold names with values, and holds a {type(content).__name__}.')
    return content


class _Loader(yaml.SafeLoader):
    """Knows no merge keys, which can grow without end."""

    def flatten_mapping(self, node: Any) -> None:
        """Leaves a merge key as it is, which then is an error."""


def load_yaml(text: str) -> Any:
    """Reads a YAML document that may come from anywhere.

    A ValueError says that it is larger than a description of a run, once what it repeats by a name is written out.
    """
    try:
        content = yaml.load(text, _Loader)  # noqa: S506  derived from SafeLoader
        _count(content, {})
    except RecursionError:
        raise ValueError('it is nested too deeply.') from None
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
        raise ValueError('it repeats parts of itself without end.' if size is None else f'it holds {size:,} values.')
    return size


def checked(content: Dict[str, Any], kinds: Dict[str, Any], path: Union[str, Path]) -> Dict[str, Any]:
    """Returns the content of a file after a check of the kinds of some of its values, where they are not None."""
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
            raise RunError(f'{path}: {name!r} takes {", ".join(kind)}, and has {shown}.')
        for key, part in value.items():
            check(part, kind[key], f'{name}: {key}', path)
    elif isinstance(kind, list) and isinstance(value, (list, tuple)):
        for part in value:
            check(part, kind[0], f'an entry of {name}', path)
    elif isinstance(kind, list) or not isinstance(value, kind) or isinstance(value, bool):
        right = {NUMBER: 'number', TEXT: 'text'}.get(kind) if isinstance(kind, tuple) else (
            'list' if isinstance(kind, list) else kind.__name__)
        raise RunError(f'{path}: {name!r} should be a {right}, and is {reprlib.repr(value)}.')
