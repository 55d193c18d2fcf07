"""The command line: `timm-spa VERB`, or `python -m timm_spa VERB`.

A package of its own, so that help and usage errors do not wait for torch, which `import timm_spa` needs. Each verb is a
module with `HELP`, `add_arguments` and `run`.
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

__all__ = ['main']

VERBS = (
    'list', 'demo', 'predict', 'explain', 'app', 'detect', 'export', 'card', 'publish', 'verify', 'convert', 'recipes',
    'bench', 'with')

EXIT_CODES = 'Exit code: 0 if all was done, 1 if anything that was asked for could not be, 2 for wrong arguments.'


class _Version(argparse.Action):
    """Looks up the version when it is asked for: the package may be used from a folder, without being installed."""

    def __init__(self, **kwargs: Any):
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        try:
            version = metadata.version('timm_spa')
        except metadata.PackageNotFoundError:
            version = 'not installed'
        print(f'timm_spa {version}')
        parser.exit()


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line, and returns the exit code; wrong arguments end in SystemExit(2)."""
    parser = argparse.ArgumentParser(
        prog='timm-spa', description='Spatial Pyramid Attention models for timm.', epilog=EXIT_CODES)
    parser.add_argument('--version', action=_Version, help='show the version and exit')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
    for name in VERBS:
        module = importlib.import_module(f'.{name}_' if keyword.iskeyword(name) else f'.{name}', __name__)
        verb = verbs.add_parser(
            name, help=module.HELP, description=f'{module.HELP[0].upper()}{module.HELP[1:]}.',
            epilog='\n  '.join(['example:', *module.EXAMPLES]), formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run, error=verb.error)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():  # of a variable of the shell that is not set: never what was meant
        if value == '' or isinstance(value, List) and '' in value:  # `list` is a verb here
            args.error(f'argument {name}: it is empty')
    if hasattr(sys.stdout, 'reconfigure'):  # not in a notebook
        sys.stdout.reconfigure(errors='backslashreplace')  # names of files are any bytes
    args.argv = ['timm-spa', *(sys.argv[1:] if argv is None else argv)]
    try:
        code = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough, e.g. `timm-spa list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        if args.traceback:
            raise
        # not imported here: with a timm that is too old, the package refuses to be
        own = getattr(sys.modules.get('timm_spa._errors'), 'TimmSpaError', OSError)
        expected = isinstance(e, (own, OSError))  # the file system names file and cause by itself
        report = '' if expected else (
            f'\nThis is a bug of timm_spa, please report it with what `timm-spa --traceback {args.verb} ...` shows.')
        if getattr(args, 'json', None) is True:
            print(json.dumps(dict(error=str(e))))
        print(f'timm-spa: {"" if expected else type(e).__name__ + ": "}{printable(str(e))}{report}', file=sys.stderr)
        return 1
    return code
