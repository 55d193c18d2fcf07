"""Rebuilds the table and the figure of a folder of results from the files of its runs.

    python train_scripts/results.py train_scripts/results/tin10_cpu

A run is a folder with `summary.csv`, `args.yaml` and `run.json`, as `sweep.py` keeps them. `table.md` has the accuracy
of the last epoch and of the best one, which was picked on the same validation images; the mean over seeds and, from two
on, the sample standard deviation. `losses.png` has the training and the validation loss of every epoch, as the paper's
figures 3 and 4. `--check` writes nothing and fails if the table that is there is not the one of its runs.
"""
import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, Optional

from timm_spa._errors import TimmSpaError
from timm_spa.hub.comparison import check_alike, mean_and_spread, read_results
from timm_spa.hub.run_record import Run, RunError
from timm_spa.models import GATES
from timm_spa.models._entrypoints import split_gate
from timm_spa.profile import count_cost


def read_runs(folder: Path) -> List[Run]:
    """Reads every run of a folder, and checks that they can stand side by side.

    Raises:
        RunError: There is none, one is not complete or is another than its folder's name says, or the runs were not
            trained alike.
        SummaryError: The metrics of a run are no table.
    """
    runs = read_results(folder)
    for run in runs:
        model, seed = run.args['model'], run.args['seed']
        said = run.record.get('model'), run.record.get('seed')
        if said != (model, seed) or run.folder.name != f'{model}-seed{seed}':
            raise RunError(
                f'{run.folder} has the arguments of {model} with seed {seed}, and run.json of '
                f'{said[0]} with seed {said[1]}.')
        if len(run.summary) != run.args['epochs']:
            raise RunError(f'{run.folder} has {len(run.summary)} of {run.args["epochs"]} epochs.')
        check_alike(run, runs[0])
    return runs


def make_table(runs: List[Run]) -> str:
    """Returns the results as Markdown: one table for each backbone, in the order of the gates above."""
    groups: Dict[str, Dict[str, List[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        backbone, gate, _ = split_gate(run.args['model'])
        groups[backbone][gate].append(run)
    lines = []
    for backbone, gates in groups.items():
        base = [run.summary[-1]['eval_top1'] for run in gates.get('none', [])]
        lines += [
            f'### {backbone}', '',
            '| attention | parameters (M) | runs | top-1 (%), last epoch | against none | top-1 (%), best epoch '
            '| top-5 (%), last epoch | training loss | validation loss |',
            '|---|---|---|---|---|---|---|---|---|']
        for gate in (gate for gate in GATES if gate in gates):
            group = gates[gate]
            last = [run.summary[-1] for run in group]
            top1 = [row['eval_top1'] for row in last]
            args = group[0].args
            cost = count_cost(args['model'], num_classes=args['num_classes'], **args.get('model_kwargs') or {})
            difference = '' if gate == 'none' or not base else f'{statistics.mean(top1) - statistics.mean(base):+.2f}'
            lines.append('| ' + ' | '.join([
                GATES[gate].label, f'{cost.parameters / 1e6:.3f}', str(len(group)), mean_and_spread(top1), difference,
                mean_and_spread([max(row['eval_top1'] for row in run.summary) for run in group]),
                *(mean_and_spread([row[key] for row in last]) for key in ('eval_top5', 'train_loss', 'eval_loss')),
            ]) + ' |')
        lines.append('')
    hardware = sorted({run.record['hardware'] for run in runs})
    versions = sorted({', '.join(f'{k} {v}' for k, v in run.record['versions'].items()) for run in runs})
    seeds = sorted({run.args['seed'] for run in runs})
    lines += [
        f'{len(runs)} runs, seeds {", ".join(map(str, seeds))}; {"; ".join(hardware)}; {"; ".join(versions)}. ± is the '
        'standard deviation of the runs.']
    return '\n'.join(lines) + '\n'


def draw_losses(runs: List[Run], path: Path) -> None:
    """Draws training and validation loss over epochs, one column of plots for each backbone."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    names = {id(run): split_gate(run.args['model'])[:2] for run in runs}
    backbones = sorted({backbone for backbone, _ in names.values()})
    figure, axes = pyplot.subplots(2, len(backbones), figsize=(5 * len(backbones), 7), squeeze=False, sharex=True)
    colours = dict(zip(GATES, pyplot.rcParams['axes.prop_cycle'].by_key()['color'], strict=False))
    for column, backbone in enumerate(backbones):
        for row, (key, label) in enumerate((('train_loss', 'training loss'), ('eval_loss', 'validation loss'))):
            axis = axes[row][column]
            for gate in GATES:
                curves = [
                    [epoch[key] for epoch in run.summary] for run in runs if names[id(run)] == (backbone, gate)]
                if curves:
                    means = [statistics.mean(values) for values in zip(*curves, strict=True)]
                    axis.plot(
                        range(1, len(means) + 1), means, label=GATES[gate].label, color=colours[gate], linewidth=1.2)
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
    except TimmSpaError as e:
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
