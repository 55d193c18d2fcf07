"""Draws docs/spa_block.png: what Spatial Pyramid Attention does to one channel of a feature map.

    python docs/spa_block.py

The feature map is the brightness of a photograph of scikit-image (coffee, by Rachel Michetti, CC0). The gate is that of
a layer whose convolutions keep the channel.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image, ImageOps

from timm_spa.predict import sample_image

SIZES = (7, 4, 1)
WIDTH, HEIGHT = 9.2, 3.3  # inches


def main() -> None:
    """Draws the figure."""
    photograph = ImageOps.fit(Image.open(sample_image('coffee')).convert('L'), (56, 56), centering=(0.35, 0.5))
    x = torch.from_numpy(np.asarray(photograph) / np.float32(255))[None, None]
    levels = [F.adaptive_avg_pool2d(x, size) for size in SIZES]
    pyramid = sum(F.interpolate(level, size=7) for level in levels)
    gate = torch.sigmoid(6 * (pyramid - pyramid.mean()))
    # left, bottom and side in inches
    panels = [
        (x, 'feature map', (0.1, 0.95, 1.4)),
        (levels[0], 'averages: 7x7', (2.1, 2.25, 0.8)), (levels[1], '4x4', (2.1, 1.18, 0.8)),
        (levels[2], '1x1', (2.1, 0.11, 0.8)),
        (pyramid / len(SIZES), 'weighted sum', (3.55, 1.05, 1.2)), (gate, 'gate, 0 to 1', (5.75, 1.05, 1.2)),
        (x * F.interpolate(gate, size=56), 'rescaled map', (7.7, 0.95, 1.4))]
    figure = Figure(figsize=(WIDTH, HEIGHT))
    for values, title, (left, bottom, side) in panels:
        axis = figure.add_axes((left / WIDTH, bottom / HEIGHT, side / WIDTH, side / HEIGHT))
        axis.imshow(values[0, 0], cmap='PuOr' if values is gate else 'gray', vmin=0, vmax=1)
        axis.set(xticks=(), yticks=())
        axis.set_title(title, fontsize=10, pad=4)
    for start, end in (
            ((1.55, 1.65), (2.05, 2.6)), ((1.55, 1.65), (2.05, 1.6)), ((1.55, 1.65), (2.05, 0.55)),
            ((2.95, 2.6), (3.5, 1.7)), ((2.95, 1.6), (3.5, 1.65)), ((2.95, 0.55), (3.5, 1.6)),
            ((4.8, 1.65), (5.7, 1.65)), ((7., 1.65), (7.65, 1.65))):
        start, end = ((left / WIDTH, bottom / HEIGHT) for left, bottom in (start, end))
        figure.add_artist(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=9, color='black', linewidth=0.8))
    for text, left, bottom in (
            ('two 1x1\nconvolutions,\nsigmoid', 5.23, 2.15), ('times the\nfeature\nmap', 7.31, 2.15)):
        figure.text(left / WIDTH, bottom / HEIGHT, text, fontsize=9, ha='center', va='center')
    path = Path(__file__).with_name('spa_block.png')
    figure.savefig(path, dpi=110)
    Image.open(path).convert('RGB').quantize(128).save(path, optimize=True)


if __name__ == '__main__':
    main()
