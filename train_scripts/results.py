"""Rebuilds the tables and figures of a folder of results from the files of its runs.

    python train_scripts/results.py train_scripts/results/grocery81
    python train_scripts/results.py train_scripts/results/mosaic

A run is a folder with `summary.csv`, `args.yaml` and `run.json`, as `sweep.py` keeps them, and perhaps with what
`evaluate.py` adds. `table.md` has the accuracy of the last epoch on the validation pictures and on those of `test.csv`:
the mean over seeds and, from two on, the sample standard deviation. Where every picture's class is known, each run is
compared with the plain net of the same seed on the same pictures, by McNemar's exact test. `curves.png` has losses
and accuracy of every epoch, as the paper's figures 3 and 4, and `pyramid_weights.png` the learned weights of
equation (1).
A run of `timm-spa detect train` is a folder with `summary.csv` and `args.yaml`. `table.md` has COCO's figures on the
validation pictures after the last epoch that all runs of a detector have.
`--check` writes nothing and fails if the table that is there is not the one of its runs.
Files of these names that it did not write stay, unless `--overwrite` is given.
"""
import argparse
import csv
import math
import statistics
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from timm_spa._errors import TimmSpaError
from timm_spa.checkpoints.files import read_text, replacing
from timm_spa.checkpoints.own_files import refuse_replacing
from timm_spa.checkpoints.run_files import RunError
from timm_spa.detection.repository import TITLES
from timm_spa.detection.train import METRICS
from timm_spa.explain import ScaleWeights, figures
from timm_spa.explain.attention import block_of
from timm_spa.hub.comparison import check_alike, mean_and_spread, read_results, tested_top1, verdicts
from timm_spa.models import GATES
from timm_spa.models._entrypoints import split_gate
from timm_spa.profile import count_cost
from timm_spa.training.run_record import Run

COCO = {**METRICS, 'train_loss': 'training loss'}

Nets = Dict[str, Dict[str, List[Run]]]  # runs by net and label of the gate
Detectors = Dict[str, Dict[str, List[Run]]]  # runs by detector and backbone


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
        name = run.folder.name
        if said != (model, seed) or not name.startswith(f'{model}-') or not name.endswith(f'-seed{seed}'):
            raise RunError(
                f'{run.folder} has the arguments of {model} with seed {seed}, and run.json of '
                f'{said[0]} with seed {said[1]}.')
        if len(run.summary) != run.args['epochs']:
            raise RunError(f'{run.folder} has {len(run.summary)} of {run.args["epochs"]} epochs.')
        check_alike(run, runs[0])
    return runs


def grouped(runs: List[Run]) -> Nets:
    """Sorts runs by net and gate, in the order of the table of gates."""
    rows: Dict[Tuple[str, int, str], List[Run]] = {}
    for run in sorted(runs, key=lambda run: run.args['seed']):
        kwargs = run.args.get('model_kwargs') or {}
        net, gate, _ = split_gate(run.args['model'])
        if run.args['model'] == 'gated':
            net, gate = kwargs['base'], kwargs.get('gate', 'spa')
        label = GATES[gate].label + (', gates as initialized' if kwargs.get('neutral') is False else '')
        rows.setdefault((net, list(GATES).index(gate), label), []).append(run)
    nets: Nets = {}
    for (net, _, label), row in sorted(rows.items(), key=lambda item: item[0]):
        nets.setdefault(net, {})[label] = row
    return nets


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the probability of a split at least as uneven if either is right as often (exact, two-sided)."""
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1., 2 * tail / 2 ** n)


def make_table(runs: List[Run]) -> str:
    """Returns the results as Markdown: one table for each net, in the order of the gates above."""
    lines = []
    for net, rows in grouped(runs).items():
        plain = rows.get(GATES['none'].label, [])
        tested = any(verdicts(run) for row in rows.values() for run in row)
        lines += [
            f'### {net}', '',
            '| attention | parameters (M) | runs | top-1 (%), last epoch | against none | top-5 (%), last epoch '
            '| training loss | validation loss |' + (' test top-1 (%) | against none | runs |' if tested else ''),
            '|---' * (11 if tested else 8) + '|']
        for label, row in rows.items():
            last = [run.summary[-1] for run in row]
            args = row[0].args
            cost = count_cost(args['model'], num_classes=args['num_classes'], **args.get('model_kwargs') or {})
            top1 = [epoch['eval_top1'] for epoch in last]
            cells = [
                label, f'{cost.parameters / 1e6:.3f}', str(len(row)), mean_and_spread(top1),
                _against(top1, [run.summary[-1]['eval_top1'] for run in plain], row is plain),
                *(mean_and_spread([epoch[key] for epoch in last]) for key in ('eval_top5', 'train_loss', 'eval_loss'))]
            if tested:
                shares = tested_top1(row)
                cells += [
                    mean_and_spread(shares) if shares else '', _against(shares, tested_top1(plain), row is plain),
                    str(len(shares))]
            lines.append('| ' + ' | '.join(cells) + ' |')
        lines.append('')
        if tested and plain:
            lines += _pairs(rows, plain)
    hardware = sorted({run.record['hardware'] for run in runs})
    versions = sorted({', '.join(f'{k} {v}' for k, v in run.record['versions'].items()) for run in runs})
    seeds = sorted({run.args['seed'] for run in runs})
    lines += [
        f'{len(runs)} runs, seeds {", ".join(map(str, seeds))}; {"; ".join(hardware)}; {"; ".join(versions)}. ± is the '
        'standard deviation of the runs.']
    return '\n'.join(lines) + '\n'


def _against(values: List[float], plain: List[float], is_plain: bool) -> str:
    return f'{statistics.mean(values) - statistics.mean(plain):+.2f}' if values and plain and not is_plain else ''


def _pairs(rows: Dict[str, List[Run]], plain: List[Run]) -> List[str]:
    """Returns the table of the runs beside the plain net of the same seed, on the same test pictures."""
    by_seed: Dict[Any, Any] = {run.args['seed']: verdicts(run) for run in plain}
    lines = ['| attention | seed | only none right | only it right | p (McNemar) |', '|---|---|---|---|---|']
    count, share = 1, 0.
    for label, row in rows.items():
        for run in row:
            own, base = verdicts(run), by_seed.get(run.args['seed'])
            if row is plain or not own or not base:
                continue
            count, share = len(base), statistics.mean(base)
            lost, won = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((base, own), (own, base)))
            lines.append(f'| {label} | {run.args["seed"]} | {lost} | {won} | {mcnemar(lost, won):.2g} |')
    error = 100 * math.sqrt(share * (1 - share) / count)
    return [*lines, '', f'{count} test pictures: the standard error of an accuracy is {error:.2f} points.', '']


def mean_pyramid_weights(runs: List[Run]) -> Dict[str, Dict[str, ScaleWeights]]:
    """Averages the learned weights of the pyramids over seeds: of each net that has any, those of its gates."""
    found: Dict[str, Dict[str, ScaleWeights]] = {}
    for net, rows in grouped(runs).items():
        for label, row in rows.items():
            files = [run.folder / 'pyramid_weights.csv' for run in row]
            seeds = [list(csv.reader(read_text(file).splitlines())) for file in files if file.exists()]
            if not seeds:
                continue
            sizes = tuple(int(name.split('x')[0]) for name in seeds[0][0][1:])
            of_net = found[f'{net}, {label}'] = {}
            for gates in zip(*(seed[1:] for seed in seeds), strict=True):
                name, *levels = zip(*gates, strict=True)
                of_net[block_of(name[0])] = ScaleWeights(
                    sizes, tuple(statistics.mean(map(float, level)) for level in levels))
    return found


def read_detectors(folder: Path) -> Detectors:
    """Reads every run of a folder of detectors.

    Raises:
        RunError: There is none, or runs of a detector were not trained alike.
        SummaryError: The metrics of a run are no table.
    """
    found: Detectors = {}
    alike: Dict[str, Any] = {}
    for path in sorted(folder.glob('*/summary.csv')):
        run = Run.read(path.parent)
        detector, model = str(run.args.get('detector')), str(run.args.get('model'))
        if detector not in TITLES:
            raise RunError(f'{path.parent} is no run of `timm-spa detect train`: its args.yaml names no detector.')
        how = {**run.args['settings'], 'seed': None, 'processes': run.args['processes']}
        if alike.setdefault(detector, how) != how:
            raise RunError(f'{path.parent} was not trained like the runs of {detector} before it.')
        found.setdefault(detector, {}).setdefault(model, []).append(run)
    if not found:
        raise RunError(f'{folder} has no run in it: there is no summary.csv in its folders.')
    return {  # the plain net first
        detector: dict(sorted(found[detector].items(), key=lambda item: (len(item[0]), item[0])))
        for detector in TITLES if detector in found}


def make_detector_table(detectors: Detectors) -> str:
    """Returns COCO's figures after the last epoch that all runs of a detector have, as Markdown."""
    lines = [
        f'| detector | backbone | seeds | epochs | {" | ".join(COCO.values())} |',
        '|---' * (4 + len(COCO)) + '|']
    for detector, rows in detectors.items():
        epochs = min(len(run.summary) for runs in rows.values() for run in runs)
        planned = next(iter(rows.values()))[0].args['settings']['epochs']
        for model, runs in rows.items():
            at = [run.summary[epochs - 1] for run in runs]
            cells = [
                TITLES[detector], f'`{model}`', ', '.join(str(run.args['settings']['seed']) for run in runs),
                f'{epochs} of {planned}', *(mean_and_spread([row[key] for row in at]) for key in COCO)]
            lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def _has_detectors(folder: Path) -> bool:
    first = next(iter(sorted(folder.glob('*/args.yaml'))), None)
    return first is not None and 'detector' in Run.read(first.parent).args


def _of_classifiers(folder: Path) -> Tuple[str, Callable[[], Dict[str, Any]]]:
    """Returns the table, and what draws the figures by their names."""
    runs = read_runs(folder)

    def draw() -> Dict[str, Any]:
        curves = {
            net: {label: [run.summary for run in row] for label, row in rows.items()}
            for net, rows in grouped(runs).items()}
        weights = mean_pyramid_weights(runs)
        drawn = dict(curves=figures.draw_curves(curves))
        return dict(drawn, pyramid_weights=figures.draw_scales(weights)) if weights else drawn

    return make_table(runs), draw


def _of_detectors(folder: Path) -> Tuple[str, Callable[[], Dict[str, Any]]]:
    detectors = read_detectors(folder)
    curves = {
        TITLES[detector]: {model: [run.summary for run in runs] for model, runs in rows.items()}
        for detector, rows in detectors.items()}
    return make_detector_table(detectors), lambda: dict(curves=figures.draw_curves(curves))


def _is_own_table(path: Path) -> bool:
    """Tells whether a table has the header of one that this script wrote."""
    text = read_text(path) if path.is_file() else ''
    return '| attention | parameters (M) | runs |' in text or text.startswith('| detector | backbone | seeds |')


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line, and returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('folder', type=Path, help='folder of runs')
    parser.add_argument('--check', action='store_true', help='compare table.md with the runs, and write nothing')
    parser.add_argument('--overwrite', action='store_true', help='replace files that are not of an earlier call')
    args = parser.parse_args(argv)
    try:
        table, draw = _of_detectors(args.folder) if _has_detectors(args.folder) else _of_classifiers(args.folder)
    except TimmSpaError as e:
        print(f'results: {e}', file=sys.stderr)
        return 1
    path = args.folder / 'table.md'
    if args.check:
        if not path.exists() or path.read_text(encoding='utf-8') != table:
            print(f'results: {path} is not the table of its runs. Rebuild it without --check.', file=sys.stderr)
            return 1
        return 0
    drawn = draw()
    files = [path, *(args.folder / f'{name}.{suffix}' for name in drawn for suffix in ('png', 'svg'))]
    try:
        refuse_replacing(files, args.overwrite or _is_own_table(path))
        with replacing(path) as partial:
            partial.write_text(table, encoding='utf-8')
        for name, figure in drawn.items():
            figures.save(figure, args.folder / name)
    except TimmSpaError as e:
        print(f'results: {e}', file=sys.stderr)
        return 1
    print(table)
    return 0


if __name__ == '__main__':
    sys.exit(main())
