"""The kinds of files that `export` writes: how each is written and run, and its quantization."""
import contextlib
import dataclasses
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
import torch.nn as nn

from .._errors import TimmSpaError
from ..predict import labelled_batches

__all__ = ['AXES', 'FORMATS', 'INPUT', 'ExportError', 'Format', 'Runner', 'add_metadata', 'padded', 'quantize', 'told']

INPUT, OUTPUT = 'image', 'logits'
AXES = {None: {}, 'batch': {0: 'batch'}, 'size': {0: 'batch', 2: 'height', 3: 'width'}}  # dynamic axes
CALIBRATION_PICTURES = 128

Runner = Callable[[torch.Tensor], torch.Tensor]


class ExportError(TimmSpaError, RuntimeError):
    """A model could not be exported, or its file computes something else; the message says which."""


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Turns whatever an exporter or a runtime raises into an error for the reader."""
    try:
        yield
    except OSError:  # the file system's
        raise
    except Exception as e:
        lines = str(e).strip().splitlines() or ['']
        raise ExportError(f'{what}: {type(e).__name__}: {lines[0]}') from e


def padded(x: torch.Tensor, fixed: Optional[int]) -> torch.Tensor:
    """Fills a batch (N, C, H, W) up to the one that a file takes."""
    if fixed is None or len(x) == fixed:
        return x
    return torch.cat([x, x[:1].expand(fixed - len(x), *x.shape[1:])])


def _write_onnx(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    names = {INPUT: axes, OUTPUT: {i: axis for i, axis in axes.items() if i == 0}}
    with warnings.catch_warnings():
        # The older exporter. Both are right at every batch and size (spa_resnet18, spa_mobilenetv2_050,
        # spa_densenet_cifar, resnet18: 3e-7 to 1e-6), but the newer one took 13, 30, 156 and 6 seconds for these nets,
        # this one 1.1, 1.2, 5.1 and 0.4; and the newer one writes stack traces with the paths of this machine.
        warnings.simplefilter('ignore')
        torch.onnx.export(
            model, (example,), str(path), dynamo=False, input_names=[INPUT], output_names=[OUTPUT], dynamic_axes=names)
        if half:
            import onnx
            from onnxruntime.transformers.float16 import convert_float_to_float16

            # the exporter itself would write a model in float16 with its weights in float32
            onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


def _run_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])


def _exported_program(model: nn.Module, example: torch.Tensor, axes: Dict[int, str]) -> torch.export.ExportedProgram:
    dynamic = ({i: torch.export.Dim.DYNAMIC for i in axes},) if axes else None
    program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # has the paths of this machine
    return program


def _write_torch_export(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    torch.export.save(_exported_program(model, example, axes), path)


def _write_aoti(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    torch._inductor.aoti_compile_and_package(_exported_program(model, example, axes), package_path=str(path))


def _write_openvino(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        # by way of ONNX: reading an exported program takes 5 to 13 seconds, reading this less than one
        onnx_path = Path(folder, 'model.onnx')
        _write_onnx(model, onnx_path, example, axes, half=False)
        openvino.save_model(openvino.Core().read_model(onnx_path), path, compress_to_fp16=half)


def _run_openvino(path: Path) -> Runner:
    import openvino

    # the plug-in for CPUs chooses bfloat16 by itself where the processor has it
    compiled = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file: how it ends, what it needs, how it is written and run, and what else it can be in."""
    suffix: str
    extra: str
    packages: Tuple[str, ...]
    write: Callable[[nn.Module, Path, torch.Tensor, Dict[int, str], bool], None]
    run: Callable[[Path], Runner]
    dtypes: Tuple[str, ...] = ('float32',)
    beside: Tuple[str, ...] = ()


FORMATS = {
    'onnx': Format('.onnx', 'export', ('onnx', 'onnxruntime'), _write_onnx, _run_onnx, ('float32', 'float16', 'int8')),
    'torch-export': Format('.pt2', '', (), _write_torch_export, lambda path: torch.export.load(path).module()),
    'aoti': Format('.pt2', '', (), _write_aoti, lambda path: torch._inductor.aoti_load_package(str(path))),
    'openvino': Format(
        '.xml', 'openvino', ('onnx', 'openvino'), _write_openvino, _run_openvino, ('float32', 'float16'), ('.bin',)),
}


def quantize(model: Any, path: Path, images: Any, split: str, fixed: Optional[int]) -> str:
    """Replaces an ONNX file by a quantized one, and says what it was calibrated on."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    train = 'train' if split != 'train' and Path(images, 'train').is_dir() else split
    dataset: Any = labelled_batches(model, images, train, 1)[0].dataset
    count = min(CALIBRATION_PICTURES, len(dataset))
    chosen = iter(range(count))

    class Pictures(CalibrationDataReader):
        def get_next(self) -> Optional[Dict[str, Any]]:
            i = next(chosen, None)
            if i is None:
                return None
            # folders come one after another: equal steps meet all classes
            pixels = torch.as_tensor(dataset[i * len(dataset) // count][0]).unsqueeze(0)
            return {INPUT: padded(pixels, fixed).numpy()}

    quantized = path.with_name('quantized.onnx')
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises a preprocessing that fused models do not need
    try:
        with told('ONNX Runtime cannot quantize it'):
            # MatMul is left: the averages of the pyramid are products with constant matrices, the classifier is a Gemm
            quantize_static(
                path, quantized, Pictures(), per_channel=True,
                op_types_to_quantize=['Conv', 'Gemm', 'Add', 'Mul', 'Relu', 'Clip', 'MaxPool', 'GlobalAveragePool'])
    finally:
        logger.setLevel(level)
    quantized.replace(path)
    where = 'the pictures that accuracy is measured on, as there are no others' if train == split else f'{train!r}'
    return f'Calibrated on {count} pictures of {where}.'


def add_metadata(path: Path, about: Dict[str, Any]) -> None:
    """Adds a description, as JSON under 'timm_spa', to the metadata of an ONNX file."""
    import onnx

    loaded = onnx.load(path)
    onnx.helper.set_model_props(loaded, {'timm_spa': json.dumps(about)})
    onnx.save(loaded, path)
