"""`timm-spa card`: create the model card of a repository's folder."""
import argparse
import os

HELP = "create the model card of a repository's folder from its files, and print it"
EXAMPLES = ('timm-spa card out --repo ORG/NAME --write',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('folder', metavar='FOLDER', help='folder written by `publish --dry-run`')
    parser.add_argument('--repo', metavar='ORG/NAME', help='repository of the folder')
    parser.add_argument('--results', metavar='DIR', help='results of a sweep, for a comparison in the card')
    parser.add_argument('--write', action='store_true', help='replace the README.md of the folder')
    parser.add_argument(
        '--overwrite', action='store_true', help='with --write: even in a folder that `publish` did not write')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    from timm_spa.checkpoints.files import finish_interrupted, replacing
    from timm_spa.checkpoints.own_files import has_mark, refuse_replacing
    from timm_spa.hub.card import card_of_folder

    if args.overwrite and not args.write:
        args.error('--overwrite goes with --write')
    path = os.path.join(args.folder, 'README.md')
    if args.write:
        finish_interrupted(args.folder)
        refuse_replacing([path], args.overwrite or has_mark(args.folder))
    card = card_of_folder(args.folder, args.repo, args.results)
    if not args.write:
        print(card, end='')
        return 0
    with replacing(path) as partial:
        card.save(partial)
    print(f'Wrote {path}.')
    return 0
