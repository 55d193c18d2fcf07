"""Class activation maps, by the methods of torchcam."""
import dataclasses
from typing import Any, List, Optional, Sequence, Union

import torch
import torch.nn as nn

from .attention import ExplainError, check_images, forward_hooks, in_eval_mode, refuse_compiled

__all__ = ['METHODS', 'ClassActivation', 'cam', 'last_map_layer']

# classes of torchcam by method name
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
        maps: Class activation maps (N, H, W) in float32 on the CPU, at the resolution of the layer. The largest value
            of each is 1, or 0 if nothing in the image raises the score of the class.
        classes: Explained class (N,) of each image.
        probabilities: Predicted probability (N,) of that class.
        layer: Name of the layer whose output was weighted.
    """
    maps: torch.Tensor
    classes: torch.Tensor
    probabilities: torch.Tensor
    layer: str


def last_map_layer(model: nn.Module, x: torch.Tensor) -> str:
    """Returns the name of the outermost module whose output is the output of `forward_features`, in eval mode."""
    if not hasattr(model, 'forward_features'):
        raise ExplainError(
            f'The last feature map of {type(model).__name__} was not found: the model lacks forward_features. Name a '
            'layer.')
    finished: List[Any] = []
    names = {module: name for name, module in model.named_modules()}
    hooks = [(module, lambda m, args, out: finished.append((m, out))) for module, name in names.items() if name]
    with torch.no_grad(), forward_hooks(hooks):
        features: Any = model.forward_features(x)  # type: ignore[operator]
    if not isinstance(features, torch.Tensor) or features.ndim != 4:
        raise ExplainError(
            f'{type(model).__name__} cannot be explained: it lacks a feature map (N, C, H, W) before its pooling. Use '
            'a CNN.')
    for module, out in reversed(finished):
        if out is features:
            return names[module]
    raise ExplainError(f'The layer of the last feature map of {type(model).__name__} was not found. Name a layer.')


def _one_each(classes: Any, count: int) -> torch.Tensor:
    """Returns the class of each image as an integer tensor."""
    try:
        chosen = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0)
    if chosen.ndim == 0:
        chosen = chosen.expand(count)
    if chosen.shape != (count,) or chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        raise ExplainError(
            f'Expected the number of a class for each of {count} images, or one for all, got {classes!r}. Use '
            'timm_spa.predict.find_class to find the number of a class by its name.')
    return chosen.long()


def cam(
        model: nn.Module,
        x: torch.Tensor,
        classes: Optional[Union[torch.Tensor, Sequence[int], int]] = None,
        method: str = 'gradcam',
        layer: Optional[str] = None,
) -> ClassActivation:
    """Computes class activation maps.

    The modes and hooks of the model and the gradients of its parameters are unchanged afterwards, also after an error.

    Args:
        model: A timm CNN, with or without gates, fused or not, not compiled.
        x: Images (N, C, H, W), prepared for the model, on its device.
        classes: Class (N,) to explain for each image, or one class for all images; None for the likeliest class.
        method: A key of `METHODS`. The paper's figure 5 shows Grad-CAM (Selvaraju et al., ICCV 2017).
        layer: Name of a module; None for the last feature map before pooling.

    Returns:
        The class activation maps.

    Raises:
        ExplainError: The method, layer or class is unknown, torchcam is not installed, `x` is not a batch, or the model
            is compiled, is not a CNN, or does not return class scores.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ExplainError(f'Unknown method {method!r}. Choose from {", ".join(METHODS)}.')
    try:
        from torchcam import methods
    except ImportError as e:
        raise ExplainError(
            'Class activation maps need torchcam and Python 3.11: pip install "timm_spa[explain]".') from e
    refuse_compiled(model)
    check_images(x)
    if layer is not None and layer not in dict(model.named_modules()):
        children = ', '.join(name for name, _ in model.named_children())
        raise ExplainError(f'The model does not have the layer {layer!r}. Its top-level layers are {children}.')
    # gradients are needed even under torch.no_grad, and for a model whose parameters are all frozen
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
                    f'The layer {layer!r} cannot be explained: its output is not a feature map (N, C, H, W). Name a '
                    'layer before the pooling.')
            if not isinstance(scores, torch.Tensor) or scores.ndim != 2 or not getattr(model, 'num_classes', 1):
                raise ExplainError(
                    f'{type(model).__name__} does not return class scores (N, classes). Create it with its classifier, '
                    'without features_only and num_classes=0.')
            probabilities = scores.detach().float().softmax(1)
            chosen = probabilities.argmax(1) if classes is None else _one_each(classes, len(x)).to(scores.device)
            if not 0 <= int(chosen.min()) <= int(chosen.max()) < scores.shape[1]:
                raise ExplainError(f'Classes must be numbers from 0 to {scores.shape[1] - 1}, got {chosen.tolist()}.')
            maps = extract(chosen.tolist(), scores, normalized=False)[0].detach().float().clamp(min=0).cpu()
    largest = maps.flatten(1).amax(1).clamp(min=torch.finfo(maps.dtype).tiny)[:, None, None]
    return ClassActivation(
        maps / largest, chosen.cpu(), probabilities.gather(1, chosen[:, None])[:, 0].cpu(), layer)
