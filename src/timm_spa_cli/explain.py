"""`timm-spa explain`: what the attention of a net does, in pictures and numbers."""
import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from timm_spa_cli._table import print_table
from timm_spa_cli.predict import SHIPPED_MODEL, load_named

HELP = 'show what the attention of a net does: its gates, its pyramid weights, its worth'
LIMITS = (
    'A gate acts on channels, and a mean over them hides what single ones do. That a gate differs from 1/2 does not '
    'say that it helps: `ablate` does.')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.epilog = LIMITS
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='WHAT')
    gates = kinds.add_parser('gates', help='the gates of every block for pictures', epilog=LIMITS)
    gates.add_argument('images', nargs='+', metavar='IMAGE', help='picture')
    gates.add_argument('--blocks', nargs='+', metavar='NAME', help='only these; all by default')
    scales = kinds.add_parser('scales', help="the learned weights of the pyramid by block, the paper's figure 6")
    scales.add_argument('--model', dest='models', action='append', metavar='MODEL', help='can be given again')
    ablate = kinds.add_parser('ablate', help='accuracy without the gates of each block, and without any')
    ablate.add_argument('--images', required=True, metavar='DIR', help='image folder, a folder for each class')
    ablate.add_argument('--split', default='test', help='subfolder of it, if it is there (default: %(default)s)')
    ablate.add_argument('--batch-size', type=int, default=64, help='pictures at a time (default: %(default)s)')
    for kind in (gates, ablate):
        kind.add_argument('--model', help=f'as for `timm-spa predict` (default: {SHIPPED_MODEL})')
        kind.add_argument('--device', default='cpu', help='device to run on (default: %(default)s)')
    for kind in (gates, scales, ablate):
        kind.add_argument('--checkpoint', help='weights file to load in place of the published ones')
        kind.add_argument('--num-classes', type=int, help='classes of the checkpoint, if they differ')
        kind.add_argument('--out', metavar='DIR', help='write figures and CSV files there')
        kind.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> int:
    """Runs the verb, and returns the exit code."""
    return {'gates': _gates, 'scales': _scales, 'ablate': _ablate}[args.kind](args)


def _gates(args: argparse.Namespace) -> int:
    import torch
    from PIL import Image

    from timm_spa import explain, figures
    from timm_spa.predict import PictureError, picture_reader

    model = load_named(args, args.model, args.device)
    read = picture_reader(model)
    cfg = model.pretrained_cfg
    code = 0
    printed: Dict[str, Any] = {}
    for path in args.images:
        try:
            pixels = read(path)
        except PictureError as e:
            print(f'timm-spa: {path} could not be read: {e}', file=sys.stderr)
            code = 1
            continue
        gates = {
            name: gate[0] for name, gate in explain.gate_maps(
                model, pixels.unsqueeze(0).to(args.device), args.blocks).items()}
        rows = figures.gate_rows(gates)
        if args.json:
            printed[path] = _records(rows)
        else:
            print(f'{path}\n')
            print_table(rows, right_aligned=range(1, 7))
            print()
        if args.out:
            mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
            seen = ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
            name = f'{Path(path).stem}-gates'
            _write(args.out, name, rows, figures.draw_gates(Image.fromarray(seen), gates))
    if args.json:
        print(json.dumps(printed, indent=2))
    return code


def _scales(args: argparse.Namespace) -> int:
    from timm_spa import explain, figures

    names = args.models or [None]
    if args.checkpoint and len(names) != 1:
        args.error('--checkpoint is of one model')
    weights = {name or SHIPPED_MODEL: explain.scale_weights(load_named(args, name)) for name in names}
    rows = {name: figures.scale_rows(of_net) for name, of_net in weights.items()}
    if args.json:
        print(json.dumps({name: _records(of_net) for name, of_net in rows.items()}, indent=2))
    else:
        for name, of_net in rows.items():
            print(f'{name}\n')
            print_table(of_net, right_aligned=range(1, len(of_net[0])))
            print()
    if args.out:
        table = [('model', *next(iter(rows.values()))[0])]
        table += [(name, *row) for name, of_net in rows.items() for row in of_net[1:]]
        _write(args.out, 'scales', table, figures.draw_scales(weights))
    return 0


def _ablate(args: argparse.Namespace) -> int:
    from timm_spa import explain
    from timm_spa.predict import labelled_batches

    model = load_named(args, args.model, args.device)
    loader, count = labelled_batches(model, args.images, args.split, args.batch_size)
    batches = ((images.to(args.device), target.to(args.device)) for images, target in loader)
    shown = sys.stderr.isatty()
    found = explain.ablate(
        model, batches, lambda seen: print(f'\r{seen} of {count}', end='', file=sys.stderr) if shown else None)
    whole, seen = found['']
    names = {'': 'none', '*': 'all'}
    rows: List[Tuple[Any, ...]] = [('gates set to 1/2', 'right', 'top-1 %', 'against none')]
    for name, (right, _) in found.items():
        change = f'{100 * (right - whole) / seen:+.2f}' if name else ''
        rows.append((names.get(name, name), str(right), f'{100 * right / seen:.2f}', change))
    if args.json:
        print(json.dumps(_records(rows), indent=2))
    else:
        print_table(rows, right_aligned=(1, 2, 3))
        print(f'\n{seen} pictures. A model that was not trained from a warm start has no reason to be neutral at 1/2.')
    if args.out:
        _write(args.out, 'ablate', rows)
    return 0


def _records(rows: Sequence[Tuple[Any, ...]]) -> List[Dict[str, Any]]:
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def _write(folder: str, name: str, rows: Sequence[Tuple[Any, ...]], figure: Any = None) -> None:
    from timm_spa._files import replacing

    Path(folder).mkdir(parents=True, exist_ok=True)
    with replacing(Path(folder) / f'{name}.csv') as partial, open(partial, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f, lineterminator='\n').writerows(rows)
    if figure is not None:
        from timm_spa import figures

        figures.save(figure, Path(folder) / name)
