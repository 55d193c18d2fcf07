"""What a training run leaves beside its checkpoints: metrics, one row an epoch, and the names of the classes."""
import csv
from pathlib import Path
from typing import Dict, List, Union

from .._errors import TimmSpaError
from ..checkpoints.files import ReadError, read_text, replacing

__all__ = ['CLASSES_FILE', 'SummaryError', 'read_classes', 'read_summary', 'write_summary']

CLASSES_FILE = 'classes.txt'


class SummaryError(TimmSpaError, ValueError):
    """A metrics file cannot be read as one row for each epoch; the message names the file and the line."""


def read_summary(path: Union[str, Path]) -> List[Dict[str, float]]:
    """Reads `summary.csv` of a run, also of one that was interrupted and resumed: the columns of each epoch, in order.

    timm appends to the file of a resumed run, with a second header line in its middle; and an epoch is there twice if
    the run was killed between the writing of its row and of its checkpoint. The later row is the one that the
    checkpoints go on from.
    """
    rows: Dict[int, Dict[str, float]] = {}
    header: List[str] = []
    try:
        lines = list(csv.reader(read_text(path).splitlines()))
    except (ReadError, csv.Error) as e:
        raise SummaryError(str(e) if isinstance(e, ReadError) else f'{path} cannot be read: {e}.') from e
    for number, cells in enumerate(lines, start=1):
        if cells[:1] == ['epoch']:
            header = cells
            if not {'eval_top1', 'eval_map'} & set(header):
                raise SummaryError(f'{path}, line {number}, has no column eval_top1, but {", ".join(header)}.')
            continue
        if not ''.join(cells).strip():
            continue
        try:
            row = dict(zip(header, map(float, cells), strict=True))
            rows[int(row['epoch'])] = row
        except (KeyError, ValueError, OverflowError):
            raise SummaryError(f'{path}, line {number}, is no row of metrics: {",".join(cells)!r}.') from None
    if not rows:
        raise SummaryError(f'{path} has no epoch in it.')
    epochs = sorted(rows)
    for epoch, following in zip(epochs, epochs[1:], strict=False):
        if following != epoch + 1:
            last = f' to {following - 1}' if following > epoch + 2 else ''
            raise SummaryError(f'{path} lacks epoch {epoch + 1}{last}.')
    return [rows[epoch] for epoch in epochs]


def write_summary(path: Union[str, Path], rows: List[Dict[str, float]]) -> None:
    """Writes rows of `read_summary` as timm writes them: one header, of the last row, and one line an epoch."""
    with replacing(path) as partial, open(partial, 'w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerow(rows[-1])
        for row in rows:
            writer.writerow([int(row['epoch']) if name == 'epoch' else row.get(name, '') for name in rows[-1]])


def read_classes(folder: Union[str, Path]) -> List[str]:
    """Reads the names of the classes that a run was trained on, in the order of outputs; empty if there are none."""
    path = Path(folder) / CLASSES_FILE
    text = read_text(path).rstrip('\n') if path.exists() else ''
    return text.split('\n') if text else []
