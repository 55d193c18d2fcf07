"""Speed of exported networks with SPA and SE, relative to the plain network in the same runtime.

    python tests/benchmarks/deploy.py FOLDER --weights tf_efficientnet_lite0=FILE    # 5 minutes on an idle machine

The networks are exported to FOLDER in the fused form, at a batch size of 1 and 224x224 pixels. Existing files are used
again. Norm layers have random statistics, or those of a file of weights of the plain network. Each file is measured in
a process of its own, in turn; a round measures each file once. FOLDER/deploy.json holds the milliseconds of all rounds.
"""
import argparse
import datetime
import json
from pathlib import Path
from typing import Any, Dict, Optional

import onnx
import timm
import torch
import torch.nn as nn
from runtime_worker import RUNTIMES, Worker, measure_rounds, speed
from timm.models import load_state_dict

import timm_spa  # noqa: F401
from timm_spa.environment import environment
from timm_spa.export import export

NETWORKS = {
    'resnet50': {'plain': 'resnet50', 'SE': 'seresnet50', 'SPA': 'spa_resnet50'},
    'tf_efficientnet_lite0': {
        'plain': 'tf_efficientnet_lite0', 'SE': 'se_tf_efficientnet_lite0', 'SPA': 'spa_tf_efficientnet_lite0'}}
FORMATS = {'onnxruntime': ('.onnx', 'onnx'), 'openvino': ('.xml', 'openvino'), 'openvino-float32': ('.xml', 'openvino')}


def network(name: str, weights: Optional[str]) -> nn.Module:
    """Returns a network whose norm layers do something, with the weights of the plain network if a file is given."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.8, 1.2)
                module.weight.uniform_(0.4, 0.8)  # ResNets initialize some with zeros
                module.bias.uniform_(-0.1, 0.1)
    if weights:
        different = model.load_state_dict(load_state_dict(weights), strict=False)
        assert not different.unexpected_keys
        assert all('attn' in key or '.se.' in key for key in different.missing_keys), different.missing_keys
    return model


def exported(folder: Path, name: str, runtime: str, weights: Optional[str]) -> Path:
    """Returns the file of a network, and writes it first if it is missing."""
    suffix, to = FORMATS[runtime]
    path = folder / f'{name}{suffix}'
    if not path.exists():
        report = export(network(name, weights), path, to, img_size=224)
        print(f'{path}: difference from PyTorch {report.difference:.2g}')
    return path


def main() -> None:
    """Measures all networks, and writes the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--rounds', type=int, default=25)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--backbones', nargs='+', choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument('--runtimes', nargs='+', choices=FORMATS, default=list(FORMATS))
    parser.add_argument('--weights', nargs='+', metavar='BACKBONE=FILE', default=[])
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    weights = dict(pair.split('=', 1) for pair in args.weights)
    files = {
        (backbone, kind, runtime): exported(args.folder, name, runtime, weights.get(backbone))
        for backbone in args.backbones for kind, name in NETWORKS[backbone].items()
        for runtime in RUNTIMES if runtime in args.runtimes}
    workers = {}
    try:
        for (backbone, kind, runtime), path in files.items():
            workers[backbone, kind, runtime] = Worker(runtime, str(path), args.threads, (1, 3, 224, 224))
        seconds = measure_rounds(workers, args.rounds)
    finally:
        for worker in workers.values():
            worker.close()
    torch.set_num_threads(args.threads)  # for the description of the hardware
    rows: Dict[str, Any] = {}
    print('| runtime, backbone | network | nodes | ms | speed | quartiles |\n|---|---|---|---|---|---|')
    for (backbone, kind, runtime), values in seconds.items():
        path = files[backbone, kind, runtime]
        nodes = len(onnx.load(path).graph.node) if path.suffix == '.onnx' else None
        first, middle, third = speed(values, seconds[backbone, 'plain', runtime])
        name = NETWORKS[backbone][kind]
        rows[f'{runtime} {name}'] = dict(
            nodes=nodes, speed=round(middle, 4), quartiles=[round(first, 4), round(third, 4)],
            milliseconds=[round(1000 * value, 4) for value in values])
        milliseconds = 1000 * sorted(values)[len(values) // 2]
        print(
            f'| {runtime}, {backbone} | {kind} | {nodes or ""} | {milliseconds:.2f} | {middle:.3f} '
            f'| {first:.3f} to {third:.3f} |')
    about = environment(('timm_spa', 'timm', 'torch', 'onnxruntime', 'openvino'), 'cpu')
    print('\n' + json.dumps(about))
    record = dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'), environment=about,
        threads=args.threads, rounds=args.rounds, shape=[1, 3, 224, 224],
        weights={backbone: 'file' if backbone in weights else 'random' for backbone in args.backbones}, rows=rows)
    (args.folder / 'deploy.json').write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    main()
