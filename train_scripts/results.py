"""Creates the tables and figures of a folder of results from the files of its runs.

    python train_scripts/results.py train_scripts/results/grocery81
    python train_scripts/results.py train_scripts/results/mosaic

A run is a folder with `summary.csv`, `args.yaml` and `run.json`, as written by `sweep.py`, and optionally the files of
`evaluate.py`. `table.md` has the accuracy of the last epoch on the validation images and on the images of `test.csv`:
the mean over seeds and, from two seeds on, the sample standard deviation. With `test.csv`, each run is compared with
the plain model of the same seed on the same images, by McNemar's exact test. `curves.png` has the losses and the
accuracy of every epoch, as figures 3 and 4 of the paper. `pyramid_weights.png` has the learned weights of equation (1).

Runs must be trained alike. Only the learning rate may differ: a row names it where it is not that of the plain model
or, without a plain model, not the most common one.

A run of `timm-spa detect train` is a folder with `summary.csv` and `args.yaml`. `table.md` has COCO's metrics on the
validation images after the last epoch that all runs of a detector have.

`--check` writes nothing, and fails if `table.md` does not match the runs. Files of these names that results.py did not
write are only replaced with `--overwrite`.
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

Networks = Dict[str, Dict[str, List[Run]]]  # runs by network and label of the gate
Detectors = Dict[str, Dict[str, List[Run]]]  # runs by detector and backbone


def read_runs(folder: Path) -> List[Run]:
    """Reads every run of a folder, and checks that the runs can be compared.

    Raises:
        RunError: No runs found, a run is incomplete or unreadable or does not match the name of its folder, or the runs
            were not trained alike.
    """
    runs = read_results(folder)
    for run in runs:
        model, seed = run.args['model'], run.args['seed']
        recorded = run.record.get('model'), run.record.get('seed')
        name = run.folder.name
        if recorded != (model, seed) or not name.startswith(f'{model}-') or not name.endswith(f'-seed{seed}'):
            raise RunError(
                f'{run.folder} is inconsistent: its args.yaml has {model} with seed {seed}, its run.json has '
                f'{recorded[0]} with seed {recorded[1]}. Run sweep.py again, or remove the folder.')
        if len(run.summary) != run.args['epochs']:
            raise RunError(
                f'{run.folder} is incomplete: it has {len(run.summary)} of {run.args["epochs"]} epochs. Resume it.')
        check_alike(run, runs[0], free=['lr'])
    return runs


def grouped(runs: List[Run]) -> Networks:
    """Groups runs by network and gate, in the order of the table of gates."""
    rows: Dict[Tuple[str, int, str], List[Run]] = {}
    plain = [run for run in runs if _network_and_gate(run)[1] == 'none']
    rates = statistics.multimode(run.args.get('lr') for run in plain or runs)
    shared_lr = rates[0] if len(rates) == 1 else None
    for run in sorted(runs, key=lambda run: run.args['seed']):
        kwargs = run.args.get('model_kwargs') or {}
        network, gate = _network_and_gate(run)
        label = GATES[gate].label + (', gates as initialized' if kwargs.get('neutral') is False else '')
        if run.args.get('lr') != shared_lr:  # None where the batch size determines it
            label += f', lr {run.args.get("lr")}'
        rows.setdefault((network, list(GATES).index(gate), label), []).append(run)
    networks: Networks = {}
    for (network, _, label), row in sorted(rows.items(), key=lambda item: item[0]):
        networks.setdefault(network, {})[label] = row
    return networks


def _network_and_gate(run: Run) -> Tuple[str, str]:
    kwargs = run.args.get('model_kwargs') or {}
    if run.args['model'] == 'gated':
        return kwargs['base'], kwargs.get('gate', 'spa')
    return split_gate(run.args['model'])[:2]


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the p-value of McNemar's exact two-sided test for the images that only one of two models has correct."""
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1., 2 * tail / 2 ** n)


def make_table(runs: List[Run]) -> str:
    """Returns the results as Markdown, one table per network."""
    lines = []
    for network, rows in grouped(runs).items():
        plain = rows.get(GATES['none'].label, [])
        tested = any(verdicts(run) for row in rows.values() for run in row)
        lines += [
            f'### {network}', '',
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
                accuracies = tested_top1(row)
                cells += [
                    mean_and_spread(accuracies) if accuracies else '',
                    _against(accuracies, tested_top1(plain), row is plain), str(len(accuracies))]
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
    """Returns a table that compares each run with the plain model of the same seed, on the same test images."""
    by_seed: Dict[Any, Any] = {run.args['seed']: verdicts(run) for run in plain}
    lines = [
        '| attention | seed | correct only without attention | correct only with it | p (McNemar) |',
        '|---|---|---|---|---|']
    count, accuracy = 1, 0.
    for label, row in rows.items():
        for run in row:
            own, base = verdicts(run), by_seed.get(run.args['seed'])
            if row is plain or not own or not base:
                continue
            count, accuracy = len(base), statistics.mean(base)
            lost, won = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((base, own), (own, base)))
            lines.append(f'| {label} | {run.args["seed"]} | {lost} | {won} | {mcnemar(lost, won):.2g} |')
    error = 100 * math.sqrt(accuracy * (1 - accuracy) / count)
    return [*lines, '', f'{count} test images: the standard error of an accuracy is {error:.2f} points.', '']


def mean_pyramid_weights(runs: List[Run]) -> Dict[str, Dict[str, ScaleWeights]]:
    """Returns the pyramid weights of each model with SPA by block, averaged over seeds."""
    weights: Dict[str, Dict[str, ScaleWeights]] = {}
    for network, rows in grouped(runs).items():
        for label, row in rows.items():
            files = [run.folder / 'pyramid_weights.csv' for run in row]
            seeds = [list(csv.reader(read_text(file).splitlines())) for file in files if file.exists()]
            if not seeds:
                continue
            sizes = tuple(int(name.split('x')[0]) for name in seeds[0][0][1:])
            blocks = weights[f'{network}, {label}'] = {}
            for gates in zip(*(seed[1:] for seed in seeds), strict=True):
                name, *levels = zip(*gates, strict=True)
                blocks[block_of(name[0])] = ScaleWeights(
                    sizes, tuple(statistics.mean(map(float, level)) for level in levels))
    return weights


def read_detectors(folder: Path) -> Detectors:
    """Reads every run of a folder of detectors.

    Raises:
        RunError: No runs found, a run is unreadable, or the runs of a detector were not trained alike.
    """
    runs: Detectors = {}
    settings: Dict[str, Any] = {}
    for path in sorted(folder.glob('*/summary.csv')):
        run = Run.read(path.parent)
        detector, model = str(run.args.get('detector')), str(run.args.get('model'))
        if detector not in TITLES:
            raise RunError(
                f'{path.parent} is not a run of `timm-spa detect train`: the key "detector" in args.yaml is missing or '
                'unknown. Remove the folder.')
        own = {**run.args['settings'], 'seed': None, 'processes': run.args['processes']}
        if settings.setdefault(detector, own) != own:
            raise RunError(
                f'{path.parent} was not trained like the runs of {detector} before it: the settings in args.yaml '
                'differ. Move it to another folder.')
        runs.setdefault(detector, {}).setdefault(model, []).append(run)
    if not runs:
        raise RunError(f'No runs found in {folder}: expected folders with summary.csv.')
    return {  # the plain model first
        detector: dict(sorted(runs[detector].items(), key=lambda item: (len(item[0]), item[0])))
        for detector in TITLES if detector in runs}


def make_detector_table(detectors: Detectors) -> str:
    """Returns COCO's metrics after the last epoch that all runs of a detector have, as Markdown."""
    lines = [
        f'| detector | backbone | seeds | epochs | {" | ".join(COCO.values())} |',
        '|---' * (4 + len(COCO)) + '|']
    for detector, rows in detectors.items():
        epochs = min(len(run.summary) for runs in rows.values() for run in runs)
        planned = next(iter(rows.values()))[0].args['settings']['epochs']
        for model, runs in rows.items():
            last = [run.summary[epochs - 1] for run in runs]
            cells = [
                TITLES[detector], f'`{model}`', ', '.join(str(run.args['settings']['seed']) for run in runs),
                f'{epochs} of {planned}', *(mean_and_spread([row[key] for row in last]) for key in COCO)]
            lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def _has_detectors(folder: Path) -> bool:
    first = next(iter(sorted(folder.glob('*/args.yaml'))), None)
    return first is not None and 'detector' in Run.read(first.parent).args


def _classifier_results(folder: Path) -> Tuple[str, Callable[[], Dict[str, Any]]]:
    """Returns the table, and a function that draws the figures by name."""
    runs = read_runs(folder)

    def draw() -> Dict[str, Any]:
        curves = {
            network: {label: [run.summary for run in row] for label, row in rows.items()}
            for network, rows in grouped(runs).items()}
        weights = mean_pyramid_weights(runs)
        drawn = dict(curves=figures.draw_curves(curves))
        return dict(drawn, pyramid_weights=figures.draw_scales(weights)) if weights else drawn

    return make_table(runs), draw


def _detector_results(folder: Path) -> Tuple[str, Callable[[], Dict[str, Any]]]:
    detectors = read_detectors(folder)
    curves = {
        TITLES[detector]: {model: [run.summary for run in runs] for model, runs in rows.items()}
        for detector, rows in detectors.items()}
    return make_detector_table(detectors), lambda: dict(curves=figures.draw_curves(curves))


def _is_own_table(path: Path) -> bool:
    """Returns whether a table has a header of this script."""
    text = read_text(path) if path.is_file() else ''
    return '| attention | parameters (M) | runs |' in text or text.startswith('| detector | backbone | seeds |')


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('folder', type=Path, help='folder of runs')
    parser.add_argument('--check', action='store_true', help='compare table.md with the runs without writing')
    parser.add_argument('--overwrite', action='store_true', help='replace files that results.py did not write')
    args = parser.parse_args(argv)
    try:
        table, draw = (_detector_results if _has_detectors(args.folder) else _classifier_results)(args.folder)
    except TimmSpaError as e:
        print(f'results: {e}', file=sys.stderr)
        return 1
    path = args.folder / 'table.md'
    if args.check:
        if not path.exists() or path.read_text(encoding='utf-8') != table:
            print(f'results: {path} does not match its runs. Update it without --check.', file=sys.stderr)
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
