"""The command line: `timm-spa <verb>`, or `python -m timm_spa <verb>`."""
import argparse
import dataclasses
import json
import os
import shlex
import sys
from importlib import resources
from typing import Dict, List, Optional, Sequence, Tuple

DEMO_MODEL = 'spa_mobilenetv2_cifar.tmm_tin200'
# the classes of the demo model that a shipped picture shows; a picture of none of its classes has no right answer
DEMO_PICTURES: Dict[str, Tuple[str, ...]] = {
    'chelsea.jpg': ('n02123045',),
    'coffee.jpg': ('n07920052',),
    'rocket.jpg': (),
    'astronaut.jpg': (),
}


def _print_table(rows: Sequence[Sequence[str]], right_aligned: Sequence[int] = ()) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [c.rjust(widths[i]) if i in right_aligned else c.ljust(widths[i]) for i, c in enumerate(row)]
        print('  '.join(cells).rstrip())


def _tables() -> int:
    from .tables import NOTE, TABLES, table_rows

    for table in TABLES:
        _print_table(table_rows(table), right_aligned=range(2, 11))
        print()
    print(NOTE)
    return 0


def _list(args: argparse.Namespace) -> int:
    if args.tables:
        return _tables()
    import timm

    import timm_spa

    from .profile import count_cost

    rows = [('model', 'parameters (M)', 'GMACs', 'input', 'weights')]
    tagged_rows = [('name for create_model', 'weights')]
    for name in timm_spa.list_models(args.filter):
        cost = count_cost(name)
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
        tagged = timm.list_pretrained(f'{name}.*')
        for full_name in tagged:
            source = timm.get_pretrained_cfg(full_name)
            tagged_rows.append((full_name, 'with the package' if source.file else f'Hub: {source.hf_hub_id}'))
        first = f'{cfg.tag}, {len(tagged) - 1} more' if len(tagged) > 1 else cfg.tag
        rows.append((
            name, f'{cost.parameters / 1e6:.3f}', f'{cost.macs / 1e9:.3f}', 'x'.join(map(str, cfg.input_size[1:])),
            first if tagged else '-'))
    if len(rows) == 1:
        print(f'timm-spa: no model of this package is called {args.filter!r}.', file=sys.stderr)
        return 1
    if args.tags:
        _print_table(tagged_rows)
        return 0
    _print_table(rows, right_aligned=(1, 2))
    print('\nGMACs: multiply-adds of convolutions and linear layers, 1e9, for one image of the input size.')
    return 0


def _show_predictions(
        model_name: str,
        paths: Sequence[str],
        expected: Dict[str, Tuple[str, ...]],
        top_k: int,
        as_json: bool,
        checkpoint: Optional[str] = None,
        num_classes: Optional[int] = None,
        device: str = 'cpu',
) -> int:
    from .predict import load_model, predict

    try:
        model = load_model(model_name, checkpoint, num_classes, device)
    except Exception as e:  # timm, torch and the Hub each raise their own; the reader needs the message, not the trace
        print(f'timm-spa: {model_name} could not be loaded: {e}', file=sys.stderr)
        return 1
    predictions = list(predict(model, paths, top_k))
    if as_json:
        print(json.dumps([vars(p) for p in predictions], indent=2))
    rows: List[Tuple[str, ...]] = [('picture', '', 'probability', 'class')]
    for p in predictions:
        known = expected.get(p.path, ())
        for rank, c in enumerate(p.classes):
            verdict = '' if rank or not known else ('right' if c['label'] in known else 'wrong')
            rows.append((p.path.rpartition('/')[2] if rank == 0 else '', verdict, f'{c["probability"]:.1%}', c['name']))
    if len(rows) > 1 and not as_json:
        _print_table(rows, right_aligned=(2,))
    failed = [p for p in predictions if p.error]
    for p in failed:
        print(f'timm-spa: {p.path} could not be read: {p.error}', file=sys.stderr)
    return 1 if failed else 0


def _predict(args: argparse.Namespace) -> int:
    return _show_predictions(
        args.model, args.images, {}, args.top_k, args.json, args.checkpoint, args.num_classes, args.device)


def _demo(args: argparse.Namespace) -> int:
    import timm

    cfg = timm.get_pretrained_cfg(DEMO_MODEL)
    print(f'{DEMO_MODEL}: {cfg.description}\n')
    folder = resources.files('timm_spa') / 'images'
    pictures = {str(folder / name): labels for name, labels in DEMO_PICTURES.items()}
    code = _show_predictions(DEMO_MODEL, [*pictures, *args.images], pictures, args.top_k, as_json=False)
    print(
        '\nIt sees 32x32 pixels and knows 200 classes. For 1000 classes at 224x224, with a connection to the Hub:\n'
        '    timm-spa predict IMAGE... --model spa_resnet50\n'
        "which starts from timm's resnet50 weights: the same accuracy, attention neutral until you fine-tune it.")
    return code


def _card(args: argparse.Namespace) -> int:
    from .hub.card import CardError, card_of_folder
    from .hub.run_record import RunError
    from .training_log import SummaryError

    try:
        card = card_of_folder(args.folder, args.repo, args.results)
    except (CardError, RunError, SummaryError) as e:
        print(f'timm-spa: {e}', file=sys.stderr)
        return 1
    if not args.write:
        print(card, end='')
        return 0
    path = os.path.join(args.folder, 'README.md')
    partial = os.path.join(args.folder, f'.README.md.{os.getpid()}')
    card.save(partial)
    os.replace(partial, path)
    print(f'Wrote {path}.')
    return 0


def _publish(args: argparse.Namespace) -> int:
    from .hub.publish import publish, write_repository

    what = args.checkpoint, args.model, args.repo
    options = dict(num_classes=args.num_classes, replace_card=args.replace_card, results=args.results)
    try:
        if args.dry_run:
            notes = write_repository(args.dry_run, *what, **options)
            outcome = f'Wrote {args.dry_run}. Nothing was uploaded.'
        else:
            published = publish(*what, private=args.private, create_pr=args.pr, tag=args.tag, **options)
            notes = published.notes
            outcome = f'Published: {published.url}' if published.changed else f'Nothing to change: {published.url}'
    except (OSError, RuntimeError, TypeError, ValueError) as e:  # of the files, the model, the card and the Hub
        print(f'timm-spa: {e}', file=sys.stderr)
        return 1
    print('\n'.join([*notes, outcome]))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .hub.verify import verify

    report = verify(args.source, args.revision, args.images, args.split, args.batch_size, args.device)
    for line in report.checked:
        print(f'checked: {line}')
    for line in report.problems:
        print(f'problem: {line}')
    print(f'{len(report.problems)} problems.' if report.problems else 'No problem found.')
    return 1 if report.problems else 0


def _convert(args: argparse.Namespace) -> int:
    from timm.utils import ParseKwargs

    from .hub.convert import convert

    try:
        ParseKwargs([], 'model_kwargs')(None, args, args.model_kwargs)  # as timm's own scripts read them
        done = convert(
            args.source, args.output, args.model, args.dtype, args.kind, args.from_model, args.overwrite,
            **args.model_kwargs)
    except (OSError, RuntimeError, TypeError, ValueError) as e:  # of the file, the model and its arguments
        print(f'timm-spa: {e}', file=sys.stderr)
        return 1
    print(f'{args.source} is of {done.description}.')
    print('\n'.join(done.notes), end='\n' if done.notes else '')
    error = f'largest error {done.error:.3g}, in {done.error_in}' if done.error_in else 'every value is exact'
    print(f'Wrote {args.output}: {done.tensors} tensors, {args.dtype}, {done.size / 1e6:.1f} MB, {error}.')
    return 0


def _bench(args: argparse.Namespace) -> int:
    from . import benchmark

    try:
        if args.compare:
            rows, lines = benchmark.compare(*args.compare)
            print('\n'.join(lines) + '\n')
            _print_table(rows, right_aligned=(1, 3))
            return 0
        settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(benchmark.Settings)}
        settings['dtype'] = args.dtype or ('bfloat16' if args.amp else 'float32')
        if args.json and (os.path.isdir(args.json) or not os.access(os.path.dirname(args.json) or '.', os.W_OK)):
            raise OSError(f'--json: {args.json} is no file that can be written.')  # now, not after the measurement
        record = benchmark.measure(
            args.models, benchmark.Settings(**settings), args.base, args.command,
            lambda message: print(message, file=sys.stderr) if sys.stderr.isatty() else None)
        _print_table(benchmark.table_rows(record), right_aligned=range(2, 11))
        print('\n' + '\n'.join(benchmark.notes(record)))
        if args.json:
            benchmark.write_record(args.json, record)
    except (OSError, RuntimeError, ValueError) as e:  # of the files, the models and the options
        print(f'timm-spa: {e}', file=sys.stderr)
        return 1
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 1 if anything that was asked for could not be done.
    """
    parser = argparse.ArgumentParser(prog='timm-spa', description='Spatial Pyramid Attention models for timm.')
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')

    verb = verbs.add_parser('list', help='models, their size and cost, and their weights')
    verb.add_argument('filter', nargs='?', default='*', help='wildcard, e.g. "spa_b_*" (default: all)')
    verb.add_argument('--tags', action='store_true', help='every tag of weights, and where they are, instead')
    verb.add_argument('--tables', action='store_true', help="the size and cost columns of the paper's tables instead")
    verb.set_defaults(run=_list)

    verb = verbs.add_parser('demo', help='classify the shipped pictures with the shipped weights')
    verb.add_argument('images', nargs='*', metavar='IMAGE', help='further pictures')
    verb.add_argument('--top-k', type=int, default=5, help='classes to show for each picture (default: %(default)s)')
    verb.set_defaults(run=_demo)

    verb = verbs.add_parser('predict', help='classify pictures with any model that timm can create')
    verb.add_argument('images', nargs='+', metavar='IMAGE')
    verb.add_argument('--model', required=True, help="name, or 'hf-hub:organization/name', or 'local-dir:folder'")
    verb.add_argument('--checkpoint', help='weights file to load in place of the published ones')
    verb.add_argument('--num-classes', type=int, help='classes of the checkpoint, if they differ')
    verb.add_argument('--device', default='cpu', help='device to run on (default: %(default)s)')
    verb.add_argument('--top-k', type=int, default=5, help='classes to show for each picture (default: %(default)s)')
    verb.add_argument('--json', action='store_true', help='print JSON, errors included')
    verb.set_defaults(run=_predict)

    verb = verbs.add_parser('card', help="make the card of a repository's folder from the files in it, and print it")
    verb.add_argument('folder', metavar='FOLDER', help='folder that `publish --dry-run` wrote')
    verb.add_argument('--repo', metavar='ORG/NAME', help='repository that the folder is of')
    verb.add_argument('--results', metavar='DIR', help='results of a sweep with the controls to compare with')
    verb.add_argument('--write', action='store_true', help='replace the README.md of the folder')
    verb.set_defaults(run=_card)

    verb = verbs.add_parser('publish', help='publish weights as a repository of the Hub, in one commit')
    verb.add_argument('checkpoint', metavar='CHECKPOINT', help='model_best.pth.tar of a run, or a file of its weights')
    verb.add_argument('--model', required=True, metavar='NAME.TAG', help='e.g. spa_resnet50.tmm_in1k')
    verb.add_argument('--repo', metavar='ORG/NAME', help='repository (default: NAME.TAG of TIMM_SPA_HUB_ORG)')
    verb.add_argument('--num-classes', type=int, help="classes of the checkpoint, if the run's args.yaml is missing")
    verb.add_argument('--private', action='store_true', help='to a private repository, or not at all')
    verb.add_argument('--pr', action='store_true', help='as a pull request')
    verb.add_argument('--tag', help='name for the commit, e.g. v1')
    verb.add_argument('--results', metavar='DIR', help='results of a sweep with the controls for the card')
    verb.add_argument('--replace-card', action='store_true', help='replace the README.md of the repository or folder')
    verb.add_argument('--dry-run', metavar='DIR', help='write the files to a folder, and upload nothing')
    verb.set_defaults(run=_publish)

    verb = verbs.add_parser('verify', help='check a repository of the Hub, or a folder that will be one')
    verb.add_argument('source', metavar='ORG/NAME|FOLDER')
    verb.add_argument('--revision', help='branch, tag or commit of the repository')
    verb.add_argument('--images', metavar='DIR', help='image folder to measure the accuracy on')
    verb.add_argument('--split', default='validation', help='subfolder of it (default: %(default)s)')
    verb.add_argument('--batch-size', type=int, default=64, help='pictures at a time (default: %(default)s)')
    verb.add_argument('--device', default='cpu', help='device to measure on (default: %(default)s)')
    verb.set_defaults(run=_verify)

    verb = verbs.add_parser('convert', help='make a safetensors file of weights from elsewhere')
    verb.add_argument('source', metavar='SOURCE', help='file of torch.save or of safetensors')
    verb.add_argument('output', metavar='OUT.safetensors')
    verb.add_argument('--model', required=True, help='model that the file is for')
    verb.add_argument('--dtype', default='float32', help='float32, float16 or bfloat16 (default: %(default)s)')
    verb.add_argument(
        '--from', dest='kind', metavar='KIND',
        help='what the source is of: same, plain, torchvision, efficientnet-pytorch, authors, authors-plain, variant '
             '(default: found out)')
    verb.add_argument('--from-model', metavar='NAME', help='model of the source, if the file does not say it')
    verb.add_argument('--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help='e.g. pyramid_sizes=1,2,4')
    verb.add_argument('--overwrite', action='store_true', help='replace OUT if it is there')
    verb.set_defaults(run=_convert)

    verb = verbs.add_parser('bench', help='measure speed and memory of models in turn, as ratios to one of them')
    verb.add_argument(
        'models', nargs='*', metavar='MODEL', help="name, or with arguments: 'spa_resnet50 pyramid_sizes=1,2'")
    verb.add_argument('--base', metavar='MODEL', help='the one to compare the others with (default: the first)')
    verb.add_argument('--mode', choices=('infer', 'train'), default='infer', help='train: a whole step with SGD')
    compiler = verb.add_mutually_exclusive_group()
    compiler.add_argument('--compile', action='store_const', const='inductor', help='measure with torch.compile')
    compiler.add_argument('--compile-with', dest='compile', metavar='BACKEND', help='with another of its backends')
    verb.add_argument(
        '--dtype', choices=('float32', 'bfloat16', 'float16'), help='default: float32; bfloat16 with --amp')
    verb.add_argument(
        '--reparam', action='store_true',
        help="measure the fused form of blocks that have one, else merge norm layers; adds the base as it is built")
    verb.add_argument('--amp', action='store_true', help='float32 weights under autocast')
    verb.add_argument('--channels-last', action='store_true', help='memory layout of weights and input')
    verb.add_argument('--batch-size', type=int, default=32, help='images at a time (default: %(default)s)')
    verb.add_argument('--img-size', type=int, metavar='N', help="height and width (default: each model's own)")
    verb.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='default: %(default)s')
    verb.add_argument('--threads', type=int, metavar='N', help='CPU threads')
    verb.add_argument('--rounds', type=int, default=10, help='measurements of each model (default: %(default)s)')
    verb.add_argument('--warmup', type=int, default=5, help='steps of each model before (default: %(default)s)')
    verb.add_argument(
        '--min-seconds', type=float, default=1., metavar='S', help='least length of one (default: %(default)s)')
    verb.add_argument(
        '--import', dest='imports', action='append', default=[], metavar='MODULE',
        help='a module that registers further models with timm; can be given again')
    verb.add_argument('--json', metavar='FILE', help='write all that was measured to a file, every round included')
    verb.add_argument(
        '--compare', nargs=2, metavar='FILE.json',
        help='in place of models: set the ratios of two such files side by side')
    verb.set_defaults(run=_bench)

    args = parser.parse_args(argv)
    args.command = shlex.join(['timm-spa', *(sys.argv[1:] if argv is None else argv)])
    if args.verb == 'bench' and bool(args.models) == bool(args.compare):
        parser.error('bench needs either models or --compare.')
    if getattr(args, 'top_k', 1) < 1:
        parser.error(f'--top-k must be at least 1, got {args.top_k}.')
    import timm_spa  # noqa: F401  registers the models; after the parser, so that --help is quick

    try:
        code = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough, e.g. `timm-spa list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
