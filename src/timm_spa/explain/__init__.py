"""What the attention of a net does, in numbers and pictures. Nothing of it is imported by `import timm_spa`."""
from .attention import ExplainError, ScaleWeights, ablate, gate_maps, neutral_gates, scale_weights
from .class_activation import METHODS, ClassActivation, cam

__all__ = [
    'METHODS', 'ClassActivation', 'ExplainError', 'ScaleWeights', 'ablate', 'cam', 'gate_maps', 'neutral_gates',
    'scale_weights']
