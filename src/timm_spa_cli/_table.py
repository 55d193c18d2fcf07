"""Printing of tables and JSON."""
import itertools
import json
import math
import re
from typing import Any, List, Sequence


def printable(text: str) -> str:
    """Returns text with escaped control characters, because text from files could control the terminal."""
    return re.sub('[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]', lambda match: ascii(match[0])[1:-1], text)


def print_table(rows: Sequence[Sequence[str]], right_aligned: Sequence[int] = ()) -> None:
    """Prints rows of text in columns; the first row is the header."""
    rows = [[printable(cell).replace('\n', '\\n') for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [c.rjust(widths[i]) if i in right_aligned else c.ljust(widths[i]) for i, c in enumerate(row)]
        print('  '.join(cells).rstrip())


def print_json(value: Any) -> None:
    """Prints a value as JSON, with null for NaN and infinity, which JSON does not support."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def distinct(names: Sequence[str]) -> List[str]:
    """Returns unique names: a duplicate name gets its position as a suffix, or the next number that is free."""
    taken = set(names)
    result = []
    for i, name in enumerate(names, start=1):
        if names.count(name) > 1:
            name = next(f'{name}-{number}' for number in itertools.count(i) if f'{name}-{number}' not in taken)
            taken.add(name)
        result.append(name)
    return result
