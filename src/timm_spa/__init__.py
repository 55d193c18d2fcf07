"""Spatial Pyramid Attention for timm: importing this package registers its models with timm."""
from . import models
from .layers import SpatialPyramidAttention

__all__ = ['SpatialPyramidAttention', '__version__', 'models']

__version__ = '0.1.0'
