"""Command-line options and model loading shared by several verbs."""
import argparse
from typing import Any, Optional

SHIPPED_MODEL = 'spa_tf_efficientnet_lite0.grocery81'
MODEL = "name, 'hf-hub:organization/name', 'local-dir:folder', or a weights file that names its model"


def positive(text: str) -> int:
    """Parses a whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {number}')
    return number


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Adds --model."""
    parser.add_argument('--model', help=f'{MODEL} (default: the model that --checkpoint names, else {SHIPPED_MODEL})')


def add_checkpoint_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds --checkpoint and --num-classes; several checkpoints are stored as `checkpoints`."""
    kwargs: Any = dict(dest='checkpoints', action='append') if several else {}
    parser.add_argument(
        '--checkpoint', metavar='FILE', **kwargs, help='weights file to load instead of the published weights'
        f'{"; can be repeated" if several else ""}')
    parser.add_argument(
        '--num-classes', type=positive, metavar='N',
        help='number of classes of the checkpoint, if it is not recorded with the checkpoint')


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument('--device', default='cpu', help='device to run on (default: %(default)s)')


def load_named(args: argparse.Namespace, name: Optional[str], device: str = 'cpu', fuse: bool = True) -> Any:
    """Loads the model that a command or its checkpoint names; without either, the shipped model."""
    if name is None and args.checkpoint is None:
        if args.num_classes is not None:
            args.error('--num-classes needs --checkpoint: the published weights have their own number of classes')
        name = SHIPPED_MODEL
    from timm_spa.predict import load_model

    return load_model(name, args.checkpoint, args.num_classes, device, fuse)
