"""Files next to the checkpoints of a run: metrics, one row per epoch, and class names."""
import csv
from pathlib import Path
from typing import Dict, List, Union

from ..checkpoints.files import ReadError, read_text, replacing
from ..checkpoints.run_files import RunError

__all__ = ['CLASSES_FILE', 'read_classes', 'read_summary', 'write_summary']

CLASSES_FILE = 'classes.txt'



def read_summary(path: Union[str, Path]) -> List[Dict[str, float]]:
    """Reads the metrics of each epoch from `summary.csv`, in the order of epochs.

    After a resume, timm appends a second header line. An epoch is duplicate if the run was killed between writing its
    row and its checkpoint: the later row is used, because the training continued from there.

    Raises:
        RunError: The file is not a table with one row per epoch. The message names the line.
    """
    rows: Dict[int, Dict[str, float]] = {}
    header: List[str] = []
    try:
        lines = list(csv.reader(read_text(path).splitlines()))
    except (ReadError, csv.Error) as e:
        raise RunError(str(e) if isinstance(e, ReadError) else f'{path} cannot be read: {e}.') from e
    for number, cells in enumerate(lines, start=1):
        if cells[:1] == ['epoch']:
            header = cells
            if not {'eval_top1', 'eval_map'} & set(header):
                raise RunError(f'{path}, line {number}: column eval_top1 is missing. Columns: {", ".join(header)}.')
            continue
        if not ''.join(cells).strip():
            continue
        try:
            row = dict(zip(header, map(float, cells), strict=True))
            rows[int(row['epoch'])] = row
        except (KeyError, ValueError, OverflowError):
            raise RunError(
                f'{path}, line {number}: expected one number for each of {len(header)} columns, got '
                f'{",".join(cells)!r}.') from None
    if not rows:
        raise RunError(f'{path} has no epochs: expected a header and one row per epoch.')
    epochs = sorted(rows)
    for epoch, following in zip(epochs, epochs[1:], strict=False):
        if following != epoch + 1:
            last = f' to {following - 1}' if following > epoch + 2 else ''
            raise RunError(f'{path}: epoch {epoch + 1}{last} is missing.')
    return [rows[epoch] for epoch in epochs]


def write_summary(path: Union[str, Path], rows: List[Dict[str, float]]) -> None:
    """Writes rows of `read_summary` as timm does: one line per epoch, under the columns of the last row."""
    with replacing(path) as partial, open(partial, 'w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerow(rows[-1])
        for row in rows:
            writer.writerow([int(row['epoch']) if name == 'epoch' else row.get(name, '') for name in rows[-1]])


def read_classes(folder: Union[str, Path]) -> List[str]:
    """Reads the class names of a run in the order of the model's outputs; empty without `classes.txt`."""
    path = Path(folder) / CLASSES_FILE
    text = read_text(path).rstrip('\n') if path.exists() else ''
    return text.split('\n') if text else []
