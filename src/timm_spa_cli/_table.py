"""Tables of text, and names in them."""
import itertools
import re
from typing import List, Sequence


def printable(text: str) -> str:
    """Returns text with its control characters spelled out: what files hold could move the cursor of a terminal."""
    return re.sub('[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]', lambda found: ascii(found[0])[1:-1], text)


def print_table(rows: Sequence[Sequence[str]], right_aligned: Sequence[int] = ()) -> None:
    """Prints rows of text in columns, a header first."""
    rows = [[printable(cell).replace('\n', '\\n') for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [c.rjust(widths[i]) if i in right_aligned else c.ljust(widths[i]) for i, c in enumerate(row)]
        print('  '.join(cells).rstrip())


def distinct(names: Sequence[str]) -> List[str]:
    """Returns names, with their place behind those that are there twice: pictures of one name in several folders.

    If another has that name as well, the next free number is used.
    """
    taken = set(names)
    result = []
    for i, name in enumerate(names, start=1):
        if names.count(name) > 1:
            name = next(f'{name}-{number}' for number in itertools.count(i) if f'{name}-{number}' not in taken)
            taken.add(name)
        result.append(name)
    return result
