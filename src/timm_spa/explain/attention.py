"""Gates, pyramid weights, and accuracy without gates.

Every function leaves the model unchanged and removes its hooks, also after an error.
"""
import contextlib
import dataclasses
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .._errors import TimmSpaError
from ..layers import SpatialPyramidAttention
from ..layers.fused_branch import FusedBranch

__all__ = ['ExplainError', 'ScaleWeights', 'ablate', 'gate_maps', 'gate_panels', 'neutral_gates', 'scale_weights']

NEUTRAL = 0.5  # value of every gate at a warm start
SMALLEST_REACH = 0.01  # of the colours of gates: smaller deviations from 1/2 look neutral


class ExplainError(TimmSpaError, ValueError):
    """A model cannot be explained, or a figure or the page cannot be shown."""


@dataclasses.dataclass(frozen=True)
class ScaleWeights:
    """Learned pyramid weights of one gate, equation (1).

    Attributes:
        sizes: Pyramid sizes in cells, the largest first.
        weights: Weight of each size.
    """
    sizes: Tuple[int, ...]
    weights: Tuple[float, ...]


def block_of(gate: str) -> str:
    """Returns the name of the block that contains a gate, from the name of the gate."""
    return gate.removesuffix('.attn').removesuffix('.drop')


def refuse_compiled(model: nn.Module) -> None:
    """Raises ExplainError if the model is compiled."""
    if hasattr(model, '_orig_mod'):
        raise ExplainError(
            'The model cannot be explained: a compiled model does not call the hooks of its modules. Give the model '
            'before its compilation.')


def check_images(x: Any) -> None:
    """Raises ExplainError unless `x` is a batch of at least one image."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or not len(x):
        given = f'a tensor of the shape {tuple(x.shape)}' if isinstance(x, torch.Tensor) else f'a {type(x).__name__}'
        raise ExplainError(
            f'Expected a batch of at least one image, a tensor (N, C, H, W), got {given}. Turn a single image '
            '(C, H, W) into a batch with image.unsqueeze(0).')


def _gates(model: nn.Module, blocks: Optional[Union[str, Sequence[str]]] = None) -> Dict[str, Any]:
    """Returns the modules with a SPA gate by block name, in the order of the model."""
    refuse_compiled(model)
    blocks = (blocks,) if isinstance(blocks, str) else blocks
    gates: Dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, SpatialPyramidAttention) or isinstance(module, FusedBranch) and module.is_pyramid:
            gates[block_of(name)] = module
    if not gates:
        raise ExplainError(
            f'{type(model).__name__} cannot be explained: it does not contain Spatial Pyramid Attention. Use a model '
            'with SPA.')
    unknown = [name for name in blocks or () if name not in gates]
    if unknown:
        raise ExplainError(f'Block {unknown[0]!r} is not a gated block of the model. Choose from {", ".join(gates)}.')
    return {name: gate for name, gate in gates.items() if blocks is None or name in blocks}


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode, and restores the modes of its modules afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def forward_hooks(modules: Iterable[Tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Registers forward hooks, and removes them afterwards."""
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
        model: A model with SPA, fused or not, not compiled.
        x: Images (N, C, H, W), prepared for the model, on its device.
        blocks: Names of blocks, or one name; None for all.

    Returns:
        The gates (N, channels, P, P) in float32 on the CPU, by block name, in the order of the model. P is the largest
        pyramid size. The gate applies to a P x P grid of cells over the feature map of the block.

    Raises:
        ExplainError: The model does not contain SPA, is compiled, or lacks a named block; or `x` is not a batch.
    """
    gates: Dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, out: gates.update({name: out.detach().float().cpu()})

    check_images(x)
    hooks = [(module.gate, keep(name)) for name, module in _gates(model, blocks).items()]
    with in_eval_mode(model), torch.no_grad(), forward_hooks(hooks):
        model(x)
    return gates


def gate_panels(
        gates: Mapping[str, torch.Tensor],
) -> Tuple[Dict[str, Dict[str, torch.Tensor]], Tuple[float, float]]:
    """Selects what a figure of gates shows: the mean of the channels, and the channel that varies most.

    Args:
        gates: Gates (channels, P, P) of one image by block name.

    Returns:
        Cells (P, P) by block and title, and the limits of the colours of all panels, with 1/2 in the middle.
    """
    varying = {name: int(gate.flatten(1).std(1).argmax()) for name, gate in gates.items()}
    panels = {
        name: {'mean': gate.mean(0), f'channel {varying[name]}': gate[varying[name]]} for name, gate in gates.items()}
    reach = max((cells - NEUTRAL).abs().max().item() for shown in panels.values() for cells in shown.values())
    reach = max(reach, SMALLEST_REACH)
    return panels, (NEUTRAL - reach, NEUTRAL + reach)


def scale_weights(model: nn.Module) -> Dict[str, ScaleWeights]:
    """Returns the learned pyramid weights, equation (1).

    Args:
        model: A model with SPA, fused or not.

    Returns:
        The pyramid weights by block name, in the order of the model.

    Raises:
        ExplainError: The model does not contain SPA, or is compiled.
    """
    return {
        name: ScaleWeights(tuple(module.pyramid_sizes), tuple(module.pyramid_weight.detach().float().tolist()))
        for name, module in _gates(model).items()}


@contextlib.contextmanager
def neutral_gates(model: nn.Module, blocks: Optional[Union[str, Sequence[str]]] = None) -> Iterator[None]:
    """Context manager that sets gates to 1/2, their value at a warm start.

    Args:
        model: A model with SPA, fused or not, not compiled.
        blocks: Names of blocks from `gate_maps`, or one name; None for all.

    Raises:
        ExplainError: The model does not contain SPA, is compiled, or lacks a named block.
    """
    chosen = _gates(model, blocks).values()
    with forward_hooks((module.gate, lambda m, args, out: torch.full_like(out, NEUTRAL)) for module in chosen):
        yield


def ablate(
        model: nn.Module,
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        progress: Callable[[int], None] = lambda count: None,
) -> Dict[str, Tuple[int, int]]:
    """Measures the accuracy with all gates, with the gates of each block set to 1/2, and with all gates set to 1/2.

    Args:
        model: A model with SPA, fused or not, not compiled.
        batches: Images (N, C, H, W), prepared for the model, and their classes (N,), on the device of the model.
        progress: Called after each batch with the number of images so far.

    Returns:
        Numbers of correct answers and of images, by block name: '' for the unchanged model, a block name for the model
        with the gates of that block set to 1/2, and '*' for the model with all gates set to 1/2.

    Raises:
        ExplainError: The model does not contain SPA, or is compiled; or `batches` is empty.
    """
    names = tuple(_gates(model))
    settings: Dict[str, Sequence[str]] = {'': (), **{name: (name,) for name in names}, '*': names}
    correct = dict.fromkeys(settings, 0)
    total = 0
    with in_eval_mode(model), torch.no_grad():
        for images, target in batches:
            check_images(images)
            if target.shape != images.shape[:1]:
                raise ExplainError(f'Expected a class for each of {len(images)} images, got {tuple(target.shape)}.')
            for name, blocks in settings.items():
                with neutral_gates(model, blocks):
                    correct[name] += int((model(images).argmax(-1) == target).sum())
            total += len(target)
            progress(total)
    if not total:
        raise ExplainError('The accuracy cannot be measured: `batches` is empty. Give at least one batch of images.')
    return {name: (count, total) for name, count in correct.items()}
