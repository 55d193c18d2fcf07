"""`timm-spa demo`: the shipped photographs, classified with the shipped weights."""
import argparse

from timm_spa_cli.predict import SHIPPED_MODEL, positive, show_predictions

HELP = 'classify the shipped photographs with the shipped weights'
EXAMPLES = ('timm-spa demo holiday.jpg',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('images', nargs='*', metavar='IMAGE', help='further pictures')
    parser.add_argument('--top-k', type=positive, default=2, help='classes to show a picture (default: %(default)s)')


def run(args: argparse.Namespace) -> int:
    """Runs the verb, and returns the exit code."""
    import timm

    from timm_spa._shipped import shipped_photographs
    from timm_spa.predict import load_model

    model = load_model(SHIPPED_MODEL)
    print(f'{SHIPPED_MODEL}: {timm.get_pretrained_cfg(SHIPPED_MODEL).description}\n')
    pictures = {str(path): path.stem for path in shipped_photographs()}  # named after their classes
    code = show_predictions(model, [*pictures, *args.images], pictures, args.top_k)
    print(
        '\nIt knows the 81 classes of its data set. For the 1000 of ImageNet, with a connection to the Hub:\n'
        '    timm-spa predict IMAGE... --model spa_resnet50\n'
        "which starts from timm's resnet50 weights: the same accuracy, attention neutral until you fine-tune it.")
    return code
