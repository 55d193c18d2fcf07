"""`timm-spa list`: the models, their size and cost, and their weights."""
import argparse
import importlib.util
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Sequence

from timm_spa_cli._table import print_table

HELP = 'models, their size and cost, and their weights'
EXAMPLES = ('timm-spa list "spa_b_*"',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('filter', nargs='?', default='*', help='wildcard, e.g. "spa_b_*" (default: all)')
    parser.add_argument('--tags', action='store_true', help='list every tag with the location of its weights instead')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    # read without importing the package, which would take longer than the rest
    spec = importlib.util.find_spec('timm_spa')
    models = json.loads((Path(str(spec and spec.origin)).parent / 'models.json').read_text(encoding='utf-8'))
    names = [name for name in models if fnmatchcase(name, args.filter)]
    if not names:
        print(
            f'timm-spa: the filter {args.filter!r} matches no model of this package. `timm-spa list` shows all models.',
            file=sys.stderr)
        return 1
    if args.tags:
        return _tags(names)
    rows = [('model', 'parameters (M)', 'GMACs', 'input', 'weights')]
    for name in names:
        about, more = models[name], models[name]['tags'] - 1
        rows.append((
            name, f'{about["parameters"] / 1e6:.3f}', f'{about["macs"] / 1e9:.3f}', about['input'],
            '-' if more < 0 else about['tag'] + (f', {more} more' if more else '')))
    print_table(rows, right_aligned=(1, 2))
    print('\nGMACs: 1e9 multiply-adds of convolutions and linear layers, for one image of the input size.')
    return 0


def _tags(names: Sequence[str]) -> int:
    import timm

    import timm_spa  # noqa: F401

    rows = [('name for create_model', 'weights')]
    for tagged in (tagged for name in names for tagged in timm.list_pretrained(f'{name}.*')):
        source = timm.get_pretrained_cfg(tagged)
        rows.append((tagged, 'with the package' if source.file else f'Hub: {source.hf_hub_id}'))
    print_table(rows)
    return 0
