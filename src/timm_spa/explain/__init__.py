"""Class activation maps, gates and pyramid weights of models. `import timm_spa` does not import this package."""
from .attention import ExplainError, ScaleWeights, ablate, gate_maps, neutral_gates, scale_weights
from .class_activation import METHODS, ClassActivation, cam

__all__ = [
    'METHODS', 'ClassActivation', 'ExplainError', 'ScaleWeights', 'ablate', 'cam', 'gate_maps', 'neutral_gates',
    'scale_weights']
