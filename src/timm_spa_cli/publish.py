"""`timm-spa publish`: publish weights as a repository of the Hub."""
import argparse
from functools import partial
from typing import Any

from timm_spa_cli._options import add_model_kwargs_option, model_kwargs, positive

HELP = 'publish weights as a repository of the Hub, in one commit'
EXAMPLES = (
    'timm-spa publish runs/first/model_best.pth.tar --model spa_resnet50.mine --dry-run out',
    'timm-spa publish mine/model.safetensors --repo ORG/NAME',
    'timm-spa publish runs/detector/best --repo ORG/NAME',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        'checkpoint', metavar='CHECKPOINT',
        help='training checkpoint or file of weights; for a detector the folder `best` or `last`')
    parser.add_argument(
        '--model', metavar='NAME.TAG',
        help='architecture and tag, e.g. spa_resnet50.mine; not for a detector (default: the architecture that the '
             'checkpoint or its folder names)')
    parser.add_argument('--repo', metavar='ORG/NAME', help='repository (default: $TIMM_SPA_HUB_ORG/NAME.TAG)')
    parser.add_argument(
        '--num-classes', type=positive, help='number of classes, if it is not recorded with the checkpoint')
    add_model_kwargs_option(parser)
    parser.add_argument('--private', action='store_true', help='fail unless the repository is private')
    parser.add_argument('--pr', action='store_true', help='open a pull request')
    parser.add_argument('--tag', help='tag of the commit, e.g. v1')
    parser.add_argument('--results', metavar='DIR', help='results of a sweep, for a comparison in the card')
    parser.add_argument('--replace-card', action='store_true', help='replace an existing README.md')
    parser.add_argument('--dry-run', metavar='DIR', help='write the files to a folder without an upload')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace files even in a folder that `publish` did not write')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    from timm_spa.detection.checkpoint import is_detector
    from timm_spa.detection.repository import publish_detector, write_detector_repository
    from timm_spa.hub.publish import publish, write_repository

    if args.overwrite and not args.dry_run:
        args.error('--overwrite goes with --dry-run; --replace-card replaces the card of a repository')
    upload: Any = dict(private=args.private, create_pr=args.pr, tag=args.tag, replace_card=args.replace_card)
    if is_detector(args.checkpoint):
        if args.model is not None or args.num_classes or args.model_kwargs or args.results:
            args.error(
                f'{args.checkpoint} is a detector: leave out --model, --model-kwargs, --num-classes and --results')
        if not args.repo and not args.dry_run:
            args.error('a detector needs --repo ORG/NAME')
        write: Any = partial(
            write_detector_repository, args.dry_run, args.checkpoint, args.repo, args.replace_card, args.overwrite)
        send: Any = partial(publish_detector, args.checkpoint, args.repo, **upload)
    else:
        if args.model is None and not args.repo and not args.dry_run:
            args.error('one of the arguments --model, --repo and --dry-run is required')
        options: Any = dict(num_classes=args.num_classes, results=args.results, model_kwargs=model_kwargs(args))
        write = partial(
            write_repository, args.dry_run, args.checkpoint, args.model, args.repo, replace_card=args.replace_card,
            overwrite=args.overwrite, **options)
        send = partial(publish, args.checkpoint, args.model, args.repo, **upload, **options)
    if args.dry_run:
        notes = write()
        outcome = f'Wrote {args.dry_run}. Nothing was uploaded.'
    else:
        published = send()
        notes = published.notes
        outcome = f'Published: {published.url}' if published.changed else f'Nothing to change: {published.url}'
    print('\n'.join([*notes, outcome]))
    return 0
