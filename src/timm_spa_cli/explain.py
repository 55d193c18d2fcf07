"""`timm-spa explain`: class activation maps, gates, pyramid weights, ablation and curves."""
import argparse
import csv
import itertools
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from timm_spa_cli._options import (
    SHIPPED_MODEL,
    add_checkpoint_options,
    add_device_option,
    add_model_option,
    add_split_option,
    load_named,
    measured_folder,
    positive,
)
from timm_spa_cli._table import distinct, print_json, print_table, printable

HELP = 'show class activation maps, gates, pyramid weights, accuracy without gates, and curves of training runs'
EXAMPLES = ('timm-spa explain cam beet.jpg --compare resnet50 --out figures',)
LIMITS = (
    'A class activation map shows which parts of an image raise a score. It does not prove how the model reasons. A '
    'gate acts on single channels, and the mean over channels hides them. A gate that differs from 1/2 does not have '
    'to help: `ablate` measures that.')
Rows = List[Tuple[Any, ...]]
Figures = Iterator[Tuple[str, Any]]  # names of files and figures of matplotlib
# beginning of the first line of each CSV file
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

    cam = add('cam', "class activation maps of CNNs for images, like the paper's figure 5")
    cam.add_argument('--compare', nargs='+', default=[], metavar='MODEL', help='further models, one row for each')
    cam.add_argument(
        '--class', dest='label',
        help='class to explain: label, name, or number if no class has that name (default: the likeliest class)')
    cam.add_argument(
        '--method', default='gradcam', metavar='METHOD',
        help="gradcam, gradcam++, smoothgradcam++, xgradcam, layercam or scorecam (default: %(default)s)")
    cam.add_argument('--layer', help='module whose output is weighted (default: the last feature map before pooling)')
    gates = add('gates', 'gates of every block for images')
    gates.add_argument('--blocks', nargs='+', metavar='NAME', help='blocks to show (default: all)')
    scales = add('scales', "learned pyramid weights by block, like the paper's figure 6")
    scales.add_argument('--model', dest='models', action='append', metavar='MODEL', help='model; can be repeated')
    ablate = add('ablate', 'accuracy without the gates of each block, and without all gates')
    ablate.add_argument('--images', required=True, metavar='DIR', help='image folder with a subfolder for each class')
    add_split_option(ablate)
    ablate.add_argument('--batch-size', type=positive, default=64, help='images per batch (default: %(default)s)')
    curves = add('curves', "losses and accuracy of training runs, like the paper's figures 3 and 4")
    curves.add_argument(
        'runs', nargs='+', metavar='RUN',
        help='folder with summary.csv, or folder of such folders; seeds are averaged, runs without metrics are skipped')
    for kind in (cam, gates):
        kind.add_argument('images', nargs='+', metavar='IMAGE', help='image, or folder of images')
    for kind in (cam, gates, ablate):
        add_model_option(kind)
        add_device_option(kind)
    for kind in (cam, gates, scales, ablate):
        add_checkpoint_options(kind, several=kind is scales)
    for kind in (cam, gates, scales, ablate, curves):
        kind.add_argument('--out', metavar='DIR', help='write figures and CSV files to this folder')
        kind.add_argument(
            '--overwrite', action='store_true', help='also replace files in DIR that an earlier call did not write')
        kind.add_argument('--json', action='store_true', help='print JSON')
        if kind is not ablate:
            kind.add_argument('--dark', action='store_true', help='draw on a dark background')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    if args.out:
        _refuse_output(args)
    return {'cam': _cam, 'gates': _gates, 'scales': _scales, 'ablate': _ablate, 'curves': _curves}[args.kind](args)


def _refuse_output(args: argparse.Namespace) -> None:
    """Refuses to replace files of other origin, before anything is computed."""
    from timm_spa.checkpoints.own_files import is_own_figure, refuse_replacing, starts_with

    stems = distinct([Path(path).stem for path in args.images]) if args.kind == 'gates' else []
    names = [f'{stem}-gates' for stem in stems] or [args.kind]
    tables = [Path(args.out) / f'{name}.csv' for name in names]
    refuse_replacing(tables, args.overwrite, lambda path: starts_with(path, HEADERS[args.kind]))
    numbered = Path(args.out).glob('cam-*.*') if args.kind == 'cam' else ()
    figures = [table.with_suffix(suffix) for table in tables for suffix in ('.png', '.svg')]
    refuse_replacing([*figures, *numbered], args.overwrite, is_own_figure)


def _read(reader: Any, path: str) -> Any:
    """Returns a prepared image, or prints an error and returns None."""
    from timm_spa.predict import ImageError

    try:
        return reader(path)
    except ImageError as e:
        print(f'timm-spa: {path} could not be read: {e}', file=sys.stderr)
        return None


def _cam(args: argparse.Namespace) -> int:
    import torch

    from timm_spa.explain import cam, figures
    from timm_spa.predict import class_names, find_class, image_files, image_reader, image_seen, load_model

    # a checkpoint is named by its file, so that it can be compared with the published weights of the same model
    models = {args.checkpoint or args.model or SHIPPED_MODEL: load_named(args, args.model, args.device)}
    models.update({name: load_model(name, device=args.device) for name in args.compare})
    panels: Dict[str, List[Any]] = {}
    records: List[Dict[str, Any]] = []
    failed = set()
    images = [str(path) for path in image_files(args.images)]
    for name, model in models.items():
        reader, names = image_reader(model), class_names(model)
        chosen = None if args.label is None else torch.tensor([find_class(model, args.label)])
        for path in images:
            pixels = None if path in failed else _read(reader, path)
            if pixels is None:
                failed.add(path)
                continue
            result = cam(model, pixels.unsqueeze(0).to(args.device), chosen, args.method, args.layer)
            label, probability = names[int(result.classes)]['name'], result.probabilities.item()
            panels.setdefault(name, []).append(
                (image_seen(model, pixels), result.maps[0], f'{label} {probability:.1%}'))
            records.append({
                'picture': path, 'model': name, 'class': label, 'probability': round(probability, 4),
                'layer': result.layer, 'map': [[round(value, 4) for value in row] for row in result.maps[0].tolist()]})

    def draw() -> Figures:
        count = len(next(iter(panels.values())))
        for start in range(0, count, figures.COLUMNS):
            part = {name: row[start:start + figures.COLUMNS] for name, row in panels.items()}
            suffix = f'-{start // figures.COLUMNS + 1}' if count > figures.COLUMNS else ''
            yield f'cam{suffix}', figures.draw_cams(part, args.dark)

    basenames = [os.path.basename(path) for path in images]
    shown = {
        path: path if basenames.count(name) > 1 else name for path, name in zip(images, basenames, strict=True)}
    table: Rows = [('image', 'model', 'class', 'probability', 'layer', 'cells')]
    table += [(
        shown[r['picture']], r['model'], r['class'], f'{r["probability"]:.1%}', r['layer'],
        f'{len(r["map"])}x{len(r["map"][0])}') for r in records]
    cells: Rows = [('picture', 'model', 'class', 'probability', 'row', 'column', 'activation')]
    cells += [
        (r['picture'], r['model'], r['class'], r['probability'], y, x, value)
        for r in records for y, line in enumerate(r['map']) for x, value in enumerate(line)]
    _emit(args, records, {'': table}, 'cam', cells, draw, right_aligned=(3,))
    return 1 if failed else 0


def _gates(args: argparse.Namespace) -> int:
    from timm_spa.explain import figures, gate_maps
    from timm_spa.predict import image_files, image_reader, image_seen

    model = load_named(args, args.model, args.device)
    reader = image_reader(model)
    code = 0
    records: Dict[str, Any] = {}
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
        records[path] = _records(rows)
        text = _as_text(rows, '.4f')
        if not args.json:
            _print_table(path, text, range(1, 7))
        if args.out:
            name = f'{stem}-gates'
            _write(args, name, text, [(name, figures.draw_gates(image_seen(model, pixels), gates, args.dark))])
    if args.json:
        print_json(records)
    return code


def _scales(args: argparse.Namespace) -> int:
    from timm_spa.explain import figures, scale_weights

    names = args.models or [None]
    if args.checkpoints and len(names) != 1:
        args.error('--checkpoint needs a single --model')
    weights = {}
    for name, checkpoint in itertools.product(names, args.checkpoints or [None]):
        args.checkpoint = checkpoint
        weights[checkpoint or name or SHIPPED_MODEL] = scale_weights(load_named(args, name))
    tables: Dict[str, Rows] = {}
    for name, by_block in weights.items():
        sizes = next(iter(by_block.values())).sizes
        tables[name] = [('block', *(f'{size}x{size}' for size in sizes))]
        tables[name] += [(block, *scales.weights) for block, scales in by_block.items()]
    cells: Rows = [('model', 'block', 'size', 'weight')]
    cells += [
        (name, block, size, f'{value:.4f}') for name, by_block in weights.items()
        for block, scales in by_block.items() for size, value in zip(scales.sizes, scales.weights, strict=True)]
    _emit(
        args, {name: _records(table) for name, table in tables.items()},
        {name: _as_text(table, '.4f') for name, table in tables.items()}, 'scales', cells,
        lambda: iter([('scales', figures.draw_scales(weights, args.dark))]),
        right_aligned=range(1, max(len(table[0]) for table in tables.values())))
    return 0


def _ablate(args: argparse.Namespace) -> int:
    from timm_spa import explain
    from timm_spa.predict import default_split, labelled_batches

    model = load_named(args, args.model, args.device)
    loader, count = labelled_batches(
        model, args.images, args.split or default_split(args.images), args.batch_size)
    batches = ((images.to(args.device), target.to(args.device)) for images, target in loader)
    on_terminal = sys.stderr.isatty()
    results = explain.ablate(
        model, batches, lambda done: print(f'\r{done} of {count}', end='', file=sys.stderr) if on_terminal else None)
    baseline, total = results['']
    names = {'': 'none', '*': 'all'}
    rows: Rows = [('gates set to 1/2', 'right', 'top-1 %', 'against none')]
    for name, (correct, _) in results.items():
        change = 100 * (correct - baseline) / total if name else None
        rows.append((names.get(name, name), correct, 100 * correct / total, change))
    text = _as_text(rows, '.2f', '+.2f')
    _emit(
        args, _records(rows), {'': text}, 'ablate', text, right_aligned=(1, 2, 3),
        note=f'{total} images of {measured_folder(args)}. '
             'Gates of 1/2 are neutral only for models that were trained from a warm start.')
    return 0


def _curves(args: argparse.Namespace) -> int:
    import statistics

    from timm_spa.explain import figures
    from timm_spa.explain.curves import read_curves

    skipped: List[str] = []
    groups = read_curves(args.runs, skipped)
    for cause in skipped:
        print(f'timm-spa: run skipped: {cause}', file=sys.stderr)
    curves = figures.curves_of(next(iter(groups.values()))[0])
    rows: Rows = [('trained', 'runs', 'epochs', *curves.values())]
    cells: Rows = [('trained', 'run', 'epoch', *curves)]
    for label, runs in groups.items():
        epochs = min(map(len, runs))
        last = [[run[epochs - 1][key] for run in runs] for key in curves]
        rows.append((label, str(len(runs)), str(epochs), *(f'{statistics.mean(values):.3f}' for values in last)))
        cells += [
            (label, number, int(row['epoch']), *(row[key] for key in curves))
            for number, run in enumerate(runs, start=1) for row in run]
    _emit(
        args, _records(cells), {'': rows}, 'curves', cells,
        lambda: iter([('curves', figures.draw_curves({'': groups}, args.dark))]), right_aligned=range(1, 6),
        note='Means of the runs, at the last epoch that all of them have.')
    return 1 if skipped else 0


def _records(rows: Sequence[Tuple[Any, ...]]) -> List[Dict[str, Any]]:
    """Returns the rows below the header as JSON objects; numbers stay numbers."""
    return [
        {key: round(value, 6) if isinstance(value, float) else value for key, value in zip(rows[0], row, strict=True)}
        for row in rows[1:]]


def _as_text(rows: Rows, spec: str, last_spec: Optional[str] = None) -> Rows:
    """Returns rows as text, with a format for floats, and optionally another format for the last column."""
    def text(value: Any, is_last: bool) -> str:
        if isinstance(value, float):
            return format(value, last_spec if is_last and last_spec else spec)
        return '' if value is None else str(value)

    return [tuple(text(value, i == len(row) - 1) for i, value in enumerate(row)) for row in rows]


def _emit(
        args: argparse.Namespace,
        records: Any,
        tables: Dict[str, Rows],
        name: str,
        cells: Rows,
        draw: Callable[[], Figures] = lambda: iter(()),
        right_aligned: Sequence[int] = (),
        note: str = '',
) -> None:
    """Prints results, and writes them to the folder of --out.

    Args:
        args: Arguments of the verb.
        records: Results to print as JSON.
        tables: Tables to print without --json, by heading. A table with only a header is not printed.
        name: Name of the CSV file.
        cells: Rows of the CSV file. A file with only a header is not written.
        draw: Draws the figures to write.
        right_aligned: Right-aligned columns of the tables.
        note: Line to print below the tables.
    """
    if args.json:
        print_json(records)
    else:
        for heading, rows in tables.items():
            if len(rows) > 1:
                _print_table(heading, rows, right_aligned)
        if note:
            print(f'\n{note}')
    if args.out and len(cells) > 1:
        _write(args, name, cells, draw())


def _print_table(heading: str, rows: Rows, right_aligned: Sequence[int]) -> None:
    if heading:
        print(f'{heading}\n')
    print_table(rows, right_aligned)
    if heading:
        print()


def _write(args: argparse.Namespace, name: str, rows: Rows, figures: Any) -> None:
    """Writes a CSV file, and figures as PNG and SVG, to the folder of --out, and prints their names."""
    from timm_spa.checkpoints.files import replacing
    from timm_spa.explain.figures import save

    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise OSError(f'--out {folder} cannot be used: it is a file. Name a folder to write to.')
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f'{name}.csv']
    with replacing(written[0]) as partial, open(partial, 'w', newline='', encoding='utf-8') as f:
        csv.writer(f, lineterminator='\n').writerows(rows)
    for stem, figure in figures:
        written += save(figure, folder / stem)
    names = printable(', '.join(path.name for path in written))
    print(f'Wrote {folder}: {names}.', file=sys.stderr if args.json else sys.stdout)
