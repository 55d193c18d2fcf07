"""`timm-spa verify`: checks of a repository of the Hub, or of a folder that will be one."""
import argparse

from timm_spa_cli._table import printable
from timm_spa_cli.predict import positive

HELP = 'check a repository of the Hub, or a folder that will be one'
EXAMPLES = ('timm-spa verify ORG/NAME --images DATA --split val',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('source', metavar='ORG/NAME|FOLDER')
    parser.add_argument('--revision', help='branch, tag or commit of the repository')
    parser.add_argument('--images', metavar='DIR', help='image folder to measure the accuracy on')
    parser.add_argument('--split', default='validation', help='subfolder of it (default: %(default)s)')
    parser.add_argument('--batch-size', type=positive, default=64, help='pictures at a time (default: %(default)s)')
    parser.add_argument('--device', default='cpu', help='device to measure on (default: %(default)s)')


def run(args: argparse.Namespace) -> int:
    """Runs the verb, and returns the exit code."""
    import torch

    from timm_spa.hub.verify import verify
    from timm_spa.predict import on_device

    on_device(torch.nn.Identity(), args.device)  # before a download, and no fault of the repository
    report = verify(args.source, args.revision, args.images, args.split, args.batch_size, args.device)
    for kind, lines in (('checked', report.checked), ('problem', report.problems)):
        for line in lines:  # with names of files that may come from anywhere
            print(printable(f'{kind}: {line}').replace('\n', '\\n'))
    print(f'{len(report.problems)} problems.' if report.problems else 'No problem found.')
    return 1 if report.problems else 0
