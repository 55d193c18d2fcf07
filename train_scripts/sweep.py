"""Trains several models with several seeds and one recipe, and stores the results of each run.

Every run is `accelerate launch ... -m timm_spa.run train` with the arguments after `--`, and its own --model, --seed,
--output and --experiment. The results of a finished run are stored in RESULTS/<model>-seed<seed>/: `summary.csv` and
`args.yaml` as written by timm, and `run.json` with the command, hardware, versions and duration. A second call skips
finished runs, resumes interrupted ones from their last checkpoint, and starts the others.

    python train_scripts/sweep.py --models preresnet18_cifar spa_preresnet18_cifar --seeds 42 43 44 --parallel 4 \
        --launch train_scripts/accelerate/gpu1.yaml --runs runs --results train_scripts/results/tin200 -- \
        --config train_scripts/recipes/tmm_small_image.yaml --num-classes 200 \
        --data-dir TIN200_40 --val-split validation
"""
import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from timm_spa.checkpoints.files import replacing

PACKAGES = ('timm_spa', 'timm', 'torch', 'torchvision', 'accelerate')
RESULT_FILES = ('summary.csv', 'args.yaml', 'run.json')
OWN_OPTIONS = ('--model', '--seed', '--output', '--experiment', '--resume')


def split_options(model: str) -> Tuple[List[str], List[str]]:
    """Splits e.g. 'gated base=resnet18 --lr 0.1' into the model's words and train.py's options for this model."""
    words = shlex.split(model)
    first = next((i for i, word in enumerate(words) if word.startswith('--')), len(words))
    return words[:first], words[first:]


def run_name(words: List[str], options: List[str], seed: int) -> str:
    """Returns the folder name of a run, e.g. 'gated-base=resnet18-lr=0.1-seed42'."""
    named = re.sub(r' (?!--)', '=', ' '.join(options)).replace('--', '').split()
    return '-'.join([*words, *named, f'seed{seed}'])


def train(model: str, seed: int, args: argparse.Namespace, about: Dict[str, Any]) -> Optional[str]:
    """Trains one model with one seed, or resumes from its last checkpoint.

    Returns:
        An error message, or None on success.
    """
    words, options = split_options(model)
    model, *kwargs = words
    name = run_name(words, options, seed)
    results = args.results / name
    if (results / 'run.json').exists():
        print(f'{name}: already done', flush=True)
        return None
    existing = [results / file for file in RESULT_FILES if (results / file).exists()]
    if existing:
        return f'{name}: {existing[0]} exists without a run.json, so it is not from sweep.py. Move it to another folder'
    run = args.runs / name
    run.mkdir(parents=True, exist_ok=True)
    command = [
        'accelerate', 'launch', '--config_file', str(args.launch), '-m', 'timm_spa.run', 'train', *args.arguments,
        '--model', model, '--seed', str(seed), '--output', str(args.runs), '--experiment', name]
    if kwargs:
        command += ['--model-kwargs', *kwargs]
    command += options
    checkpoint = run / 'last.pth.tar'
    resumed = checkpoint.exists()
    if resumed:
        command += ['--resume', str(checkpoint)]
    print(f'{name}: {"resuming" if resumed else "starting"}', flush=True)
    started = time.time()
    with open(run / 'log.txt', 'a') as log:
        # the launcher of this interpreter, not the first one in PATH
        code = subprocess.run(
            [sys.executable, '-m', 'accelerate.commands.launch', *command[2:]], stdout=log, stderr=log).returncode
    if code or not (run / 'summary.csv').exists():
        return f'{name}: exit code {code}, see {run / "log.txt"}'
    record = dict(
        model=model, seed=seed, command=shlex.join(command), resumed=resumed, seconds=round(time.time() - started),
        **about)
    # `timm-spa publish` reads it next to the checkpoint
    with replacing(run / 'run.json') as partial:
        partial.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
    with replacing(results) as partial:
        partial.mkdir(parents=True)
        for file in RESULT_FILES:
            shutil.copy(run / file, partial)
    print(f'{name}: done in {record["seconds"]} s', flush=True)
    return None


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns its exit code: 1 if any run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        '--models', nargs='+', required=True,
        help="model names; quote a name with its arguments and train.py's options: 'gated base=resnet18 --lr 0.02'")
    parser.add_argument('--seeds', nargs='+', type=int, default=[42], help='default: 42')
    parser.add_argument('--parallel', type=int, default=1, help='runs at a time (default: %(default)s)')
    parser.add_argument('--launch', type=Path, required=True, help='configuration file of accelerate')
    parser.add_argument('--runs', type=Path, required=True, help='folder for checkpoints and logs')
    parser.add_argument('--results', type=Path, required=True, help='folder for the results')
    parser.add_argument('arguments', nargs='*', metavar='-- ARGUMENT', help="arguments of timm's train.py")
    args = parser.parse_args(argv)

    given = [*args.arguments, *(option for model in args.models for option in split_options(model)[1])]
    own = [a for a in given if a.partition('=')[0] in OWN_OPTIONS]
    if own:
        parser.error(f'{", ".join(own)} is set for each run. Give --models and --seeds before the "--".')
    if args.parallel < 1:
        parser.error(f'--parallel must be at least 1, got {args.parallel}.')
    if not args.launch.is_file():
        parser.error(f'--launch {args.launch} not found. Give a configuration file of accelerate.')
    import timm_spa  # noqa: F401  registers the models
    from timm_spa.benchmark_worker import parse_model
    from timm_spa.environment import environment

    for model in args.models:
        try:
            parse_model(shlex.join(split_options(model)[0]))
        except ValueError as e:
            parser.error(str(e))
    about = environment(PACKAGES)
    jobs = [(model, seed) for seed in args.seeds for model in args.models]
    with ThreadPoolExecutor(args.parallel) as pool:
        errors = [e for e in pool.map(lambda job: train(job[0], job[1], args, about), jobs) if e]
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == '__main__':
    sys.exit(main())
