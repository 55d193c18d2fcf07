"""The page of `timm-spa app` and of the Hub's Space: drop a picture and see what a net makes of it. Needs Gradio."""
import collections
import functools
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from PIL import Image

from .._errors import TimmSpaError
from .._shipped import shipped_photographs
from ..predict import PictureError, class_names, likeliest_classes, load_model, picture_reader, picture_seen
from . import figures
from .attention import ExplainError, gate_maps, scale_weights
from .class_activation import cam

__all__ = ['AppError', 'SHIPPED', 'build', 'look', 'serve']

SHIPPED = ('spa_tf_efficientnet_lite0.grocery81', 'spa_mobilenetv2_cifar.tmm_tin200')
NOTHING = 'no second model'
LARGEST_FILE = '20mb'
TOP = 5
BLOCKS = 4  # of the gates' figure, evenly over the net
TITLE = 'What Spatial Pyramid Attention looks at'
ABOUT = """
Choose a picture, or one of the photographs below, and see the likeliest classes, which places speak for the first of
them (Grad-CAM), and the gates of four blocks: maps that the net multiplies its features with.

A class activation map shows which places raise a score; it is no proof of reasoning. A gate acts on channels, and a
mean over them hides what single ones do. The models know the classes they were trained on and no others.
"""


Figure = Optional[Image.Image]


class AppError(TimmSpaError, RuntimeError):
    """The page cannot be served; the message says why."""


def look(model: torch.nn.Module, picture: Union[str, Path]) -> Tuple[Dict[str, float], Figure, Figure, Figure]:
    """Computes what the page shows of one picture and one model.

    Args:
        model: A timm CNN in eval mode.
        picture: File of a picture.

    Returns:
        The likeliest classes with their probabilities, the picture under its class activation map, the gates and the
        weights of the pyramid. The last two are None for a net without SPA.

    Raises:
        PictureError: The picture cannot be read.
        ExplainError: The model is no CNN.
    """
    pixels = picture_reader(model)(picture)
    x, seen = pixels.unsqueeze(0), picture_seen(model, pixels)
    names = class_names(model)
    times = collections.Counter(c['name'] for c in names)  # ImageNet has two classes 'crane', and two 'maillot'
    classes = {
        f'{c["name"]} (class {c["index"]})' if times[c['name']] > 1 else str(c['name']): c['probability']
        for c in likeliest_classes(model, pixels, names, TOP)}
    found = cam(model, x)
    drawn = figures.as_image(figures.draw_cams({'': [(seen, found.maps[0], next(iter(classes)))]}))
    try:
        weights = scale_weights(model)
    except ExplainError:
        return classes, drawn, None, None
    blocks = list(weights)
    shown = [blocks[i * (len(blocks) - 1) // (BLOCKS - 1)] for i in range(BLOCKS)] if len(blocks) > BLOCKS else blocks
    gates = {name: gate[0] for name, gate in gate_maps(model, x, shown).items()}
    of_gates = figures.draw_gates(seen, gates, columns=2)  # for a telephone
    of_pyramid = figures.draw_scales({'weights of the pyramid': weights})
    return classes, drawn, figures.as_image(of_gates), figures.as_image(of_pyramid)


def build(models: Sequence[str] = SHIPPED) -> Any:
    """Builds the page.

    Args:
        models: Names that it offers, the first one chosen.

    Returns:
        `gradio.Blocks`.

    Raises:
        AppError: Gradio is not installed, or there is no model.
    """
    models = (models,) if isinstance(models, str) else tuple(models)
    if not models:
        raise AppError('The page needs a model to offer: give at least one name.')
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        import gradio as gr
    except ImportError as e:
        raise AppError('The page needs Gradio: pip install "timm_spa[app]".') from e
    loaded = functools.lru_cache(maxsize=4)(load_model)

    def show(picture: Optional[Dict[str, Any]], *names: str) -> List[Any]:
        cells: List[Any] = []
        for name in names:
            if picture is None or name not in models:
                cells += [None] * 4
                continue
            try:
                cells += look(loaded(name), picture['path'])
            except PictureError as e:
                file = picture.get('orig_name') or Path(picture['path']).name
                raise gr.Error(f'{file} is no picture that can be read.', print_exception=False) from e
            except TimmSpaError as e:
                raise gr.Error(str(e), print_exception=False) from e
        return [*cells, gr.update(visible=names[1] in models)]

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f'# {TITLE}\n{ABOUT}')
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    type='filepath', sources=['upload', 'clipboard'], label='picture', height=300, elem_id='picture')
                gr.Examples(
                    [[str(path)] for path in shipped_photographs()], [picture],
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
        for changed in (picture, first, second):
            # without Gradio's own reading of the picture, whose errors are no use to anybody
            changed.change(
                show, [picture, first, second], [*cells, column], preprocess=False, show_progress='minimal',
                trigger_mode='always_last')
    return page


def serve(models: Sequence[str] = SHIPPED, host: str = '127.0.0.1', port: Optional[int] = None) -> None:
    """Serves the page until the process is stopped. Pictures are kept in a temporary folder, which then is removed.

    Args:
        models: Names that it offers, the first one chosen.
        host: Address to listen on; '0.0.0.0' for every one of the machine.
        port: Port; the first free one from 7860 if None.

    Raises:
        AppError: Gradio is not installed, or the port is taken.
    """
    if port is not None and not 0 < port < 65536:
        raise AppError(f'The port must be a number from 1 to 65535, got {port}.')
    with tempfile.TemporaryDirectory(prefix='timm_spa_app') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        page = build(models)
        import gradio as gr

        fonts = ['system-ui', 'sans-serif']  # none that would be fetched from elsewhere
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                page.launch(
                    server_name=host, server_port=port, share=False, max_file_size=LARGEST_FILE, footer_links=[],
                    theme=gr.themes.Default(font=fonts, font_mono=['monospace']), show_error=True)
        except OSError as e:
            raise AppError(f'{host}, port {port or "7860 and those behind it"}: {e}') from e
