"""Metrics of training runs, grouped by what was trained and how; runs of a group differ in the seed alone."""
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List, Tuple, Union

from ..hub.comparison import NAMING
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
        there is none the folder's name without its seed; and those settings in which runs of the same model differ.

    Raises:
        SummaryError: A folder is no run and has none in it, the metrics of a run are no table or lack a column, or
            runs of classifiers and of detectors are mixed.
        RunError: An args.yaml cannot be read.
    """
    groups: List[Tuple[str, Dict[str, str], List[Summary]]] = []  # a label, how it was trained, the runs
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
            first = groups[0][2][0] if groups else summary
            if curves_of(first) != curves_of(summary):
                raise SummaryError(
                    f'{folder} and the runs before it are of a classifier and a detector. Draw each alone.')
            settings = _settings(args)
            same = [runs for other, theirs, runs in groups if (other, theirs) == (label, settings)]
            if same:
                same[0].append(summary)
            else:
                groups.append((label, settings, [summary]))
    found: Dict[str, List[Summary]] = {}
    for label, settings, runs in groups:
        others = [theirs for other, theirs, _ in groups if other == label]
        differing = [key for key in settings if any(theirs.get(key) != settings[key] for theirs in others)]
        found[' '.join([label, *(f'{key}={settings[key]}' for key in differing)])] = runs
    return found


def _settings(args: Dict[str, Any]) -> Dict[str, str]:
    """Returns how a run was trained, without what only names it; the mappings of a detector's arguments are opened."""
    flat: Dict[str, Any] = {}
    for key, value in args.items():
        flat.update(value if key in ('config', 'settings') and isinstance(value, dict) else {key: value})
    skipped = NAMING | {'model_kwargs'}  # which the label has
    return {str(key): str(value) for key, value in flat.items() if key not in skipped and value is not None}
