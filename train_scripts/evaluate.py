"""What the nets of a sweep say to every picture of a split that was kept apart.

    python train_scripts/evaluate.py train_scripts/results/grocery81 --runs runs --data-dir GROCERY --split test \
        --class-map GROCERY/classes.txt --device cuda

Reads every picture once and shows it to the last epoch of every run, in float32, prepared as the runs' own validation
does. Beside the `run.json` of a run it writes `<split>.csv`, the class and the predicted class of each picture in the
order of their paths, and for nets with SPA `pyramid_weights.csv`, the learned weights of each gate from fine to global.
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
    """Returns the net of a run with the weights of its last epoch.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        RunError: It is of another epoch.
    """
    kwargs = run.args['model_kwargs'] or {}
    net = timm.create_model(run.args['model'], num_classes=run.args['num_classes'], **kwargs)
    checkpoint = read_checkpoint(runs / run.folder.name / 'last.pth.tar')
    if checkpoint['epoch'] != run.args['epochs'] - 1:
        raise RunError(f'{run.folder.name} ended after epoch {checkpoint["epoch"]}, and has {run.args["epochs"]}.')
    net.load_state_dict(checkpoint['state_dict'])
    return net.eval().to(device)


def write(path: Path, rows: List[Tuple[Any, ...]]) -> None:
    """Writes a table, whole or not at all."""
    with replacing(path) as unfinished, open(unfinished, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f, lineterminator='\n').writerows(rows)


@torch.inference_mode()
def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line, and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, help='folder that sweep.py kept the runs in')
    parser.add_argument('--runs', type=Path, required=True, help='folder of their checkpoints')
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--split', required=True)
    parser.add_argument('--class-map', default='')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--overwrite', action='store_true', help='replace files that are not of an earlier call')
    args = parser.parse_args(argv)

    torch.backends.cudnn.allow_tf32 = False
    runs = [Run.read(path.parent) for path in sorted(args.results.glob('*/run.json'))]
    if not runs:
        parser.error(f'{args.results} holds no run.')
    try:
        for name, header in ((f'{args.split}.csv', 'target,predicted'), ('pyramid_weights.csv', 'gate,')):
            refuse_replacing(
                (run.folder / name for run in runs), args.overwrite, partial(starts_with, text=header))
        nets = [load(run, args.runs, args.device) for run in runs]
    except (OSError, TimmSpaError) as e:
        print(f'evaluate: {e}', file=sys.stderr)
        return 1
    configs = [resolve_data_config(run.args, model=net) for run, net in zip(runs, nets, strict=True)]
    if any(config != configs[0] for config in configs):
        parser.error('the runs prepare their pictures in different ways.')
    config = {k: v for k, v in configs[0].items() if k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')}
    try:
        dataset = open_dataset('', args.data_dir, args.split, class_map=args.class_map)
    except TimmSpaError as e:
        parser.error(str(e))
    count, outputs = number_of_classes(class_numbers(dataset)), {run.args['num_classes'] for run in runs}
    if outputs != {count}:  # timm would number the classes of the images from 0 on
        parser.error(
            f'{args.data_dir} has {count} classes, and the models {", ".join(map(str, sorted(outputs)))} outputs. Give '
            'the names in the order of the outputs with --class-map FILE.')
    loader = create_loader(
        dataset, batch_size=128, num_workers=args.workers, use_prefetcher=False, persistent_workers=False, **config)
    rows: List[List[Tuple[Any, ...]]] = [[('target', 'predicted')] for _ in runs]
    for images, target in loader:
        images = images.to(args.device)
        for net, table in zip(nets, rows, strict=True):
            table += zip(target.tolist(), net(images).argmax(-1).tolist(), strict=True)
    for run, net, table in zip(runs, nets, rows, strict=True):
        write(run.folder / f'{args.split}.csv', table)
        gates = [(n, m) for n, m in net.named_modules() if isinstance(m, timm_spa.SpatialPyramidAttention)]
        if gates:
            sizes = max((m.pyramid_sizes for _, m in gates), key=len)
            write(run.folder / 'pyramid_weights.csv', [
                ('gate', *(f'{s}x{s}' for s in sizes)),
                *((n, *(f'{w:.5f}' for w in m.pyramid_weight.tolist())) for n, m in gates)])
        right = sum(t == p for t, p in table[1:])
        print(f'{run.folder.name}: {right} of {len(dataset)}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
