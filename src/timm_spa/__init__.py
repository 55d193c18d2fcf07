"""Spatial Pyramid Attention for timm. Importing this package registers its models with timm."""
from typing import TYPE_CHECKING, Any, List

from . import _timm_release as _timm_release  # fails early if timm is too old
from . import models
from .layers import SpatialPyramidAttention
from .models import add_attention, list_models

if TYPE_CHECKING:
    from .hub.save import push_to_hub, save_pretrained

__all__ = [
    'SpatialPyramidAttention', '__version__', 'add_attention', 'list_models', 'models', 'push_to_hub',
    'save_pretrained']

__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
    """Imports what writes to folders and the Hub when it is used: models are needed more often."""
    if name not in ('push_to_hub', 'save_pretrained'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from .hub import save

    return getattr(save, name)


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})
