"""Measures the milliseconds per image of shipped weights in several runtimes.

    python tests/benchmarks/runtimes.py FOLDER --rounds 15     # FOLDER has files of `timm-spa export`

The batch size is one, on a CPU. A round measures each runtime once. Ratios are computed within a round.
"""
import argparse
import statistics
import time
from pathlib import Path
from typing import Callable, Dict

import timm
import torch

import timm_spa  # noqa: F401
from timm_spa.environment import environment
from timm_spa.export.exporter import FORMATS
from timm_spa.predict import for_inference

MODEL = 'spa_tf_efficientnet_lite0.grocery81'
CALLS = 20  # per measurement


def main() -> None:
    """Measures all runtimes and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--rounds', type=int, default=15)
    args = parser.parse_args()
    x = torch.randn(1, 3, 224, 224)
    built = timm.create_model(MODEL, pretrained=True).eval()
    runs: Dict[str, Callable] = {
        'PyTorch, as built': built,
        'PyTorch, fused, channels_last': for_inference(timm.create_model(MODEL, pretrained=True)),
        'PyTorch, fused, compiled': torch.compile(for_inference(timm.create_model(MODEL, pretrained=True)))}
    for path in sorted(args.folder.glob('*')):
        kind = next((name for name, f in FORMATS.items() if f.suffix == path.suffix and path.suffix != '.pt2'), None)
        if kind:
            runs[path.name] = FORMATS[kind].run(path)
    seconds: Dict[str, list] = {name: [] for name in runs}
    with torch.inference_mode():
        for name in runs:
            for _ in range(5):
                runs[name](x)
        for _ in range(args.rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    run(x)
                seconds[name].append((time.perf_counter() - start) / CALLS)
    base = next(iter(seconds.values()))
    print('| | ms per image | speed | (quartiles) |\n|---|---|---|---|')
    for name, values in seconds.items():
        ratios = [b / v for b, v in zip(base, values, strict=True)]
        first, middle, third = statistics.quantiles(ratios, method='inclusive')
        print(f'| {name} | {1000 * statistics.median(values):.1f} | {middle:.2f} | ({first:.2f}-{third:.2f}) |')
    about = environment(('timm_spa', 'timm', 'torch', 'onnxruntime', 'openvino'), 'cpu')
    versions = ', '.join(f'{name} {version}' for name, version in about['versions'].items())
    print(f'\n{about["hardware"]}; Python {about["python"]}, {versions}')


if __name__ == '__main__':
    main()
