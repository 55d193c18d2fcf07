"""Checks of a repository's config.json, before a model is created from it."""
import math
from typing import Any, Dict, List, Mapping

import timm
from timm.models import PretrainedCfg

__all__ = ['NOT_OF_A_MODEL', 'class_labels', 'config_problems']

LARGEST_IMAGE = 3 * 2048 * 2048  # values
LARGEST_CLASSES = 1_000_000
# of a pretrained_cfg: what would make timm fetch or open something else than the repository's own weights
SOURCES = ('custom_load', 'file', 'hf_hub_id', 'source', 'state_dict', 'url')
# of model_args: arguments of timm.create_model that are no model's
NOT_OF_A_MODEL = (
    'cache_dir', 'checkpoint_path', 'device', 'dtype', 'exportable', 'features_only', 'no_jit', 'out_indices',
    'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_strict', 'scriptable')
INTERPOLATIONS = ('bicubic', 'bilinear', 'box', 'hamming', 'lanczos', 'nearest', 'random')


def class_labels(config: Mapping[str, Any]) -> Dict[str, Any]:
    """Finds 'label_names' and 'label_descriptions' as timm does: of the top level, else of pretrained_cfg."""
    keys = ('label_names', 'label_descriptions')
    found = {key: config[key] if key in config else config['pretrained_cfg'].get(key) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def config_problems(config: Any) -> List[str]:
    """Returns what is wrong with a config.json, a line each; empty if a model can safely be made of it."""
    if not isinstance(config, Mapping):
        return [f'config.json should hold names with values, and holds a {type(config).__name__}']
    missing = [key for key in ('architecture', 'num_classes', 'pretrained_cfg') if key not in config]
    if missing:
        return [f'config.json lacks {", ".join(missing)}']
    problems = []

    def expect(right: bool, key: str, value: Any, what: str) -> None:
        if not right:
            problems.append(f'config.json: {key} should be {what}, and is {_shown(value)}')

    architecture, count, cfg = config['architecture'], config['num_classes'], config['pretrained_cfg']
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        problems.append(f'config.json names the architecture {_shown(architecture)}, which is none that is registered')
    expect(_is_whole(count) and 0 < count <= LARGEST_CLASSES, 'num_classes', count, 'a number of classes')
    if not isinstance(cfg, dict):
        expect(False, 'pretrained_cfg', cfg, 'names with values')
        return problems
    labelled = dict(config, **class_labels(config))
    for key, kind, what in (
            ('num_features', int, 'a whole number'), ('global_pool', str, 'a name'), ('dtype', str, 'a name'),
            ('label_names', list, 'a list of names'), ('label_descriptions', dict, 'names with descriptions'),
            ('id2label', dict, 'numbers with names'), ('model_args', dict, 'names with values')):
        given = labelled.get(key)
        expect(given is None or isinstance(given, kind), key, given, what)
    for key in ('label_names', 'label_descriptions', 'id2label'):
        names: Any = labelled.get(key) or ()
        texts = names.values() if isinstance(names, dict) else names
        odd = [v for v in texts if not isinstance(v, str)] if isinstance(names, (dict, list, tuple)) else []
        expect(not odd, f'an entry of {key}', odd[:1], 'a text')
    arguments = config.get('model_args')
    taken = [key for key in NOT_OF_A_MODEL if isinstance(arguments, dict) and key in arguments]
    if taken:
        problems.append(f'config.json: model_args has {", ".join(taken)}, which no model takes')

    def in_cfg(right: bool, key: str, what: str) -> None:
        expect(right, f'{key} of pretrained_cfg', cfg.get(key), what)

    asked = [key for key in SOURCES if cfg.get(key)]
    if asked:
        problems.append(
            f'config.json: pretrained_cfg has {", ".join(asked)}, by which timm would look for weights elsewhere')
    unknown = sorted(set(cfg) - set(PretrainedCfg.__dataclass_fields__))
    if unknown:
        shown = ', '.join(map(_shown, unknown[:4]))
        problems.append(f'config.json: pretrained_cfg has {shown}, which timm does not know')
    size: Any = cfg.get('input_size')
    right = _is_size(size)
    in_cfg(right, 'input_size', 'channels, height and width of a picture')
    channels = size[0] if right else 3
    for key in ('test_input_size', 'min_input_size'):
        in_cfg(cfg.get(key) is None or _is_size(cfg[key]), key, 'channels, height and width of a picture')
    for key in ('mean', 'std'):
        values: Any = cfg.get(key)
        right = isinstance(values, list) and len(values) in (1, 3, channels) and all(map(_is_number, values))
        in_cfg(right and (key == 'mean' or min(values) > 0), key, 'a number for each channel')
    value: Any
    for key in ('crop_pct', 'test_crop_pct'):
        value = cfg.get(key)
        is_share = _is_number(value) and 0 < value <= 2
        in_cfg(is_share or (value is None and key != 'crop_pct'), key, 'a share of the picture')
    in_cfg(cfg.get('crop_mode') in (None, 'border', 'center', 'squash'), 'crop_mode', 'border, center or squash')
    in_cfg(cfg.get('interpolation') in INTERPOLATIONS, 'interpolation', f'one of {", ".join(INTERPOLATIONS)}')
    for key in ('architecture', 'tag', 'license', 'origin_url', 'hf_hub_filename'):
        in_cfg(isinstance(cfg.get(key), (str, type(None))), key, 'a name')
    for key, what in (
            ('classifier', 'the name of a layer'), ('first_conv', 'the name of a layer'), ('paper_ids', 'a text')):
        value = cfg.get(key)
        names = value if isinstance(value, list) else [value]
        in_cfg(all(isinstance(name, (str, type(None))) for name in names), key, what)
    count = cfg.get('num_classes')
    in_cfg(count is None or (_is_whole(count) and 0 < count <= LARGEST_CLASSES), 'num_classes', 'a number of classes')
    return problems


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and all(_is_whole(v) and v > 0 for v in value)
        and math.prod(value) <= LARGEST_IMAGE and value[0] <= 64)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:60]}...'
