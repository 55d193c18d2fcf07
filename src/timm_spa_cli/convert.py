"""`timm-spa convert`: converts weight files to safetensors."""
import argparse

from timm_spa_cli._options import add_model_kwargs_option, model_kwargs

HELP = 'convert a weight file to safetensors, with renamed tensors and neutral gates where needed'
EXAMPLES = ('timm-spa convert resnet50.pth spa_resnet50.safetensors --model spa_resnet50',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('source', metavar='SOURCE', help='file of torch.save or safetensors')
    parser.add_argument('output', metavar='OUT.safetensors')
    parser.add_argument(
        '--model', help='model to convert the weights for (default: the model that SOURCE or its folder names)')
    parser.add_argument('--dtype', default='float32', help='float32, float16 or bfloat16 (default: %(default)s)')
    parser.add_argument(
        '--from', dest='kind', metavar='KIND',
        help='kind of the source: same (the model itself) or plain (default: inferred)')
    add_model_kwargs_option(parser, 'arguments of the model, if they are not recorded with the weights')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing OUT')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    from timm_spa.hub.convert import convert

    done = convert(
        args.source, args.output, args.model, args.dtype, args.kind, args.overwrite, **model_kwargs(args))
    print(f'Source {args.source}: {done.description}.')
    error = f'largest error {done.error:.3g}, in {done.error_in}' if done.error_in else 'every value is exact'
    print(f'Wrote {args.output}: {done.tensors} tensors, {args.dtype}, {done.size / 1e6:.1f} MB, {error}.')
    return 0
