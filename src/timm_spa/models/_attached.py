"""The record of `add_attention` in a model: the arguments with which the model `gated` rebuilds it.

timm's `save_for_hf` and `push_to_hf_hub` write this record to config.json.
"""
from typing import Any

import torch.nn as nn
from timm.models import is_model, list_pretrained
from timm.models._input import update_model_args  # timm writes these arguments to config.json

from ._gate_slots import BATCH_NORMS
from ._timm_bases import pretrained_arguments

__all__ = ['count_classes', 'record_attention']


def record_attention(model: Any, **attention: Any) -> None:
    """Records in a model of timm that it has gates.

    The architecture in its `pretrained_cfg` becomes 'gated'. The name of the plain network and the arguments of
    `add_attention` are added to timm's record of the arguments. timm keeps no such record for other
    models and feature extractors, which are left unchanged.

    Args:
        model: The model with its gates.
        **attention: Arguments of `gated` for these gates.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    args = getattr(model, '_model_args', {})
    architecture, tag = cfg.get('architecture') or '', cfg.get('tag')
    if not is_model(architecture) or 'num_classes' not in cfg:  # timm removes the number from an extractor's
        return
    base = architecture
    if architecture == 'gated':  # with gate='none'
        base = args.get('base', 'resnet50.a1_in1k')
    elif tag and f'{architecture}.{tag}' in list_pretrained(f'{architecture}.*'):
        base = f'{architecture}.{tag}'
    if 'bn_eps' in pretrained_arguments(architecture) and 'bn_eps' not in args:
        norm: Any = next((m for m in model.modules() if isinstance(m, BATCH_NORMS)), None)
        update_model_args(model, bn_eps=norm.eps)
    update_model_args(model, base=base, **attention)
    fields = dict(cfg, architecture='gated', description=f'{base} with attention.')
    if tag and architecture != 'gated':
        fields['tag'] = f'warm_{tag}'
    model.pretrained_cfg = model.default_cfg = fields
    count_classes(model)


def count_classes(model: Any) -> None:
    """Corrects the number of classes of a model whose classifier was replaced by assignment, e.g. `model.fc = ...`."""
    name = model.pretrained_cfg.get('classifier')
    try:
        classifier = model.get_submodule(name) if isinstance(name, str) else None
    except AttributeError:
        return
    count = {nn.Linear: 'out_features', nn.Conv2d: 'out_channels'}.get(type(classifier))
    if type(classifier) is nn.Identity:
        model.num_classes = 0
    elif count is not None:
        model.num_classes = getattr(classifier, count)
