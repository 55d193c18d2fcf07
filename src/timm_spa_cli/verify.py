"""`timm-spa verify`: check a repository of the Hub, or its folder before publishing."""
import argparse
from pathlib import Path
from typing import List, Tuple

from timm_spa_cli._options import add_device_option, add_model_kwargs_option, add_split_option, model_kwargs, positive
from timm_spa_cli._table import printable

HELP = 'check a repository of the Hub, or its folder before publishing'
EXAMPLES = ('timm-spa verify ORG/NAME --images DATA --split val',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('source', metavar='ORG/NAME|FOLDER')
    parser.add_argument('--revision', help='branch, tag or commit of the repository')
    parser.add_argument('--images', metavar='DIR', help='image folder to measure the accuracy on')
    add_split_option(parser)
    parser.add_argument('--batch-size', type=positive, default=64, help='images per batch (default: %(default)s)')
    add_model_kwargs_option(parser, 'arguments that config.json should have for the model')
    add_device_option(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    import torch

    from timm_spa.hub.verify import verify
    from timm_spa.predict import on_device

    def check_detector(folder: Path) -> Tuple[List[str], List[str]]:
        from timm_spa.detection.repository import check_detector  # imports torchvision, for a detector only

        return check_detector(folder)

    on_device(torch.nn.Identity(), args.device)  # fails before a download, and is not a problem of the repository
    report = verify(
        args.source, args.revision, args.images, args.split, args.batch_size, args.device, check_detector,
        model_kwargs(args))
    for kind, lines in (('checked', report.checked), ('problem', report.problems)):
        for line in lines:  # names of files may contain control characters
            print(printable(f'{kind}: {line}').replace('\n', '\\n'))
    count = len(report.problems)
    print(f'{count} problem{"s" if count > 1 else ""}.' if count else 'No problem found.')
    return 1 if report.problems else 0
