"""Export of a model to a file for another runtime, with a comparison."""
import copy
import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.utils import reparameterize_model

from .. import __version__
from .._errors import UsageError
from ..checkpoints.files import replacing
from ..predict import class_names, data_config, default_split, labelled_batches
from ..predict.classes import check_classifier
from .aoti import FORMAT as AOTI
from .calibration import CalibrationImages
from .check import compare, top1
from .coreml import FORMAT as COREML
from .executorch import FORMAT as EXECUTORCH
from .format import AXES, INPUT, OUTPUT, ExportError, as_export_error
from .litert import FORMAT as LITERT
from .ncnn import FORMAT as NCNN
from .onnx import FORMAT as ONNX
from .onnx import add_metadata
from .openvino import FORMAT as OPENVINO
from .static_padding import with_static_padding
from .torch_export import FORMAT as TORCH_EXPORT

__all__ = ['FORMATS', 'ExportReport', 'export']

FORMATS = {
    'onnx': ONNX, 'torch-export': TORCH_EXPORT, 'aoti': AOTI, 'openvino': OPENVINO, 'litert': LITERT, 'ncnn': NCNN,
    'executorch': EXECUTORCH, 'coreml': COREML}


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Attributes:
        path: The file that a runtime opens.
        size: Size in bytes of all files that the runtime needs; OpenVINO needs two.
        dtype: Type in which the file computes: 'float32', 'float16' or 'int8'. With OpenVINO, 'float16' applies to the
            stored weights only.
        difference: Largest difference from the model in PyTorch and float32, relative to the largest output; None for
            Core ML, whose files only run on macOS.
        shapes: Shapes (N, C, H, W) of the compared inputs.
        accuracy: Top-1 accuracy of the file in percent, if images were given.
        pictures: Number of images that the accuracy was measured on.
        accuracy_before: Top-1 accuracy of the float32 file before quantization.
        size_before: Size in bytes of the file before quantization.
        default_dtype: Type in which the runtime computes on this processor by default, if it is not the one that
            `difference` and `accuracy` hold for. OpenVINO computes in bfloat16 where the processor can.
        default_difference: Largest difference at `default_dtype`. No limit applies.
        default_accuracy: Top-1 accuracy at `default_dtype` in percent, if images were given.
        notes: Remarks for the user, one per line.
    """
    path: Path
    size: int
    dtype: str
    difference: Optional[float]
    shapes: List[Tuple[int, ...]]
    accuracy: Optional[float] = None
    pictures: int = 0
    accuracy_before: Optional[float] = None
    size_before: Optional[int] = None
    default_dtype: Optional[str] = None
    default_difference: Optional[float] = None
    default_accuracy: Optional[float] = None
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
        split: Optional[str] = None,
        batch_size: int = 1,
        img_size: Optional[int] = None,
        overwrite: bool = False,
) -> ExportReport:
    """Writes a model for another runtime, runs the file there, and compares it with PyTorch on at least three inputs.

    Core ML files are not compared: they only run on macOS.

    A second file, named like the first with '.json' appended, holds labels, preprocessing and versions. An ONNX file
    also holds them in its metadata under 'timm_spa'. A package of AOTInductor is compiled for this machine and
    contains its paths.

    Args:
        model: CNN of timm. It is not changed.
        path: File to write, with the suffix .onnx, .pt2 for torch.export and AOTInductor, .xml for OpenVINO, .tflite
            for LiteRT, .param for ncnn, .pte for ExecuTorch, or .mlpackage for Core ML.
        to: Format: 'onnx', 'torch-export', 'aoti', 'openvino', 'litert', 'ncnn', 'executorch' or 'coreml'.
        dynamic: Dynamic axes: None for a fixed shape, 'batch', or 'size' for batch, height and width. The last four
            formats need a fixed shape.
        fuse: Export the fused form (timm's `reparameterize_model`) instead of the form for training.
        half: Compute in float16, with float32 input and output. With OpenVINO, only the weights are stored in float16.
        int8: Static quantization to 8 bits, of weights (per channel) and feature maps, by ONNX Runtime or by NNCF for
            OpenVINO. Needs `images`.
        images: Image folder. The top-1 accuracy of the file is measured on it.
        split: Subfolder to measure the accuracy on; None for `timm_spa.predict.default_split`. Quantization is
            calibrated on the subfolder 'train' if it exists.
        batch_size: Batch size of the file if it is fixed, and images per batch when the accuracy is measured.
        img_size: Height and width in pixels; None for the size of the model.
        overwrite: Replace existing files.

    Returns:
        A report about the file and its difference from PyTorch.

    Raises:
        ExportError: A package is missing, the model is not a classifier of timm, the exporter fails, the file differs
            from PyTorch by more than 1e-4 of the largest output (1e-2 in float16, unlimited for int8), or the file
            exists.
        ImageError: `images` cannot be read, or has other classes.
        UsageError: An argument is invalid, or two arguments exclude each other.
        WriteError: The file cannot be written. No file is left behind after any error.
    """
    path = Path(path)
    split = split or (default_split(images) if images else '')
    dtype = _checked_dtype(path, to, dynamic, half, int8, images, batch_size, img_size)
    description_name = f'{path.name}.json'
    names = (path.name, *(path.with_suffix(suffix).name for suffix in FORMATS[to].companions), description_name)
    for target in map(path.with_name, names):
        if target.is_dir():
            raise ExportError(f'{target} cannot be written: the folder exists already. Remove it.')
        if target.exists() and not overwrite:
            raise ExportError(f'{target} cannot be written: the file exists already. Replace it with --overwrite.')
    check_classifier(model, ExportError)
    _import_packages(to, int8)
    copied: Any = copy.deepcopy(model).cpu().float().eval()
    config = data_config(copied)
    channels = getattr(copied, 'in_chans', config['input_size'][0])
    size = (channels, *((img_size, img_size) if img_size else config['input_size'][1:]))
    # image readers take the size from pretrained_cfg
    copied.pretrained_cfg = dict(copied.pretrained_cfg, input_size=size)
    description = _describe(copied, to, dtype, dynamic, fuse, batch_size)
    # exporters derive names of further files from the first name, so the file gets its final name in a temporary folder
    with replacing(path.absolute().parent) as folder, torch.no_grad():
        folder.mkdir()
        report = _write_and_check(copied, folder / path.name, description, dynamic, fuse, images, split, batch_size)
        (folder / description_name).write_text(json.dumps(description, indent=1) + '\n', encoding='utf-8')
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
    """Checks the arguments, and returns the type in which the file will compute."""
    if to not in FORMATS:
        raise UsageError(f'The format must be one of {", ".join(FORMATS)}, got {to!r}.')
    if dynamic not in AXES:
        raise UsageError(f"dynamic must be 'batch', 'size' or None, got {dynamic!r}.")
    if dynamic not in FORMATS[to].dynamic:
        supporting = [name for name, known in FORMATS.items() if dynamic in known.dynamic]
        raise UsageError(
            f'{to} does not support dynamic={dynamic!r}: its files have a fixed shape. Use {" or ".join(supporting)}.')
    if path.suffix != FORMATS[to].suffix:
        raise UsageError(f'The name of a file for {to} must end in {FORMATS[to].suffix}, got {path}.')
    if not _is_count(batch_size) or not (img_size is None or _is_count(img_size)):
        raise UsageError(
            f'batch_size and img_size must be whole numbers of at least 1, got batch_size={batch_size!r}, '
            f'img_size={img_size!r}.')
    if half and int8:
        raise UsageError('--half and --int8 cannot be combined. Give one of them.')
    dtype = 'int8' if int8 else 'float16' if half else 'float32'
    if dtype not in FORMATS[to].dtypes:
        supporting = [name for name, known in FORMATS.items() if dtype in known.dtypes]
        raise UsageError(f'{to} does not support {dtype}. Use {" or ".join(supporting)}.')
    if FORMATS[to].run is None and images is not None:
        raise UsageError(f'The accuracy of a file for {to} cannot be measured here. Omit --images.')
    if int8 and images is None:
        raise UsageError('--int8 needs --images: a folder to calibrate the quantization and to measure its accuracy.')
    return dtype


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _import_packages(to: str, int8: bool) -> None:
    required = [(package, FORMATS[to].extra) for package in FORMATS[to].packages]
    if int8:
        os.environ.setdefault('NNCF_CI', '1')  # read when NNCF is imported: it would send usage data otherwise
        required += [(package, 'int8') for package in FORMATS[to].int8_packages]
    for package, extra in required:
        try:
            importlib.import_module(package)
        except ImportError as e:
            purpose = f'int8 for {to}' if extra == 'int8' else to
            raise ExportError(f'{purpose} needs {package}: pip install "timm_spa[{extra}]".') from e


def _describe(
        model: Any,
        to: str,
        dtype: str,
        dynamic: Optional[str],
        fused: bool,
        batch_size: int,
) -> Dict[str, Any]:
    """Returns a description of the file as JSON data, without local paths."""
    config, cfg, classes = data_config(model), model.pretrained_cfg, class_names(model)
    shape = [batch_size, *config['input_size']]
    return dict(
        model='.'.join(filter(None, [cfg.get('architecture') or type(model).__name__, cfg.get('tag')])),
        format=to, form='fused' if fused else 'built', dtype=dtype,
        inputs={INPUT: [AXES[dynamic].get(i, length) for i, length in enumerate(shape)]},
        input_layout='NCHW', color_order={1: 'L', 3: 'RGB'}.get(shape[1]), pixel_range=[0, 1], output=OUTPUT,
        **{key: config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
        runtime_options=FORMATS[to].options, label_names=[entry['label'] or entry['name'] for entry in classes],
        class_names=[entry['name'] for entry in classes],
        versions=dict(timm_spa=__version__, timm=timm.__version__, torch=torch.__version__))


def _write_and_check(
        model: Any,
        path: Path,
        description: Dict[str, Any],
        dynamic: Optional[str],
        fuse: bool,
        images: Optional[Union[str, Path]],
        split: str,
        batch_size: int,
) -> ExportReport:
    """Writes the file, compares it with PyTorch, and measures its accuracy."""
    name, to, dtype = (description[key] for key in ('model', 'format', 'dtype'))
    fixed = None if dynamic else batch_size
    form = reparameterize_model(model) if fuse else model
    # torch.export would treat a batch size of 1 as a constant
    example = torch.zeros(2 if dynamic else batch_size, *description['input_size'])
    batches: Any = None
    count = 0
    if images is not None:
        batches, count = labelled_batches(model, images, split, batch_size)
    start: Any = FORMATS[to].run
    before: Dict[str, Any] = {}
    with as_export_error(f'{name} cannot be exported to {to}'):
        if dynamic != 'size':
            form = with_static_padding(form, example)
        FORMATS[to].write(form, path, example, AXES[dynamic], dtype == 'float16')
    if dtype == 'int8':
        before = dict(accuracy_before=top1(start(path), batches, fixed), size_before=_size(path, to))
        assert images is not None  # checked with the other arguments
        calibration = CalibrationImages(model, images, split, fixed)
        quantized = path.with_name(f'{path.stem}-int8{path.suffix}')
        quantize: Any = FORMATS[to].quantize
        with as_export_error(f'The file of {name} for {to} cannot be quantized'):
            quantize(path, quantized, calibration)
        for suffix in (path.suffix, *FORMATS[to].companions):
            quantized.with_suffix(suffix).replace(path.with_suffix(suffix))
        before['notes'] = [calibration.note]
    if to == 'onnx':
        add_metadata(path, description)
    size = _size(path, to)
    if start is None:
        return ExportReport(path, size, dtype, None, [])
    with as_export_error(f'The exported file of {name} cannot be run'):
        run = start(path)
    difference, shapes = compare(model, run, name, dtype, dynamic, batch_size)
    accuracy = top1(run, batches, fixed) if batches is not None else None
    at_default = _measure_at_default(model, path, name, to, dynamic, batch_size, batches)
    return ExportReport(path, size, dtype, difference, shapes, accuracy, count, **before, **at_default)


def _size(path: Path, to: str) -> int:
    """Returns the size in bytes of a file, or of a folder, with its companions."""
    files = [path.with_suffix(suffix) for suffix in (path.suffix, *FORMATS[to].companions)]
    return sum(file.stat().st_size for root in files for file in (root, *root.rglob('*')) if file.is_file())


def _measure_at_default(
        model: Any,
        path: Path,
        name: str,
        to: str,
        dynamic: Optional[str],
        batch_size: int,
        batches: Any,
) -> Dict[str, Any]:
    """Returns the fields of a report about the default precision of the runtime, if it is not float32."""
    open_file = FORMATS[to].run_at_default
    if open_file is None:
        return {}
    with as_export_error(f'The exported file of {name} cannot be run'):
        dtype, run = open_file(path)
    if dtype == 'float32':
        return {}
    difference, _ = compare(model, run, name, None, dynamic, batch_size)
    accuracy = top1(run, batches, None if dynamic else batch_size) if batches is not None else None
    return dict(default_dtype=dtype, default_difference=difference, default_accuracy=accuracy)
