"""Evaluates the models of a sweep on every image of a held-out split.

    python train_scripts/evaluate.py train_scripts/results/grocery81 --runs runs --data-dir GROCERY --split test \
        --class-map GROCERY/classes.txt --device cuda

Evaluates the last epoch of every run in float32, with the preprocessing of the run's own validation. Writes two files
next to the `run.json` of each run: `<split>.csv` has the class and the predicted class of each image, in the order of
their paths. `pyramid_weights.csv` has the learned pyramid weights of each SPA gate, from the finest level to the global
one.
"""
import argparse
import csv
import sys
from functools import partial
from pathlib import Path
from typing import Any, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
from timm.data import create_loader, resolve_data_config

import timm_spa
from timm_spa._errors import TimmSpaError
from timm_spa.checkpoints.files import replacing
from timm_spa.checkpoints.own_files import refuse_replacing, starts_with
from timm_spa.checkpoints.reading import read_checkpoint
from timm_spa.checkpoints.run_files import RunError
from timm_spa.training.image_folder import class_numbers, number_of_classes, open_dataset
from timm_spa.training.run_record import Run


def load(run: Run, runs: Path, device: str) -> nn.Module:
    """Returns the model of a run with the weights of its last epoch.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        RunError: The training is incomplete.
    """
    kwargs = run.args['model_kwargs'] or {}
    model = timm.create_model(run.args['model'], num_classes=run.args['num_classes'], **kwargs)
    checkpoint = read_checkpoint(runs / run.folder.name / 'last.pth.tar')
    if checkpoint['epoch'] != run.args['epochs'] - 1:
        raise RunError(
            f'{run.folder.name} is incomplete: its last checkpoint is of epoch {checkpoint["epoch"]}, expected '
            f'{run.args["epochs"] - 1}. Resume the training.')
    model.load_state_dict(checkpoint['state_dict'])
    return model.eval().to(device)


def write(path: Path, rows: List[Tuple[Any, ...]]) -> None:
    """Writes a table atomically."""
    with replacing(path) as unfinished, open(unfinished, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f, lineterminator='\n').writerows(rows)


@torch.inference_mode()
def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, help='folder of results of sweep.py')
    parser.add_argument('--runs', type=Path, required=True, help='folder of their checkpoints')
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--split', required=True)
    parser.add_argument('--class-map', default='')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--overwrite', action='store_true', help='replace files that evaluate.py did not write')
    args = parser.parse_args(argv)

    torch.backends.cudnn.allow_tf32 = False
    runs = [Run.read(path.parent) for path in sorted(args.results.glob('*/run.json'))]
    if not runs:
        parser.error(f'No runs found in {args.results}: expected folders with run.json. Run sweep.py first.')
    try:
        for name, header in ((f'{args.split}.csv', 'target,predicted'), ('pyramid_weights.csv', 'gate,')):
            refuse_replacing(
                (run.folder / name for run in runs), args.overwrite, partial(starts_with, text=header))
        models = [load(run, args.runs, args.device) for run in runs]
    except (OSError, TimmSpaError) as e:
        print(f'evaluate: {e}', file=sys.stderr)
        return 1
    configs = [resolve_data_config(run.args, model=model) for run, model in zip(runs, models, strict=True)]
    if any(config != configs[0] for config in configs):
        parser.error('The runs have different preprocessing. Evaluate them in separate folders.')
    config = {k: v for k, v in configs[0].items() if k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')}
    try:
        dataset = open_dataset('', args.data_dir, args.split, class_map=args.class_map)
    except TimmSpaError as e:
        parser.error(str(e))
    count, outputs = number_of_classes(class_numbers(dataset)), {run.args['num_classes'] for run in runs}
    if outputs != {count}:  # timm would number the class folders from 0 on
        parser.error(
            f'{args.data_dir} has {count} classes, but the models have {", ".join(map(str, sorted(outputs)))} outputs. '
            'List the class names with --class-map FILE, in the order of the outputs.')
    loader = create_loader(
        dataset, batch_size=128, num_workers=args.workers, use_prefetcher=False, persistent_workers=False, **config)
    rows: List[List[Tuple[Any, ...]]] = [[('target', 'predicted')] for _ in runs]
    for images, target in loader:
        images = images.to(args.device)
        for model, table in zip(models, rows, strict=True):
            table += zip(target.tolist(), model(images).argmax(-1).tolist(), strict=True)
    for run, model, table in zip(runs, models, rows, strict=True):
        write(run.folder / f'{args.split}.csv', table)
        gates = [(n, m) for n, m in model.named_modules() if isinstance(m, timm_spa.SpatialPyramidAttention)]
        if gates:
            sizes = max((m.pyramid_sizes for _, m in gates), key=len)
            write(run.folder / 'pyramid_weights.csv', [
                ('gate', *(f'{s}x{s}' for s in sizes)),
                *((n, *(f'{w:.5f}' for w in m.pyramid_weight.tolist())) for n, m in gates)])
        correct = sum(t == p for t, p in table[1:])
        print(f'{run.folder.name}: {correct} of {len(dataset)} correct')
    return 0


if __name__ == '__main__':
    sys.exit(main())
