"""Rebuilds the table and the figure of a folder of results from the files of its runs.

    python train_scripts/results.py train_scripts/results/tin10_cpu

A run is a folder with `summary.csv`, `args.yaml` and `run.json`, as `sweep.py` keeps them. `table.md` has the accuracy
of the last epoch and of the best one, which was picked on the same validation images; the mean over seeds and, from two
on, the sample standard deviation. `losses.png` has the training and the validation loss of every epoch, as the paper's
figures 3 and 4. `--check` writes nothing and fails if the table that is there is not the one of its runs.
"""
import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import timm
import yaml

import timm_spa  # noqa: F401
from timm_spa.models._entrypoints import split_gate
from timm_spa.training_log import SummaryError, read_summary

GATE_LABELS = {
    'none': 'none', 'se': 'SE', 'se_b': 'SE+', 'se_c': 'SE++', 'ge': 'GE', 'cbam': 'CBAM', 'gc': 'GC',
    'spa': 'SPA-A', 'spa_b': 'SPA-B', 'spa_c': 'SPA-C'}
SAME_FOR_ALL = ('epochs', 'batch_size', 'lr', 'opt', 'sched', 'weight_decay', 'num_classes')


class ResultsError(ValueError):
    """A folder of results is not complete or not comparable; the message names the file."""


class Run(NamedTuple):
    """One training run."""

    model: str
    gate: str
    backbone: str
    seed: int
    num_classes: int
    epochs: List[Dict[str, float]]
    record: Dict[str, Any]


def read_runs(folder: Path) -> List[Run]:
    """Reads every run of a folder.

    Raises:
        ResultsError: There is none, a file is missing or says something else than its folder's name, or the runs were
            not trained alike.
    """
    runs = []
    settings: Dict[Any, str] = {}
    for place in sorted(path.parent for path in folder.glob('*/run.json')):
        try:
            record = json.loads((place / 'run.json').read_text(encoding='utf-8'))
            args = yaml.safe_load((place / 'args.yaml').read_text(encoding='utf-8'))
            epochs = read_summary(place / 'summary.csv')
        except (OSError, ValueError, SummaryError) as e:
            raise ResultsError(f'{place} is not complete: {e}') from e
        model, seed = record['model'], record['seed']
        if (model, seed) != (args['model'], args['seed']) or place.name != f'{model}-seed{seed}':
            raise ResultsError(f'{place} holds a run of {args["model"]} with seed {args["seed"]}.')
        if len(epochs) != args['epochs']:
            raise ResultsError(f'{place} has {len(epochs)} of {args["epochs"]} epochs.')
        settings.setdefault(tuple(args[key] for key in SAME_FOR_ALL), place.name)
        if len(settings) > 1:
            raise ResultsError(f'{" and ".join(settings.values())} differ in one of {", ".join(SAME_FOR_ALL)}.')
        backbone, gate, _ = split_gate(model)
        runs.append(Run(model, gate, backbone, seed, args['num_classes'], epochs, record))
    if not runs:
        raise ResultsError(f'{folder} holds no run.')
    return runs


def _mean_and_spread(values: List[float]) -> str:
    mean = f'{statistics.mean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


def make_table(runs: List[Run]) -> str:
    """Returns the results as Markdown: one table for each backbone, in the order of the gates above."""
    groups: Dict[str, Dict[str, List[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[run.backbone][run.gate].append(run)
    lines = []
    for backbone, gates in groups.items():
        base = [run.epochs[-1]['eval_top1'] for run in gates.get('none', [])]
        lines += [
            f'### {backbone}', '',
            '| attention | parameters (M) | runs | top-1 (%), last epoch | against none | top-1 (%), best epoch '
            '| top-5 (%), last epoch | training loss | validation loss |',
            '|---|---|---|---|---|---|---|---|---|']
        for gate in (gate for gate in GATE_LABELS if gate in gates):
            group = gates[gate]
            last = [run.epochs[-1] for run in group]
            top1 = [row['eval_top1'] for row in last]
            model = timm.create_model(group[0].model, num_classes=group[0].num_classes)
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            difference = '' if gate == 'none' or not base else f'{statistics.mean(top1) - statistics.mean(base):+.2f}'
            lines.append('| ' + ' | '.join([
                GATE_LABELS[gate], f'{parameters:.3f}', str(len(group)), _mean_and_spread(top1), difference,
                _mean_and_spread([max(row['eval_top1'] for row in run.epochs) for run in group]),
                *(_mean_and_spread([row[key] for row in last]) for key in ('eval_top5', 'train_loss', 'eval_loss')),
            ]) + ' |')
        lines.append('')
    hardware = sorted({run.record['hardware'] for run in runs})
    versions = sorted({', '.join(f'{k} {v}' for k, v in run.record['versions'].items()) for run in runs})
    seeds = sorted({run.seed for run in runs})
    lines += [
        f'{len(runs)} runs, seeds {", ".join(map(str, seeds))}; {"; ".join(hardware)}; {"; ".join(versions)}. ± is the '
        'standard deviation of the runs.']
    return '\n'.join(lines) + '\n'


def draw_losses(runs: List[Run], path: Path) -> None:
    """Draws training and validation loss over epochs, one column of plots for each backbone."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    backbones = sorted({run.backbone for run in runs})
    figure, axes = pyplot.subplots(2, len(backbones), figsize=(5 * len(backbones), 7), squeeze=False, sharex=True)
    colours = dict(zip(GATE_LABELS, pyplot.rcParams['axes.prop_cycle'].by_key()['color'], strict=True))
    for column, backbone in enumerate(backbones):
        for row, (key, label) in enumerate((('train_loss', 'training loss'), ('eval_loss', 'validation loss'))):
            axis = axes[row][column]
            for gate in GATE_LABELS:
                curves = [
                    [epoch[key] for epoch in run.epochs] for run in runs
                    if (run.gate, run.backbone) == (gate, backbone)]
                if curves:
                    means = [statistics.mean(values) for values in zip(*curves, strict=True)]
                    axis.plot(
                        range(1, len(means) + 1), means, label=GATE_LABELS[gate], color=colours[gate], linewidth=1.2)
            axis.set(ylabel=label, title=backbone if row == 0 else None, xlabel='epoch' if row else None)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={'Software': None})
    pyplot.close(figure)


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line, and returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('folder', type=Path, help='folder of runs')
    parser.add_argument('--check', action='store_true', help='compare table.md with the runs, and write nothing')
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.folder)
    except ResultsError as e:
        print(f'results: {e}', file=sys.stderr)
        return 1
    table = make_table(runs)
    path = args.folder / 'table.md'
    if args.check:
        if not path.exists() or path.read_text(encoding='utf-8') != table:
            print(f'results: {path} is not the table of its runs. Rebuild it without --check.', file=sys.stderr)
            return 1
        return 0
    path.write_text(table, encoding='utf-8')
    draw_losses(runs, args.folder / 'losses.png')
    print(table)
    return 0


if __name__ == '__main__':
    sys.exit(main())
