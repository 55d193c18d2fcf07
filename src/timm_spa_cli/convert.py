"""`timm-spa convert`: converts weight files to safetensors."""
import argparse

HELP = 'convert a weight file to safetensors, with renamed tensors and neutral gates where needed'
EXAMPLES = ('timm-spa convert resnet50.pth spa_resnet50.safetensors --model spa_resnet50',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('source', metavar='SOURCE', help='file of torch.save or safetensors')
    parser.add_argument('output', metavar='OUT.safetensors')
    parser.add_argument('--model', required=True, help='model to convert the weights for')
    parser.add_argument('--dtype', default='float32', help='float32, float16 or bfloat16 (default: %(default)s)')
    parser.add_argument(
        '--from', dest='kind', metavar='KIND',
        help='kind of the source: same (the model itself) or plain (default: inferred)')
    parser.add_argument('--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help='e.g. pyramid_sizes=1,2,4')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing OUT')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    from timm.utils import ParseKwargs

    from timm_spa._errors import UsageError
    from timm_spa.hub.convert import convert

    try:
        ParseKwargs([], 'model_kwargs')(None, args, args.model_kwargs)  # parsed like in timm's own scripts
    except ValueError as e:
        raise UsageError(f'--model-kwargs takes KEY=VALUE, got {" ".join(args.model_kwargs)}.') from e
    done = convert(
        args.source, args.output, args.model, args.dtype, args.kind, args.overwrite, **args.model_kwargs)
    print(f'Source {args.source}: {done.description}.')
    error = f'largest error {done.error:.3g}, in {done.error_in}' if done.error_in else 'every value is exact'
    print(f'Wrote {args.output}: {done.tensors} tensors, {args.dtype}, {done.size / 1e6:.1f} MB, {error}.')
    return 0
