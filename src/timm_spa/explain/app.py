"""Page of `timm-spa app` and of the Hub's Space, which explains the predictions for an image. Needs Gradio."""
import base64
import collections
import errno
import functools
import html
import io
import os
import re
import socket
import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from PIL import Image

from .._errors import TimmSpaError
from ..predict import ImageError, class_names, image_reader, image_seen, likeliest_classes, load_model, sample_images
from .attention import ExplainError, ScaleWeights, gate_maps, gate_panels, scale_weights
from .class_activation import cam

__all__ = ['SHIPPED', 'build', 'look', 'serve']

SHIPPED = ('spa_tf_efficientnet_lite0.grocery81', 'spa_mobilenetv2_cifar.tmm_tin200')
NOTHING = 'no second model'
LARGEST_FILE = '20mb'
TOP = 5
BLOCKS = 4  # blocks in the figure of gates, evenly spaced over the model
SIDE = 240  # pixels of a panel
TITLE = 'What does the network look at?'
ABOUT = """
Choose an image, and see the likeliest classes, the regions that speak for the first class, and how attention rescales
the features.
"""
LIMITS = """
A class activation map shows which parts of an image raise a score. It does not prove how the network reasons. A gate
acts on single channels, and the mean over channels hides them. A network knows only the classes that it was trained on.
"""
NO_GATES = 'This model has no SPA gates.'
TABS = ('Classes and class activation', 'Gates', 'Pyramid weights')


class Results(NamedTuple):
    """Results that the page shows for one image and one model.

    Attributes:
        classes: The likeliest classes with their probabilities.
        activation: The class activation map of the first class over the image.
        activation_text: Caption of `activation`.
        gates: Gates over the image, each with a caption. Empty for a model without SPA.
        gates_text: Caption of all `gates`.
        pyramid: Table of the pyramid weights, as HTML.
    """
    classes: Dict[str, float]
    activation: Image.Image
    activation_text: str
    gates: List[Tuple[Image.Image, str]]
    gates_text: str
    pyramid: str


def look(model: torch.nn.Module, image: Union[str, Path]) -> Results:
    """Computes the results that the page shows for one image and one model.

    Args:
        model: A timm CNN in eval mode.
        image: Image file.

    Raises:
        ImageError: The image cannot be read.
        ExplainError: The model is not a CNN.
    """
    pixels = image_reader(model)(image)
    x, seen = pixels.unsqueeze(0), image_seen(model, pixels)
    names = class_names(model)
    counts = collections.Counter(c['name'] for c in names)  # ImageNet has two classes 'crane', and two 'maillot'
    classes = {
        f'{c["name"]} (class {c["index"]})' if counts[c['name']] > 1 else str(c['name']): c['probability']
        for c in likeliest_classes(model, pixels, names, TOP)}
    activation = _overlay(seen, cam(model, x).maps[0], 'inferno', (0, 1), smooth=True)
    text = f'Brighter: more evidence for **{_as_text(next(iter(classes)))}**.'
    try:
        weights = scale_weights(model)
    except ExplainError:
        return Results(classes, activation, text, [], NO_GATES, f'<p>{NO_GATES}</p>')
    blocks = list(weights)
    shown = [blocks[i * (len(blocks) - 1) // (BLOCKS - 1)] for i in range(BLOCKS)] if len(blocks) > BLOCKS else blocks
    panels, limits = gate_panels({name: gate for name, (gate,) in gate_maps(model, x, shown).items()})
    gates = [
        (_overlay(seen, cells, 'PuOr', limits), f'{name}, {title}')
        for name, titled in panels.items() for title, cells in titled.items()]
    gates_text = (
        f'Values from {limits[0]:.3f} (orange) to {limits[1]:.3f} (violet), in all panels. 1/2, the value of a neutral '
        'gate, has no colour. For each block: the mean over the channels, and the channel that varies most.')
    return Results(classes, activation, text, gates, gates_text, _table(weights))


def _as_text(name: str) -> str:
    """Escapes the Markdown of a class name."""
    return re.sub(r'([\\`*_{}\[\]<>()#+.!|~$&-])', r'\\\1', name)


def _overlay(
        image: Image.Image,
        cells: torch.Tensor,
        colours: str,
        limits: Tuple[float, float],
        smooth: bool = False,
) -> Image.Image:
    """Returns a grey image with a tensor (H, W) over it, in a colour map of matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise ExplainError('Drawing needs matplotlib: pip install matplotlib.') from e
    size = (SIDE, max(1, SIDE * image.height // image.width))
    grey = image.convert('L').resize(size, Image.Resampling.NEAREST if max(image.size) < SIDE // 2 else None)
    values = ((cells - limits[0]) / (limits[1] - limits[0])).clamp(0, 1)[None, None].float()
    if smooth:
        values = F.interpolate(values, size[::-1], mode='bilinear', align_corners=False)
    else:
        values = F.interpolate(values, size[::-1], mode='nearest')
    drawn = Image.fromarray(matplotlib.colormaps[colours](values[0, 0].numpy(), bytes=True)[..., :3])
    return Image.blend(grey.convert('RGB'), drawn, 0.6)


def _captioned(panels: Sequence[Tuple[Image.Image, str]]) -> Any:
    """Returns images with captions as HTML: pairs, as many in a row as fit."""
    figures = []
    for image, caption in panels:
        file = io.BytesIO()
        image.save(file, 'jpeg', quality=90)
        figures.append(
            '<figure style="flex: 1; max-width: 200px; margin: 0">'
            f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}" alt="" '
            f'style="width: 100%"><figcaption>{html.escape(caption)}</figcaption></figure>')
    pairs = [
        f'<div style="display: flex; gap: 12px">{"".join(figures[i:i + 2])}</div>' for i in range(0, len(figures), 2)]
    style = 'display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 12px'
    return f'<div style="{style}">{"".join(pairs)}</div>'


def _table(weights: Mapping[str, ScaleWeights]) -> str:
    """Returns the pyramid weights by block as an HTML table; the colour is the distance from 1."""
    sizes = next(iter(weights.values())).sizes
    reach = max(max(abs(abs(w) - 1) for w in scales.weights) for scales in weights.values()) or 1.
    rows = [''.join(f'<th>{text}</th>' for text in ('block', *(f'{size}x{size}' for size in sizes)))]
    for block, scales in weights.items():
        cells = ''.join(
            f'<td style="padding: 3px 12px; background: rgba({"94, 60, 153" if abs(w) > 1 else "230, 97, 1"}, '
            f'{0.6 * abs(abs(w) - 1) / reach:.2f})">{w:.3f}</td>' for w in scales.weights)
        rows.append(f'<td style="padding: 3px 12px">{html.escape(block)}</td>{cells}')
    return (
        '<p>Weight of each average in the gates of a block. Training starts from 1. Violet: above 1, orange: below.</p>'
        f'<table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table>')


def build(models: Sequence[str] = SHIPPED) -> Any:
    """Builds the page.

    Args:
        models: Names of the models to offer. The first one is selected.

    Returns:
        `gradio.Blocks`.

    Raises:
        ExplainError: Gradio is not installed, or `models` is empty.
    """
    models = (models,) if isinstance(models, str) else tuple(models)
    if not models:
        raise ExplainError('The page cannot be built without a model. Give at least one name.')
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        import gradio as gr
    except ImportError as e:
        raise ExplainError('The page needs Gradio: pip install "timm_spa[app]".') from e
    loaded = functools.lru_cache(maxsize=4)(load_model)

    def show(image: Optional[Dict[str, Any]], *names: str) -> List[Any]:
        cells: List[Any] = []
        for name in names:
            if image is None or name not in models:
                cells += [None] * (len(Results._fields) + len(TABS))
                continue
            try:
                results = look(loaded(name), image['path'])
                cells += [*results._replace(gates=_captioned(results.gates)), *[f'### {_as_text(name)}'] * len(TABS)]
            except ImageError as e:
                file = image.get('orig_name') or Path(image['path']).name
                raise gr.Error(f'{file} cannot be read as an image. Choose another file.', print_exception=False) from e
            except TimmSpaError as e:
                raise gr.Error(str(e), print_exception=False) from e
        return [*cells, *[gr.update(visible=names[1] in models)] * len(TABS)]

    with gr.Blocks(title=f'timm_spa: {TITLE}', analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f'# {TITLE}\n{ABOUT}')
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(
                    type='filepath', sources=['upload', 'clipboard'], label='image', height=260, elem_id='input_image')
                first = gr.Dropdown(list(models), value=models[0], label='model', elem_id='first')
                second = gr.Dropdown(
                    [NOTHING, *models], value=NOTHING, label='compare with', elem_id='second')
                gr.Examples(
                    [[str(path)] for path in sample_images()], [image],
                    label='photographs of scikit-image')
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                cells: Dict[Tuple[int, str], Any] = {}
                columns: List[Any] = []
                for tab in TABS:
                    with gr.Tab(tab, id=tab), gr.Row():
                        for number in (1, 2):
                            with gr.Column(visible=number == 1, min_width=300) as column:
                                cells[number, tab] = gr.Markdown()
                                cells.update(_panels(gr, tab, number))
                            if number == 2:
                                columns.append(column)
        with gr.Accordion('What these results do not show', open=False):
            gr.Markdown(LIMITS)
        outputs = [cells[number, name] for number in (1, 2) for name in (*Results._fields, *TABS)]
        for changed in (image, first, second):
            # `preprocess=False` skips Gradio's own reading of the image, whose errors do not help users
            changed.change(
                show, [image, first, second], [*outputs, *columns], preprocess=False, show_progress='minimal',
                trigger_mode='always_last')
    return page


def _panels(gr: Any, tab: str, number: int) -> Dict[Tuple[int, str], Any]:
    """Creates the components of a tab for the first or second model, by field of `Results`."""
    if tab == TABS[0]:
        with gr.Row():
            classes = gr.Label(
                num_top_classes=TOP, label='likeliest classes', elem_id=f'classes{number}', min_width=260)
            with gr.Column(min_width=260):
                activation = gr.Image(
                    label='class activation', interactive=False, buttons=['download', 'fullscreen'], height=300,
                    elem_id=f'activation{number}')
                text = gr.Markdown()
        return {(number, 'classes'): classes, (number, 'activation'): activation, (number, 'activation_text'): text}
    if tab == TABS[1]:
        text = gr.Markdown()
        return {(number, 'gates_text'): text, (number, 'gates'): gr.HTML(elem_id=f'gates{number}')}
    return {(number, 'pyramid'): gr.HTML(elem_id=f'pyramid{number}')}


def serve(models: Sequence[str] = SHIPPED, host: str = '127.0.0.1', port: Optional[int] = None) -> None:
    """Serves the page until the process is stopped.

    Uploaded images are stored in a temporary folder, which is removed at the end.

    Args:
        models: Names of the models to offer. The first one is selected.
        host: Address to listen on, e.g. '0.0.0.0' for all addresses of the machine.
        port: Port; None for the first free port from 7860.

    Raises:
        ExplainError: Gradio is not installed, or the port is in use.
    """
    if port is not None and not 0 < port < 65536:
        raise ExplainError(f'The port must be a number from 1 to 65535, got {port}.')
    _check_address(host, port)
    with tempfile.TemporaryDirectory(prefix='timm_spa_app') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        page = build(models)
        import gradio as gr

        fonts = ['system-ui', 'sans-serif']  # no fonts from other servers
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                page.launch(
                    server_name=host, server_port=port, share=False, max_file_size=LARGEST_FILE, footer_links=[],
                    theme=gr.themes.Default(font=fonts, font_mono=['monospace']), show_error=True)
        except OSError as e:
            raise ExplainError(
                f'The page cannot be served at {host}: no port from 7860 to 7959 can be used. Free one of them, or '
                'choose another with --port.') from e


def _check_address(host: str, port: Optional[int]) -> None:
    """Raises ExplainError if the address cannot be used. Gradio's own error names options that we do not have."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            cause = 'another program uses this port. Choose another --port, or leave it out for the first free one'
        else:
            cause = f'{e.strerror or e}. Choose another --host or --port'
        named = f'{host}, port {port}' if port else host
        raise ExplainError(f'The page cannot be served at {named}: {cause}.') from e
