"""Fails early if timm is too old."""
import timm
from torch.torch_version import TorchVersion

from ._errors import TimmSpaError

__all__ = ['OLDEST', 'TimmTooOldError']

OLDEST = '1.0.31'  # as in pyproject.toml; first release that writes model arguments to config.json


class TimmTooOldError(TimmSpaError, ImportError):
    """The installed timm is older than `OLDEST`."""


if TorchVersion(timm.__version__) < OLDEST:
    raise TimmTooOldError(
        f'timm_spa requires timm {OLDEST} or newer, but {timm.__version__} is installed: pip install --upgrade timm')
