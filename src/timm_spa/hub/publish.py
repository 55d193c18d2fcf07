"""Publishing of trained weights: the files of one Hub repository."""
import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import timm
from huggingface_hub import get_token
from timm.models import get_pretrained_cfg
from timm.models._hub import save_config_for_hf

from .. import __version__
from ..checkpoints.config_file import class_labels, config_problems
from ..checkpoints.files import WriteError, finish_interrupted, replacing
from ..checkpoints.own_files import MARK, has_mark
from ..checkpoints.reading import check_shapes, check_weights, read_weights, write_tensors
from ..checkpoints.run_arguments import as_json, preprocessing, trained_with
from ..models._builder import WEIGHTS_FILENAME
from ..training.run_record import Run, card_facts
from .card import check_repository_name, make_card
from .card_sections import figure_file
from .upload import CARD, Published, PublishError, upload

__all__ = [
    'HUB_ORG', 'Published', 'PublishError', 'keep_card_yaml', 'publish', 'refuse_foreign', 'refuse_secrets',
    'without_private_paths', 'write_repository']

HUB_ORG = os.environ.get('TIMM_SPA_HUB_ORG', 'timm-spa')
# tokens of the Hub, of GitHub and of clouds; a password in an address
SECRETS = re.compile(
    r'\b(?:hf_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|sk-[\w-]{20,})'
    r'|://[^/\s:@]*:[^/\s:@]+@')


def write_repository(
        folder: Union[str, Path],
        checkpoint: Union[str, Path],
        model_name: str,
        repo_id: Optional[str] = None,
        num_classes: Optional[int] = None,
        replace_card: bool = False,
        results: Optional[Union[str, Path]] = None,
        overwrite: bool = False,
) -> List[str]:
    """Writes the files of a Hub repository, after a check that the weights fit the model.

    These are model.safetensors, config.json and README.md, and args.yaml, summary.csv, run.json and card.yaml of the
    training run if they are next to the checkpoint. All of them are written or none, as `replacing` describes.

    Args:
        folder: Folder to write to. Other files in it are left alone, and its card.yaml is never replaced.
        checkpoint: A training checkpoint of timm, a file of a state dict, or a safetensors file.
        model_name: Architecture and tag, e.g. 'spa_resnet50.tmm_in1k'.
        repo_id: Repository that the card names.
        num_classes: Number of classes, if neither the training's arguments nor the model have it right.
        replace_card: Write README.md also if there is one, in the folder or beside a model.safetensors.
        results: Results of a sweep with the controls that the card compares with.
        overwrite: Replace files of these names also in a folder that this package did not write.

    Returns:
        Remarks for the reader, a line each.

    Raises:
        CheckpointError: The file cannot be read, or its weights do not fit the model or are not finite.
        PublishError: The name of the model is none, or a file beside the checkpoint has a token or a password in it.
        CardError: A card cannot be made of what is known.
        RunError: A file beside the checkpoint does not hold what it should.
        SummaryError: The metrics beside the checkpoint are no table.
        WriteError: The folder has files that this package did not write, or cannot be written.
    """
    folder, checkpoint = Path(folder), Path(checkpoint)
    finish_interrupted(folder)
    architecture, _, tag = model_name.partition('.')
    if not timm.is_model(architecture) or not re.fullmatch(r'[\w.-]+', tag, re.ASCII):
        raise PublishError(
            f'{model_name!r} names no weights: that is architecture.tag, e.g. spa_resnet50.tmm_in1k, the tag saying '
            'how it was trained and on what. `timm-spa list` has the architectures.')
    weights = read_weights(checkpoint)
    check_repository_name(repo_id)
    run = Run.read(checkpoint.parent)
    args, model_args = trained_with(weights, checkpoint, model_name)
    run = dataclasses.replace(run, args=_plain(args))
    for name, content in (('args.yaml', run.args), ('summary.csv', run.summary), ('run.json', run.record)):
        if (folder / name).exists() and not content:
            raise PublishError(
                f'{folder} has the {name} of another training, and {checkpoint} has none: its card would tell of that '
                'one. Name another folder.')
    refuse_secrets(run)
    run, notes = without_private_paths(run)
    figures = [file for figure in run.facts.get('figures') or () if (file := figure_file(run, figure))]
    own = refuse_foreign(folder, run, figures, overwrite)
    # without memory first: what a file says of the number of classes may be anything
    check_shapes(weights.state_dict, _named_model(model_name, run, num_classes, model_args, device='meta'), checkpoint)
    model = _named_model(model_name, run, num_classes, model_args)
    check_weights(weights.state_dict, model, checkpoint)
    notes.insert(0, f'Weights: {weights.used or "all tensors"} of {checkpoint}' + (
        f', epoch {weights.epoch}.' if weights.epoch is not None else '.'))

    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        metadata = dict(
            format='pt', model=model_name, model_args=as_json(model_args),
            timm_spa=__version__, source_sha256=weights.sha256)
        if weights.epoch is not None:
            metadata['epoch'] = str(weights.epoch)
        write_tensors(partial / WEIGHTS_FILENAME, weights.state_dict, metadata)
        config = _write_config(partial / 'config.json', model)
        problems = config_problems(config)
        if problems:
            raise PublishError(f'The arguments of the training describe no model that could be loaded: {problems[0]}.')
        if not class_labels(config) and not model_name.endswith('_in1k'):
            taken = ", and will be taken for ImageNet's" if model.num_classes == 1000 else ''
            notes.append(
                f'The classes have numbers and no names{taken}. classes.txt beside the checkpoint names them, one a '
                'line.')
        run.write(partial)
        keep_card_yaml(folder, partial)
        for file in figures:  # the card says what is missing
            shutil.copyfile(run.folder / file, partial / file)
        # what an earlier call wrote may have been edited since
        cards = [folder / CARD] if own else []
        if checkpoint.name == WEIGHTS_FILENAME:
            cards.append(checkpoint.parent / CARD)
        written = next((card for card in cards if card.exists()), None)
        if written and not replace_card:
            notes.append(f'The card is {written}, as it is.')
            shutil.copyfile(written, partial / CARD)
        else:
            make_card(
                model_name, repo_id, run, config=config, weights=partial / WEIGHTS_FILENAME, epoch=weights.epoch,
                results=results).save(partial / CARD)
    return notes


def refuse_foreign(folder: Path, run: Run, figures: Sequence[str], overwrite: bool) -> bool:
    """Refuses to replace files in a folder that this package did not write.

    Args:
        folder: Folder of a repository, which need not exist.
        run: What is next to a checkpoint.
        figures: Names of the figures of its card.
        overwrite: Allow it.

    Returns:
        Whether this package wrote the folder: its config.json has the mark.

    Raises:
        WriteError: A file would be lost; the message names all of them.
        PublishError: card.yaml has other facts than the one next to the checkpoint.
    """
    own = has_mark(folder)
    contents = {'args.yaml': run.args, 'summary.csv': run.summary, 'run.json': run.record}
    names = (WEIGHTS_FILENAME, 'config.json', CARD, *(name for name, content in contents.items() if content), *figures)
    foreign = [name for name in names if os.path.lexists(folder / name)]
    if foreign and not own and not overwrite:
        raise WriteError(
            f'{folder} is not a folder that `timm-spa publish` wrote, and has {", ".join(foreign)}, which would be '
            'replaced. Name another folder, or replace them with --overwrite.')
    card_yaml = folder / 'card.yaml'
    if run.facts and os.path.lexists(card_yaml) and card_facts(folder) != run.facts:
        raise PublishError(
            f'{card_yaml} says something else than the card.yaml of the checkpoint, and is never replaced. Make them '
            'the same, or remove the first.')
    return own


def keep_card_yaml(folder: Path, partial: Path) -> None:
    """Leaves the card.yaml of a folder as it is, which its owner may have edited, comments included."""
    if os.path.lexists(folder / 'card.yaml'):
        (partial / 'card.yaml').unlink(missing_ok=True)


def publish(
        checkpoint: Union[str, Path],
        model_name: str,
        repo_id: Optional[str] = None,
        *,
        num_classes: Optional[int] = None,
        private: bool = False,
        create_pr: bool = False,
        tag: Optional[str] = None,
        replace_card: bool = False,
        results: Optional[Union[str, Path]] = None,
) -> Published:
    """Publishes weights as one commit of a Hub repository, which is created if there is none.

    Args:
        checkpoint: As for `write_repository`.
        model_name: As for `write_repository`.
        repo_id: Repository, 'organization/name'; if None that of the model's name under `HUB_ORG`.
        num_classes: As for `write_repository`.
        private: Publish to a private repository only.
        create_pr: Propose the commit in a pull request.
        tag: Name to give to the commit; a tag is never moved.
        replace_card: Replace the README.md of the repository, if it has one.
        results: As for `write_repository`.

    Returns:
        What became of the repository.

    Raises:
        PublishError: There is no token, no right to write, no network, or the upload failed; or the repository is
            public and should not be, or the tag is there and names another commit.
        CheckpointError: As for `write_repository`, and also its other errors; nothing has left the machine then.
    """
    repo_id = repo_id or f'{HUB_ORG}/{model_name}'
    check_repository_name(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, model_name)
        notes = write_repository(folder, checkpoint, model_name, repo_id, num_classes, results=results)
        return upload(
            folder, repo_id, f'Weights of {model_name}', notes, private=private, create_pr=create_pr, tag=tag,
            replace_card=replace_card)


def _named_model(
        model_name: str,
        run: Run,
        num_classes: Optional[int],
        model_args: Dict[str, Any],
        **kwargs: Any,
) -> Any:
    """Creates the model as it was trained, with the preprocessing of the training in its configuration."""
    args = run.args
    architecture, _, tag = model_name.partition('.')
    registered = model_name in timm.list_pretrained(architecture)
    overlay = preprocessing(args, architecture)
    if not registered:  # the default configuration is that of other weights
        overlay.update(
            tag=tag, hf_hub_id=None, hf_hub_filename=None, url=None, file=None, description=None, notes=None,
            label_names=run.classes or None, label_descriptions=None, license=run.facts.get('license'))
    elif run.classes and run.classes != list(get_pretrained_cfg(model_name).label_names or run.classes):
        raise PublishError(
            f'classes.txt beside the checkpoint has other classes than {model_name}, which is of other weights: '
            'choose another tag.')
    try:
        model: Any = timm.create_model(
            model_name if registered else architecture,
            num_classes=num_classes or args.get('num_classes'),
            pretrained_cfg_overlay=overlay,
            **model_args,
            **kwargs,
        )
    except Exception as e:  # timm's, for arguments that are not the model's
        raise PublishError(f'{architecture} cannot be made with the arguments of the training: {e}') from e
    if run.classes and len(run.classes) != model.num_classes:
        raise PublishError(
            f'classes.txt beside the checkpoint names {len(run.classes)} classes, and the model has '
            f'{model.num_classes}: it needs one name a line, or to go.')
    return model


def _write_config(path: Path, model: Any) -> Dict[str, Any]:
    names, descriptions = (model.pretrained_cfg.get(key) for key in ('label_names', 'label_descriptions'))
    if len(names or ()) != model.num_classes:
        names = descriptions = None
    # timm reads labels at either level; transformers shows `label_names` of the upper one as they are, and reads
    # `id2label` only where there are none
    labels: Dict[str, Any] = dict(label_names=names) if names and not descriptions else {}
    if descriptions:
        labels['id2label'] = {i: descriptions.get(name, name) for i, name in enumerate(names)}
    # transformers would compute in the precision of the file, and AdamW in float16 gives NaN after one step
    save_config_for_hf(model, path, model_config=dict(dtype='float32', **labels))
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)  # also at the top level; transformers fails on two
    config['pretrained_cfg']['hf_hub_filename'] = WEIGHTS_FILENAME  # without it timm may look for a pickle
    for key in ('label_names', 'label_descriptions'):
        config['pretrained_cfg'].pop(key, None)
    if descriptions:
        config['pretrained_cfg'].update(label_names=names, label_descriptions=descriptions)
    config.update(MARK)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    path.write_text(f'{text}\n', encoding='utf-8')
    return json.loads(text)


def _plain(value: Any) -> Any:
    """Returns arguments as YAML and JSON can hold them: a checkpoint's may have types of torch among them."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def refuse_secrets(run: Run) -> None:
    """Refuses to publish a run with a secret in it.

    Args:
        run: What lies beside a checkpoint.

    Raises:
        PublishError: Something looks like a token or a password; the message names the field.
    """
    own = get_token()

    def look(value: Any, field: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                look(part, f'{field}: {key}')
        elif isinstance(value, (list, tuple)):
            for part in value:
                look(part, field)
        elif isinstance(value, str) and (SECRETS.search(value) or (own and own in value)):
            raise PublishError(
                f'{field} has what looks like a token or a password in it, which would be published. Take it out of '
                'the file, and withdraw it if others could see it.')

    for name, content in (('args.yaml', run.args), ('run.json', run.record), ('card.yaml', run.facts)):
        look(content, name)


def without_private_paths(run: Run) -> Tuple[Run, List[str]]:
    """Reduces paths of this machine in the arguments and the command to their last part.

    Args:
        run: What lies beside a checkpoint.

    Returns:
        The run without these paths, and a line on each.
    """
    notes: List[str] = []

    def reduce(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {k: reduce(v, str(k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [reduce(v, key) for v in value]
        reduced = _reduced(value) if isinstance(value, str) else value
        if reduced != value:
            notes.append(f'{key}: {value!r} is a path of this machine, and is published as {reduced!r}.')
        return reduced

    return dataclasses.replace(run, args=reduce(run.args, 'args'), record=reduce(run.record, 'run')), notes


def _reduced(value: str) -> str:
    """Returns text with the last part of each path in it: of the whole, of what is quoted, or of a word."""
    def replace(found: Any) -> str:
        text = found[0]
        quote = text[0] if text[0] in '\'"' else ''
        return f'{quote}{_reduced(text[1:-1])}{quote}' if quote else _last_part(text)

    whole = _last_part(value)
    return whole if whole != value else re.sub(r''''[^']*'|"[^"]*"|(?<![^\s='",])[^\s='",]+''', replace, value)


def _last_part(value: str) -> str:
    """Returns the last part of a path that is absolute or leaves the working folder, everything else unchanged."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(value)
        if len(path.parts) > 1 and (path.is_absolute() or path.parts[0] == '..' or path.parts[0].startswith('~')):
            return path.name
    return value
