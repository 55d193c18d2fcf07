"""Figures of class activation maps, gates, pyramid weights and curves, as PNG and SVG. Needs matplotlib.

The same input gives the same bytes. The colours are safe for colour-blind readers.
"""
import contextlib
import io
import statistics
import textwrap
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Sequence, Tuple, Union

import torch
from PIL import Image

from ..checkpoints.files import replacing
from ..checkpoints.own_files import MARK, png_mark
from .attention import ExplainError, ScaleWeights, gate_panels

__all__ = ['curves_of', 'draw_cams', 'draw_curves', 'draw_gates', 'draw_scales', 'save']

COLUMNS = 4
PANEL = 1.75  # inches: four panels fit the width of a page
LEGEND_WIDTH, LEGEND_LINE = 60, 0.11  # characters and inches, below a panel of curves
# palette of Okabe and Ito
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00')
CURVES = {'train_loss': 'training loss', 'eval_loss': 'validation loss', 'eval_top1': 'validation top-1 (%)'}
DETECTION_CURVES = {
    'train_loss': 'training loss', 'eval_map': 'validation AP (%)', 'eval_ap50': 'validation AP50 (%)'}

Summary = Sequence[Mapping[str, float]]  # metrics of each epoch, see `timm_spa.training.log.read_summary`


@contextlib.contextmanager
def _style(dark: bool = False) -> Iterator[None]:
    """Context manager that sets matplotlib's style."""
    try:
        import matplotlib
        from matplotlib import style
    except ImportError as e:
        raise ExplainError('Drawing needs matplotlib: pip install "timm_spa[explain]".') from e
    with style.context('dark_background' if dark else 'default'), matplotlib.rc_context({
            'svg.hashsalt': 'timm_spa', 'font.size': 8}):
        yield


def _panels(rows: int, columns: int, width: float, height: float, **kwargs: Any) -> Tuple[Any, Any]:
    """Returns a figure and its panels, whose width and height are in inches, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _small(image: Image.Image) -> Image.Image:
    """Returns a copy of an image that is no larger than a printed panel."""
    small = image.copy()
    small.thumbnail((192, 192))
    return small


def _overlay(
        axis: Any,
        image: Image.Image,
        cells: torch.Tensor,
        cmap: str,
        limits: Tuple[float, float],
        interpolation: str,
) -> None:
    """Draws a tensor (H, W) in colours over a grey image."""
    extent = (0, image.width, image.height, 0)
    axis.imshow(image, cmap='gray', extent=extent)
    axis.imshow(
        cells.numpy(), cmap=cmap, vmin=limits[0], vmax=limits[1], alpha=0.6, interpolation=interpolation,
        extent=extent)


def draw_cams(rows: Mapping[str, Sequence[Tuple[Image.Image, torch.Tensor, str]]], dark: bool = False) -> Any:
    """Draws class activation maps over images, like the paper's figure 5: one row per model, one column per image.

    Args:
        rows: By model name, for each image: the image that the model sees, the class activation map (H, W) from 0 to 1,
            and a title.
        dark: Draw on a dark background.

    Returns:
        Figure of matplotlib. The first row shows the images alone. The class activation maps are interpolated.
    """
    with _style(dark):
        first = next(iter(rows.values()))
        figure, axes = _panels(len(rows) + 1, len(first), PANEL, PANEL + 0.35)
        for axis, (image, _, _) in zip(axes[0], first, strict=True):
            axis.imshow(_small(image), cmap='gray')
        for line, (name, panels) in zip(axes[1:], rows.items(), strict=True):
            line[0].set_ylabel(name, fontsize=7)
            for axis, (image, cells, title) in zip(line, panels, strict=True):
                _overlay(axis, _small(image.convert('L')), cells, 'inferno', (0, 1), 'bilinear')
                axis.set_title('\n'.join(textwrap.wrap(title, 24)), fontsize=7)
        for axis in axes.flat:
            axis.set(xticks=(), yticks=())
            axis.spines[:].set_visible(False)
        figure.suptitle('brighter: more evidence for the class', fontsize=7)
    return figure


def draw_gates(
        image: Image.Image,
        gates: Mapping[str, torch.Tensor],
        dark: bool = False,
        columns: int = COLUMNS,
) -> Any:
    """Draws the gates of every block over an image: the mean of the channels, and the channel that varies most.

    Args:
        image: Cropped and resized image that the model sees.
        gates: Gates (channels, P, P) by block name.
        dark: Draw on a dark background.
        columns: Number of blocks per row.

    Returns:
        Figure of matplotlib. Cells above 1/2 are violet, cells below 1/2 are orange. All panels have the same range
        around 1/2, so that colours can be compared.
    """
    shown, limits = gate_panels(gates)
    with _style(dark):
        rows = -(-len(gates) // columns)
        figure, axes = _panels(2 * rows, min(columns, len(gates)), PANEL, PANEL + 0.3)
        for axis in axes.flat:
            axis.axis('off')
        image = _small(image.convert('L'))
        for i, (name, panels) in enumerate(shown.items()):
            for line, (title, cells) in enumerate(panels.items()):
                axis = axes[2 * (i // columns) + line][i % columns]
                _overlay(axis, image, cells, 'PuOr', limits, 'nearest')
                axis.set_title(f'{name}\n{title}', fontsize=7)
        legend = (
            f'violet: above 1/2, up to {limits[1]:.2f}; orange: below 1/2, down to {limits[0]:.2f}; white: '
            '1/2, as before training')
        figure.suptitle('\n'.join(textwrap.wrap(legend, 26 * axes.shape[1])), fontsize=7)
    return figure


def draw_scales(weights: Mapping[str, Mapping[str, ScaleWeights]], dark: bool = False) -> Any:
    """Draws how far the pyramid weights have moved from 1, their value at the start of a training, by block.

    The paper's figure 6 shows their absolute values.

    Args:
        weights: Pyramid weights by model name and block name, see `timm_spa.explain.scale_weights`.
        dark: Draw on a dark background.

    Returns:
        Figure of matplotlib, one row of bars per model. Bars above the line are weights above 1.
    """
    with _style(dark):
        blocks = max(map(len, weights.values()))
        figure, axes = _panels(len(weights), 1, max(3.5, 0.35 * blocks + 1), 2.2)
        for axis, (name, by_block) in zip(axes[:, 0], weights.items(), strict=True):
            sizes = next(iter(by_block.values())).sizes
            for level, size in enumerate(sizes):
                offset = (level - (len(sizes) - 1) / 2) * 0.8 / len(sizes)
                axis.bar(
                    [i + offset for i in range(len(by_block))], [w.weights[level] - 1 for w in by_block.values()],
                    width=0.8 / len(sizes), label=f'{size}x{size}', color=COLOURS[level % len(COLOURS)])
            axis.axhline(0, color='grey', linewidth=0.6)
            axis.set_xticks(range(len(by_block)), by_block, rotation=90, fontsize=6)
            axis.set_title(name, fontsize=8)
            axis.set_ylabel('weight - 1')
            axis.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7)
    return figure


def curves_of(summary: Summary) -> Mapping[str, str]:
    """Returns the columns of summary.csv to draw and their titles, for a classifier or a detector."""
    return DETECTION_CURVES if 'eval_map' in summary[0] else CURVES


def draw_curves(panels: Mapping[str, Mapping[str, Sequence[Summary]]], dark: bool = False) -> Any:
    """Draws losses and accuracy over the epochs, like the paper's figures 3 and 4.

    Args:
        panels: Runs by column title and label; all of classifiers, or all of detectors.
        dark: Draw on a dark background.

    Returns:
        Figure of matplotlib, one column per title. A line is the mean of the runs of one label. The band around it
        reaches from the smallest to the largest value. Both end with the shortest of these runs.
    """
    first = next(iter(next(iter(panels.values())).values()))[0]
    curves = curves_of(first)
    with _style(dark):
        figure, axes = _panels(len(curves), len(panels), 3.5, 2, sharex='col')
        legend_height = 0.
        for column, (heading, rows) in enumerate(panels.items()):
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
            axes[0][column].set_title(heading, fontsize=8)
            axes[-1][column].set_xlabel('epoch')
            # below the panels: labels contain all settings in which runs differ, and would cover the curves
            handles, labels = axes[-1][column].get_legend_handles_labels()
            labels = ['\n'.join(textwrap.wrap(label, LEGEND_WIDTH)) for label in labels]
            axes[-1][column].legend(
                handles, labels, fontsize=6, frameon=False, loc='upper center', bbox_to_anchor=(0.5, -0.25))
            legend_height = max(legend_height, LEGEND_LINE * sum(label.count('\n') + 1.5 for label in labels))
        figure.set_figheight(figure.get_figheight() + legend_height)
    return figure


def save(figure: Any, path: Union[str, Path]) -> List[Path]:
    """Writes a figure as PNG and as SVG.

    Args:
        figure: Figure of matplotlib.
        path: Path without a suffix.

    Returns:
        The two files.

    Raises:
        WriteError: A file cannot be written.
    """
    png, svg = Path(f'{path}.png'), Path(f'{path}.svg')
    with replacing(png) as partial:
        # 256 colours look the same and need a third of the bytes
        as_image(figure).quantize(256).save(partial, format='png', optimize=True, pnginfo=png_mark())
    with replacing(svg) as partial, _style():
        figure.savefig(partial, format='svg', metadata={'Date': None, 'Title': MARK['written_by']})
    return [png, svg]


def as_image(figure: Any) -> Image.Image:
    """Renders a figure of matplotlib as an image, with 120 dots per inch."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, dpi=120, format='png')
    with Image.open(buffer) as image:
        return image.convert('RGB')
