"""What SPA must cost at least on this machine: the bytes that it reads and the multiply-adds that it takes.

    python tests/benchmarks/roofline.py spa_resnet50 --batch-size 8 --threads 2 [--device cuda --dtype bfloat16]

The gate is multiplied where the residual sum is taken, so that it moves no bytes of its own but those of small maps.
What is left is reading the maps that the pyramids are pooled from, and the two convolutions on every pyramid, as the
equations have them. The time of the first is that of torch's own sum over as many bytes; of the second, that of as many
multiply-adds at the rate of the plain net's forward pass.
"""
import argparse
import time
from typing import Any, Callable, List

import timm
import torch
import torch.nn as nn

import timm_spa
from timm_spa.layers.residual import pools_in_front
from timm_spa.profile import count_cost

PLAIN = {'spa_resnet50': 'resnet50', 'spa_mobilenetv2': 'mobilenetv2_100'}


def seconds(step: Callable[[], Any], device: str, repeats: int = 15) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def pooled_maps(model: nn.Module, batch: int, size: int) -> List[List[int]]:
    """Shapes of the maps that the pyramids of a model are pooled from, for one image of a batch."""
    shapes: List[List[int]] = []
    inputs: List[Any] = []

    def before(module: nn.Module, args: Any) -> None:
        inputs.append((module, args[0].shape))

    def after(module: Any, args: Any, output: torch.Tensor) -> None:
        conv, shape = next((m, s) for m, s in reversed(inputs) if m.out_channels == output.shape[1])
        early = pools_in_front(conv, module.fc1.out_channels, module.pyramid_sizes[0], (batch, *shape[1:]))
        shapes.append(list((shape if early else output.shape)[1:]))

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and 'attn' not in name and 'downsample' not in name:
            module.register_forward_pre_hook(before)
        elif isinstance(module, timm_spa.SpatialPyramidAttention):
            module.register_forward_hook(after)
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device='meta'))
    return shapes


def main() -> None:
    """Prints the least cost, and the ratio to the plain net that it allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', choices=sorted(PLAIN))
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--threads', type=int)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    plain = timm.create_model(PLAIN[args.model]).eval()
    plain = plain.to(device=args.device, dtype=dtype, memory_format=torch.channels_last)
    size = plain.pretrained_cfg['input_size'][-1]
    images = torch.randn(args.batch_size, 3, size, size, device=args.device, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)

    maps = pooled_maps(timm.create_model(args.model, device='meta').eval(), args.batch_size, size)
    # in the order of the net, each once: a map is as far from the caches as it would be there
    tensors = [torch.randn(args.batch_size, *shape, device=args.device, dtype=dtype) for shape in maps]
    read = sum(t.nbytes for t in tensors)
    macs = args.batch_size * (count_cost(args.model).macs - count_cost(PLAIN[args.model]).macs)
    with torch.inference_mode():
        plain(images)
        net = seconds(lambda: plain(images), args.device)
        reading = seconds(lambda: [t.sum() for t in tensors], args.device)
    rate = args.batch_size * count_cost(PLAIN[args.model]).macs / net
    print(
        f'{args.model}, batch {args.batch_size}, {args.dtype}, {args.device}\n'
        f'plain net                {net * 1e3:8.2f} ms, {rate / 1e9:.0f} GMAC/s\n'
        f'maps read for pooling    {reading * 1e3:8.2f} ms, {read / 1e6:.1f} MB at {read / reading / 1e9:.1f} GB/s\n'
        f'convolutions of gates    {macs / rate * 1e3:8.2f} ms, {macs / 1e9:.3f} GMAC\n'
        f'ratio that they allow    {net / (net + reading + macs / rate):8.3f}')


if __name__ == '__main__':
    main()
