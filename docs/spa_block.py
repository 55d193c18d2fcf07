"""Draws docs/spa_block.png: what Spatial Pyramid Attention does to one channel of a map.

    python docs/spa_block.py

The map is the brightness of a shipped photograph; the gate is that of a layer whose convolutions keep the channel.
"""
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

SIZES = (7, 4, 1)


def main() -> None:
    """Draws the figure."""
    picture = Image.open(resources.files('timm_spa') / 'images' / 'Green-Bell-Pepper.jpg').convert('L').resize((56, 56))
    x = torch.tensor(list(picture.tobytes()), dtype=torch.float32).view(1, 1, 56, 56) / 255
    levels = [F.adaptive_avg_pool2d(x, size) for size in SIZES]
    pyramid = sum(F.interpolate(level, size=7) for level in levels)
    gate = torch.sigmoid(6 * (pyramid - pyramid.mean()))
    panels = [
        (x, 'map X', 0.), (levels[0], 'averages: 7x7', 1.6), (levels[1], '4x4', 1.6), (levels[2], '1x1', 1.6),
        (pyramid, 'weighted sum (1)', 3.2), (gate, 'gate (2), 0 to 1', 5.2),
        (x * F.interpolate(gate, size=56), 'product', 7.)]
    figure = Figure(figsize=(8.4, 3.6))
    rows = {1: 2.4, 2: 1.2, 3: 0.}
    for i, (values, title, left) in enumerate(panels):
        bottom, side = rows.get(i, 1.05), 1. if i in rows else 1.3
        axis = figure.add_axes((left / 8.4 + 0.01, bottom / 3.6 + 0.01, side / 8.4, side / 3.6))
        axis.imshow(values[0, 0], cmap='PuOr' if i == 5 else 'gray', vmin=0, vmax=pyramid.max() if i == 4 else 1)
        axis.set(xticks=(), yticks=())
        axis.set_title(title, fontsize=8, pad=3)
    for text, left, bottom in (
            ('→', 1.5, 1.7), ('→', 2.95, 1.7), ('→', 4.92, 1.7), ('→', 6.83, 1.7),
            ('two 1x1 convolutions\nand a sigmoid', 4.92, 0.75), ('each cell enlarged,\ntimes X', 6.83, 0.75)):
        figure.text(left / 8.4, bottom / 3.6, text, fontsize=8, ha='center', va='center')
    figure.savefig(Path(__file__).with_name('spa_block.png'), dpi=120)


if __name__ == '__main__':
    main()
