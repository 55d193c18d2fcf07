"""The repository of the shipped weights, which tests of publishing write and upload."""
from pathlib import Path

import timm_spa

NAME = 'spa_mobilenetv2_cifar.tmm_tin200'
REPO = f'org/{NAME}'
FILES = ['README.md', 'args.yaml', 'config.json', 'model.safetensors', 'scales.png', 'summary.csv']
WRITTEN = sorted([*FILES, 'card.yaml', 'run.json'])
CARDS = Path(__file__).parent.parent / 'hub_cards' / NAME
SHIPPED = Path(timm_spa.__file__).parent / 'weights' / f'{NAME}.safetensors'
