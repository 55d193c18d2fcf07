"""Metrics of training runs, grouped by model and settings. Runs of one group differ only in the seed."""
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple, Union

from ..checkpoints.run_files import RunError
from ..hub.comparison import NAMING
from ..training.run_record import Run
from .figures import Summary, curves_of

__all__ = ['read_curves']


def read_curves(
        paths: Union[str, Path, Iterable[Union[str, Path]]],
        skipped: Optional[List[str]] = None,
) -> Dict[str, List[Summary]]:
    """Reads the metrics of training runs, and groups the runs.

    Args:
        paths: Folders of runs of timm's train.py or of `timm-spa detect train`, which contain summary.csv; and folders
            that contain such folders. A single path is allowed.
        skipped: Receives a message for each run without readable metrics, e.g. a run that failed in its first epoch.
            If it is None, such a run is an error.

    Returns:
        The metrics of each epoch of the runs, by label. The label consists of the model and its arguments in args.yaml
        (without args.yaml, the folder's name without its seed), and of the settings in which runs of the same model
        differ.

    Raises:
        RunError: A folder does not contain a run, or its summary.csv or args.yaml is invalid, and `skipped` is None or
            no other run is readable; or runs of classifiers and of detectors are mixed.
    """
    groups: List[Tuple[str, Dict[str, str], List[Summary]]] = []  # label, settings, runs
    errors: List[RunError] = []
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        is_run = (path / 'summary.csv').exists()
        folders = [path] if is_run else sorted(p.parent for p in path.glob('*/summary.csv'))
        if not folders:
            errors.append(RunError(
                f'{path} does not contain a training run: summary.csv was not found. Name the folder of a run.'))
        for folder in folders:
            try:
                label, settings, summary = _read_run(folder)
            except RunError as e:
                errors.append(e)
                continue
            first = groups[0][2][0] if groups else summary
            if curves_of(first) != curves_of(summary):
                raise RunError(
                    f'{folder} cannot be drawn with the runs before it: one is a classifier, the other a detector. '
                    'Draw them separately.')
            matches = [runs for other, theirs, runs in groups if (other, theirs) == (label, settings)]
            if matches:
                matches[0].append(summary)
            else:
                groups.append((label, settings, [summary]))
    if errors and (skipped is None or not groups):
        raise errors[0]
    if not groups:
        raise RunError('No runs were given. Name the folder of a run, which contains summary.csv.')
    if skipped is not None:
        skipped += map(str, errors)
    curves: Dict[str, List[Summary]] = {}
    for label, settings, runs in groups:
        others = [theirs for other, theirs, _ in groups if other == label]
        differing = [key for key in settings if any(theirs.get(key) != settings[key] for theirs in others)]
        curves[' '.join([label, *(f'{key}={settings[key]}' for key in differing)])] = runs
    return curves


def _read_run(folder: Path) -> Tuple[str, Dict[str, str], Summary]:
    """Returns the label of a run, its settings and its metrics."""
    run = Run.read(folder)
    args, summary = run.args, run.summary
    kwargs = ' '.join(f'{key}={value}' for key, value in (args.get('model_kwargs') or {}).items())
    named = ' '.join(str(args[key]) for key in ('detector', 'model') if key in args)
    label = f'{named} {kwargs}'.strip() if 'model' in args else re.sub(r'-seed\d+$', '', folder.name)
    missing = [key for key in curves_of(summary) if any(key not in row for row in summary)]
    if missing:
        raise RunError(f'{folder / "summary.csv"} cannot be drawn: the column {missing[0]} is missing.')
    return label, _settings(args), summary


def _settings(args: Dict[str, Any]) -> Dict[str, str]:
    """Returns the settings of a run without names and paths; nested settings of a detector are flattened."""
    flat: Dict[str, Any] = {}
    for key, value in args.items():
        flat.update(value if key in ('config', 'settings') and isinstance(value, dict) else {key: value})
    skipped = NAMING | {'model_kwargs'}  # the label contains them
    return {str(key): str(value) for key, value in flat.items() if key not in skipped and value is not None}
