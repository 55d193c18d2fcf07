"""Refuses a timm that is too old, by one line in place of whatever name it lacks first."""
import timm
from torch.torch_version import TorchVersion

from ._errors import TimmSpaError

__all__ = ['OLDEST', 'TimmTooOldError']

OLDEST = '1.0.31'  # as in pyproject.toml; the first that writes a model's arguments into config.json


class TimmTooOldError(TimmSpaError, ImportError):
    """The installed timm lacks what this package extends."""


if TorchVersion(timm.__version__) < OLDEST:
    raise TimmTooOldError(
        f'timm_spa needs timm {OLDEST} or newer, and finds {timm.__version__}: pip install --upgrade timm')
