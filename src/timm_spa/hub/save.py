"""Saving of models to folders and Hub repositories that `timm.create_model` loads."""
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.models import is_model
from timm.models._hub import save_config_for_hf
from timm.models._input import get_model_args

from .. import __version__
from .._errors import TimmSpaError
from ..checkpoints.files import finish_interrupted, replacing
from ..checkpoints.fit import compare_tensors, first_few
from ..checkpoints.own_files import MARK, has_mark, refuse_replacing
from ..checkpoints.reading import value_problems, write_tensors
from ..checkpoints.run_arguments import as_json
from ..models._attached import count_classes
from ..models._builder import WEIGHTS_FILENAME

__all__ = ['SaveError', 'push_to_hub', 'save_pretrained', 'write_config']

CONFIG = 'config.json'
# fields of pretrained_cfg that describe the published weights which a training started from
OF_PUBLISHED_WEIGHTS = ('tag', 'license', 'description', 'notes')


class SaveError(TimmSpaError, ValueError):
    """A model cannot be saved. The message names the cause and what to do."""


def save_pretrained(
        model: nn.Module,
        folder: Union[str, Path],
        class_names: Optional[Sequence[str]] = None,
        overwrite: bool = False,
) -> None:
    """Writes a model to a folder, with its weights in model.safetensors and its arguments in config.json.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` loads the folder, and so do the commands of timm_spa. A
    model with attention needs `import timm_spa` first. Either both files are written or none.

    Args:
        model: Model of timm or of timm_spa, or the result of `add_attention` for a model of timm.
        folder: Folder to write to. Other files in it are unchanged.
        class_names: Names of the classes, in the order of the model's outputs. If None, those of the model.
        overwrite: Replace these files also in a folder that timm_spa did not write.

    Raises:
        SaveError: config.json cannot describe the model, or values of the weights are not finite.
        WriteError: The folder has files that timm_spa did not write, or cannot be written.
    """
    model = _whole_model(model)
    folder = Path(folder)
    count = model.num_classes
    if class_names is not None and len(class_names) != count:
        raise SaveError(
            f'{len(class_names)} class names were given, but the model has {count} classes. Give one name per class.')
    args = _plain_arguments(model)
    for problem in value_problems(model.state_dict()):
        raise SaveError(f'The model cannot be saved: it has {problem}.')
    finish_interrupted(folder)
    own = has_mark(folder)
    refuse_replacing([folder / WEIGHTS_FILENAME, folder / CONFIG], overwrite or own)
    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        cfg: Any = model.pretrained_cfg
        metadata: Dict[str, str] = dict(
            format='pt', model=cfg['architecture'], timm_spa=__version__,
            model_args=as_json({key: value for key, value in args.items() if key != 'num_classes'}))
        write_tensors(partial / WEIGHTS_FILENAME, model.state_dict(), metadata)
        config = write_config(partial / CONFIG, model, class_names)
        for key in OF_PUBLISHED_WEIGHTS:
            config['pretrained_cfg'].pop(key, None)
        _write_json(partial / CONFIG, config)
        _check_rebuilt(model, partial)


def push_to_hub(
        model: nn.Module,
        repo_id: str,
        *,
        license: str,
        class_names: Optional[Sequence[str]] = None,
        private: bool = False,
        create_pr: bool = False,
        replace_card: bool = False,
) -> Any:
    """Publishes a model as one commit of a Hub repository, which is created if needed.

    `timm.create_model('hf-hub:ORG/NAME', pretrained=True)` loads the repository, after `import timm_spa` if the model
    has attention. The command `timm-spa publish` writes a card with the results of a training.

    Args:
        model: As for `save_pretrained`.
        repo_id: Repository, 'organization/name'.
        license: License of the weights, an identifier of the Hub, e.g. 'apache-2.0'.
        class_names: As for `save_pretrained`.
        private: Publish to a private repository only.
        create_pr: Propose the commit in a pull request.
        replace_card: Replace the README.md of the repository, if it has one.

    Returns:
        The state of the repository: `url`, `commit`, `changed` and `notes`.

    Raises:
        PublishError: No token, no permission to write, no network, or a failed upload; or the repository is public
            although `private` is set.
        SaveError: As for `save_pretrained`. Nothing has been uploaded.
    """
    from ..training.run_record import Run  # `import timm_spa` needs none of these
    from .card import check_repository_name, make_card
    from .upload import CARD, upload

    check_repository_name(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, repo_id.partition('/')[2])
        save_pretrained(model, folder, class_names)
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        config['pretrained_cfg']['license'] = license
        _write_json(folder / CONFIG, config)
        card = make_card(
            config['architecture'], repo_id, Run(facts=dict(license=license)), config=config,
            weights=folder / WEIGHTS_FILENAME)
        card.save(folder / CARD)
        return upload(
            folder, repo_id, f'Weights of {config["architecture"]}', private=private, create_pr=create_pr,
            replace_card=replace_card)


def write_config(path: Path, model: Any, class_names: Optional[Sequence[str]] = None) -> Dict[str, Any]:
    """Writes the config.json of a model through timm, and returns its content."""
    names, descriptions = (model.pretrained_cfg.get(key) for key in ('label_names', 'label_descriptions'))
    if class_names is not None:
        names, descriptions = list(class_names), None
    if len(names or ()) != model.num_classes:
        names = descriptions = None
    # timm reads labels at either level. transformers shows `label_names` of the top level without descriptions, and
    # reads `id2label` only where `label_names` is missing
    labels: Dict[str, Any] = dict(label_names=names) if names and not descriptions else {}
    if descriptions:
        labels['id2label'] = {i: descriptions.get(name, name) for i, name in enumerate(names)}
    # without `dtype`, transformers would train in the float16 of the file, where AdamW gives NaN after one step
    save_config_for_hf(model, path, model_config=dict(dtype='float32', **labels))
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)  # a duplicate of the top level; transformers fails on two
    config['pretrained_cfg']['hf_hub_filename'] = WEIGHTS_FILENAME  # without it timm may look for a pickle
    for key in ('label_names', 'label_descriptions'):
        config['pretrained_cfg'].pop(key, None)
    if descriptions:
        config['pretrained_cfg'].update(label_names=names, label_descriptions=descriptions)
    config.update(MARK)
    return _write_json(path, config)


def _write_json(path: Path, config: Mapping[str, Any]) -> Dict[str, Any]:
    text = json.dumps(config, indent=2, ensure_ascii=False)
    path.write_text(f'{text}\n', encoding='utf-8')
    return json.loads(text)


def _whole_model(model: nn.Module) -> Any:
    """Returns the model inside of wrappers for training; raises SaveError unless timm made it, with its classifier."""
    from timm.utils import unwrap_model

    model = unwrap_model(model)
    cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
    kind = type(model).__name__
    if not is_model(cfg.get('architecture') or ''):
        raise SaveError(
            f'{kind} cannot be saved: config.json describes models of timm only, and timm did not create this one. '
            'Save its weights with torch.save(model.state_dict(), ...).')
    if not hasattr(model, 'num_classes'):
        raise SaveError(
            f'{kind} cannot be saved: it is a feature extractor, a part of {cfg["architecture"]}. Save the whole '
            "model, and load it with timm.create_model('local-dir:...', pretrained=True, features_only=True).")
    count_classes(model)
    return model


def _plain_arguments(model: Any) -> Dict[str, Any]:
    """Returns the arguments of a model; raises SaveError for the first one that JSON cannot hold."""
    args = get_model_args(model)
    for key, value in args.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as e:
            shown = getattr(value, '__name__', None) or repr(value)
            remedy = (
                'Save its weights with torch.save(model.state_dict(), ...) and add the same gate before you load them. '
                'Or register a model with timm that creates the network with this gate.'
            ) if key == 'gate' else (
                f"Create the model with the name of a layer instead, e.g. {key}='silu', if timm has one.")
            raise SaveError(
                f'The model cannot be saved: config.json cannot carry its argument {key}={shown}, which is neither '
                f'text nor a number. {remedy}') from e
    return args


def _check_rebuilt(model: Any, folder: Path) -> None:
    """Raises SaveError if the model that timm creates from a folder differs in tensors or layers."""
    architecture = model.pretrained_cfg['architecture']
    remedy = (
        'Pass changes of the network to timm.create_model (e.g. num_classes, in_chans, global_pool) instead of '
        'replacing layers, and save before fusing or quantizing.')
    try:
        with torch.device('meta'):
            rebuilt = timm.create_model(f'local-dir:{folder}')
    except Exception as e:  # timm and torch raise several types for invalid arguments
        raise SaveError(
            f'The model cannot be saved: {architecture} cannot be created from its config.json ({e}). {remedy}') from e
    mismatch = compare_tensors(model.state_dict(), rebuilt.state_dict())
    if mismatch:
        raise SaveError(
            f'The model cannot be saved: compared with the {architecture} that config.json describes, it has tensors '
            f'{mismatch}. {remedy}')
    own, other = dict(_layers(model)), dict(_layers(rebuilt))
    changed: List[str] = [
        f'{name} ({" ".join(own[name]).strip() if name in own else "removed"})'
        for name in {**other, **own} if own.get(name) != other.get(name)]
    if changed:
        raise SaveError(
            f'The model cannot be saved: {len(changed)} layers differ from the {architecture} that config.json '
            f'describes: {first_few(changed)}. {remedy}')


def _layers(model: nn.Module) -> Iterator[Tuple[str, Tuple[str, str]]]:
    """Yields the names of the layers that act on features, with kind and settings.

    Layers for regularization are not part of config.json. Batch norms may be synchronized or frozen.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if 'BatchNorm' in kind:
            yield name, ('BatchNorm', f'eps={getattr(module, "eps", None)}')
        elif name and not kind.startswith('Drop') and not isinstance(module, nn.Identity):
            yield name, (kind, module.extra_repr().replace('inplace=True', ''))
