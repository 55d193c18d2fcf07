"""`timm-spa demo`: the shipped photographs, classified with the shipped weights."""
import argparse

from timm_spa_cli._options import SHIPPED_MODEL, positive
from timm_spa_cli.predict import show_predictions

HELP = 'classify the shipped photographs with the shipped weights'
EXAMPLES = ('timm-spa demo holiday.jpg',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('images', nargs='*', metavar='IMAGE', help='further images to classify')
    parser.add_argument('--top-k', type=positive, default=2, help='classes to show per image (default: %(default)s)')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    import timm

    from timm_spa._shipped import shipped_photographs
    from timm_spa.predict import load_model

    model = load_model(SHIPPED_MODEL)
    print(f'{SHIPPED_MODEL}: {timm.get_pretrained_cfg(SHIPPED_MODEL).description}\n')
    labels = {str(path): path.stem for path in shipped_photographs()}  # the files are named after their classes
    code = show_predictions(model, [*labels, *args.images], labels, args.top_k)
    print(
        '\nThis model knows the 81 classes of its data set. For the 1000 classes of ImageNet, with access to the Hub:\n'
        '    timm-spa predict IMAGE... --model spa_resnet50\n'
        "It starts from timm's resnet50 weights and has their accuracy: attention is neutral until you fine-tune it.")
    return code
