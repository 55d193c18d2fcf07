"""Models of a sweep that were trained alike, side by side."""
import csv
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from ..checkpoints.run_files import RunError
from ..models._entrypoints import split_gate
from ..profile import count_cost
from ..training.run_record import Run

__all__ = ['check_alike', 'comparison_table', 'mean_and_spread', 'read_results', 'tested_top1', 'verdicts']

# arguments of timm's train.py that name the run, or say where it ran and what it printed
NAMING = frozenset((
    'checkpoint_hist', 'data', 'data_dir', 'device', 'experiment', 'local_rank', 'log_interval', 'log_wandb', 'model',
    'output', 'pin_mem', 'recovery_interval', 'resume', 'save_images', 'seed', 'wandb_project', 'wandb_resume_id',
    'wandb_tags', 'workers'))
# arguments of a model that describe its gates: they name the model too
GATING = frozenset(('base', 'gate', 'neutral', 'pyramid_sizes', 'rd_ratio', 'where'))


def read_results(folder: Union[str, Path], architecture: Optional[str] = None) -> List[Run]:
    """Reads the runs of a sweep, in the order of names; with `architecture` those of the same net with any gate."""
    runs = [Run.read(path.parent) for path in sorted(Path(folder).glob('*/args.yaml'))]
    if not runs:
        raise RunError(f'{folder} holds no results: expected folders with args.yaml and summary.csv in them.')
    for run in runs:
        missing = [key for key in ('model', 'seed') if key not in run.args]
        if missing:
            raise RunError(f'{run.folder / "args.yaml"} lacks {" and ".join(missing)}.')
    return [run for run in runs if architecture is None or _net(run.args['model']) == _net(architecture)]


def comparison_table(runs: List[Run], reference: Run, architecture: str) -> List[List[str]]:
    """Compares runs of a sweep in rows of cells, the names of the columns first, the model itself last.

    Empty if there is no other model. A RunError says that a run is no control for the reference.
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
            f'The results have {", ".join(by_model)}, and no run of {own} that the others could be compared with.')
    tested = ['test top-1 %'] if any(map(verdicts, runs)) else []
    table = [['model', 'top-1 %', 'top-5 %', *tested, 'seeds', 'parameters (M)', 'GMACs']]
    for model in sorted(by_model, key=lambda name: (name == own, name)):
        same = by_model[model]
        args = same[0].args
        cost = count_cost(args['model'], num_classes=args.get('num_classes'), **args.get('model_kwargs') or {})
        last = [run.summary[-1] for run in same]
        seeds = ', '.join(str(seed) for seed in sorted(run.args['seed'] for run in same))
        shares = tested_top1(same)
        few = f' ({len(shares)} of {len(same)} runs)' if len(shares) < len(same) else ''
        table.append([
            model, *(mean_and_spread([row[key] for row in last]) for key in ('eval_top1', 'eval_top5')),
            *[mean_and_spread(shares) + few if shares else 'not known'] * len(tested), seeds,
            f'{cost.parameters / 1e6:.2f}', f'{cost.macs / 1e9:.3f}'])
    return table


def verdicts(run: Run) -> Optional[List[bool]]:
    """Returns whether a run has each test picture right, in an order of all runs; None if it has no `test.csv`."""
    path = run.folder / 'test.csv'
    if not path.exists():
        return None
    try:
        with open(path, newline='', encoding='utf-8') as f:
            return [row['target'] == row['predicted'] for row in csv.DictReader(f)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as e:
        raise RunError(f'{path} is no table of targets and predictions: {e}') from e


def tested_top1(runs: List[Run]) -> List[float]:
    """Returns the top-1 accuracy in percent of those runs of which the test pictures' `verdicts` are known."""
    return [100 * statistics.mean(right) for right in map(verdicts, runs) if right]


def _label(run: Run) -> str:
    """Names what a run trained: the model, and those of its arguments that describe its gates."""
    kwargs = run.args.get('model_kwargs') or {}
    return ' '.join([run.args['model'], *(f'{key}={kwargs[key]}' for key in sorted(GATING & kwargs.keys()))])


def _net(model: str) -> str:
    """Returns the name of a model without its gate; timm spells its own plain and SE models differently."""
    return split_gate(model)[0].removeprefix('se').removesuffix('_100')


def check_alike(run: Run, reference: Run) -> None:
    """Raises a RunError if the arguments of two runs differ in more than what names them, or their last epochs do."""
    def arguments(of: Run) -> Dict[str, Any]:
        kwargs = {k: v for k, v in (of.args.get('model_kwargs') or {}).items() if k not in GATING}
        return dict({key: value for key, value in of.args.items() if key not in NAMING}, model_kwargs=kwargs)

    ours, theirs = arguments(reference), arguments(run)
    different = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if different:
        shown = ', '.join(f'{key} ({theirs.get(key)!r}, here {ours.get(key)!r})' for key in different)
        raise RunError(f'{run.folder} was not trained like {reference.folder}, and is no control for it: {shown}.')
    if _last(run) is None or _last(run) != _last(reference):
        raise RunError(
            f'{run.folder} ended with epoch {_last(run)} and {reference.folder} with epoch {_last(reference)}: '
            'they cannot be compared.')


def _last(run: Run) -> Optional[int]:
    return int(run.summary[-1]['epoch']) if run.summary else None


def mean_and_spread(values: List[float]) -> str:
    """Returns the mean of values, and from two on their sample standard deviation, with two decimals."""
    mean = f'{statistics.mean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean
