"""Comparison of models that a sweep trained with the same arguments."""
import csv
import statistics
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Union

from ..checkpoints.run_files import RunError
from ..models._entrypoints import split_gate
from ..profile import count_cost
from ..training.run_record import Run

__all__ = ['check_alike', 'comparison_table', 'mean_and_spread', 'read_results', 'tested_top1', 'verdicts']

# arguments of timm's train.py that may differ between compared runs: names, the seed, places and logging
NAMING = frozenset((
    'checkpoint_hist', 'data', 'data_dir', 'device', 'experiment', 'local_rank', 'log_interval', 'log_wandb', 'model',
    'output', 'pin_mem', 'recovery_interval', 'resume', 'save_images', 'seed', 'wandb_project', 'wandb_resume_id',
    'wandb_tags', 'workers'))
# model arguments that describe the gates, and are part of a model's name in tables
GATING = frozenset(('base', 'gate', 'neutral', 'pyramid_sizes', 'rd_ratio', 'where'))


def read_results(folder: Union[str, Path], architecture: Optional[str] = None) -> List[Run]:
    """Reads the runs of a sweep, sorted by name.

    With `architecture`, only runs of the same network are returned, with any gate.
    """
    runs = [Run.read(path.parent) for path in sorted(Path(folder).glob('*/args.yaml'))]
    if not runs:
        raise RunError(f'{folder} holds no results: expected folders that contain args.yaml and summary.csv.')
    for run in runs:
        missing = [key for key in ('model', 'seed') if key not in run.args]
        if missing:
            raise RunError(
                f'{run.folder / "args.yaml"} does not set {" and ".join(missing)}. Copy the args.yaml of the run '
                'again.')
    return [run for run in runs if architecture is None or _network(run.args['model']) == _network(architecture)]


def comparison_table(runs: List[Run], reference: Run, architecture: str) -> List[List[str]]:
    """Returns a table of the runs of a sweep: first the names of the columns, last the model of `reference`.

    The table is empty if all runs are of that model. Raises a RunError if a run cannot be compared with `reference`.
    """
    by_model: Dict[str, List[Run]] = {}
    for run in runs:
        check_alike(run, reference)
        by_model.setdefault(_label(run), []).append(run)
    own = _label(reference) if reference.args.get('model') else architecture
    if set(by_model) <= {own}:
        return []
    if own not in by_model:
        raise RunError(
            f'The results have runs of {", ".join(by_model)}, but none of {own} to compare them with. Add a run of '
            f'{own}, or leave out --results.')
    tested = ['test top-1 %'] if any(map(verdicts, runs)) else []
    table = [['model', 'validation top-1 %', 'validation top-5 %', *tested, 'seeds', 'parameters (M)', 'GMACs']]
    for model in sorted(by_model, key=lambda name: (name == own, name)):
        model_runs = by_model[model]
        args = model_runs[0].args
        cost = count_cost(args['model'], num_classes=args.get('num_classes'), **args.get('model_kwargs') or {})
        last = [run.summary[-1] for run in model_runs]
        seeds = ', '.join(str(seed) for seed in sorted(run.args['seed'] for run in model_runs))
        tested_runs = tested_top1(model_runs)
        count = f' ({len(tested_runs)} of {len(model_runs)} runs)' if len(tested_runs) < len(model_runs) else ''
        table.append([
            model, *(mean_and_spread([row[key] for row in last]) for key in ('eval_top1', 'eval_top5')),
            *[mean_and_spread(tested_runs) + count if tested_runs else 'unknown'] * len(tested), seeds,
            f'{cost.parameters / 1e6:.2f}', f'{cost.macs / 1e9:.3f}'])
    return table


def verdicts(run: Run) -> Optional[List[bool]]:
    """Returns for each test image whether the run classifies it correctly; None if the run has no `test.csv`.

    The order of the images is the same for all runs.
    """
    path = run.folder / 'test.csv'
    if not path.exists():
        return None
    try:
        with open(path, newline='', encoding='utf-8') as f:
            return [row['target'] == row['predicted'] for row in csv.DictReader(f)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as e:
        raise RunError(f'{path} cannot be read as a table with columns "target" and "predicted": {e}') from e


def tested_top1(runs: List[Run]) -> List[float]:
    """Returns the top-1 accuracy on the test images, in percent, of each run with a `test.csv`."""
    return [100 * statistics.mean(correct) for correct in map(verdicts, runs) if correct]


def _label(run: Run) -> str:
    """Returns the model of a run and its gate arguments as one name."""
    kwargs = run.args.get('model_kwargs') or {}
    return ' '.join([run.args['model'], *(f'{key}={kwargs[key]}' for key in sorted(GATING & kwargs.keys()))])


def _network(model: str) -> str:
    """Returns the name of a model without its gate."""
    # timm has other names for its own plain and SE models
    return split_gate(model)[0].removeprefix('se').removesuffix('_100')


def check_alike(run: Run, reference: Run, free: Iterable[str] = ()) -> None:
    """Raises a RunError if two runs differ in more than the model, the seed, the names of the run and `free`."""
    ignored = NAMING.union(free)

    def arguments(either: Run) -> Dict[str, Any]:
        kwargs = {k: v for k, v in (either.args.get('model_kwargs') or {}).items() if k not in GATING}
        return dict({key: value for key, value in either.args.items() if key not in ignored}, model_kwargs=kwargs)

    expected, given = arguments(reference), arguments(run)
    different = [key for key in sorted(expected.keys() | given.keys()) if expected.get(key) != given.get(key)]
    if different:
        shown = ', '.join(f'{key} ({given.get(key)!r}, expected {expected.get(key)!r})' for key in different)
        raise RunError(
            f'{run.folder} was not trained like {reference.folder}, so that they cannot be compared: {shown}. Remove '
            'the folder from the results, or train it with the same arguments.')
    if _last_epoch(run) is None or _last_epoch(run) != _last_epoch(reference):
        raise RunError(
            f'{run.folder} ends with epoch {_last_epoch(run)} and {reference.folder} with epoch '
            f'{_last_epoch(reference)}, so that they cannot be compared. Train both for the same number of epochs.')


def _last_epoch(run: Run) -> Optional[int]:
    return int(run.summary[-1]['epoch']) if run.summary else None


def mean_and_spread(values: List[float]) -> str:
    """Returns the mean with two decimals, and the sample standard deviation if there are several values."""
    mean = f'{statistics.mean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean
