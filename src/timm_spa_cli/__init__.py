"""Command line: `timm-spa VERB`, or `python -m timm_spa VERB`.

This is a separate package because `import timm_spa` loads torch, and help and usage errors should not wait for torch.
Each verb is a module with `HELP`, `EXAMPLES`, `add_arguments` and `run`.
"""
import argparse
import importlib
import json
import keyword
import os
import sys
from importlib import metadata
from typing import Any, List, Optional

from timm_spa_cli._table import printable

__all__ = ['create_parser', 'main']

VERBS = (
    'list', 'demo', 'predict', 'explain', 'app', 'detect', 'export', 'card', 'publish', 'verify', 'convert', 'recipes',
    'bench', 'with')

EXIT_CODES = 'Exit code: 0 on success, 1 on failure, 2 on a usage error.'


class _Version(argparse.Action):
    """Prints the version. It is looked up only here, because the package also works without being installed."""

    def __init__(self, **kwargs: Any):
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        try:
            version = metadata.version('timm_spa')
        except metadata.PackageNotFoundError:
            version = 'not installed'
        print(f'timm_spa {version}')
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Parser that accepts options between positional arguments even if one of these may be missing, if asked to."""

    intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses the arguments that it knows; argparse calls this for the parser of a verb."""
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # argparse calls this method again
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True


def create_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line. docs/tables.py lists its options."""
    parser = _Parser(
        prog='timm-spa', description='Spatial Pyramid Attention models for timm.', epilog=EXIT_CODES)
    parser.add_argument('--version', action=_Version, help='show the version and exit')
    parser.add_argument('--traceback', action='store_true', help='show the traceback of an error')
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
    for name in VERBS:
        module = importlib.import_module(f'.{name}_' if keyword.iskeyword(name) else f'.{name}', __name__)
        verb = verbs.add_parser(
            name, help=module.HELP, description=f'{module.HELP[0].upper()}{module.HELP[1:]}.',
            epilog='\n  '.join(['example:', *module.EXAMPLES]), formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run, error=verb.error)
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line, and returns the exit code; a usage error raises SystemExit(2)."""
    args = create_parser().parse_args(argv)
    for name, value in vars(args).items():
        if value == '' or isinstance(value, List) and '' in value:  # `list` is a verb here
            args.error(f'argument {name}: it is empty, probably because a shell variable is not set')
    if hasattr(sys.stdout, 'reconfigure'):  # not in a notebook
        sys.stdout.reconfigure(errors='backslashreplace')  # file names may contain any bytes
    args.argv = ['timm-spa', *(sys.argv[1:] if argv is None else argv)]
    try:
        code = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has ended, e.g. `timm-spa list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        if args.traceback:
            raise
        # looked up, not imported: importing the package fails if timm is too old
        own = getattr(sys.modules.get('timm_spa._errors'), 'TimmSpaError', OSError)
        expected = isinstance(e, (own, OSError))  # an OSError names the file and the cause itself
        report = '' if expected else (
            f'\nThis is a bug in timm_spa. Please report it with the output of `timm-spa --traceback {args.verb} ...`.')
        if getattr(args, 'json', None) is True:
            print(json.dumps(dict(error=str(e))))
        print(f'timm-spa: {"" if expected else type(e).__name__ + ": "}{printable(str(e))}{report}', file=sys.stderr)
        return 1
    return code
