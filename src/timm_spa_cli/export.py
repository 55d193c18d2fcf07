"""`timm-spa export`: a model as a file for another runtime."""
import argparse
from pathlib import Path
from typing import Any, Optional

from timm_spa_cli._options import MODEL, add_checkpoint_options, add_split_option, load_named, measured_folder, positive

HELP = 'write a model for ONNX Runtime, OpenVINO, LiteRT and other runtimes, and compare it with PyTorch'
EXAMPLES = ('timm-spa export spa_tf_efficientnet_lite0.grocery81 grocery.onnx --dynamic batch',)

FORMATS = {
    'onnx': '.onnx', 'torch-export': '.pt2', 'aoti': '.pt2', 'openvino': '.xml', 'litert': '.tflite', 'ncnn': '.param',
    'executorch': '.pte', 'coreml': '.mlpackage'}  # repeated here so that help does not wait for torch


def add_arguments(parser: Any) -> None:
    """Adds the arguments of the verb."""
    parser.intermixed = True
    parser.add_argument('model', nargs='?', metavar='MODEL', help=MODEL)
    parser.add_argument('--model', dest='named', metavar='MODEL', help='another way to name MODEL')
    parser.add_argument(
        'output', metavar='OUT',
        help='*.onnx, *.pt2 (torch-export, aoti), *.xml (openvino), *.tflite (litert), *.param (ncnn), '
             '*.pte (executorch) or *.mlpackage (coreml)')
    parser.add_argument(
        '--to', choices=FORMATS, help='format (default: the one of the suffix; .pt2 files need --to)')
    add_checkpoint_options(parser)
    parser.add_argument(
        '--dynamic', choices=('batch', 'size'),
        help='dynamic axes: batch, or batch, height and width (default: fixed shape)')
    parser.add_argument('--built', action='store_true', help='write the form for training instead of the fused form')
    parser.add_argument(
        '--half', action='store_true', help='float16, with float32 input and output; onnx, openvino, coreml')
    parser.add_argument('--int8', action='store_true', help='quantize, calibrated on --images; onnx, openvino')
    parser.add_argument('--images', metavar='DIR', help='image folder to measure the accuracy of the file on')
    add_split_option(parser)
    parser.add_argument(
        '--batch-size', type=positive, default=1, metavar='N',
        help='batch size of the file unless it is dynamic, and images per batch of --images (default: %(default)s)')
    parser.add_argument(
        '--img-size', type=positive, metavar='N', help='height and width (default: the size of the model)')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')


def _format(output: str) -> Optional[str]:
    """Returns the format of a file name, None if the suffix does not determine it."""
    formats = [name for name, suffix in FORMATS.items() if suffix == Path(output).suffix]
    return formats[0] if len(formats) == 1 else None


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    args.to = args.to or _format(args.output)
    if args.to is None:
        args.error(
            f'{args.output}: the suffix does not determine the format. Add --to torch-export or --to aoti for .pt2, or '
            f'use one of {", ".join(sorted(set(FORMATS.values())))}')
    if args.model and args.named:
        args.error(f'two models: {args.model} and --model {args.named}. Name one')
    model = load_named(args, args.model or args.named, fuse=False)
    from timm_spa.export import export

    report = export(
        model, args.output, args.to, args.dynamic, not args.built, args.half, args.int8, args.images, args.split,
        args.batch_size, args.img_size, args.overwrite)
    print(f'Wrote {report.path}: {"built" if args.built else "fused"}, {report.dtype}, {report.size / 1e6:.1f} MB.')
    if report.difference is None:
        print(f'Not compared with PyTorch: files for {args.to} cannot be run here.')
    else:
        shapes = ', '.join('x'.join(map(str, shape)) for shape in report.shapes)
        print(f'Largest difference from PyTorch at {shapes}: {report.difference:.2g} of the largest output.')
    if report.size_before is not None:
        print(
            f'Before quantization (float32): {report.size_before / 1e6:.1f} MB, top-1 {report.accuracy_before:.2f} %.')
    if report.accuracy is not None:
        print(f'Top-1 {report.accuracy:.2f} % on {report.pictures} images of {measured_folder(args)}.')
    if report.default_dtype:
        accuracy = '' if report.default_accuracy is None else f', top-1 {report.default_accuracy:.2f} %'
        print(
            f'{args.to} computes in {report.default_dtype} on this processor by default: largest difference '
            f'{report.default_difference:.2g}{accuracy}. The figures above need the options of the runtime in '
            f'{report.path.name}.json.')
    for note in report.notes:
        print(note)
    return 0
