"""`timm-spa explain`: what the attention of a net does, in pictures and numbers."""
import argparse
import csv
import itertools
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from timm_spa_cli._table import distinct, print_json, print_table
from timm_spa_cli.predict import SHIPPED_MODEL, load_named, positive

HELP = 'show what a net looks at, and what its attention does: class activation, gates, pyramid weights, its worth'
EXAMPLES = ('timm-spa explain cam beet.jpg --compare resnet50 --out figures',)
LIMITS = (
    'A class activation map shows which places raise a score, and is no proof of reasoning. A gate acts on channels, '
    'and a mean over them hides what single ones do. That a gate differs from 1/2 does not say that it helps: `ablate` '
    'does.')
Rows = List[Tuple[Any, ...]]
# how the first line of the CSV file begins
HEADERS = {
    'cam': 'picture,model,class,probability,row,column', 'gates': 'block,channels,cells,mean',
    'scales': 'model,block,size,weight', 'ablate': 'gates set to 1/2,right', 'curves': 'trained,run,epoch'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='WHAT')

    def add(name: str, about: str) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, help=about, description=f'{about[0].upper()}{about[1:]}.', epilog=LIMITS)
        kind.set_defaults(error=kind.error)
        return kind

    cam = add('cam', "class activation maps of any CNNs for pictures, the paper's figure 5")
    cam.add_argument('images', nargs='+', metavar='IMAGE', help='image, or folder of images')
    cam.add_argument('--compare', nargs='+', default=[], metavar='MODEL', help='further models, a row of maps for each')
    cam.add_argument(
        '--class', dest='label',
        help='class to explain: label, name, or number if no class is called so (default: the likeliest)')
    cam.add_argument(
        '--method', default='gradcam', metavar='METHOD',
        help="gradcam, gradcam++, smoothgradcam++, xgradcam, layercam or scorecam (default: %(default)s)")
    cam.add_argument('--layer', help='module whose output is weighted (default: the last map before pooling)')
    gates = add('gates', 'the gates of every block for pictures')
    gates.add_argument('images', nargs='+', metavar='IMAGE', help='image, or folder of images')
    gates.add_argument('--blocks', nargs='+', metavar='NAME', help='only these; all by default')
    scales = add('scales', "the learned weights of the pyramid by block, the paper's figure 6")
    scales.add_argument('--model', dest='models', action='append', metavar='MODEL', help='can be given again')
    ablate = add('ablate', 'accuracy without the gates of each block, and without any')
    ablate.add_argument('--images', required=True, metavar='DIR', help='image folder, a folder for each class')
    ablate.add_argument('--split', default='test', help='subfolder of it, if it has any (default: %(default)s)')
    ablate.add_argument('--batch-size', type=positive, default=64, help='pictures at a time (default: %(default)s)')
    curves = add('curves', "losses and accuracy of training runs, the paper's figures 3 and 4")
    curves.add_argument(
        'runs', nargs='+', metavar='RUN',
        help='folder with summary.csv, or folder of such folders; seeds are averaged, runs without metrics left out')
    for kind in (cam, gates, ablate):
        kind.add_argument('--model', help=f'as for `timm-spa predict` (default: of --checkpoint, else {SHIPPED_MODEL})')
        kind.add_argument('--device', default='cpu', help='device to run on (default: %(default)s)')
    scales.add_argument(
        '--checkpoint', dest='checkpoints', action='append', metavar='FILE',
        help='weights file to load in place of the published ones; can be given again')
    for kind in (cam, gates, ablate):
        kind.add_argument('--checkpoint', metavar='FILE', help='weights file to load in place of the published ones')
    for kind in (cam, gates, scales, ablate):
        kind.add_argument('--num-classes', type=positive, help='classes of the checkpoint, if they differ')
    for kind in (cam, gates, scales, ablate, curves):
        kind.add_argument('--out', metavar='DIR', help='write figures and CSV files there')
        kind.add_argument(
            '--overwrite', action='store_true', help='replace files in DIR also if they are not of an earlier call')
        kind.add_argument('--json', action='store_true', help='print JSON')
        if kind is not ablate:
            kind.add_argument('--dark', action='store_true', help='draw on a dark background')


def run(args: argparse.Namespace) -> int:
    """Runs the verb, and returns the exit code."""
    if args.out:
        _refuse_output(args)
    return {'cam': _cam, 'gates': _gates, 'scales': _scales, 'ablate': _ablate, 'curves': _curves}[args.kind](args)


def _refuse_output(args: argparse.Namespace) -> None:
    """Refuses to replace files of something else, before anything is computed."""
    from timm_spa.checkpoints.own_files import is_own_figure, refuse_replacing, starts_with

    stems = distinct([Path(path).stem for path in args.images]) if args.kind == 'gates' else []
    names = [f'{stem}-gates' for stem in stems] or [args.kind]
    tables = [Path(args.out) / f'{name}.csv' for name in names]
    refuse_replacing(tables, args.overwrite, lambda path: starts_with(path, HEADERS[args.kind]))
    numbered = Path(args.out).glob('cam-*.*') if args.kind == 'cam' else ()
    figures = [table.with_suffix(suffix) for table in tables for suffix in ('.png', '.svg')]
    refuse_replacing([*figures, *numbered], args.overwrite, is_own_figure)


def _read(reader: Any, path: str) -> Any:
    """Reads a picture, or says why it cannot be read and returns None."""
    from timm_spa.predict import PictureError

    try:
        return reader(path)
    except PictureError as e:
        print(f'timm-spa: {path} could not be read: {e}', file=sys.stderr)
        return None


def _cam(args: argparse.Namespace) -> int:
    import torch

    from timm_spa.explain import cam
    from timm_spa.predict import class_names, find_class, image_files, load_model, picture_reader, picture_seen

    # by its file, so that the published weights of the same model can stand beside it
    models = {args.checkpoint or args.model or SHIPPED_MODEL: load_named(args, args.model, args.device)}
    models.update({name: load_model(name, device=args.device) for name in args.compare})
    drawn: Dict[str, List[Any]] = {}
    printed: List[Dict[str, Any]] = []
    failed = set()
    images = [str(path) for path in image_files(args.images)]
    for name, model in models.items():
        reader, names = picture_reader(model), class_names(model)
        chosen = None if args.label is None else torch.tensor([find_class(model, args.label)])
        for path in images:
            pixels = None if path in failed else _read(reader, path)
            if pixels is None:
                failed.add(path)
                continue
            found = cam(model, pixels.unsqueeze(0).to(args.device), chosen, args.method, args.layer)
            label, share = names[int(found.classes)]['name'], found.probabilities.item()
            drawn.setdefault(name, []).append((picture_seen(model, pixels), found.maps[0], f'{label} {share:.1%}'))
            printed.append({
                'picture': path, 'model': name, 'class': label, 'probability': round(share, 4), 'layer': found.layer,
                'map': [[round(value, 4) for value in row] for row in found.maps[0].tolist()]})
    if args.json:
        print_json(printed)
    elif printed:
        rows: Rows = [('picture', 'model', 'class', 'probability', 'layer', 'cells')]
        names_of_files = [os.path.basename(path) for path in images]
        shown = {
            path: path if names_of_files.count(name) > 1 else name
            for path, name in zip(images, names_of_files, strict=True)}
        rows += [(
            shown[p['picture']], p['model'], p['class'], f'{p["probability"]:.1%}', p['layer'],
            f'{len(p["map"])}x{len(p["map"][0])}') for p in printed]
        print_table(rows, right_aligned=(3,))
    if args.out and printed:
        from timm_spa.explain import figures

        cells: Rows = [('picture', 'model', 'class', 'probability', 'row', 'column', 'activation')]
        cells += [
            (p['picture'], p['model'], p['class'], p['probability'], y, x, value)
            for p in printed for y, line in enumerate(p['map']) for x, value in enumerate(line)]
        _write(args.out, 'cam', cells)
        count = len(next(iter(drawn.values())))
        for start in range(0, count, figures.COLUMNS):
            part = {name: panels[start:start + figures.COLUMNS] for name, panels in drawn.items()}
            suffix = f'-{start // figures.COLUMNS + 1}' if count > figures.COLUMNS else ''
            figures.save(figures.draw_cams(part, args.dark), Path(args.out) / f'cam{suffix}')
    return 1 if failed else 0


def _gates(args: argparse.Namespace) -> int:
    from timm_spa.explain import figures, gate_maps
    from timm_spa.predict import image_files, picture_reader, picture_seen

    model = load_named(args, args.model, args.device)
    reader = picture_reader(model)
    code = 0
    printed: Dict[str, Any] = {}
    images = [str(path) for path in image_files(args.images)]
    for path, stem in zip(images, distinct([Path(path).stem for path in images]), strict=True):
        pixels = _read(reader, path)
        if pixels is None:
            code = 1
            continue
        gates = {
            name: gate[0]
            for name, gate in gate_maps(model, pixels.unsqueeze(0).to(args.device), args.blocks).items()}
        rows: Rows = [('block', 'channels', 'cells', 'mean', 'smallest', 'largest', 'mean distance from 1/2')]
        for name, gate in gates.items():
            rows.append((name, gate.shape[0], f'{gate.shape[1]}x{gate.shape[2]}', *(
                value.item() for value in (gate.mean(), gate.min(), gate.max(), (gate - 0.5).abs().mean()))))
        if args.json:
            printed[path] = _records(rows)
        else:
            print(f'{path}\n')
            print_table(_as_text(rows, '.4f'), right_aligned=range(1, 7))
            print()
        if args.out:
            figure = figures.draw_gates(picture_seen(model, pixels), gates, args.dark)
            _write(args.out, f'{stem}-gates', _as_text(rows, '.4f'), figure)
    if args.json:
        print_json(printed)
    return code


def _scales(args: argparse.Namespace) -> int:
    from timm_spa.explain import figures, scale_weights

    names = args.models or [None]
    if args.checkpoints and len(names) != 1:
        args.error('--checkpoint is of one model')
    weights = {}
    for name, checkpoint in itertools.product(names, args.checkpoints or [None]):
        args.checkpoint = checkpoint
        weights[checkpoint or name or SHIPPED_MODEL] = scale_weights(load_named(args, name))
    tables: Dict[str, Rows] = {}
    for name, of_net in weights.items():
        sizes = next(iter(of_net.values())).sizes
        tables[name] = [('block', *(f'{size}x{size}' for size in sizes))]
        tables[name] += [(block, *of_block.weights) for block, of_block in of_net.items()]
    if args.json:
        print_json({name: _records(table) for name, table in tables.items()})
    else:
        for name, table in tables.items():
            print(f'{name}\n')
            print_table(_as_text(table, '.4f'), right_aligned=range(1, len(table[0])))
            print()
    if args.out:
        cells: Rows = [('model', 'block', 'size', 'weight')]
        cells += [
            (name, block, size, f'{value:.4f}') for name, of_net in weights.items()
            for block, of_block in of_net.items() for size, value in zip(*vars(of_block).values(), strict=True)]
        _write(args.out, 'scales', cells, figures.draw_scales(weights, args.dark))
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
    rows: Rows = [('gates set to 1/2', 'right', 'top-1 %', 'against none')]
    for name, (right, _) in found.items():
        change = 100 * (right - whole) / seen if name else None
        rows.append((names.get(name, name), right, 100 * right / seen, change))
    table = _as_text(rows, '.2f', '+.2f')
    if args.json:
        print_json(_records(rows))
    else:
        print_table(table, right_aligned=(1, 2, 3))
        print(f'\n{seen} pictures. A model that was not trained from a warm start has no reason to be neutral at 1/2.')
    if args.out:
        _write(args.out, 'ablate', table)
    return 0


def _curves(args: argparse.Namespace) -> int:
    import statistics

    from timm_spa.explain import figures
    from timm_spa.explain.curves import read_curves

    skipped: List[str] = []
    found = read_curves(args.runs, skipped)
    for cause in skipped:
        print(f'timm-spa: left out: {cause}', file=sys.stderr)
    curves = figures.curves_of(next(iter(found.values()))[0])
    rows: Rows = [('trained', 'runs', 'epochs', *curves.values())]
    cells: Rows = [('trained', 'run', 'epoch', *curves)]
    for label, runs in found.items():
        epochs = min(map(len, runs))
        last = [[run[epochs - 1][key] for run in runs] for key in curves]
        rows.append((label, str(len(runs)), str(epochs), *(f'{statistics.mean(values):.3f}' for values in last)))
        cells += [
            (label, number, int(row['epoch']), *(row[key] for key in curves))
            for number, run in enumerate(runs, start=1) for row in run]
    if args.json:
        print_json(_records(cells))
    else:
        print_table(rows, right_aligned=range(1, 6))
        print('\nMeans of the runs, at the last epoch that all of them have.')
    if args.out:
        _write(args.out, 'curves', cells, figures.draw_curves({'': found}, args.dark))
    return 1 if skipped else 0


def _records(rows: Sequence[Tuple[Any, ...]]) -> List[Dict[str, Any]]:
    """Returns rows below a header as JSON has them; numbers stay numbers."""
    return [
        {key: round(value, 6) if isinstance(value, float) else value for key, value in zip(rows[0], row, strict=True)}
        for row in rows[1:]]


def _as_text(rows: Rows, spec: str, last: Optional[str] = None) -> Rows:
    """Returns rows as text, with a format for the floats, and for those of the last column if it has its own."""
    def text(value: Any, of_last: bool) -> str:
        if isinstance(value, float):
            return format(value, last if of_last and last else spec)
        return '' if value is None else str(value)

    return [tuple(text(value, i == len(row) - 1) for i, value in enumerate(row)) for row in rows]


def _write(folder: str, name: str, rows: Sequence[Tuple[Any, ...]], figure: Optional[Any] = None) -> None:
    from timm_spa.checkpoints.files import replacing

    if Path(folder).exists() and not Path(folder).is_dir():
        raise OSError(f'--out: {folder} is a file. Name a folder to write to.')
    Path(folder).mkdir(parents=True, exist_ok=True)
    with replacing(Path(folder) / f'{name}.csv') as partial, open(partial, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f, lineterminator='\n').writerows(rows)
    if figure is not None:
        from timm_spa.explain import figures

        figures.save(figure, Path(folder) / name)
