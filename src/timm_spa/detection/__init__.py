"""Object detection with any CNN of timm as the backbone. `import timm_spa` does not import this package."""
from .checkpoint import load_detector, save_detector
from .data import read_image
from .models import DetectionError, cascade_rcnn, retinanet

__all__ = ['DetectionError', 'cascade_rcnn', 'load_detector', 'read_image', 'retinanet', 'save_detector']
