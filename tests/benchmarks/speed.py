"""Creates the tables of speed.md: all common modes, measured as by `timm-spa bench`.

    python tests/benchmarks/speed.py FOLDER --device cpu --threads 2       # about an hour per run
    python tests/benchmarks/speed.py FOLDER --modes '*eager*'              # some of the modes
    python tests/benchmarks/speed.py FOLDER --table                        # print the tables of the files in FOLDER

The speed of a process depends by some percent on its memory layout. Each mode is therefore measured in several runs
with new processes, and the tables use the rounds of all runs. Each run of a mode writes a JSON file to FOLDER; existing
files are not measured again. `--train` measures training steps instead of inference.
"""
import argparse
import fnmatch
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List

from timm_spa import benchmark
from timm_spa.checkpoints.files import replacing

MODELS = {
    'resnet50': [
        'resnet50', 'seresnet50', 'spa_resnet50', 'spa_b_resnet50', 'spa_c_resnet50', 'straightforward_spa_resnet50'],
    'mobilenetv2_100': ['mobilenetv2_100', 'se_mobilenetv2', 'spa_mobilenetv2', 'straightforward_spa_mobilenetv2'],
}
BATCH = {
    ('cpu', 'resnet50'): 8, ('cpu', 'mobilenetv2_100'): 32, ('cuda', 'resnet50'): 256, ('cuda', 'mobilenetv2_100'): 512}
# all models of a mode share the memory of one device, and a backward pass needs more memory
CUDA_TRAIN_SHARE = 4


def modes(device: str, train: bool) -> Dict[str, Dict[str, Any]]:
    """Returns the settings of each mode by the name of its file."""
    settings: Dict[str, Dict[str, Any]] = {}
    kind = 'train' if train else 'infer'
    for compiler, channels_last, reparam in itertools.product((None, 'inductor'), (True, False), (False, True)):
        if (reparam and train) or (device != 'cpu' and not channels_last):
            continue
        form = 'fused' if reparam else 'built'
        name = f'{device}-{kind}-{"compiled" if compiler else "eager"}-{"nhwc" if channels_last else "nchw"}-{form}'
        settings[name] = dict(
            mode=kind, compile=compiler, channels_last=channels_last, reparam=reparam, device=device,
            dtype='float32' if device == 'cpu' else 'bfloat16', amp=device == 'cuda' and train)
    return settings


def markdown(folder: Path) -> List[str]:
    """Returns tables with a row per model and a column per mode: ratios to the unfused base, quartiles in brackets."""
    records: Dict[str, List[Dict[str, Any]]] = {}
    for path in sorted(folder.glob('*.json')):
        records.setdefault(path.name.partition('.')[0], []).append(json.loads(path.read_text()))
    lines: List[str] = []
    for base, models in MODELS.items():
        columns = {name[:-len(base) - 1]: runs for name, runs in records.items() if runs[0]['base'] == base}
        if not columns:
            continue
        titles = [name.replace('-', ' ').replace('cpu infer ', '') for name in columns]
        lines += ['', '| | ' + ' | '.join(titles) + ' |']
        lines.append('|---|' + '---|' * len(columns))
        for model in models:
            cells = []
            for runs in columns.values():
                ratios = [
                    r.get('ratio_as_built', r['ratio']) for run in runs for entry in run['models']
                    if entry['model'] == model for r in entry['rounds']]
                first, middle, third = statistics.quantiles(ratios, method='inclusive') if ratios else (0, 0, 0)
                cells.append(f'{middle:.2f} ({first:.2f}-{third:.2f})' if ratios else '')
            lines.append(f'| `{model}` | ' + ' | '.join(cells) + ' |')
    counts = sorted({len(entry['rounds']) * len(runs) for runs in records.values() for entry in runs[0]['models']})
    about = {
        line.replace(run['date'], run['date'][:len('2026-01-01')])
        for runs in records.values() for run in runs for line in benchmark.notes(run)[2:]}
    rounds = f'Medians and quartiles of {" or ".join(map(str, counts))} rounds.'
    return [*lines, '', *(f'- {line}' for line in (rounds, *sorted(about)))]


def main() -> None:
    """Measures all modes without a file and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--threads', type=int)
    parser.add_argument('--runs', type=int, default=3)
    parser.add_argument('--rounds', type=int, default=21)
    parser.add_argument('--min-seconds', type=float, default=0.3)
    parser.add_argument('--train', action='store_true')
    parser.add_argument('--modes', default='*', help='pattern of mode names')
    parser.add_argument('--table', action='store_true', help='only print the tables')
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    selected = {} if args.table else modes(args.device, args.train)
    for run, (name, mode), (base, models) in itertools.product(
            range(1, args.runs + 1), selected.items(), MODELS.items()):
        path = args.folder / f'{name}-{base}.{run}.json'
        if path.exists() or not fnmatch.fnmatch(path.stem, args.modes):
            continue
        print(f'{name}, {base}, run {run}', file=sys.stderr, flush=True)
        batch_size = BATCH[args.device, base]
        if args.device == 'cuda' and args.train:
            batch_size //= CUDA_TRAIN_SHARE
        # the straightforward form cannot be fused
        models = [m for m in models if not (mode['reparam'] and m.startswith('straightforward'))]
        if mode['compile']:
            models = models[:3]  # compiling takes minutes
        settings = benchmark.Settings(
            **mode, batch_size=batch_size, threads=args.threads, rounds=args.rounds,
            min_seconds=args.min_seconds, imports=('straightforward',))
        record = benchmark.measure(models, settings, command=' '.join(sys.argv))
        with replacing(path) as partial:
            partial.write_text(json.dumps(record, indent=2) + '\n')
    print('\n'.join(markdown(args.folder)))


if __name__ == '__main__':
    main()
