"""`timm-spa predict`: the classes of pictures, by any model that timm can create."""
import argparse
import os
import sys
from typing import Any, List, Mapping, Optional, Sequence, Tuple

from timm_spa_cli._table import print_json, print_table

HELP = 'classify pictures with any model that timm can create'
EXAMPLES = (
    'timm-spa predict beet.jpg --model spa_tf_efficientnet_lite0.grocery81',
    'timm-spa predict photos --checkpoint runs/first/model_best.pth.tar',
)
SHIPPED_MODEL = 'spa_tf_efficientnet_lite0.grocery81'


def positive(text: str) -> int:
    """Reads a number of things to show, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {number}')
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='picture, or folder of pictures')
    parser.add_argument(
        '--model', help="name, 'hf-hub:organization/name', 'local-dir:folder', or a weights file that names its model "
        f'(default: the model that --checkpoint names, else {SHIPPED_MODEL})')
    parser.add_argument('--checkpoint', help='weights file to load in place of the published ones')
    parser.add_argument('--num-classes', type=positive, help='classes of the checkpoint, if they differ')
    parser.add_argument('--device', default='cpu', help='device to run on (default: %(default)s)')
    parser.add_argument('--top-k', type=positive, default=5, help='classes to show a picture (default: %(default)s)')
    parser.add_argument('--json', action='store_true', help='print JSON, errors included')


def run(args: argparse.Namespace) -> int:
    """Runs the verb, and returns the exit code."""
    model = load_named(args, args.model, args.device)
    if args.model is args.checkpoint is None:
        import timm

        print(f'{SHIPPED_MODEL}: {timm.get_pretrained_cfg(SHIPPED_MODEL).description}\n', file=sys.stderr)
    return show_predictions(model, args.images, {}, args.top_k, args.json)


def load_named(args: argparse.Namespace, name: Optional[str], device: str = 'cpu', fuse: bool = True) -> Any:
    """Loads the model that a command or its checkpoint names; the shipped model if there is neither."""
    if name is None and args.checkpoint is None:
        if args.num_classes is not None:
            args.error('--num-classes needs --checkpoint: weights of other classes than the published ones')
        name = SHIPPED_MODEL
    from timm_spa.predict import load_model

    return load_model(name, args.checkpoint, args.num_classes, device, fuse)


def show_predictions(
        model: Any,
        paths: Sequence[str],
        expected: Mapping[str, str],
        top_k: int,
        as_json: bool = False,
) -> int:
    """Prints what a model says of pictures, and whether it is what is expected; returns 1 if one cannot be read."""
    from timm_spa.predict import predict

    predictions = list(predict(model, paths, top_k))
    if as_json:
        print_json([vars(p) for p in predictions])
    rows: List[Tuple[str, ...]] = [('picture', '', 'probability', 'class')]
    names = [os.path.basename(p.path) for p in predictions]
    for p, name in zip(predictions, names, strict=True):
        known = expected.get(p.path)
        shown = name if names.count(name) == 1 or p.path in expected else p.path
        for rank, c in enumerate(p.classes):
            verdict = '' if rank or not known else ('right' if c['label'] == known else 'wrong')
            rows.append((shown if rank == 0 else '', verdict, f'{c["probability"]:.1%}', c['name']))
    if len(rows) > 1 and not as_json:
        print_table(rows, right_aligned=(2,))
    failed = [p for p in predictions if p.error]
    for p in failed:
        print(f'timm-spa: {p.path} could not be read: {p.error}', file=sys.stderr)
    return 1 if failed else 0
