"""Spatial Pyramid Attention for timm. Importing this package registers its models with timm."""
from . import _timm_release as _timm_release  # fails early if timm is too old
from . import models
from .layers import SpatialPyramidAttention
from .models import add_attention, list_models

__all__ = ['SpatialPyramidAttention', '__version__', 'add_attention', 'list_models', 'models']

__version__ = '0.1.0'
