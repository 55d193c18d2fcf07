"""Tables of text, and names in them."""
from typing import List, Sequence


def print_table(rows: Sequence[Sequence[str]], right_aligned: Sequence[int] = ()) -> None:
    """Prints rows of text in columns.

    Args:
        rows: The rows, a header first.
        right_aligned: Columns of figures.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [c.rjust(widths[i]) if i in right_aligned else c.ljust(widths[i]) for i, c in enumerate(row)]
        print('  '.join(cells).rstrip())


def distinct(names: Sequence[str]) -> List[str]:
    """Returns names, with their place behind those that are there twice: pictures of one name in several folders."""
    return [name if names.count(name) == 1 else f'{name}-{i}' for i, name in enumerate(names, start=1)]
