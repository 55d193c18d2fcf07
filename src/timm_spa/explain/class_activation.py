"""Class activation maps: which places of a picture speak for a class. The methods are torchcam's."""
import dataclasses
from typing import Any, List, Optional, Sequence, Union

import torch
import torch.nn as nn

from .attention import ExplainError, check_images, forward_hooks, in_eval_mode, refuse_compiled

__all__ = ['METHODS', 'ClassActivation', 'cam', 'last_map_layer']

# names for users, and torchcam's classes
METHODS = {
    'gradcam': 'GradCAM',
    'gradcam++': 'GradCAMpp',
    'smoothgradcam++': 'SmoothGradCAMpp',
    'xgradcam': 'XGradCAM',
    'layercam': 'LayerCAM',
    'scorecam': 'ScoreCAM',
}


@dataclasses.dataclass(frozen=True)
class ClassActivation:
    """Class activation maps of a batch.

    Attributes:
        maps: Maps (N, H, W) in float32 on the CPU, at the resolution of the layer. The largest value of each is 1, or
            0 where nothing speaks for the class.
        classes: The class (N,) that each map is of.
        probabilities: The probability (N,) that the model gives it.
        layer: Name of the layer whose output was weighted.
    """
    maps: torch.Tensor
    classes: torch.Tensor
    probabilities: torch.Tensor
    layer: str


def last_map_layer(model: nn.Module, x: torch.Tensor) -> str:
    """Returns the name of the outermost module whose output is that of `forward_features` of a CNN in eval mode."""
    if not hasattr(model, 'forward_features'):
        raise ExplainError(f'{type(model).__name__} has no forward_features, as models of timm have: name a layer.')
    finished: List[Any] = []
    names = {module: name for name, module in model.named_modules()}
    hooks = [(module, lambda m, args, out: finished.append((m, out))) for module, name in names.items() if name]
    with torch.no_grad(), forward_hooks(hooks):
        features: Any = model.forward_features(x)  # type: ignore[operator]
    if not isinstance(features, torch.Tensor) or features.ndim != 4:
        raise ExplainError(
            f'{type(model).__name__} has no map (N, C, H, W) before its pooling: class activation maps are for CNNs.')
    for module, out in reversed(finished):
        if out is features:
            return names[module]
    raise ExplainError(f'No layer of {type(model).__name__} gives its last map: name one.')


def _one_each(classes: Any, count: int) -> torch.Tensor:
    """Returns the class of each image as a tensor of whole numbers."""
    try:
        chosen = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0)
    if chosen.ndim == 0:
        chosen = chosen.expand(count)
    if chosen.shape != (count,) or chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        raise ExplainError(
            f'Expected the number of a class for each of {count} images, or one for all, got {classes!r}. find_class '
            'of timm_spa.predict gives the number of a name.')
    return chosen.long()


def cam(
        model: nn.Module,
        x: torch.Tensor,
        classes: Optional[Union[torch.Tensor, Sequence[int], int]] = None,
        method: str = 'gradcam',
        layer: Optional[str] = None,
) -> ClassActivation:
    """Computes class activation maps.

    The model is afterwards as it was: its modes, its hooks and the gradients of its parameters, also after an error.

    Args:
        model: A timm CNN with any gate or none, as it is built or fused, not compiled.
        x: Images (N, C, H, W), prepared for the model, on its device.
        classes: The class (N,) to explain for each image, or one class for all of them; the likeliest if None.
        method: A key of `METHODS`. Grad-CAM (Selvaraju et al., ICCV 2017) is what the paper's figure 5 shows.
        layer: Name of a module; the last map before pooling if None.

    Returns:
        The maps.

    Raises:
        ExplainError: There is no such method, layer or class, torchcam is not installed, `x` is no batch, or the model
            is no CNN, is compiled, or gives no scores of classes.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ExplainError(f'There is no method {method!r}. There are {", ".join(METHODS)}.')
    try:
        from torchcam import methods
    except ImportError as e:
        raise ExplainError(
            'Class activation maps need torchcam and Python 3.11: pip install "timm_spa[explain]".') from e
    refuse_compiled(model)
    check_images(x)
    if layer is not None and layer not in dict(model.named_modules()):
        children = ', '.join(name for name, _ in model.named_children())
        raise ExplainError(f'There is no layer {layer!r}. The layers of the top level are {children}.')
    # gradients are needed also where the caller wants none, and for a net whose parameters are all frozen
    with in_eval_mode(model), torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # SmoothGrad adds noise
        x = x.detach().clone().requires_grad_()
        layer = layer or last_map_layer(model, x)
        outputs: List[Any] = []
        watched = forward_hooks([(model.get_submodule(layer), lambda m, args, out: outputs.append(out))])
        with getattr(methods, METHODS[method])(model, layer, input_shape=tuple(x.shape[1:])) as extract, watched:
            scores = model(x)
            if not outputs or not isinstance(outputs[-1], torch.Tensor) or outputs[-1].ndim != 4:
                raise ExplainError(
                    f'The layer {layer!r} gives no feature map (N, C, H, W) in a forward pass. Name a layer before the '
                    'pooling.')
            if not isinstance(scores, torch.Tensor) or scores.ndim != 2 or not getattr(model, 'num_classes', 1):
                raise ExplainError(
                    f'{type(model).__name__} gives no scores of classes (N, classes): create it with its classifier, '
                    'without features_only and num_classes=0.')
            probabilities = scores.detach().float().softmax(1)
            chosen = probabilities.argmax(1) if classes is None else _one_each(classes, len(x)).to(scores.device)
            if not 0 <= int(chosen.min()) <= int(chosen.max()) < scores.shape[1]:
                raise ExplainError(f'The classes are 0 to {scores.shape[1] - 1}, and {chosen.tolist()} were asked for.')
            maps = extract(chosen.tolist(), scores, normalized=False)[0].detach().float().clamp(min=0).cpu()
    largest = maps.flatten(1).amax(1).clamp(min=torch.finfo(maps.dtype).tiny)[:, None, None]
    return ClassActivation(
        maps / largest, chosen.cpu(), probabilities.gather(1, chosen[:, None])[:, 0].cpu(), layer)
