"""Pretrained configurations and the loading of weights, for every model of the package."""
import dataclasses
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import torch
import torch.nn as nn
from timm.models import (  # not `timm.X`: timm may still be importing
    PretrainedCfg,
    build_model_with_cfg,
    get_pretrained_cfg,
    list_pretrained,
    load_pretrained,
    load_state_dict,
    resolve_pretrained_cfg,
)
from timm.models._hub import load_state_dict_from_path

from .._errors import TimmSpaError
from ..checkpoints.fit import compare_tensors
from ..checkpoints.hub_files import HubWeightsError, locate_weights
from ..checkpoints.warm_start import checkpoint_filter_fn, gate_weights, has_gates
from ._gate_table import GATES, create_gate

__all__ = [
    'PAPER_ID', 'StateDict', 'Weights', 'WeightsError', 'attached_cfg', 'build_model', 'cifar_cfg', 'load_weights',
    'read_weights', 'shipped_cfg', 'untrained_cfg', 'warm_cfg', 'warm_cfgs']

StateDict = Dict[str, torch.Tensor]
_logger = logging.getLogger(__name__)
PAPER_ID = 'doi:10.1109/TMM.2021.3068576'
WEIGHTS_FILENAME = 'model.safetensors'


class WeightsError(TimmSpaError, RuntimeError):
    """Weights do not fit the model. The message names file, model and tensors."""


def untrained_cfg(source: str, **kwargs: Any) -> PretrainedCfg:
    """Makes a configuration without weights, with the preprocessing of timm's `source` and the given fields."""
    plain = get_pretrained_cfg(source, allow_unregistered=False)
    paper_ids = (plain.paper_ids,) if isinstance(plain.paper_ids, str) else tuple(plain.paper_ids or ())
    fields = dict(
        url=None,
        hf_hub_id=None,
        hf_hub_filename=None,
        architecture=None,
        tag=None,
        license=plain.license or 'unknown',
        origin_url=plain.origin_url or 'https://github.com/huggingface/pytorch-image-models',
        paper_ids=tuple(dict.fromkeys((*paper_ids, PAPER_ID))),
    )
    return dataclasses.replace(plain, **dict(fields, **kwargs))


def warm_cfg(source: str) -> PretrainedCfg:
    """Makes the configuration of a warm start: timm's published weights of the plain model, gates neutral."""
    plain: Any = get_pretrained_cfg(source, allow_unregistered=False)
    return untrained_cfg(
        source,
        url=None if plain.hf_hub_id else plain.url,
        hf_hub_id=plain.hf_hub_id,
        hf_hub_filename=plain.hf_hub_filename or (WEIGHTS_FILENAME if plain.hf_hub_id else None),
        description=f'Warm start from {source}: the same function, attention still neutral.',
        notes=(
            f'The weights are those of {plain.hf_hub_id or plain.url}. Every gate is 1/2 and what it gates is doubled, '
            "so the model computes what the plain one does, with the plain one's accuracy, until it is fine-tuned.",
        ),
    )


def warm_cfgs(name: str, plain: str, default: str = '') -> Dict[str, PretrainedCfg]:
    """Makes the configurations of the warm starts from every tag that timm has of the plain model.

    The tag `default`, or timm's own, comes first. If there is none, it is one configuration without weights.
    """
    sources = list_pretrained(f'{plain}.*')
    if not sources:
        return {f'{name}.untrained': untrained_cfg(plain)}
    first = f'{plain}.{default or get_pretrained_cfg(plain).tag}'
    sources.sort(key=lambda source: source != first)
    return {f'{name}.warm_{source.partition(".")[2]}': warm_cfg(source) for source in sources}


def attached_cfg(
        variant: str,
        base: str,
        pretrained_cfg: Any = None,
        overlay: Optional[Mapping[str, Any]] = None,
) -> PretrainedCfg:
    """Makes the configuration of one of timm's models with gates added.

    Args:
        variant: Name of the model with gates.
        base: Name of timm's model, with the tag of its weights if it is not the default.
        pretrained_cfg: Configuration or tag, as timm passes it. That of a repository is taken as it is; the fields of
            any other replace those of `base`, but for the ones that `variant` is registered with: timm's scripts pass
            these, which may be of another base.
        overlay: Fields to replace.

    Returns:
        The configuration.

    Raises:
        RuntimeError: timm's model has no weights of that tag.
        ValueError: The tag is not that of `base`.
    """
    name, _, tag = base.partition('.')
    fields = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg or {}
    if isinstance(fields, str):
        wanted = fields.removeprefix('warm_')
        if wanted != (tag or wanted):
            raise ValueError(f'{variant}.{fields} is not of base={base!r}. Give the tag with base.')
        tag, fields = wanted, {}
    start = PretrainedCfg()
    if not fields.get('source'):
        registered = f'{variant}.{fields.get("tag")}'
        if registered in list_pretrained(f'{variant}.*'):
            known: Any = get_pretrained_cfg(registered)
            fields = {key: value for key, value in fields.items() if value != getattr(known, key, None)}
            source = known.hf_hub_id.removeprefix('timm/')
            tag = tag or (source.partition('.')[2] if source.partition('.')[0] == name else '')
        plain: Any = get_pretrained_cfg(f'{name}.{tag}' if tag else name, allow_unregistered=False)
        source = f'{name}.{plain.tag}' if plain.tag else name
        start = warm_cfg(source) if plain.has_weights else untrained_cfg(source)
        start.tag = f'warm_{plain.tag}' if plain.has_weights else plain.tag
    start = resolve_pretrained_cfg(variant, start.to_dict(), {**fields, **(overlay or {})})
    return dataclasses.replace(start, architecture=variant)


def cifar_cfg(**kwargs: Any) -> PretrainedCfg:
    """Makes a configuration without weights for 32x32 images; mean and deviation are ImageNet's, as in the paper."""
    fields = dict(
        input_size=(3, 32, 32),
        pool_size=(4, 4),
        crop_pct=1.0,
        interpolation='bilinear',
        num_classes=100,
        license='apache-2.0',
        origin_url='https://github.com/13952522076/SPANet_TMM',
        paper_ids=PAPER_ID,
    )
    return PretrainedCfg(**dict(fields, **kwargs))


def shipped_cfg(name: str, **kwargs: Any) -> PretrainedCfg:
    """Makes the configuration of `weights/<name>.safetensors` from the fields in `weights/<name>.json`."""
    folder = Path(__file__).parent.parent / 'weights'
    fields = json.loads((folder / f'{name}.json').read_text(encoding='utf-8'))
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return PretrainedCfg(**dict(fields, file=str(folder / f'{name}.safetensors'), **kwargs))


def build_model(
        model_cls: Type[nn.Module],
        variant: str,
        pretrained: bool,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Any = None,
        plain_filter: Optional[Callable[[Dict[str, Any]], Dict[str, Any]]] = None,
        gate: str = 'spa',
        pyramid_sizes: Sequence[int] = (1, 4, 7),
        rd_ratio: float = 1. / 16,
        **kwargs: Any,
) -> Any:
    """Builds a model through timm's builder, with its weights already found if they are on the Hub.

    `gate`, `pyramid_sizes` and `rd_ratio` become one argument of the class, `make_gate`: a function of the gated
    channels, the channels of the block's input, norm layer, device and dtype. `plain_filter` renames weights of the
    plain model where their names can differ from timm's.
    """
    weights = Weights('')
    source = None
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, dict(pretrained_cfg_overlay or {}))
        source = cfg.source
        weights = _find(cfg, cache_dir)
        if weights.located:
            pretrained_cfg_overlay = dict(pretrained_cfg_overlay or {}, file=weights.located, source='')

    def filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
        return _fitted(
            state_dict, model, variant, weights, plain_filter, needs_classifier=not kwargs.get('features_only'))

    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        pretrained_filter_fn=filter_fn,
        make_gate=partial(create_gate, gate, pyramid_sizes=pyramid_sizes, rd_ratio=rd_ratio),
        **kwargs,
    )
    if weights.located:
        model.pretrained_cfg.pop('file', None)  # the path in the cache should not end up in saved configurations
        model.pretrained_cfg['source'] = source
    return model


class Weights(NamedTuple):
    """Origin of weights.

    Attributes:
        label: Name for messages.
        error: Type of the error if they do not fit.
        located: File of the Hub, in the cache.
    """
    label: str
    error: Type[Exception] = WeightsError
    located: Optional[str] = None


def _find(cfg: PretrainedCfg, cache_dir: Any) -> Weights:
    located = _locate(cfg, cache_dir)
    if located:
        name = f'{cfg.hf_hub_filename or WEIGHTS_FILENAME} of {cfg.hf_hub_id} ({located})'
        return Weights(name, HubWeightsError, located)
    label = 'The given state dict' if cfg.state_dict and cfg.source != 'local-dir' else str(cfg.file or cfg.url)
    return Weights(label)


def _locate(cfg: PretrainedCfg, cache_dir: Any = None) -> Optional[str]:
    """Returns the file of a configuration's weights on the Hub, None if the configuration has other or no weights."""
    if not cfg.hf_hub_id or (cfg.source != 'hf-hub' and (cfg.file or cfg.state_dict or cfg.source)):
        return None
    repo_id, _, revision = cfg.hf_hub_id.partition('@')
    return locate_weights(repo_id, cfg.hf_hub_filename or WEIGHTS_FILENAME, revision or None, cache_dir)


def read_weights(cfg: PretrainedCfg, cache_dir: Any = None) -> Optional[Tuple[StateDict, Weights]]:
    """Reads the weights of a configuration and returns them with their origin. Sources have timm's order.

    Returns:
        None for weights in the format of another library, and if there are none: only timm can read or refuse these.
    """
    if cfg.custom_load == 'hf' or (cfg.custom_load and (cfg.file or not cfg.hf_hub_id)):
        return None
    weights = _find(cfg, cache_dir)
    if weights.located:
        return load_state_dict(weights.located), weights
    if cfg.source == 'local-dir':
        return load_state_dict_from_path(cfg.file), weights
    if cfg.state_dict:
        return dict(cfg.state_dict), weights
    if cfg.file:
        return load_state_dict(cfg.file), weights
    if cfg.url:
        return torch.hub.load_state_dict_from_url(
            cfg.url, cache_dir, map_location='cpu', progress=False, weights_only=True), weights
    return None


def load_weights(
        model: Any,
        variant: str,
        state_dict: StateDict,
        weights: Weights,
        plain_filter: Optional[Callable[[StateDict], StateDict]] = None,
        in_chans: int = 3,
        needs_classifier: bool = True,
        neutral: bool = True,
) -> None:
    """Loads a checkpoint of a gated or plain model, strictly except for the layers that timm adapts.

    Args:
        model: The model, with all its layers and a `pretrained_cfg` that describes the checkpoint.
        variant: Name of the model, for messages.
        state_dict: Tensors by name.
        weights: Where they are from.
        plain_filter: Brings weights of the plain model to timm's names.
        in_chans: Channels of the model's images.
        needs_classifier: The classifier's weights must be there if the number of classes is the checkpoint's.
        neutral: Keep the function of a plain model's checkpoint.

    Raises:
        HubWeightsError: Weights of the Hub do not fit.
        WeightsError: Other weights do not fit.
    """
    fitted = _fitted(state_dict, model, variant, weights, plain_filter, needs_classifier, neutral)
    cfg = dict(model.pretrained_cfg, state_dict=fitted, source='', file='')
    load_pretrained(model, cfg, num_classes=model.num_classes, in_chans=in_chans)


def _fitted(
        state_dict: StateDict,
        model: Any,
        variant: str,
        weights: Weights,
        plain_filter: Optional[Callable[[StateDict], StateDict]] = None,
        needs_classifier: bool = True,
        neutral: bool = True,
) -> StateDict:
    """Returns a checkpoint that fits a model, except for the classifier and the number of image channels.

    timm itself loads what it can once the number of classes differs, and leaves the rest random.
    """
    cfg, own = model.pretrained_cfg, model.state_dict()
    is_plain = bool(gate_weights(model)) and not has_gates(state_dict, model)
    fitted = checkpoint_filter_fn(state_dict, model, GATES, plain_filter, neutral)
    classifiers, first_convs = (_layers(cfg, key) for key in ('classifier', 'first_conv'))
    num_classes = getattr(model, 'num_classes', 0)
    keeps_classifier = needs_classifier and num_classes > 0 and num_classes == cfg.get('num_classes')
    if not keeps_classifier:
        fitted = {name: tensor for name, tensor in fitted.items() if not _is_in(name, classifiers)}
    if cfg.get('num_classes') == 0:  # such weights may lack the layers around a classifier too, e.g. its norm layer
        classifiers += tuple(name.rpartition('.')[0] for name in classifiers if '.' in name)
    adapted = classifiers if not keeps_classifier or cfg.get('label_offset') else ()

    def compared(tensors: Mapping[str, torch.Tensor]) -> StateDict:
        return {  # a first convolution is adapted in its second dimension
            name: tensor[:, :1] if name.removesuffix('.weight') in first_convs and tensor.ndim > 1 else tensor
            for name, tensor in tensors.items() if not _is_in(name, adapted) and not _is_counter(name)}

    misfit = compare_tensors(compared(fitted), compared(own))
    if misfit:
        from ._likely_model import likely_model  # needs the registered models

        hint = likely_model(state_dict, variant, str(getattr(model, '_model_args', {}).get('base', '')))
        raise weights.error(
            f'{weights.label} does not fit {variant}; tensors {misfit}. ' + (
                hint or 'Create the model that they are of, with the arguments that it was trained with.'))
    if is_plain:
        _logger.warning(
            'The checkpoint holds no attention: it is the plain model. ' + (
                'Its weights are loaded so that the model computes the same, with every gate neutral. Attention begins '
                'to act once the model is fine-tuned.' if neutral else
                'Its weights are loaded, and the gates are as they are initialized.'))
    optional = {name: tensor for name, tensor in own.items() if _is_counter(name) or _is_in(name, adapted)}
    return {**optional, **{name: tensor for name, tensor in fitted.items() if name in own or not _is_counter(name)}}


def _layers(cfg: Mapping[str, Any], key: str) -> Tuple[str, ...]:
    names = cfg.get(key) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _is_in(name: str, layers: Tuple[str, ...]) -> bool:
    return name.startswith(tuple(f'{layer}.' for layer in layers))


def _is_counter(name: str) -> bool:
    return name.endswith('.num_batches_tracked')  # old weights have none
