"""Conversion of weight files, with the gates and naming schemes of this package."""
from pathlib import Path
from typing import Any, Optional, Union

from ..checkpoints import convert as _convert
from ..checkpoints.convert import DTYPES, KINDS, Conversion
from ..models import GATES, SOURCE_NAMES
from ..models._likely_model import likely_model

__all__ = ['DTYPES', 'KINDS', 'Conversion', 'convert']


def convert(
        source: Union[str, Path],
        output: Union[str, Path],
        model_name: Optional[str] = None,
        dtype: str = 'float32',
        kind: Optional[str] = None,
        overwrite: bool = False,
        with_classifier: bool = True,
        **kwargs: Any,
) -> Conversion:
    """Converts a weight file to a safetensors file for a model.

    Args:
        source: A file of torch.save or of safetensors with weights of the model itself or of the plain model, under the
            names of timm, torchvision or EfficientNet-PyTorch.
        output: File to write, with the suffix .safetensors.
        model_name: Model that the file is for. If None, the model that the source, or args.yaml or config.json in the
            same folder, names.
        dtype: Type of the stored parameters, a key of `DTYPES`. The statistics of norm layers keep their type.
        kind: Kind of the source, one of `KINDS`; inferred if None.
        overwrite: Replace an existing `output`.
        with_classifier: Convert the classifier. If False, the source may have none, or one of any name.
        **kwargs: Further arguments of the model, e.g. `pyramid_sizes`. Recorded arguments of the same model are used.

    Returns:
        The result.

    Raises:
        CheckpointError: The source cannot be read or does not fit, a value is not finite or too large for `dtype`, or
            `output` exists.
        RunError: args.yaml next to the source contradicts it, or no model is named.
        UsageError: An argument is invalid.
    """
    return _convert.convert(
        source, output, model_name, GATES, SOURCE_NAMES, dtype, kind, overwrite, with_classifier,
        lambda tensors: likely_model(tensors, model_name or '', str(kwargs.get('base', ''))), **kwargs)
