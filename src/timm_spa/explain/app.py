"""Page of `timm-spa app` and of the Hub's Space, which explains the predictions for an image. Needs Gradio."""
import collections
import errno
import functools
import os
import socket
import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from PIL import Image

from .._errors import TimmSpaError
from .._shipped import shipped_photographs
from ..predict import ImageError, class_names, image_reader, image_seen, likeliest_classes, load_model
from . import figures
from .attention import ExplainError, gate_maps, scale_weights
from .class_activation import cam

__all__ = ['SHIPPED', 'build', 'look', 'serve']

SHIPPED = ('spa_tf_efficientnet_lite0.grocery81', 'spa_mobilenetv2_cifar.tmm_tin200')
NOTHING = 'no second model'
LARGEST_FILE = '20mb'
TOP = 5
BLOCKS = 4  # blocks in the figure of gates, evenly spaced over the model
TITLE = 'Spatial Pyramid Attention: class activation maps and gates'
ABOUT = """
Choose an image, or one of the photographs below. The page shows the likeliest classes, the parts of the image that
raise the score of the first class (Grad-CAM), the gates of four blocks, and the pyramid weights. A model multiplies its
feature maps by the gates.

A class activation map shows which parts of an image raise a score. It does not prove how the model reasons. A gate acts
on single channels, and the mean over channels hides them. A model knows only the classes that it was trained on.
"""

Figure = Optional[Image.Image]


def look(model: torch.nn.Module, image: Union[str, Path]) -> Tuple[Dict[str, float], Figure, Figure, Figure]:
    """Computes the classes and figures that the page shows for one image and one model.

    Args:
        model: A timm CNN in eval mode.
        image: Image file.

    Returns:
        The likeliest classes with their probabilities, and figures of the class activation map, the gates and the
        pyramid weights. The last two are None for a model without SPA.

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
    activation = figures.as_image(figures.draw_cams({'': [(seen, cam(model, x).maps[0], next(iter(classes)))]}))
    try:
        weights = scale_weights(model)
    except ExplainError:
        return classes, activation, None, None
    blocks = list(weights)
    shown = [blocks[i * (len(blocks) - 1) // (BLOCKS - 1)] for i in range(BLOCKS)] if len(blocks) > BLOCKS else blocks
    gates = {name: gate[0] for name, gate in gate_maps(model, x, shown).items()}
    drawn_gates = figures.as_image(figures.draw_gates(seen, gates, columns=2))  # two columns fit a phone
    pyramid = figures.as_image(figures.draw_scales({'pyramid weights': weights}))
    return classes, activation, drawn_gates, pyramid


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
                cells += [None] * 4
                continue
            try:
                cells += look(loaded(name), image['path'])
            except ImageError as e:
                file = image.get('orig_name') or Path(image['path']).name
                raise gr.Error(f'{file} cannot be read as an image. Choose another file.', print_exception=False) from e
            except TimmSpaError as e:
                raise gr.Error(str(e), print_exception=False) from e
        return [*cells, gr.update(visible=names[1] in models)]

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f'# {TITLE}\n{ABOUT}')
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    type='filepath', sources=['upload', 'clipboard'], label='image', height=300, elem_id='input_image')
                gr.Examples(
                    [[str(path)] for path in shipped_photographs()], [image],
                    label='test photographs of the Grocery Store dataset')
            with gr.Column():
                first = gr.Dropdown(list(models), value=models[0], label='model', elem_id='first')
                second = gr.Dropdown(
                    [NOTHING, *models], value=NOTHING, label='side by side with', elem_id='second')
        cells: List[Any] = []
        with gr.Row():
            for number in (1, 2):
                with gr.Column(visible=number == 1) as column:
                    cells.append(gr.Label(num_top_classes=TOP, label='likeliest classes', elem_id=f'classes{number}'))
                    for label in ('class activation', 'gates', 'pyramid'):
                        cells.append(gr.Image(
                            label=label, show_label=False, interactive=False, buttons=['download', 'fullscreen'],
                            elem_id=f'{label.split()[-1]}{number}'))
        for changed in (image, first, second):
            # `preprocess=False` skips Gradio's own reading of the image, whose errors do not help users
            changed.change(
                show, [image, first, second], [*cells, column], preprocess=False, show_progress='minimal',
                trigger_mode='always_last')
    return page


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
