"""`timm-spa bench`: speed and memory of models, as ratios."""
import argparse
import dataclasses
import json
import os
import shlex
import sys

from timm_spa_cli._options import positive, warn_deprecated
from timm_spa_cli._table import print_json, print_table

HELP = 'measure speed and memory of models, as ratios to a baseline'
EXAMPLES = ('timm-spa bench resnet50 seresnet50 spa_resnet50 --channels-last --batch-size 8 --reparam',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        'models', nargs='*', metavar='MODEL', help="name, or name with arguments: 'spa_resnet50 pyramid_sizes=1,2'")
    parser.add_argument(
        '--model', dest='more_models', action='append', default=[], metavar='MODEL',
        help='another way to name a model; can be repeated')
    parser.add_argument('--base', metavar='MODEL', help='baseline of the ratios (default: the first model)')
    parser.add_argument(
        '--mode', choices=('infer', 'train'), default='infer',
        help='train: a training step with SGD, and the MiB per image that it keeps for the backward pass')
    compiler = parser.add_mutually_exclusive_group()
    compiler.add_argument('--compile', action='store_const', const='inductor', help='measure with torch.compile')
    compiler.add_argument('--compile-with', dest='compile', metavar='BACKEND', help='torch.compile backend')
    parser.add_argument(
        '--dtype', choices=('float32', 'bfloat16', 'float16'), help='default: float32; bfloat16 with --amp')
    parser.add_argument(
        '--reparam', action='store_true',
        help="measure fused blocks, or merged norm layers where fusing is not supported; adds the unfused baseline")
    parser.add_argument('--amp', action='store_true', help='float32 weights under autocast')
    parser.add_argument('--channels-last', action='store_true', help='memory layout of weights and input')
    parser.add_argument('--batch-size', type=positive, default=32, help='images per batch (default: %(default)s)')
    parser.add_argument('--img-size', type=positive, metavar='N', help="height and width (default: each model's size)")
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='default: %(default)s')
    parser.add_argument('--threads', type=positive, metavar='N', help='CPU threads')
    parser.add_argument('--rounds', type=positive, default=10, help='measurements per model (default: %(default)s)')
    parser.add_argument('--warmup', type=positive, default=5, help='warm-up steps per model (default: %(default)s)')
    parser.add_argument(
        '--min-seconds', type=float, default=1., metavar='S',
        help='minimum duration of a measurement (default: %(default)s)')
    parser.add_argument(
        '--import', dest='imports', action='append', default=[], metavar='MODULE',
        help='module that registers further models with timm; can be repeated')
    parser.add_argument('--out', metavar='FILE', help='write all measurements to a JSON file, including every round')
    parser.add_argument(
        '--json', nargs='?', const=True, metavar='FILE',
        help='print all measurements as JSON; FILE is an old form of --out')
    parser.add_argument('--overwrite', action='store_true', help='replace the file of --out if it exists')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    models = [*args.models, *args.more_models]
    if isinstance(args.json, str):
        if args.json.endswith('.json'):
            warn_deprecated('--json FILE', '--out FILE')
            args.out, args.json = args.json, None
        else:  # the switch, followed by the first model
            models.insert(0, args.json)
            args.json = True
    if not models:
        args.error('the following arguments are required: MODEL')
    from timm_spa import benchmark
    from timm_spa._errors import UsageError
    from timm_spa.checkpoints.files import replacing
    from timm_spa.checkpoints.own_files import refuse_replacing

    if args.out and (os.path.isdir(args.out) or not os.access(os.path.dirname(args.out) or '.', os.W_OK)):
        # fail before the measurement, not after it
        raise OSError(f'--out {args.out} cannot be written: the folder is missing or read-only. Name another file.')
    if args.out:
        refuse_replacing([args.out], args.overwrite)
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(benchmark.Settings)}
    fields['dtype'] = args.dtype or ('bfloat16' if args.amp else 'float32')
    try:
        settings = benchmark.Settings(**fields)
    except ValueError as e:
        raise UsageError(e) from e
    record = benchmark.measure(
        models, settings, args.base, shlex.join(args.argv),
        lambda message: print(message, file=sys.stderr) if sys.stderr.isatty() else None)
    if args.json:
        print_json(record)
    else:
        print_table(benchmark.table_rows(record), right_aligned=range(2, 12))
        print('\n' + '\n'.join(benchmark.notes(record)))
    if args.out:
        with replacing(args.out) as partial:
            partial.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
        print(f'Wrote {args.out}.', file=sys.stderr if args.json else sys.stdout)
    return 0
