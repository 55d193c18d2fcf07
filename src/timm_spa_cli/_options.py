"""Command-line options and model loading shared by several verbs."""
import argparse
import os
import sys
from typing import Any, Dict, Optional

REMOVAL = 'version 0.3'  # of the options that are deprecated now, see CHANGELOG.md
SHIPPED_MODEL = 'spa_tf_efficientnet_lite0.grocery81'
MODEL = "name, 'hf-hub:organization/name', 'local-dir:folder', or a weights file that names its model"


def positive(text: str) -> int:
    """Parses a whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {number}')
    return number


class _Renamed(argparse.Action):
    """Stores a value, and prints the new name of an option that was given by an old name."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        if option not in self.option_strings:
            warn_deprecated(str(option), self.option_strings[0])
        setattr(namespace, self.dest, values)


def add_renamed_option(parser: argparse.ArgumentParser, name: str, *old: str, **kwargs: Any) -> None:
    """Adds an option that had other names. The old names still work and are not shown in the help."""
    action = parser.add_argument(name, *old, action=_Renamed, **kwargs)
    action.option_strings = [name]


def warn_deprecated(old: str, new: str) -> None:
    """Prints that a form of a command is deprecated."""
    print(f'timm-spa: {old} is deprecated and will be removed in {REMOVAL}. Use {new}.', file=sys.stderr)


def add_split_option(parser: argparse.ArgumentParser) -> None:
    """Adds --split, the subfolder of --images."""
    parser.add_argument(
        '--split', help='subfolder of --images to measure on (default: test if it exists, else validation or val)')


def measured_folder(args: argparse.Namespace) -> str:
    """Returns the folder of --images and --split, for messages."""
    from timm_spa.predict import default_split

    folder = os.path.join(args.images, args.split or default_split(args.images))
    return folder if os.path.isdir(folder) else args.images


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
    add_model_kwargs_option(parser)


def add_model_kwargs_option(
        parser: argparse.ArgumentParser,
        about: str = 'arguments of the model, if they are not recorded with the checkpoint',
) -> None:
    """Adds --model-kwargs, as timm's scripts have it."""
    parser.add_argument(
        '--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help=f'{about}, e.g. base=resnet18 gate=spa')


def model_kwargs(args: argparse.Namespace) -> Dict[str, Any]:
    """Returns the values of --model-kwargs, parsed as in timm's scripts."""
    from timm.utils import ParseKwargs

    from timm_spa._errors import UsageError

    parsed = argparse.Namespace()
    try:
        ParseKwargs([], 'kwargs')(None, parsed, args.model_kwargs)
    except ValueError as e:
        given = ' '.join(args.model_kwargs)
        raise UsageError(f'--model-kwargs takes KEY=VALUE, got {given}. Put it behind positional arguments.') from e
    return parsed.kwargs


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument('--device', default='cpu', help='device to run on (default: %(default)s)')


def load_named(args: argparse.Namespace, name: Optional[str], device: str = 'cpu', fuse: bool = True) -> Any:
    """Loads the model that a command or its checkpoint names; without either, the shipped model."""
    if name is None and args.checkpoint is None:
        if args.num_classes is not None:
            args.error('--num-classes needs --checkpoint: the published weights have their own number of classes')
        if args.model_kwargs:
            args.error('--model-kwargs needs --checkpoint or a model')
        name = SHIPPED_MODEL
    from timm_spa.predict import load_model

    return load_model(name, args.checkpoint, args.num_classes, device, fuse, model_kwargs(args))
