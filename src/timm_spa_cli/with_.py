"""`timm-spa with`: any command, with the models registered in the Python processes that it starts."""
import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

HELP = 'run a command with the models registered in every Python process that it starts'
EXAMPLES = (
    'timm-spa with timmx export onnx spa_resnet18 --output model.onnx',
    'timm-spa with torchrun --nproc-per-node 2 train.py --model spa_resnet50',
)

REGISTERED = Path(__file__).parent / 'registered'
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # exit codes of a shell


class _StoreTuple(argparse.Action):
    """Stores a tuple: an argument of the command may be empty, one in a list may not."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *args: Any) -> None:
        setattr(namespace, self.dest, tuple(values))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.usage = '%(prog)s [-h] COMMAND ...'
    parser.add_argument(
        'command', nargs=argparse.REMAINDER, action=_StoreTuple, metavar='COMMAND ...',
        help='command and its arguments. Not reached: Python with -S, -I or -E, processes that start with another '
             'PYTHONPATH, and workers on other machines')


def run(args: argparse.Namespace) -> int:
    """Replaces this process by the command; returns an exit code only if the command cannot be started."""
    command = args.command[1:] if args.command[:1] == ('--',) else args.command
    if not command:
        args.error('the following arguments are required: COMMAND')
    paths = (str(REGISTERED), os.environ.get('PYTHONPATH'))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))
    sys.stdout.flush()
    try:
        if not command[0]:
            raise FileNotFoundError
        os.execvpe(command[0], command, environment)
    except OSError as e:
        missing = isinstance(e, (FileNotFoundError, NotADirectoryError))
        neighbour = shutil.which(command[0], path=os.path.dirname(sys.executable))
        remedy = f'Did you mean {neighbour}?' if neighbour else 'Check its name, its permissions and PATH.'
        reason = 'command not found' if missing else e.strerror
        print(f'timm-spa: cannot run {command[0]!r}: {reason}. {remedy}', file=sys.stderr)
        return NOT_FOUND if missing else NOT_EXECUTABLE
