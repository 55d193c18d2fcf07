"""Pictures of what `timm_spa.explain` computes, as PNG and SVG; needs matplotlib.

The same input gives the same bytes. Colours are told apart by people who see no red or no green.
"""
import contextlib
import io
import statistics
import textwrap
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Sequence, Tuple, Union

import torch
from PIL import Image

from .._errors import TimmSpaError
from ..checkpoints.files import replacing
from ..checkpoints.own_files import MARK, png_mark
from .attention import NEUTRAL, ScaleWeights

__all__ = ['FigureError', 'curves_of', 'draw_cams', 'draw_curves', 'draw_gates', 'draw_scales', 'save']

COLUMNS = 4
PANEL = 1.75  # inches: four are the width of a paper's page
LEGEND_WIDTH, LEGEND_LINE = 60, 0.11  # letters and inches, below a panel of curves
# of Okabe and Ito
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00')
CURVES = {'train_loss': 'training loss', 'eval_loss': 'validation loss', 'eval_top1': 'validation top-1 (%)'}
DETECTION_CURVES = {
    'train_loss': 'training loss', 'eval_map': 'validation AP (%)', 'eval_ap50': 'validation AP50 (%)'}

Summary = Sequence[Mapping[str, float]]  # metrics of each epoch, see `timm_spa.training.log.read_summary`


class FigureError(TimmSpaError, ImportError):
    """Nothing can be drawn; the message says what to install."""


@contextlib.contextmanager
def _style(dark: bool = False) -> Iterator[None]:
    """Sets matplotlib's style within the context."""
    try:
        import matplotlib
        from matplotlib import style
    except ImportError as e:
        raise FigureError('Drawing needs matplotlib: pip install "timm_spa[explain]".') from e
    with style.context('dark_background' if dark else 'default'), matplotlib.rc_context({
            'svg.hashsalt': 'timm_spa', 'font.size': 8}):
        yield


def _panels(rows: int, columns: int, width: float, height: float, **kwargs: Any) -> Tuple[Any, Any]:
    """Makes a figure of panels of a width and height in inches, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _small(picture: Image.Image) -> Image.Image:
    """Returns a picture no larger than a panel is printed."""
    small = picture.copy()
    small.thumbnail((192, 192))
    return small


def _overlay(
        axis: Any,
        picture: Image.Image,
        cells: torch.Tensor,
        cmap: str,
        limits: Tuple[float, float],
        interpolation: str,
) -> None:
    """Draws a map (H, W) in colours over a grey picture."""
    extent = (0, picture.width, picture.height, 0)
    axis.imshow(picture, cmap='gray', extent=extent)
    axis.imshow(
        cells.numpy(), cmap=cmap, vmin=limits[0], vmax=limits[1], alpha=0.6, interpolation=interpolation,
        extent=extent)


def draw_cams(rows: Mapping[str, Sequence[Tuple[Image.Image, torch.Tensor, str]]], dark: bool = False) -> Any:
    """Draws class activation maps over pictures, as the paper's figure 5: a row a model, a column a picture.

    Args:
        rows: For each model, by its name, what it sees of each picture, the map (H, W) from 0 to 1, and a title.
        dark: Draw on a dark background.

    Returns:
        Figure of matplotlib. The pictures are above the rows; the map of a few cells is drawn smoothed.
    """
    with _style(dark):
        first = next(iter(rows.values()))
        figure, axes = _panels(len(rows) + 1, len(first), PANEL, PANEL + 0.35)
        for axis, (picture, _, _) in zip(axes[0], first, strict=True):
            axis.imshow(_small(picture), cmap='gray')
        for line, (name, panels) in zip(axes[1:], rows.items(), strict=True):
            line[0].set_ylabel(name, fontsize=7)
            for axis, (picture, cells, title) in zip(line, panels, strict=True):
                _overlay(axis, _small(picture.convert('L')), cells, 'inferno', (0, 1), 'bilinear')
                axis.set_title('\n'.join(textwrap.wrap(title, 24)), fontsize=7)
        for axis in axes.flat:
            axis.set(xticks=(), yticks=())
            axis.spines[:].set_visible(False)
        figure.suptitle('bright: speaks for the class', fontsize=7)
    return figure


def draw_gates(
        picture: Image.Image,
        gates: Mapping[str, torch.Tensor],
        dark: bool = False,
        columns: int = COLUMNS,
) -> Any:
    """Draws the gates of every block over a picture: the mean of the channels, and the channel that varies most.

    Args:
        picture: What the net sees of the picture, cropped and resized.
        gates: Gate (channels, P, P) of each block, by its name.
        dark: Draw on a dark background.
        columns: Blocks side by side.

    Returns:
        Figure of matplotlib. A cell of a gate is drawn as a cell, violet above 1/2, orange below. Each panel has its
        own range around 1/2, which stands in its title.
    """
    with _style(dark):
        rows = -(-len(gates) // columns)
        figure, axes = _panels(2 * rows, min(columns, len(gates)), PANEL, PANEL + 0.3)
        for axis in axes.flat:
            axis.axis('off')
        picture = _small(picture.convert('L'))
        for i, (name, gate) in enumerate(gates.items()):
            varying = int(gate.flatten(1).std(1).argmax())
            for line, (title, cells) in enumerate((('mean', gate.mean(0)), (f'channel {varying}', gate[varying]))):
                axis = axes[2 * (i // columns) + line][i % columns]
                reach = max((cells - NEUTRAL).abs().max().item(), 1e-6)
                _overlay(axis, picture, cells, 'PuOr', (NEUTRAL - reach, NEUTRAL + reach), 'nearest')
                axis.set_title(f'{name}\n{title}, 0.5 ± {reach:.3f}', fontsize=7)
        legend = 'violet: above 1/2, orange: below; an untrained gate is 1/2 everywhere'
        figure.suptitle('\n'.join(textwrap.wrap(legend, 26 * axes.shape[1])), fontsize=7)
    return figure


def draw_scales(weights: Mapping[str, Mapping[str, ScaleWeights]], dark: bool = False) -> Any:
    """Draws the absolute weights of the pyramid by block, as the paper's figure 6.

    Args:
        weights: Of each net, by its name, those of its blocks, see `timm_spa.explain.scale_weights`.
        dark: Draw on a dark background.

    Returns:
        Figure of matplotlib, a row of bars for each net. The line is where training starts.
    """
    with _style(dark):
        blocks = max(map(len, weights.values()))
        figure, axes = _panels(len(weights), 1, max(3.5, 0.35 * blocks + 1), 2.2)
        for axis, (net, of_net) in zip(axes[:, 0], weights.items(), strict=True):
            sizes = next(iter(of_net.values())).sizes
            for level, size in enumerate(sizes):
                offset = (level - (len(sizes) - 1) / 2) * 0.8 / len(sizes)
                axis.bar(
                    [i + offset for i in range(len(of_net))], [abs(w.weights[level]) for w in of_net.values()],
                    width=0.8 / len(sizes), label=f'{size}x{size}', color=COLOURS[level % len(COLOURS)])
            axis.axhline(1, color='grey', linewidth=0.6)
            axis.set_xticks(range(len(of_net)), of_net, rotation=90, fontsize=6)
            axis.set_title(net, fontsize=8)
            axis.set_ylabel('|weight|')
            axis.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7)
    return figure


def curves_of(summary: Summary) -> Mapping[str, str]:
    """Returns the columns that are drawn of a run, and their titles: of a classifier's, or of a detector's."""
    return DETECTION_CURVES if 'eval_map' in summary[0] else CURVES


def draw_curves(nets: Mapping[str, Mapping[str, Sequence[Summary]]], dark: bool = False) -> Any:
    """Draws losses and accuracy over the epochs, as the paper's figures 3 and 4.

    Args:
        nets: For each net, by its name, the runs of each label; all of classifiers, or all of detectors.
        dark: Draw on a dark background.

    Returns:
        Figure of matplotlib, a column for each net. A line is the mean of the runs of its label, the band around it
        reaches from the least to the largest, both over the epochs that all of these runs have.
    """
    first = next(iter(next(iter(nets.values())).values()))[0]
    curves = curves_of(first)
    with _style(dark):
        figure, axes = _panels(len(curves), len(nets), 3.5, 2, sharex='col')
        height = 0.  # of the tallest legend
        for column, (net, rows) in enumerate(nets.items()):
            for line, (key, title) in enumerate(curves.items()):
                axis = axes[line][column]
                for (label, runs), colour, dash in zip(
                        rows.items(), COLOURS * len(rows), ('-', '--', ':', '-.') * len(rows), strict=False):
                    epochs = [[row[key] for row in epoch] for epoch in zip(*runs, strict=False)]
                    x = [row['epoch'] + 1 for row in runs[0][:len(epochs)]]
                    axis.plot(
                        x, list(map(statistics.mean, epochs)), label=label, linewidth=1.2, color=colour, linestyle=dash)
                    if len(runs) > 1:
                        axis.fill_between(
                            x, list(map(min, epochs)), list(map(max, epochs)), alpha=0.2, color=colour, linewidth=0)
                axis.set(ylabel=None if column else title, yscale='log' if 'loss' in key else 'linear')
                if 'loss' in key:
                    for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                        formatted('{x:g}')
                axis.xaxis.get_major_locator().set_params(integer=True)
                axis.grid(alpha=0.3, which='both')
            axes[0][column].set_title(net, fontsize=8)
            axes[-1][column].set_xlabel('epoch')
            # below the panels: labels name all settings in which runs differ, and would cover the curves
            handles, labels = axes[-1][column].get_legend_handles_labels()
            labels = ['\n'.join(textwrap.wrap(label, LEGEND_WIDTH)) for label in labels]
            axes[-1][column].legend(
                handles, labels, fontsize=6, frameon=False, loc='upper center', bbox_to_anchor=(0.5, -0.25))
            height = max(height, LEGEND_LINE * sum(label.count('\n') + 1.5 for label in labels))
        figure.set_figheight(figure.get_figheight() + height)
    return figure


def save(figure: Any, path: Union[str, Path]) -> List[Path]:
    """Writes a figure as PNG and as SVG.

    Args:
        figure: Figure of matplotlib.
        path: File without a suffix.

    Returns:
        The files.

    Raises:
        WriteError: One cannot be written.
    """
    png, svg = Path(f'{path}.png'), Path(f'{path}.svg')
    with replacing(png) as partial:
        # 256 colours look the same, in a third of the bytes
        as_image(figure).quantize(256).save(partial, format='png', optimize=True, pnginfo=png_mark())
    with replacing(svg) as partial, _style():
        figure.savefig(partial, format='svg', metadata={'Date': None, 'Title': MARK['written_by']})
    return [png, svg]


def as_image(figure: Any) -> Image.Image:
    """Draws a figure of matplotlib into a picture, at 120 dots an inch."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, dpi=120, format='png')
    with Image.open(buffer) as image:
        return image.convert('RGB')
