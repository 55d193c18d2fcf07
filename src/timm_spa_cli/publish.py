"""`timm-spa publish`: weights as a repository of the Hub."""
import argparse

HELP = 'publish weights as a repository of the Hub, in one commit'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        'checkpoint', metavar='CHECKPOINT', help='model_best.pth.tar of a run, or a file of its weights')
    parser.add_argument('--model', required=True, metavar='NAME.TAG', help='e.g. spa_resnet50.tmm_in1k')
    parser.add_argument('--repo', metavar='ORG/NAME', help='repository (default: NAME.TAG of TIMM_SPA_HUB_ORG)')
    parser.add_argument('--num-classes', type=int, help="classes of the checkpoint, if the run's args.yaml is missing")
    parser.add_argument('--private', action='store_true', help='to a private repository, or not at all')
    parser.add_argument('--pr', action='store_true', help='as a pull request')
    parser.add_argument('--tag', help='name for the commit, e.g. v1')
    parser.add_argument('--results', metavar='DIR', help='results of a sweep with the controls for the card')
    parser.add_argument('--replace-card', action='store_true', help='replace the README.md of the repository or folder')
    parser.add_argument('--dry-run', metavar='DIR', help='write the files to a folder, and upload nothing')


def run(args: argparse.Namespace) -> int:
    """Runs the verb, and returns the exit code."""
    from timm_spa.hub.publish import publish, write_repository

    what = args.checkpoint, args.model, args.repo
    options = dict(num_classes=args.num_classes, replace_card=args.replace_card, results=args.results)
    if args.dry_run:
        notes = write_repository(args.dry_run, *what, **options)
        outcome = f'Wrote {args.dry_run}. Nothing was uploaded.'
    else:
        published = publish(*what, private=args.private, create_pr=args.pr, tag=args.tag, **options)
        notes = published.notes
        outcome = f'Published: {published.url}' if published.changed else f'Nothing to change: {published.url}'
    print('\n'.join([*notes, outcome]))
    return 0
