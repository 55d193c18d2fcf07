"""`timm-spa list`: the models, their size and cost, and their weights; the gates and their cost."""
import argparse
import importlib.util
import json
import sys
import textwrap
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, List, Mapping, Sequence, Tuple

from timm_spa_cli._table import print_table

HELP = 'models, their size and cost, and their weights; gates and their cost'
EXAMPLES = ('timm-spa list "spa_b_*"', 'timm-spa list --gates')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('filter', nargs='?', default='*', help='wildcard, e.g. "spa_b_*" (default: all)')
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument('--tags', action='store_true', help='list every tag with the location of its weights instead')
    instead.add_argument('--gates', action='store_true', help='list the gates of add_attention and their cost instead')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    # read without importing the package, which would take longer than the rest
    spec = importlib.util.find_spec('timm_spa')
    listed = json.loads((Path(str(spec and spec.origin)).parent / 'models.json').read_text(encoding='utf-8'))
    models = listed['models']
    names = [name for name in listed['gates' if args.gates else 'models'] if fnmatchcase(name, args.filter)]
    if not names:
        kind, command = ('gate', 'timm-spa list --gates') if args.gates else ('model', 'timm-spa list')
        print(
            f'timm-spa: the filter {args.filter!r} matches no {kind} of this package. `{command}` shows all {kind}s.',
            file=sys.stderr)
        return 1
    if args.gates:
        return _gates(names, listed['gates'], listed['speeds'])
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


def _gates(
        names: Sequence[str],
        costs: Mapping[str, Mapping[str, int]],
        speeds: Mapping[str, Mapping[str, Any]],
) -> int:
    rows: List[Tuple[str, ...]] = [(
        'gate', 'parameters', 'million multiply-adds', 'kept memory (MiB)', 'inference', 'training')]
    for name in names:
        added = {key: value - costs['none'][key] for key, value in costs[name].items()}
        rows.append((
            name, f'{added["parameters"]:+,}', f'{added["macs"] / 1e6:+,.1f}', f'{added["kept"] / 2 ** 20:+.1f}',
            *(f'{speeds[mode]["ratios"][name]:.2f}' for mode in ('infer', 'train'))))
    plain = costs['none']
    print_table(rows, right_aligned=range(1, 6))
    measured = dict.fromkeys(
        f'{speed["measured"]}: {speed["dtype"]}, {"channels_last" if speed["channels_last"] else "NCHW"}, batch '
        f'{speed["batch_size"]}.' for speed in speeds.values())
    for text in (
            f'Differences to ResNet-50: {plain["parameters"]:,} parameters, {plain["macs"] / 1e6:,.1f} million '
            f'multiply-adds, {plain["kept"] / 2 ** 20:.1f} MiB that a training step keeps for the backward pass, for '
            'one 224x224 image in float32.',
            f'Inference and training: speed relative to ResNet-50, as built, without compiling. {" ".join(measured)} '
            'To measure it: timm-spa bench resnet50 "gated base=resnet50 gate=coord"'):
        print('\n' + textwrap.fill(text, 100))
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
