"""What the attention of a net does: its gates for given pictures, its pyramid weights, and what it loses without them.

Hooks are gone afterwards, and the model is as it was, also after an error.
"""
import contextlib
import dataclasses
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .._errors import TimmSpaError
from ..layers import SpatialPyramidAttention
from ..layers.fused_branch import FusedBranch

__all__ = ['ExplainError', 'ScaleWeights', 'ablate', 'gate_maps', 'neutral_gates', 'scale_weights']

NEUTRAL = 0.5  # what a gate is at a warm start, everywhere


class ExplainError(TimmSpaError, ValueError):
    """There is nothing to show of a model; the message says why."""


@dataclasses.dataclass(frozen=True)
class ScaleWeights:
    """The learned weights of equation (1), of one gate.

    Attributes:
        sizes: Side lengths of the averages, in cells, the largest first.
        weights: The weight of each.
    """
    sizes: Tuple[int, ...]
    weights: Tuple[float, ...]


def block_of(gate: str) -> str:
    """Returns the name of the block that a gate, by its own name, stands in."""
    return gate.removesuffix('.attn').removesuffix('.drop')


def refuse_compiled(model: nn.Module) -> None:
    """Raises ExplainError for a compiled model."""
    if hasattr(model, '_orig_mod'):
        raise ExplainError('A compiled model does not call the hooks of its modules: give the model that was compiled.')


def check_images(x: Any) -> None:
    """Raises ExplainError unless `x` is a batch with an image in it."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or not len(x):
        given = f'a tensor of the shape {tuple(x.shape)}' if isinstance(x, torch.Tensor) else f'a {type(x).__name__}'
        raise ExplainError(
            f'Expected a batch of at least one image, a tensor (N, C, H, W), got {given}. A single image (C, H, W) '
            'becomes a batch by image.unsqueeze(0).')


def _gates(model: nn.Module, blocks: Optional[Union[str, Sequence[str]]] = None) -> Dict[str, Any]:
    """Finds the modules that end in a gate of SPA, by the name of their block, in the order of the net."""
    refuse_compiled(model)
    blocks = (blocks,) if isinstance(blocks, str) else blocks
    found: Dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, SpatialPyramidAttention) or isinstance(module, FusedBranch) and module.is_pyramid:
            found[block_of(name)] = module
    if not found:
        raise ExplainError(f'{type(model).__name__} has no gate of Spatial Pyramid Attention.')
    unknown = [name for name in blocks or () if name not in found]
    if unknown:
        raise ExplainError(f'There is no gated block {unknown[0]!r}. There are {", ".join(found)}.')
    return found if blocks is None else {name: found[name] for name in found if name in blocks}


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode within the context."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def forward_hooks(modules: Iterable[Tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Registers forward hooks within the context."""
    with contextlib.ExitStack() as stack:
        for module, hook in modules:
            stack.enter_context(module.register_forward_hook(hook))
        yield


def gate_maps(
        model: nn.Module,
        x: torch.Tensor,
        blocks: Optional[Union[str, Sequence[str]]] = None,
) -> Dict[str, torch.Tensor]:
    """Computes the gates of every block for a batch, equation (2), at their own resolution.

    Args:
        model: A net with SPA, as it is built or fused, not compiled.
        x: Images (N, C, H, W), prepared for the model, on its device.
        blocks: Names of blocks, or one name; all if None.

    Returns:
        For each block, by its name and in the order of the net, its gate (N, channels, P, P) in float32 on the CPU:
        P is the largest size of the pyramid, and the gate acts on the cells of a P x P grid over the block's map.

    Raises:
        ExplainError: The model has no gate of SPA, is compiled, or has no block of such a name; or `x` is no batch.
    """
    found: Dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, out: found.update({name: out.detach().float().cpu()})

    check_images(x)
    hooks = [(module.gate, keep(name)) for name, module in _gates(model, blocks).items()]
    with in_eval_mode(model), torch.no_grad(), forward_hooks(hooks):
        model(x)
    return found


def scale_weights(model: nn.Module) -> Dict[str, ScaleWeights]:
    """Reads the learned weights of the pyramid, equation (1).

    Args:
        model: A net with SPA, as it is built or fused.

    Returns:
        The weights of each block, by its name and in the order of the net.

    Raises:
        ExplainError: The model has no gate of SPA, or is compiled.
    """
    return {
        name: ScaleWeights(tuple(module.pyramid_sizes), tuple(module.pyramid_weight.detach().float().tolist()))
        for name, module in _gates(model).items()}


@contextlib.contextmanager
def neutral_gates(model: nn.Module, blocks: Optional[Union[str, Sequence[str]]] = None) -> Iterator[None]:
    """Sets gates to 1/2, their value at a warm start, within the context.

    Args:
        model: A net with SPA, as it is built or fused, not compiled.
        blocks: Names of blocks, as `gate_maps` has them, or one name; all if None.

    Raises:
        ExplainError: The model has no gate of SPA, is compiled, or has no block of such a name.
    """
    chosen = _gates(model, blocks).values()
    with forward_hooks((module.gate, lambda m, args, out: torch.full_like(out, NEUTRAL)) for module in chosen):
        yield


def ablate(
        model: nn.Module,
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        progress: Callable[[int], None] = lambda seen: None,
) -> Dict[str, Tuple[int, int]]:
    """Counts right answers with all gates, with each one neutral in turn, and with all neutral.

    Args:
        model: A net with SPA, as it is built or fused, not compiled.
        batches: Images (N, C, H, W), prepared for the model, and the classes of each, on its device.
        progress: Is told after each batch how many images there were so far.

    Returns:
        Right answers and images: under '' of the net as it is, under the name of a block with its gates set to 1/2, and
        under '*' with all of them set to that.

    Raises:
        ExplainError: The model has no gate of SPA, or is compiled; or there are no images.
    """
    names = tuple(_gates(model))
    settings: Dict[str, Sequence[str]] = {'': (), **{name: (name,) for name in names}, '*': names}
    right = dict.fromkeys(settings, 0)
    seen = 0
    with in_eval_mode(model), torch.no_grad():
        for images, target in batches:
            check_images(images)
            if target.shape != images.shape[:1]:
                raise ExplainError(f'Expected a class for each of {len(images)} images, got {tuple(target.shape)}.')
            for name, blocks in settings.items():
                with neutral_gates(model, blocks):
                    right[name] += int((model(images).argmax(-1) == target).sum())
            seen += len(target)
            progress(seen)
    if not seen:
        raise ExplainError('There are no images to measure the accuracy on: `batches` is empty.')
    return {name: (count, seen) for name, count in right.items()}
