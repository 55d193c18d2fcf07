"""Metrics of training runs, grouped by what was trained; runs of a group differ in the seed alone."""
import re
from pathlib import Path
from typing import Dict, Iterable, List, Union

from ..hub.run_record import Run
from ..training_log import SummaryError
from .figures import Summary, curves_of

__all__ = ['read_curves']


def read_curves(paths: Iterable[Union[str, Path]]) -> Dict[str, List[Summary]]:
    """Reads the metrics of runs.

    Args:
        paths: Folders of runs of timm's train.py or of `timm-spa detect train`, with their summary.csv; and folders of
            such folders.

    Returns:
        The metrics of each epoch of the runs, by what was trained: the model and its arguments in args.yaml, or where
        there is none the folder's name without its seed.

    Raises:
        SummaryError: A folder is no run and has none in it, the metrics of a run are no table or lack a column, or
            runs of classifiers and of detectors are mixed.
        RunError: An args.yaml cannot be read.
    """
    found: Dict[str, List[Summary]] = {}
    for path in map(Path, paths):
        folders = [path] if (path / 'summary.csv').exists() else sorted(p.parent for p in path.glob('*/summary.csv'))
        if not folders:
            raise SummaryError(f'{path} is no folder of a run, and has none in it: there is no summary.csv.')
        for folder in folders:
            run = Run.read(folder)
            args, summary = run.args, run.summary
            kwargs = ' '.join(f'{key}={value}' for key, value in (args.get('model_kwargs') or {}).items())
            named = ' '.join(str(args[key]) for key in ('detector', 'model') if key in args)
            label = f'{named} {kwargs}'.strip() if 'model' in args else re.sub(r'-seed\d+$', '', folder.name)
            missing = [key for key in curves_of(summary) if any(key not in row for row in summary)]
            if missing:
                raise SummaryError(f'{folder / "summary.csv"} has no column {missing[0]}.')
            first = next(iter(found.values()), [summary])[0]
            if curves_of(first) != curves_of(summary):
                raise SummaryError(
                    f'{folder} and the runs before it are of a classifier and a detector. Draw each alone.')
            found.setdefault(label, []).append(summary)
    return found
