"""Fine-tunes one model with several gates under equal training, and compares them on held-out images.

    python train_scripts/compare.py --base tf_efficientnet_lite0 --gates none spa se eca coord --lr se=0.01 \
        --seeds 42 43 44 --launch train_scripts/accelerate/gpu1.yaml --runs runs --results results --split test -- \
        --config train_scripts/recipes/finetune_photos.yaml --data-dir DATA --val-split val --num-classes 81 \
        --pretrained-path tf_efficientnet_lite0.safetensors

Trains `gated` with each gate, and the plain model for `none`, by `sweep.py`. Evaluates the last epoch of each run on
the images of --split by `evaluate.py`, and prints the table of `results.py`: mean and standard deviation over seeds,
the standard error of an accuracy, and each run against the plain model of the same seed by McNemar's exact test. A
second call resumes interrupted runs and repeats only what is missing.

Choose a gate's learning rate (--lr) with the validation images, in a folder of results of its own, and evaluate the
test images once, at the end: without --split, nothing is evaluated.
"""
import argparse
import runpy
import shlex
import sys
from pathlib import Path
from typing import Dict, List, Optional

HERE = Path(__file__).parent


def run_script(name: str, arguments: List[str]) -> int:
    """Runs a script of this folder in this process and returns its exit code."""
    return int(runpy.run_path(str(HERE / f'{name}.py'))['main'](arguments))


def model_argument(base: str, gate: str, rates: Dict[str, str]) -> str:
    """Returns the model as sweep.py takes it, e.g. 'gated base=resnet18 gate=se --lr 0.02'."""
    words = [base] if gate == 'none' else ['gated', f'base={base}', f'gate={gate}']
    return shlex.join([*words, *(['--lr', rates[gate]] if gate in rates else [])])


def option_of(arguments: List[str], name: str) -> Optional[str]:
    """Returns the value of one of train.py's options."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument(f'--{name}', dest='value')
    value: Optional[str] = parser.parse_known_args(arguments)[0].value
    return value


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command line and returns its exit code: 1 if a run or its evaluation failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--base', required=True, help='plain model of timm')
    parser.add_argument('--gates', nargs='+', required=True, help="gates of add_attention; 'none' for the plain model")
    parser.add_argument('--lr', nargs='+', default=[], metavar='GATE=LR', help='learning rates of gates')
    parser.add_argument('--seeds', nargs='+', type=int, default=[42], help='default: 42')
    parser.add_argument('--launch', required=True, help='configuration file of accelerate')
    parser.add_argument('--runs', required=True, help='folder for checkpoints and logs')
    parser.add_argument('--results', required=True, help='folder for the results')
    parser.add_argument('--split', help='split whose images are evaluated at the end, e.g. test')
    parser.add_argument('--parallel', type=int, default=1, help='runs at a time (default: %(default)s)')
    parser.add_argument('arguments', nargs='*', metavar='-- ARGUMENT', help="arguments of timm's train.py")
    args = parser.parse_args(argv)

    from timm_spa.models import GATES

    unknown = [gate for gate in args.gates if gate not in GATES]
    if unknown:
        parser.error(f'Unknown gate {unknown[0]!r} in --gates. Known gates: {", ".join(GATES)}.')
    rates = dict(word.partition('=')[::2] for word in args.lr)
    wrong = [word for word in args.lr if word.partition('=')[0] not in args.gates or not word.partition('=')[2]]
    if wrong:
        parser.error(f'--lr {wrong[0]} is not of the form GATE=LR with a gate of --gates.')
    data = option_of(args.arguments, 'data-dir')
    if args.split and not data:
        parser.error('--split needs --data-dir among the arguments of train.py.')

    failed = run_script('sweep', [
        '--models', *(model_argument(args.base, gate, rates) for gate in args.gates),
        '--seeds', *map(str, args.seeds), '--parallel', str(args.parallel), '--launch', args.launch,
        '--runs', args.runs, '--results', args.results, '--', *args.arguments])
    if failed:
        return failed
    if args.split:
        own = ['--device', option_of(args.arguments, 'device') or 'cuda']
        class_map = option_of(args.arguments, 'class-map')
        failed = run_script('evaluate', [
            args.results, '--runs', args.runs, '--data-dir', str(data), '--split', args.split, *own,
            *(['--class-map', class_map] if class_map else [])])
    return failed or run_script('results', [args.results])


if __name__ == '__main__':
    sys.exit(main())
