"""Checks of a repository's config.json before a model is created from it."""
import math
from typing import Any, Callable, Dict, List, Mapping, Tuple

import timm
from timm.models import PretrainedCfg

__all__ = ['NOT_OF_A_MODEL', 'class_labels', 'config_problems']

LARGEST_IMAGE = 3 * 2048 * 2048  # values
LARGEST_CLASSES = 1_000_000
# fields of pretrained_cfg by which timm would fetch or open other weights than those of the repository
SOURCES = ('custom_load', 'file', 'hf_hub_id', 'source', 'state_dict', 'url')
# arguments of timm.create_model that are not arguments of a model
NOT_OF_A_MODEL = (
    'cache_dir', 'checkpoint_path', 'device', 'dtype', 'exportable', 'features_only', 'no_jit', 'out_indices',
    'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_strict', 'scriptable')
INTERPOLATIONS = ('bicubic', 'bilinear', 'box', 'hamming', 'lanczos', 'nearest', 'random')

Predicate = Callable[[Any], bool]
Fields = Dict[str, Tuple[Predicate, str]]  # by field: the check of its value, and what is expected


def class_labels(config: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns 'label_names' and 'label_descriptions' of a configuration.

    As in timm, a field of the top level takes precedence over the same field of pretrained_cfg.
    """
    keys = ('label_names', 'label_descriptions')
    labels = {key: config[key] if key in config else config['pretrained_cfg'].get(key) for key in keys}
    return {key: value for key, value in labels.items() if value is not None}


def config_problems(config: Any) -> List[str]:
    """Returns the problems of a config.json, one line each; empty if a model can safely be created from it."""
    if not isinstance(config, Mapping):
        return [f'config.json: expected a mapping, got {type(config).__name__}']
    missing = [key for key in ('architecture', 'num_classes', 'pretrained_cfg') if key not in config]
    if missing:
        return [f'config.json: missing {", ".join(missing)}']
    cfg, model_args = config['pretrained_cfg'], config.get('model_args')
    if not isinstance(cfg, dict):
        return [*_invalid(config, TOP_LEVEL), f'config.json: pretrained_cfg should be a mapping, got {_shown(cfg)}']
    problems = _invalid(dict(config, **class_labels(config)), TOP_LEVEL)
    refused = [key for key in NOT_OF_A_MODEL if isinstance(model_args, dict) and key in model_args]
    if refused:
        problems.append(f'config.json: model_args has {", ".join(refused)}, which a configuration may not set')
    sources = [key for key in SOURCES if cfg.get(key)]
    if sources:
        problems.append(
            f'config.json: pretrained_cfg has {", ".join(sources)}, so that timm would load weights from elsewhere')
    unknown = sorted(set(cfg) - set(PretrainedCfg.__dataclass_fields__))
    if unknown:
        problems.append(f'config.json: pretrained_cfg has unknown fields: {", ".join(map(_shown, unknown[:4]))}')
    channels = cfg['input_size'][0] if _is_size(cfg.get('input_size')) else 3
    return problems + _invalid(cfg, PRETRAINED_CFG, ' of pretrained_cfg') + _invalid(
        cfg, _per_channel(channels), ' of pretrained_cfg')


def _invalid(values: Mapping[str, Any], fields: Fields, where: str = '') -> List[str]:
    return [
        f'config.json: {key}{where} should be {expected}, got {_shown(values.get(key))}'
        for key, (is_valid, expected) in fields.items() if not is_valid(values.get(key))]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:60]}...'


def _is_architecture(value: Any) -> bool:
    return isinstance(value, str) and timm.is_model(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and 0 < value <= LARGEST_CLASSES


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 2


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_texts(value: Any) -> bool:
    return all(isinstance(text, (str, type(None))) for text in (value if isinstance(value, list) else [value]))


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_mapping_of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and all(_is_whole(v) and v > 0 for v in value)
        and math.prod(value) <= LARGEST_IMAGE and value[0] <= 64)


def _optional(is_valid: Predicate) -> Predicate:
    return lambda value: value is None or is_valid(value)


def _per_channel(channels: int) -> Fields:
    """Returns the fields that have one number for each channel, or one or three for any image."""
    def are_numbers(values: Any) -> bool:
        return isinstance(values, list) and len(values) in (1, 3, channels) and all(map(_is_number, values))

    return {
        'mean': (are_numbers, 'one number per channel'),
        'std': (lambda values: are_numbers(values) and min(values) > 0, 'one positive number per channel'),
    }


TOP_LEVEL: Fields = {
    'architecture': (_is_architecture, 'the name of a registered model'),
    'num_classes': (_is_count, 'a number of classes'),
    'num_features': (_optional(_is_whole), 'a whole number'),
    'global_pool': (_optional(_is_text), 'a name'),
    'dtype': (_optional(_is_text), 'a name'),
    'label_names': (_optional(_is_list_of_texts), 'a list of texts'),
    'label_descriptions': (_optional(_is_mapping_of_texts), 'a mapping from names to texts'),
    'id2label': (_optional(_is_mapping_of_texts), 'a mapping from numbers to texts'),
    'model_args': (_optional(_is_mapping), 'a mapping'),
}
SIZE = 'channels, height and width of an image'
PRETRAINED_CFG: Fields = {
    'input_size': (_is_size, SIZE),
    'test_input_size': (_optional(_is_size), SIZE),
    'min_input_size': (_optional(_is_size), SIZE),
    'crop_pct': (_is_share, 'a share of the image, at most 2'),
    'test_crop_pct': (_optional(_is_share), 'a share of the image, at most 2'),
    'crop_mode': (lambda value: value in (None, 'border', 'center', 'squash'), 'border, center or squash'),
    'interpolation': (lambda value: value in INTERPOLATIONS, f'one of {", ".join(INTERPOLATIONS)}'),
    **{key: (_optional(_is_text), 'a text') for key in (
        'architecture', 'tag', 'license', 'origin_url', 'hf_hub_filename')},
    'classifier': (_is_text_or_texts, 'the name of a layer'),
    'first_conv': (_is_text_or_texts, 'the name of a layer'),
    'paper_ids': (_is_text_or_texts, 'a text'),
    'num_classes': (_optional(_is_count), 'a number of classes'),
}
