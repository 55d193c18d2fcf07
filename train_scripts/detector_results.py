"""Rebuilds the table and the figure of a folder of detectors' runs from the files of its runs.

    python train_scripts/detector_results.py train_scripts/results/mosaic

A run is a folder with `summary.csv` and `args.yaml`, as `timm-spa detect train` writes them. `table.md` has COCO's
figures on the validation pictures after the last epoch that all runs of a detector have: the mean over seeds and, from
two on, the sample standard deviation. `--check` writes nothing and fails if the table that is there is not the one of
its runs.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

from timm_spa._errors import TimmSpaError
from timm_spa.explain import figures
from timm_spa.hub.comparison import mean_and_spread
from timm_spa.hub.run_record import Run, RunError

TITLES = {'retinanet': 'RetinaNet', 'cascade_rcnn': 'Cascade R-CNN'}
COLUMNS = {'eval_map': 'AP', 'eval_ap50': 'AP50', 'eval_ap75': 'AP75', 'train_loss': 'training loss'}

Detectors = Dict[str, Dict[str, List[Run]]]  # runs by detector and backbone


def read_runs(folder: Path) -> Detectors:
    """Reads every run of a folder.

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


def make_table(detectors: Detectors) -> str:
    """Returns the results as Markdown."""
    lines = [
        f'| detector | backbone | seeds | epochs | {" | ".join(COLUMNS.values())} |',
        '|---' * (4 + len(COLUMNS)) + '|']
    for detector, rows in detectors.items():
        epochs = min(len(run.summary) for runs in rows.values() for run in runs)
        planned = next(iter(rows.values()))[0].args['settings']['epochs']
        for model, runs in rows.items():
            at = [run.summary[epochs - 1] for run in runs]
            cells = [
                TITLES[detector], f'`{model}`', ', '.join(str(run.args['settings']['seed']) for run in runs),
                f'{epochs} of {planned}', *(mean_and_spread([row[key] for row in at]) for key in COLUMNS)]
            lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line, and returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('folder', type=Path, help='folder of runs')
    parser.add_argument('--check', action='store_true', help='compare table.md with the runs, and write nothing')
    args = parser.parse_args(argv)
    try:
        detectors = read_runs(args.folder)
    except TimmSpaError as e:
        print(f'results: {e}', file=sys.stderr)
        return 1
    table, path = make_table(detectors), args.folder / 'table.md'
    if args.check:
        if not path.exists() or path.read_text(encoding='utf-8') != table:
            print(f'results: {path} is not the table of its runs. Rebuild it without --check.', file=sys.stderr)
            return 1
        return 0
    path.write_text(table, encoding='utf-8')
    curves = {
        TITLES[detector]: {model: [run.summary for run in runs] for model, runs in rows.items()}
        for detector, rows in detectors.items()}
    figures.save(figures.draw_curves(curves), args.folder / 'curves')
    print(table)
    return 0


if __name__ == '__main__':
    sys.exit(main())
