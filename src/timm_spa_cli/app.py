"""`timm-spa app`: a page in the browser that explains predictions."""
import argparse
import signal
import sys
from typing import Any

HELP = 'open a page that shows what a model sees in an image'
EXAMPLES = ('timm-spa app --model spa_tf_efficientnet_lite0.grocery81 --model spa_resnet50',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        '--model', dest='models', action='append', metavar='MODEL',
        help='offer this model, any CNN that timm can create; can be repeated (default: the shipped models)')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (default: %(default)s)')
    parser.add_argument('--port', type=int, help='port (default: the first free port from 7860)')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    from timm_spa.explain import app
    from timm_spa.predict import load_model

    for name in args.models or ():
        load_model(name)  # a model that cannot be loaded fails here, not on the page

    def stop(number: int, frame: Any) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)  # so that the temporary folder is removed
    app.serve(args.models or app.SHIPPED, args.host, args.port)
    return 0
