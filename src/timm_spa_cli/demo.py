"""`timm-spa demo`: the shipped pictures, classified with the shipped weights."""
import argparse
from importlib import resources
from typing import Dict, Tuple

from timm_spa_cli.predict import positive, show_predictions

HELP = 'classify the shipped pictures with the shipped weights'

DEMO_MODEL = 'spa_mobilenetv2_cifar.tmm_tin200'
# the classes of the demo model that a shipped picture shows; a picture of none of its classes has no right answer
DEMO_PICTURES: Dict[str, Tuple[str, ...]] = {
    'chelsea.jpg': ('n02123045',),
    'coffee.jpg': ('n07920052',),
    'rocket.jpg': (),
    'astronaut.jpg': (),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('images', nargs='*', metavar='IMAGE', help='further pictures')
    parser.add_argument('--top-k', type=positive, default=5, help='classes to show a picture (default: %(default)s)')


def run(args: argparse.Namespace) -> int:
    """Runs the verb, and returns the exit code."""
    import timm

    from timm_spa.predict import load_model

    model = load_model(DEMO_MODEL)
    print(f'{DEMO_MODEL}: {timm.get_pretrained_cfg(DEMO_MODEL).description}\n')
    folder = resources.files('timm_spa') / 'images'
    pictures = {str(folder / name): labels for name, labels in DEMO_PICTURES.items()}
    code = show_predictions(model, [*pictures, *args.images], pictures, args.top_k)
    print(
        '\nIt sees 32x32 pixels and knows 200 classes. For 1000 classes at 224x224, with a connection to the Hub:\n'
        '    timm-spa predict IMAGE... --model spa_resnet50\n'
        "which starts from timm's resnet50 weights: the same accuracy, attention neutral until you fine-tune it.")
    return code
