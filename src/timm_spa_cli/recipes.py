"""`timm-spa recipes`: recipes for timm's train.py, and launch configurations for accelerate."""
import argparse
import shutil

from timm_spa_cli._options import add_renamed_option
from timm_spa_cli._table import print_table

HELP = "recipes for timm's train.py and launch configurations for accelerate: list, show or copy them"
EXAMPLES = ('timm-spa recipes finetune_warm --out mine.yaml',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('name', nargs='?', metavar='NAME', help='show this recipe (default: list all)')
    add_renamed_option(parser, '--out', '--to', metavar='FILE', help='copy the recipe to a new file')
    parser.add_argument('--overwrite', action='store_true', help='replace FILE if it exists')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    from timm_spa._shipped import find_recipe, shipped_files
    from timm_spa.checkpoints.files import replacing
    from timm_spa.checkpoints.own_files import refuse_replacing

    if args.name is None:
        if args.out:
            args.error('--out needs the NAME of the recipe to copy')
        rows = [('name', 'purpose')]
        for name, path in shipped_files().items():
            comments = [line.lstrip('# ').rstrip() for line in path.read_text(encoding='utf-8').splitlines() if
                        line.startswith('# ')]
            rows.append((name, comments[0] if comments else ''))
        print_table(rows)
        print("\nUse a recipe by its name: python -m timm_spa.run train --config recipe:NAME ...")
        return 0
    path = find_recipe(args.name)
    if args.out:
        refuse_replacing([args.out], args.overwrite)
        with replacing(args.out) as partial:
            shutil.copyfile(path, partial)
        print(f'Wrote {args.out}.')
    else:
        print(path.read_text(encoding='utf-8'), end='')
    return 0
