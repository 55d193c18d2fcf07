"""Comparison of an exported file with PyTorch, and its accuracy."""
from typing import Any, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..predict import data_config
from .format import ExportError, Runner, as_export_error, padded

__all__ = ['compare', 'top1']

# of the difference, relative to the largest output; int8 has no limit, its accuracy is measured instead
LIMITS = {'float32': 1e-4, 'float16': 1e-2, 'int8': float('inf')}


def compare(
        model: Any,
        run: Runner,
        name: str,
        dtype: Optional[str],
        dynamic: Optional[str],
        batch_size: int,
) -> Tuple[float, List[Tuple[int, ...]]]:
    """Compares an exported file with its model.

    Args:
        model: Model in PyTorch and float32.
        run: Computes the output of the file.
        name: Name of the model, for messages.
        dtype: Key of `LIMITS`; None accepts any difference.
        dynamic: Dynamic axes, see `export`.
        batch_size: Batch size of the file, if it is fixed.

    Returns:
        The largest difference relative to the largest output, and the shapes of the inputs.

    Raises:
        ExportError: An input cannot be computed, or a difference is above the limit.
    """
    shapes, differences = [], []
    limit = LIMITS[dtype] if dtype else float('inf')
    for x in _inputs(model, dynamic, batch_size):
        shape = tuple(x.shape)
        with as_export_error(f'{name} cannot compute an input of {shape}'):
            expected = model(x)
        with as_export_error(f'The exported file of {name} cannot compute an input of {shape}'):
            difference = ((run(x) - expected).abs().max() / expected.abs().max()).item()
        if not difference <= limit:  # also true for NaN
            raise ExportError(
                f'The exported file of {name} differs from PyTorch by {difference:.2g} of the largest output at '
                f'{shape} (limit for {dtype}: {limit:g}). The file was not kept. Try another format.')
        shapes.append(shape)
        differences.append(difference)
    return max(differences), shapes


def _inputs(model: Any, dynamic: Optional[str], batch_size: int) -> Iterator[torch.Tensor]:
    """Yields images of random pixels, and smooth images at the size of the model."""
    config = data_config(model)
    channels, height, width = config['input_size']
    batches = (2, 1, 3) if dynamic else (batch_size,) * 3
    sizes = [(height, width)] * 3
    if dynamic == 'size':  # larger, as some models accept no smaller size; not divisible by the pyramid sizes
        sizes[1:] = (height + 21, width + 5), (height + 10, width + 32)
    mean, std = (torch.tensor(config[key]).mean() for key in ('mean', 'std'))
    for i, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
        if i > 0 or dynamic != 'size':
            pixels = torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(i))
            yield (pixels - mean) / std
    # random pixels have the same average in every region, but real images do not
    coarse = torch.rand(batches[0], channels, 5, 5, generator=torch.Generator().manual_seed(0))
    yield (F.interpolate(coarse, size=(height, width), mode='bilinear') - mean) / std


def top1(run: Runner, batches: Iterable[Tuple[torch.Tensor, torch.Tensor]], batch_size: Optional[int]) -> float:
    """Returns the top-1 accuracy in percent."""
    correct = total = 0
    for pixels, target in tqdm(batches, 'accuracy', leave=False, disable=None):  # None: on terminals only
        answers = run(padded(pixels, batch_size))[:len(pixels)].argmax(1)
        correct, total = correct + int((answers == target).sum()), total + len(target)
    return 100 * correct / total
