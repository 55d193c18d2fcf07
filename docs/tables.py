"""Writes the generated tables of docs/models.md and docs/command_line.md: `make tables`.

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end of table -->`.
"""
import argparse
import json
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import timm_spa_cli

DOCS = Path(__file__).resolve().parent
MODELS = DOCS.parent / 'src' / 'timm_spa' / 'models.json'
# title of each family, and a pattern of its names without the prefix of the gate
FAMILIES = (
    ('ResNet', r'resnet\d+'),
    ('ResNet-D, ResNeXt, Wide ResNet', r'resnet\d+d|resnext.*|wide_resnet.*'),
    ('MobileNetV2', r'mobilenetv2(_\d+)?'),
    ('EfficientNet-Lite0', r'(tf_)?efficientnet_lite0'),
    ('MobileNetV4', r'mobilenetv4.*'),
    ('DenseNet', r'densenet\d+'),
    ('VGG', r'vgg\d+_bn'),
    ('ResNet for 32x32 images', r'preresnet.*_cifar'),
    ('MobileNetV2 for 32x32 images', r'mobilenetv2_cifar'),
    ('DenseNet for 32x32 images', r'densenet.*_cifar'),
    ('VGG for 32x32 images', r'vgg.*_cifar'),
    ('Any CNN of timm (figures: ResNet-50 with SPA-A)', r'gated'),
)
GATES = {
    'spa_b_': 'SPA-B', 'spa_c_': 'SPA-C', 'spa_': 'SPA-A', 'se_b_': 'SE+', 'se_c_': 'SE++', 'se_': 'SE', 'ge_': 'GE',
    'cbam_': 'CBAM', 'gc_': 'GC', '': '-'}
ORDER = ('-', 'SPA-A', 'SPA-B', 'SPA-C', 'SE', 'SE+', 'SE++', 'GE', 'CBAM', 'GC')
# options that are explained above the table of commands
SHARED = (
    '--model', '--checkpoint', '--num-classes', '--images', '--split', '--device', '--out', '--output', '--json',
    '--overwrite')
Rows = List[Sequence[str]]


def _markdown(rows: Rows) -> str:
    header, *body = rows
    lines = [header, ['---'] * len(header), *body]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def _split_gate(name: str) -> Tuple[str, str]:
    prefix = next(prefix for prefix in GATES if name.startswith(prefix))
    return name.removeprefix(prefix), GATES[prefix]


def _order(name: str, counted: Dict[str, Dict[str, Any]]) -> Tuple[int, str, int]:
    """Returns the sort key of a model: networks by size, and gates in one order for each network."""
    base, gate = _split_gate(name)
    return counted.get(f'spa_{base}', counted[name])['parameters'], base, ORDER.index(gate)


def table_of_models() -> str:
    """Returns one collapsible table per family, with a row for each model of models.json."""
    counted: Dict[str, Dict[str, Any]] = json.loads(MODELS.read_text(encoding='utf-8'))['models']
    families: Dict[str, List[str]] = {title: [] for title, _ in FAMILIES}
    for name in counted:
        base = _split_gate(name)[0]
        families[next(title for title, pattern in FAMILIES if re.fullmatch(pattern, base))].append(name)
    parts = []
    for title, names in families.items():
        rows: Rows = [('model', 'gate', 'parameters (M)', 'GMACs', 'input', 'weights')]
        for name in sorted(names, key=lambda name: _order(name, counted)):
            row, more = counted[name], counted[name]['tags'] - 1
            weights = '-' if more < 0 else f'`{row["tag"]}`' + (f', {more} more' if more else '')
            rows.append((
                f'`{name}`', _split_gate(name)[1], f'{row["parameters"] / 1e6:.2f}', f'{row["macs"] / 1e9:.2f}',
                row['input'], weights))
        parts.append(
            f'<details>\n<summary>{title}: {len(names)} model{"s" * (len(names) > 1)}</summary>\n\n'
            f'{_markdown(rows)}\n\n</details>')
    return '\n\n'.join(parts)


def _commands(parser: argparse.ArgumentParser) -> Iterator[Tuple[str, argparse.ArgumentParser]]:
    """Yields every command with its parser, e.g. 'explain cam'."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                inner = dict(_commands(verb))
                yield from ((f'{name} {kind}', p) for kind, p in inner.items()) if inner else [(name, verb)]


def _shown(argument: argparse.Action) -> str:
    name = str(argument.metavar or argument.dest).upper().replace('|', ' or ')
    name = f'[{name}]' if argument.nargs in ('?', '*') else name
    return f'`{name} ...`' if argument.nargs in ('+', '*') else f'`{name}`'


def table_of_commands() -> str:
    """Returns a table of the arguments and options of every command."""
    rows: Rows = [('command', 'arguments', 'shared options', 'further options')]
    for name, parser in _commands(timm_spa_cli.create_parser()):
        options = [action.option_strings[-1] for action in parser._actions if action.option_strings]
        arguments = [_shown(action) for action in parser._actions if not action.option_strings]
        shared = [option for option in SHARED if option in options]
        further = [option for option in options if option not in (*SHARED, '--help')]
        rows.append((
            f'`{name}`', ' '.join(arguments), *(' '.join(f'`{o}`' for o in part) for part in (shared, further))))
    return _markdown(rows)


TABLES: Dict[str, Tuple[str, Callable[[], str]]] = {
    'models': ('models.md', table_of_models), 'commands': ('command_line.md', table_of_commands)}


def with_tables(page: Path) -> str:
    """Returns the text of a page with its tables generated anew."""
    text = page.read_text(encoding='utf-8')
    for name, (file, make) in TABLES.items():
        if file == page.name:
            pattern = rf'(?<=<!-- table: {name} -->\n\n).*?(?=\n\n<!-- end of table -->)'
            text, count = re.subn(pattern, lambda match, make=make: make(), text, flags=re.S)  # type: ignore[misc]
            if count != 1:
                raise ValueError(f'{page} must have one table {name!r} between its comments, found {count}.')
    return text


def main() -> None:
    """Writes the tables into their pages."""
    for file, _ in TABLES.values():
        (DOCS / file).write_text(with_tables(DOCS / file), encoding='utf-8')


if __name__ == '__main__':
    main()
