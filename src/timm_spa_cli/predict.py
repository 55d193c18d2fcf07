"""`timm-spa predict`: class predictions for images."""
import argparse
import os
import sys
from typing import Any, List, Sequence, Tuple

from timm_spa_cli._options import (
    SHIPPED_MODEL,
    add_checkpoint_options,
    add_device_option,
    add_model_option,
    load_named,
    positive,
)
from timm_spa_cli._table import print_json, print_table

HELP = 'classify images with any model that timm can create'
EXAMPLES = (
    'timm-spa predict beet.jpg --model spa_tf_efficientnet_lite0.grocery81',
    'timm-spa predict photos --checkpoint runs/first/model_best.pth.tar',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image, or folder of images')
    add_model_option(parser)
    add_checkpoint_options(parser)
    add_device_option(parser)
    parser.add_argument('--top-k', type=positive, default=5, help='classes to show per image (default: %(default)s)')
    parser.add_argument('--json', action='store_true', help='print JSON, including errors')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    model = load_named(args, args.model, args.device)
    if args.model is args.checkpoint is None:
        import timm

        print(f'{SHIPPED_MODEL}: {timm.get_pretrained_cfg(SHIPPED_MODEL).description}\n', file=sys.stderr)
    return show_predictions(model, args.images, args.top_k, args.json)


def show_predictions(model: Any, paths: Sequence[str], top_k: int, as_json: bool = False) -> int:
    """Prints predictions; returns 1 if an image cannot be read, else 0."""
    from timm_spa.predict import predict

    predictions = list(predict(model, paths, top_k))
    if as_json:
        print_json([vars(p) for p in predictions])
    rows: List[Tuple[str, ...]] = [('image', 'probability', 'class')]
    names = [os.path.basename(p.path) for p in predictions]
    for p, name in zip(predictions, names, strict=True):
        shown = name if names.count(name) == 1 else p.path
        rows += [
            (shown if rank == 0 else '', f'{c["probability"]:.1%}', c['name']) for rank, c in enumerate(p.classes)]
    if len(rows) > 1 and not as_json:
        print_table(rows, right_aligned=(1,))
    failed = [p for p in predictions if p.error]
    for p in failed:
        print(f'timm-spa: {p.path} could not be read: {p.error}', file=sys.stderr)
    return 1 if failed else 0
