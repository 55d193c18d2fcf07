"""Pictures of what `timm_spa.explain` computes, as PNG and SVG; needs matplotlib.

The same input gives the same bytes. Colours are told apart by people who see no red or no green, and on dark paper.
"""
import io
from pathlib import Path
from typing import Any, List, Mapping, Sequence, Tuple, Union

import torch
from PIL import Image

from ._errors import TimmSpaError
from ._files import replacing
from .explain import ScaleWeights

__all__ = ['FigureError', 'draw_gates', 'draw_scales', 'gate_rows', 'save', 'scale_rows']

COLUMNS = 4
# of Okabe and Ito
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00')


class FigureError(TimmSpaError, ImportError):
    """Nothing can be drawn; the message says what to install."""


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as e:
        raise FigureError('Drawing needs matplotlib: pip install "timm_spa[plot]".') from e
    matplotlib.use('Agg')
    matplotlib.rcParams.update({'svg.hashsalt': 'timm_spa', 'font.size': 8})
    from matplotlib import pyplot

    return pyplot


def draw_gates(picture: Image.Image, gates: Mapping[str, torch.Tensor]) -> Any:
    """Draws the gates of every block over a picture: the mean of the channels, and the channel that varies most.

    Args:
        picture: What the net sees of the picture, cropped and resized.
        gates: Gate (channels, P, P) of each block, by its name.

    Returns:
        Figure of matplotlib. A cell of a gate is drawn as a cell, violet above 1/2, orange below. Each panel has its
        own range around 1/2, which stands in its title.
    """
    pyplot = _pyplot()
    rows = -(-len(gates) // COLUMNS)
    figure, axes = pyplot.subplots(
        2 * rows, COLUMNS, figsize=(1.75 * COLUMNS, 2.05 * 2 * rows), squeeze=False, layout='constrained')
    for axis in axes.flat:
        axis.axis('off')
    picture = picture.convert('L')
    picture.thumbnail((128, 128))  # as large as a panel is printed
    width, height = picture.size
    for i, (name, gate) in enumerate(gates.items()):
        varying = int(gate.flatten(1).std(1).argmax())
        for line, (title, cells) in enumerate((('mean', gate.mean(0)), (f'channel {varying}', gate[varying]))):
            axis = axes[2 * (i // COLUMNS) + line][i % COLUMNS]
            reach = max((cells - 0.5).abs().max().item(), 1e-6)
            axis.imshow(picture, cmap='gray', extent=(0, width, height, 0))
            axis.imshow(
                cells.numpy(), cmap='PuOr', vmin=0.5 - reach, vmax=0.5 + reach, alpha=0.6, interpolation='nearest',
                extent=(0, width, height, 0))
            axis.set_title(f'{name}\n{title}, 0.5 ± {reach:.3f}', fontsize=7)
    figure.suptitle('violet: above 1/2, orange: below; an untrained gate is 1/2 everywhere', fontsize=7)
    return figure


def draw_scales(weights: Mapping[str, Mapping[str, ScaleWeights]]) -> Any:
    """Draws the absolute weights of the pyramid by block, as figure 6 of the paper.

    Args:
        weights: Of each net, by its name, those of its blocks, see `timm_spa.explain.scale_weights`.

    Returns:
        Figure of matplotlib, a row of bars for each net.
    """
    pyplot = _pyplot()
    blocks = max(map(len, weights.values()))
    figure, axes = pyplot.subplots(
        len(weights), 1, figsize=(max(3.5, 0.35 * blocks + 1), 2.2 * len(weights)), squeeze=False, layout='constrained')
    for axis, (net, of_net) in zip(axes[:, 0], weights.items(), strict=True):
        sizes = next(iter(of_net.values())).sizes
        for level, size in enumerate(sizes):
            offset = (level - (len(sizes) - 1) / 2) * 0.8 / len(sizes)
            axis.bar(
                [i + offset for i in range(len(of_net))], [abs(w.weights[level]) for w in of_net.values()],
                width=0.8 / len(sizes), label=f'{size}x{size}', color=COLOURS[level % len(COLOURS)])
        axis.axhline(1, color='grey', linewidth=0.6)  # where training starts
        axis.set_xticks(range(len(of_net)), of_net, rotation=90, fontsize=6)
        axis.set(title=net, ylabel='|weight|')
    figure.legend(*axes[0][0].get_legend_handles_labels(), ncols=len(sizes), loc='outside upper right', fontsize=7)
    return figure


def save(figure: Any, path: Union[str, Path]) -> List[Path]:
    """Writes a figure as PNG and as SVG.

    Args:
        figure: Figure of matplotlib; it is closed.
        path: File without a suffix.

    Returns:
        The files.

    Raises:
        WriteError: One cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format='png')
    png, svg = Path(f'{path}.png'), Path(f'{path}.svg')
    with replacing(png) as partial, Image.open(buffer) as image:
        # 256 colours are a third of the file, and no loss that anybody sees
        image.convert('RGB').quantize(256).save(partial, format='png', optimize=True)
    with replacing(svg) as partial:
        figure.savefig(partial, format='svg', metadata={'Date': None})
    _pyplot().close(figure)
    return [png, svg]


def gate_rows(gates: Mapping[str, torch.Tensor]) -> List[Tuple[Any, ...]]:
    """Lays out what gates (channels, P, P) are in numbers, a header first: the same that is drawn."""
    rows: List[Tuple[Any, ...]] = [
        ('block', 'channels', 'cells', 'mean', 'smallest', 'largest', 'mean distance from 1/2')]
    for name, gate in gates.items():
        rows.append((
            name, str(gate.shape[0]), f'{gate.shape[1]}x{gate.shape[2]}', *(
                f'{value.item():.4f}' for value in (gate.mean(), gate.min(), gate.max(), (gate - 0.5).abs().mean()))))
    return rows


def scale_rows(weights: Mapping[str, ScaleWeights]) -> List[Tuple[Any, ...]]:
    """Lays out the weights of a net's pyramids, a header first."""
    sizes: Sequence[int] = next(iter(weights.values())).sizes
    return [
        ('block', *(f'{size}x{size}' for size in sizes)),
        *((name, *(f'{value:.4f}' for value in of_block.weights)) for name, of_block in weights.items())]

