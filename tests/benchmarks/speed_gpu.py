"""Measures speed on a GPU as `timm-spa bench` does, with all models in one process.

    python tests/benchmarks/speed_gpu.py RECORDS --seconds 180     # measure
    python tests/benchmarks/speed_gpu.py RECORDS --table           # print the tables

On a GPU, each process of `timm-spa bench` would select its kernels again for minutes, and the processes would share the
memory. This script measures all models in turn in one process. A round measures each model once, and its ratios refer
to the base in the same round. No table starts after `--seconds`. Tables that exist in RECORDS are not measured again.
"""
import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import straightforward  # noqa: F401  registers the models that follow the equations literally
import timm  # noqa: F401
import torch

import timm_spa  # noqa: F401
from timm_spa.benchmark_worker import Settings, Workload
from timm_spa.environment import environment

R, M, C = 'resnet50', 'mobilenetv2_100', 'mobilenetv2_cifar'
FUSED = ' fused'
NHWC: Dict[str, Any] = dict(device='cuda', dtype='bfloat16', channels_last=True)
NCHW = dict(NHWC, channels_last=False)
TRAIN = dict(NHWC, mode='train', amp=True)
# the most important tables first; the first model of each table is the base
TABLES: Dict[str, Any] = {
    'infer-eager-nhwc-resnet50': (dict(NHWC, batch_size=256), [
        R, 'seresnet50', 'spa_resnet50', 'spa_b_resnet50', 'spa_c_resnet50', 'straightforward_spa_resnet50', R + FUSED,
        'seresnet50' + FUSED, 'spa_resnet50' + FUSED, 'spa_b_resnet50' + FUSED, 'spa_c_resnet50' + FUSED]),
    'train-eager-nhwc-resnet50': (dict(TRAIN, batch_size=256), [
        R, 'seresnet50', 'spa_resnet50', 'spa_b_resnet50', 'spa_c_resnet50', 'straightforward_spa_resnet50']),
    'train-eager-nhwc-cifar': (dict(TRAIN, batch_size=256), [C, 'se_' + C, 'spa_' + C, 'preresnet18_cifar']),
    'infer-compiled-nhwc-resnet50': (dict(NHWC, batch_size=256, compile='inductor'), [
        R, 'seresnet50', 'spa_resnet50', R + FUSED, 'spa_resnet50' + FUSED]),
    'infer-eager-nhwc-mobilenetv2': (dict(NHWC, batch_size=512), [
        M, 'se_mobilenetv2', 'spa_mobilenetv2', 'straightforward_spa_mobilenetv2', M + FUSED, 'se_mobilenetv2' + FUSED,
        'spa_mobilenetv2' + FUSED]),
    'infer-eager-nchw-resnet50': (dict(NCHW, batch_size=256), [
        R, 'seresnet50', 'spa_resnet50', 'straightforward_spa_resnet50', R + FUSED, 'seresnet50' + FUSED,
        'spa_resnet50' + FUSED]),
    'train-eager-nhwc-mobilenetv2': (dict(TRAIN, batch_size=256), [M, 'se_mobilenetv2', 'spa_mobilenetv2']),
    'train-compiled-nhwc-resnet50': (
        dict(TRAIN, batch_size=256, compile='inductor'), [R, 'seresnet50', 'spa_resnet50']),
}


def measure(settings: Dict[str, Any], models: List[str], rounds: int) -> Dict[str, Any]:
    """Measures models in turn; returns images per second in each round, and the memory of a step."""
    works = {}
    for name in models:
        model_settings = Settings(**settings, reparam=name.endswith(FUSED), warmup=3, min_seconds=0.12)
        works[name] = Workload(name.removesuffix(FUSED), model_settings)
        works[name].warm_up()
    for work in works.values():
        work._graphs = work._compiled()[0]  # the compiler counts graphs per process, not per model
    results: Dict[str, Any] = {name: dict(images_per_second=[]) for name in models}
    for _ in range(rounds):
        for name, work in works.items():
            timing = work.measure()
            results[name]['images_per_second'].append(
                settings['batch_size'] * timing['steps'] / timing['seconds'])
    for name, work in works.items():
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work.measure()
        results[name]['step_memory'] = torch.cuda.max_memory_allocated() - allocated
    return results


def table(folder: Path) -> List[str]:
    """Returns the tables of the records in a folder as lines of Markdown."""
    lines: List[str] = []
    for name in TABLES:
        path = folder / f'{name}.json'
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        base = next(iter(record['models'].values()))['images_per_second']
        lines += ['', f'{name}, batch {record["settings"]["batch_size"]}, {record["rounds"]} rounds', '',
                  '| | img/s | ratio | (quartiles) | memory of a step (MiB) |', '|---|---|---|---|---|']
        for model, result in record['models'].items():
            speeds = result['images_per_second']
            first, middle, third = statistics.quantiles(
                [s / b for s, b in zip(speeds, base, strict=True)], method='inclusive')
            lines.append(
                f'| `{model}` | {statistics.median(speeds):.0f} | {middle:.3f} | ({first:.3f}-{third:.3f}) '
                f'| {result["step_memory"] / 2 ** 20:.0f} |')
        about = record['environment']
        lines += ['', f'{about["hardware"]}; Python {about["python"]}, ' + ', '.join(
            f'{k} {v}' for k, v in about['versions'].items())]
    return lines


def main() -> None:
    """Measures all tables without a file and prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('records', type=Path)
    parser.add_argument('--seconds', type=float, default=600., help='do not start a table after this time')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--only', nargs='+', choices=TABLES, default=list(TABLES))
    parser.add_argument('--table', action='store_true', help='only print the tables')
    args = parser.parse_args()
    args.records.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    torch.backends.cudnn.benchmark = True
    for name in [] if args.table else args.only:
        path = args.records / f'{name}.json'
        if path.exists() or time.monotonic() - started > args.seconds:
            continue
        settings, models = TABLES[name]
        try:
            results = measure(settings, models, args.rounds)
        except Exception as e:  # continue with the other tables
            print(f'{name}: {type(e).__name__}: {e}', file=sys.stderr, flush=True)
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        path.write_text(json.dumps(dict(
            settings=settings, rounds=args.rounds, models=results,
            environment=environment(('timm_spa', 'timm', 'torch'), settings['device']))) + '\n')
        print(f'{name}: {time.monotonic() - started:.0f} s', file=sys.stderr, flush=True)
    print('\n'.join(table(args.records)))


if __name__ == '__main__':
    main()
