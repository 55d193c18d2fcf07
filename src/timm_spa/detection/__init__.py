"""Object detection with any CNN of timm as the backbone. Nothing of it is imported by `import timm_spa`."""
from .checkpoint import load_detector, save_detector
from .models import DetectionError, cascade_rcnn, retinanet

__all__ = ['DetectionError', 'cascade_rcnn', 'load_detector', 'retinanet', 'save_detector']
