"""Accuracy and speed of the shipped weights in several runtimes and precisions.

    python tests/benchmarks/runtimes.py FOLDER --images GROCERY     # writes the files to FOLDER, measures the accuracy
    python tests/benchmarks/runtimes.py FOLDER --rounds 25          # measures the speed of the files

The accuracy is measured on the subfolder `test`, and int8 files are calibrated on the subfolder `train`. Rows that
FOLDER/accuracy.json has already are not measured again. Each file is timed in a process of its own, with a batch size
of one; a round measures each file once. FOLDER/speed.json holds the milliseconds of all rounds.
"""
import argparse
import datetime
import json
from pathlib import Path
from typing import Any, Dict, Tuple

import torch
from runtime_worker import Worker, measure_rounds, speed

from timm_spa.checkpoints.files import replacing
from timm_spa.environment import environment
from timm_spa.export import export
from timm_spa.export.check import top1
from timm_spa.predict import labelled_batches, load_model

MODEL = 'spa_tf_efficientnet_lite0.grocery81'
BATCH_SIZE = 32
ROWS: Dict[str, Tuple[str, str]] = {
    'PyTorch, as built': ('pytorch', f'{MODEL} built'),
    'PyTorch, fused, channels_last': ('pytorch', f'{MODEL} fused'),
    'PyTorch, fused, compiled': ('pytorch', f'{MODEL} compiled'),
    'ONNX Runtime, float32': ('onnxruntime', 'float32.onnx'),
    'ONNX Runtime, float16': ('onnxruntime', 'float16.onnx'),
    'ONNX Runtime, int8': ('onnxruntime', 'int8.onnx'),
    'OpenVINO, float32': ('openvino-float32', 'float32.xml'),
    'OpenVINO, default precision': ('openvino', 'float32.xml'),
    'OpenVINO, int8': ('openvino', 'int8.xml')}
EXPORTS: Dict[str, Dict[str, Any]] = {
    'float32.onnx': dict(to='onnx'), 'int8.onnx': dict(to='onnx', int8=True), 'float32.xml': dict(to='openvino'),
    'int8.xml': dict(to='openvino', int8=True), 'float16.onnx': dict(to='onnx', half=True)}


def measure_accuracy(folder: Path, images: Path) -> None:
    """Writes the files, and adds the missing rows to accuracy.json."""
    record = folder / 'accuracy.json'
    rows: Dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}

    def add(name: str, accuracy: float, **more: Any) -> None:
        rows[name] = dict(top1=round(accuracy, 2), **more)
        print(name, rows[name], flush=True)
        with replacing(record) as partial:
            partial.write_text(json.dumps(rows, indent=1) + '\n')

    if 'PyTorch' not in rows:
        model = load_model(MODEL)
        batches, count = labelled_batches(model, images, 'test', BATCH_SIZE)
        with torch.inference_mode():
            add('PyTorch', top1(model, batches, None), images=count)
    for file, options in EXPORTS.items():
        if file in rows:
            continue
        report = export(
            load_model(MODEL, fuse=False), folder / file, dynamic='batch', images=images, batch_size=BATCH_SIZE,
            overwrite=True, **options)
        more: Dict[str, Any] = dict(
            megabytes=round(report.size / 1e6, 1), difference=report.difference, images=report.pictures,
            notes=report.notes)
        if report.default_accuracy is not None:
            more['at_default'] = dict(
                dtype=report.default_dtype, top1=round(report.default_accuracy, 2),
                difference=report.default_difference)
        add(file, report.accuracy or 0., **more)


def measure_speed(folder: Path, rounds: int, threads: int) -> None:
    """Measures all rows, writes speed.json, and prints the table."""
    accuracy = json.loads((folder / 'accuracy.json').read_text())
    workers: Dict[str, Worker] = {}
    try:
        for name, (runtime, path) in ROWS.items():
            path = path if runtime == 'pytorch' else str(folder / path)
            workers[name] = Worker(runtime, path, threads, (1, 3, 224, 224))
        seconds = measure_rounds(workers, rounds)
    finally:
        for worker in workers.values():
            worker.close()
    torch.set_num_threads(threads)  # for the description of the hardware
    about = environment(('timm_spa', 'timm', 'torch', 'onnxruntime', 'openvino', 'nncf'), 'cpu')
    record = dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'), environment=about,
        threads=threads, rounds=rounds, accuracy=accuracy,
        milliseconds={name: [round(1000 * value, 4) for value in values] for name, values in seconds.items()})
    (folder / 'speed.json').write_text(json.dumps(record, indent=1) + '\n')
    print('| | file (MB) | top-1 (%) | ms per image | speed (quartiles) |\n|---|---|---|---|---|')
    for name, values in seconds.items():
        runtime, path = ROWS[name]
        row = accuracy['PyTorch' if runtime == 'pytorch' else path]
        top = row.get('at_default', row)['top1'] if runtime == 'openvino' else row['top1']
        first, middle, third = speed(values, seconds['PyTorch, as built'])
        milliseconds = 1000 * sorted(values)[len(values) // 2]
        print(
            f'| {name} | {row.get("megabytes", "")} | {top:.2f} | {milliseconds:.1f} '
            f'| {middle:.2f} ({first:.2f}-{third:.2f}) |')
    print('\n' + json.dumps(about))


def main() -> None:
    """Measures accuracy if images are given, else speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--images', type=Path)
    parser.add_argument('--rounds', type=int, default=25)
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    if args.images:
        measure_accuracy(args.folder, args.images)
    else:
        measure_speed(args.folder, args.rounds, args.threads)


if __name__ == '__main__':
    main()
