"""Files of a model for other runtimes: ONNX, torch.export, AOTInductor, OpenVINO; each is run and compared."""
import copy
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.utils import reparameterize_model
from tqdm import tqdm

from .. import __version__
from .._errors import UsageError
from .._shipped import shipped_photographs
from ..checkpoints.files import replacing
from ..predict import class_names, data_config, labelled_batches, picture_reader
from ..predict.classes import check_classifier
from .formats import AXES, FORMATS, INPUT, ExportError, Runner, add_metadata, padded, quantize, told

__all__ = ['FORMATS', 'ExportError', 'ExportReport', 'export']

LIMITS = {'float32': 1e-4, 'float16': 1e-2, 'int8': float('inf')}  # of the difference, relative to the largest output


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it can be trusted.

    Attributes:
        path: The file that a runtime opens.
        size: Size of what the runtime needs, in bytes; for OpenVINO that of both files.
        dtype: What the file computes in: 'float32', 'float16' or 'int8'. OpenVINO's 'float16' is how it stores weights.
        difference: Largest difference from the model in PyTorch and float32, relative to the largest output.
        shapes: Shapes (N, C, H, W) of the inputs that were compared.
        accuracy: Top-1 of the file on all pictures, in percent, if there were any.
        pictures: Number of these pictures.
        accuracy_before: Top-1 of the float32 ONNX file that was quantized.
        size_before: Size of that file in bytes.
        notes: Remarks for the reader, a line each.
    """
    path: Path
    size: int
    dtype: str
    difference: float
    shapes: List[Tuple[int, ...]]
    accuracy: Optional[float] = None
    pictures: int = 0
    accuracy_before: Optional[float] = None
    size_before: Optional[int] = None
    notes: List[str] = dataclasses.field(default_factory=list)


def export(
        model: nn.Module,
        path: Union[str, Path],
        to: str = 'onnx',
        dynamic: Optional[str] = None,
        fuse: bool = True,
        half: bool = False,
        int8: bool = False,
        images: Optional[Union[str, Path]] = None,
        split: str = 'test',
        batch_size: int = 1,
        img_size: Optional[int] = None,
        overwrite: bool = False,
) -> ExportReport:
    """Writes a model for another runtime, runs the file there, and compares it with PyTorch on three inputs or more.

    Beside the file, one of the same name with '.json' behind it has labels, preprocessing and versions. An ONNX file
    has them in its metadata as well, under 'timm_spa'. A package of AOTInductor is compiled for this machine, whose
    paths it names.

    Args:
        model: CNN of timm; it is not changed.
        path: File to write, with the suffix .onnx, .pt2 for torch.export and AOTInductor, or .xml for OpenVINO.
        to: Kind of file, a key of `FORMATS`.
        dynamic: What may vary: None for nothing, 'batch', or 'size' for batch, height and width.
        fuse: Write the fused form (timm's `reparameterize_model`), else the one that is trained.
        half: Weights and arithmetic in float16, input and output in float32; for OpenVINO the weights only.
        int8: Static quantization by ONNX Runtime: 8 bits for weights (by channel) and maps. Needs `images`.
        images: Image folder to measure the top-1 accuracy on, through the runtime.
        split: Subfolder of it to measure on. Quantization is calibrated on its folder 'train', if there is one.
        batch_size: Batch of the file if it is fixed; pictures at a time when accuracy is measured.
        img_size: Height and width in pixels; the model's own if None.
        overwrite: Replace files that are there.

    Returns:
        What was written, and how far it is from PyTorch.

    Raises:
        ExportError: A package is missing, the model is made with `features_only`, the exporter cannot take the model,
            the file differs from PyTorch by more than 1e-4 of the largest output (1e-2 in float16, any for int8), or
            it is there already.
        PictureError: `images` cannot be read, or is of other classes.
        UsageError: An argument is none of those that are known, or does not go with another.
        WriteError: The file cannot be written. Nothing is left there after any error.
    """
    path = Path(path)
    dtype = _checked_dtype(path, to, dynamic, half, int8, images, batch_size, img_size)
    described = f'{path.name}.json'
    names = (path.name, *(path.with_suffix(suffix).name for suffix in FORMATS[to].beside), described)
    for target in map(path.with_name, names):
        if target.exists() and not overwrite:
            raise ExportError(f'{target} is there already; --overwrite replaces it.')
    check_classifier(model, ExportError)
    _import_packages(to)
    net: Any = copy.deepcopy(model).cpu().float().eval()
    config = data_config(net)
    channels = getattr(net, 'in_chans', config['input_size'][0])
    size = (channels, *((img_size, img_size) if img_size else config['input_size'][1:]))
    # picture readers take the size from pretrained_cfg
    net.pretrained_cfg = dict(net.pretrained_cfg, input_size=size)
    about = _describe(net, to, dtype, dynamic, fuse, batch_size)
    # exporters derive the names of further files from the first one's, which has its final name in this folder
    with replacing(path.absolute().parent) as folder, torch.no_grad():
        folder.mkdir()
        report = _write_and_check(net, folder / path.name, to, dtype, about, dynamic, fuse, images, split, batch_size)
        (folder / described).write_text(json.dumps(about, indent=1) + '\n', encoding='utf-8')
        for other in {p.name for p in folder.iterdir()} - set(names):
            (folder / other).unlink()
    return dataclasses.replace(report, path=path)


def _checked_dtype(
        path: Path,
        to: str,
        dynamic: Optional[str],
        half: bool,
        int8: bool,
        images: Optional[Union[str, Path]],
        batch_size: int,
        img_size: Optional[int],
) -> str:
    """Returns what the file will compute in, or says which arguments do not go together."""
    if to not in FORMATS:
        raise UsageError(f'The format must be one of {", ".join(FORMATS)}, got {to!r}.')
    if dynamic not in AXES:
        raise UsageError(f"dynamic must be 'batch', 'size' or None, got {dynamic!r}.")
    if path.suffix != FORMATS[to].suffix:
        raise UsageError(f'A file of {to} should end in {FORMATS[to].suffix}, and is {path}.')
    if not _is_count(batch_size) or not (img_size is None or _is_count(img_size)):
        raise UsageError(
            f'batch_size and img_size must be whole numbers of at least 1, got batch_size={batch_size!r}, '
            f'img_size={img_size!r}.')
    if half and int8:
        raise UsageError('--half and --int8 are two ways to make a file smaller: give one of them.')
    dtype = 'int8' if int8 else 'float16' if half else 'float32'
    if dtype not in FORMATS[to].dtypes:
        able = [name for name, known in FORMATS.items() if dtype in known.dtypes]
        raise UsageError(f'{dtype} is written for {" and ".join(able)} only, and not for {to}.')
    if int8 and images is None:
        raise UsageError('--int8 needs --images: pictures to calibrate the quantization and to measure its accuracy.')
    return dtype


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _import_packages(to: str) -> None:
    for package in FORMATS[to].packages:
        try:
            importlib.import_module(package)
        except ImportError as e:
            raise ExportError(f'{to} needs {package}: pip install "timm_spa[{FORMATS[to].extra}]".') from e


def _describe(
        model: Any,
        to: str,
        dtype: str,
        dynamic: Optional[str],
        fused: bool,
        batch_size: int,
) -> Dict[str, Any]:
    """Returns what a user of the file has to know, as JSON has it; nothing in it is of this machine."""
    config, cfg, classes = data_config(model), model.pretrained_cfg, class_names(model)
    shape = [batch_size, *config['input_size']]
    return dict(
        model='.'.join(filter(None, [cfg.get('architecture') or type(model).__name__, cfg.get('tag')])),
        format=to, form='fused' if fused else 'built', dtype=dtype,
        inputs={INPUT: [AXES[dynamic].get(i, length) for i, length in enumerate(shape)]},
        **{key: config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
        label_names=[entry['label'] or entry['name'] for entry in classes],
        class_names=[entry['name'] for entry in classes],
        versions=dict(timm_spa=__version__, timm=timm.__version__, torch=torch.__version__))


def _write_and_check(
        model: Any,
        path: Path,
        to: str,
        dtype: str,
        about: Dict[str, Any],
        dynamic: Optional[str],
        fuse: bool,
        images: Optional[Union[str, Path]],
        split: str,
        batch_size: int,
) -> ExportReport:
    """Writes the file to a folder, and compares and measures it there."""
    fixed = None if dynamic else batch_size
    form = reparameterize_model(model) if fuse else model
    example = torch.zeros(2 if dynamic else batch_size, *about['input_size'])  # torch.export takes 1 as a constant
    pictures: Any = labelled_batches(model, images, split, batch_size) if images is not None else None
    before: Dict[str, Any] = {}
    with told(f'{about["model"]} cannot be exported to {to}'):
        FORMATS[to].write(form, path, example, AXES[dynamic], dtype == 'float16')
    if dtype == 'int8':
        before = dict(accuracy_before=_accuracy(FORMATS[to].run(path), pictures[0], fixed),
                      size_before=path.stat().st_size)
        note = quantize(model, path, images, split, fixed)
        before['notes'] = [note]
    if to == 'onnx':
        add_metadata(path, about)
    with told(f'The file of {about["model"]} cannot be run'):
        run = FORMATS[to].run(path)
    shapes, differences = [], []
    for x in _inputs(model, dynamic, batch_size):
        with told(f'{about["model"]} cannot compute an input of {tuple(x.shape)}'):
            expected = model(x)
        with told(f'The file of {about["model"]} cannot compute an input of {tuple(x.shape)}'):
            differences.append(((run(x) - expected).abs().max() / expected.abs().max()).item())
        shapes.append(tuple(x.shape))
        if not differences[-1] <= LIMITS[dtype]:  # nor is it for NaN
            raise ExportError(
                f'The file of {about["model"]} differs from PyTorch by {differences[-1]:.2g} of the largest output at '
                f'{shapes[-1]}, where {dtype} allows {LIMITS[dtype]:g}. It was not kept.')
    size = sum(path.with_suffix(suffix).stat().st_size for suffix in (path.suffix, *FORMATS[to].beside))
    return ExportReport(
        path, size, dtype, max(differences), shapes, _accuracy(run, pictures[0], fixed) if pictures else None,
        pictures[1] if pictures else 0, **before)


def _inputs(model: Any, dynamic: Optional[str], batch_size: int) -> Iterator[torch.Tensor]:
    """Yields inputs to compare on: random ones, and the shipped photographs at the model's own size."""
    config = data_config(model)
    channels, height, width = config['input_size']
    batches = (2, 1, 3) if dynamic else (batch_size,) * 3
    sizes = [(height, width)] * 3
    if dynamic == 'size':  # larger ones, as some nets take none smaller, whose maps the pyramid does not divide
        sizes[1:] = (height + 21, width + 5), (height + 10, width + 32)
    mean, std = (torch.tensor(config[key]).mean() for key in ('mean', 'std'))
    for i, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
        if i > 0 or dynamic != 'size':
            pixels = torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(i))
            yield (pixels - mean) / std
    if channels in (1, 3):
        read = picture_reader(model)
        photographs = shipped_photographs()
        chosen = [photographs[i % len(photographs)] for i in range(batches[0])]
        yield torch.stack([read(photograph) for photograph in chosen])


def _accuracy(run: Runner, batches: Iterable[Tuple[torch.Tensor, torch.Tensor]], fixed: Optional[int]) -> float:
    """Returns the share of right answers in percent."""
    right = seen = 0
    for pixels, target in tqdm(batches, 'accuracy', leave=False, disable=None):  # None: on terminals only
        answers = run(padded(pixels, fixed))[:len(pixels)].argmax(1)
        right, seen = right + int((answers == target).sum()), seen + len(target)
    return 100 * right / seen
