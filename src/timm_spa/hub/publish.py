"""Publishing of trained weights as a repository of the Hub."""
import dataclasses
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import timm
from timm.models import get_pretrained_cfg

from .. import __version__
from ..checkpoints.config_file import class_labels, config_problems
from ..checkpoints.files import WriteError, finish_interrupted, replacing
from ..checkpoints.own_files import has_mark
from ..checkpoints.reading import CheckpointError, check_shapes, read_weights, value_problems, write_tensors
from ..checkpoints.run_arguments import (
    Recorded,
    as_json,
    configured_preprocessing,
    preprocessing,
    recorded_with,
)
from ..models._builder import WEIGHTS_FILENAME
from ..models._likely_model import likely_model
from ..training.run_record import Run, card_facts
from .card import benchmark_files, check_repository_name, make_card
from .card_sections import figure_file
from .facts import MissingFactsError, template_written
from .private import refuse_secrets, without_private_paths
from .save import write_config
from .upload import CARD, Published, PublishError, upload

__all__ = [
    'HUB_ORG', 'Published', 'PublishError', 'keep_card_yaml', 'publish', 'refuse_foreign', 'refuse_secrets',
    'without_private_paths', 'write_repository']

HUB_ORG = os.environ.get('TIMM_SPA_HUB_ORG', 'timm-spa')


def write_repository(
        folder: Union[str, Path],
        checkpoint: Union[str, Path],
        model_name: Optional[str] = None,
        repo_id: Optional[str] = None,
        num_classes: Optional[int] = None,
        replace_card: bool = False,
        results: Optional[Union[str, Path]] = None,
        overwrite: bool = False,
        model_kwargs: Optional[Mapping[str, Any]] = None,
) -> List[str]:
    """Writes the files of a Hub repository, after a check that the weights fit the model.

    The files are model.safetensors, config.json and README.md, and args.yaml, summary.csv, run.json and card.yaml of
    the training run if they are next to the checkpoint. Either all files are written or none.

    Args:
        folder: Folder to write to. Other files in it are unchanged, and its card.yaml is never replaced.
        checkpoint: A training checkpoint of timm, a file of a state dict, or a safetensors file.
        model_name: Architecture and tag, e.g. 'spa_resnet50.tmm_in1k'. If None, the architecture that the checkpoint,
            or args.yaml or config.json next to it, names, without a tag.
        repo_id: Name of the repository, for the card.
        num_classes: Number of classes, if neither the files of the training nor the model have the right one.
        replace_card: Replace an existing README.md, in the folder or next to a model.safetensors.
        results: Results of a sweep with the baselines that the card compares with.
        overwrite: Replace files of these names even in a folder that this package did not write.
        model_kwargs: Arguments of the model, if they are not recorded with the checkpoint.

    Returns:
        Remarks for the user, one per line.

    Raises:
        CheckpointError: The file cannot be read, or its weights do not fit the model or are not finite.
        PublishError: The name of the model is invalid, a file next to the checkpoint has a token or a password in it,
            or the card lacks required facts: a template for them is written next to the checkpoint.
        RunError: A file next to the checkpoint has invalid content.
        RunError: The metrics next to the checkpoint are not a table.
        WriteError: The folder has files that this package did not write, or cannot be written.
    """
    folder, checkpoint = Path(folder), Path(checkpoint)
    finish_interrupted(folder)
    architecture, _, tag = (model_name or '').partition('.')
    if model_name is not None and not (timm.is_model(architecture) and re.fullmatch(r'[\w.-]+', tag, re.ASCII)):
        raise PublishError(
            f'Invalid name of weights {model_name!r}: expected ARCHITECTURE.TAG, e.g. spa_resnet50.mine. The '
            'architectures are printed by `timm-spa list`. A tag may have ASCII letters, digits, ".", "_" and "-".')
    weights = read_weights(checkpoint)
    check_repository_name(repo_id)
    base = str((model_kwargs or {}).get('base') or '')

    def hint(tensors: Mapping[str, Any]) -> str:
        return likely_model(tensors, model_name or '', base)

    recorded = recorded_with(weights, checkpoint, model_name, model_kwargs, hint)
    model_name, model_args = recorded.name, recorded.model_args
    run = dataclasses.replace(Run.read(checkpoint.parent), args=_plain(recorded.args))
    for name, content in (('args.yaml', run.args), ('summary.csv', run.summary), ('run.json', run.record)):
        if (folder / name).exists() and not content:
            raise PublishError(
                f'{folder} has the {name} of another training, and {checkpoint} has none: the card would describe the '
                'other training. Choose another folder.')
    refuse_secrets(run)
    run, notes = without_private_paths(run)
    figures = [file for figure in run.facts.get('figures') or () if (file := figure_file(run, figure))]
    own = refuse_foreign(folder, run, figures, overwrite)
    # on the meta device: the file may claim any number of classes, and nothing here computes with the model
    model = _create_model(recorded, run, num_classes)
    check_shapes(weights.state_dict, model, checkpoint, hint)
    for problem in value_problems(weights.state_dict):
        raise CheckpointError(f'{checkpoint} has {problem}.')
    epoch = '' if weights.epoch is None else f', epoch {weights.epoch}'
    notes.insert(0, f'Weights: {weights.used or "all tensors"} of {checkpoint}{epoch}.')

    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        metadata = dict(
            format='pt', model=model_name, model_args=as_json(model_args),
            timm_spa=__version__, source_sha256=weights.sha256)
        if weights.epoch is not None:
            metadata['epoch'] = str(weights.epoch)
        write_tensors(partial / WEIGHTS_FILENAME, weights.state_dict, metadata)
        config = write_config(partial / 'config.json', model)
        problems = config_problems(config)
        if problems:
            raise PublishError(
                f'The training arguments of {checkpoint} do not describe a loadable model: {problems[0]}. Correct '
                'args.yaml next to the checkpoint.')
        if not class_labels(config) and not model_name.endswith('_in1k'):
            taken = ", and will be taken for ImageNet's" if model.num_classes == 1000 else ''
            notes.append(
                f'The classes have numbers but no names{taken}. To name them, write a classes.txt next to the '
                'checkpoint, one name per line.')
        run.write(partial)
        keep_card_yaml(folder, partial)
        for file in figures:  # a missing figure is an error of the card
            shutil.copyfile(run.folder / file, partial / file)
        # a card of an earlier call may have been edited since
        cards = [folder / CARD] if own else []
        if checkpoint.name == WEIGHTS_FILENAME:
            cards.append(checkpoint.parent / CARD)
        existing = next((card for card in cards if card.exists()), None)
        if existing and not replace_card:
            notes.append(f'The card is {existing}, unchanged; --replace-card replaces it.')
            shutil.copyfile(existing, partial / CARD)
        else:
            try:
                card = make_card(
                    model_name, repo_id, run, config=config, weights=partial / WEIGHTS_FILENAME, epoch=weights.epoch,
                    results=results)
            except MissingFactsError as e:
                raise template_written(e, run.folder, run.facts) from None
            card.save(partial / CARD)
        results_files = benchmark_files(model_name, run, config, partial / WEIGHTS_FILENAME, weights.epoch)
        for path, text in results_files.items():
            (partial / path).parent.mkdir(exist_ok=True)
            (partial / path).write_text(text, encoding='utf-8')
    return notes


def refuse_foreign(folder: Path, run: Run, figures: Sequence[str], overwrite: bool) -> bool:
    """Refuses to replace files in a folder that this package did not write.

    Args:
        folder: Folder of a repository; it may be missing.
        run: Files next to a checkpoint.
        figures: Names of the figures of its card.
        overwrite: Allow the replacement.

    Returns:
        Whether this package wrote the folder: its config.json has the mark.

    Raises:
        WriteError: Files would be lost; the message names all of them.
        PublishError: card.yaml differs from the one next to the checkpoint.
    """
    own = has_mark(folder)
    contents = {'args.yaml': run.args, 'summary.csv': run.summary, 'run.json': run.record}
    names = (WEIGHTS_FILENAME, 'config.json', CARD, *(name for name, content in contents.items() if content), *figures)
    foreign = [name for name in names if os.path.lexists(folder / name)]
    if foreign and not own and not overwrite:
        raise WriteError(
            f'{folder} is not a folder that `timm-spa publish` wrote, and has {", ".join(foreign)}, which would be '
            'replaced. Choose another folder, or replace them with --overwrite.')
    card_yaml = folder / 'card.yaml'
    if run.facts and os.path.lexists(card_yaml) and card_facts(folder) != run.facts:
        raise PublishError(
            f'{card_yaml} says something else than the card.yaml of the checkpoint, and is never replaced. Make the '
            f'two files equal, or remove {card_yaml}.')
    return own


def keep_card_yaml(folder: Path, partial: Path) -> None:
    """Keeps the card.yaml of a folder, comments included: its owner may have edited it."""
    if os.path.lexists(folder / 'card.yaml'):
        (partial / 'card.yaml').unlink(missing_ok=True)


def publish(
        checkpoint: Union[str, Path],
        model_name: Optional[str] = None,
        repo_id: Optional[str] = None,
        *,
        num_classes: Optional[int] = None,
        private: bool = False,
        create_pr: bool = False,
        tag: Optional[str] = None,
        replace_card: bool = False,
        results: Optional[Union[str, Path]] = None,
        model_kwargs: Optional[Mapping[str, Any]] = None,
) -> Published:
    """Publishes weights as one commit of a Hub repository, which is created if needed.

    Args:
        checkpoint: As for `write_repository`.
        model_name: As for `write_repository`.
        repo_id: Repository, 'organization/name'; if None that of the model's name under `HUB_ORG`.
        num_classes: As for `write_repository`.
        private: Publish to a private repository only.
        create_pr: Propose the commit in a pull request.
        tag: Tag of the commit; an existing tag is never moved.
        replace_card: Replace the README.md of the repository, if it has one.
        results: As for `write_repository`.
        model_kwargs: As for `write_repository`.

    Returns:
        The state of the repository.

    Raises:
        PublishError: No token, no permission to write, no network, or a failed upload; the repository is public
            although `private` is set; or the tag names another commit.
        CheckpointError: As for `write_repository`. After this and its other errors, nothing has been uploaded.
    """
    if not repo_id and not model_name:
        raise PublishError('No repository given. Name it, organization/name, or give the name of the weights.')
    repo_id = repo_id or f'{HUB_ORG}/{model_name}'
    check_repository_name(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, 'repository')
        notes = write_repository(
            folder, checkpoint, model_name, repo_id, num_classes, results=results, model_kwargs=model_kwargs)
        return upload(
            folder, repo_id, f'Weights of {model_name or repo_id}', notes, private=private, create_pr=create_pr,
            tag=tag, replace_card=replace_card)


def _create_model(recorded: Recorded, run: Run, num_classes: Optional[int]) -> Any:
    """Creates the trained model on the meta device, with the preprocessing of the training in its configuration."""
    model_name = recorded.name
    architecture, _, tag = model_name.partition('.')
    registered = model_name in timm.list_pretrained(architecture)
    overlay = preprocessing(run.args, architecture)
    labels: Dict[str, Any] = dict(label_names=run.classes or None, label_descriptions=None)
    if recorded.config and not run.args:  # else it may describe the weights that the training started from
        overlay.update(configured_preprocessing(recorded.config))
        labels = labels if run.classes else {**labels, **class_labels(recorded.config)}
    if not registered:  # the default configuration belongs to other weights
        overlay.update(
            tag=tag or None, hf_hub_id=None, hf_hub_filename=None, url=None, file=None, description=None, notes=None,
            license=run.facts.get('license'), **labels)
    elif run.classes and run.classes != list(get_pretrained_cfg(model_name).label_names or run.classes):
        raise PublishError(
            f'{run.folder / "classes.txt"} has other classes than {model_name}, a tag of other weights. Choose another '
            'tag.')
    try:
        model: Any = timm.create_model(
            model_name if registered else architecture,
            num_classes=num_classes or recorded.num_classes,
            pretrained_cfg_overlay=overlay,
            device='meta',
            **recorded.model_args,
        )
    except Exception as e:  # errors of timm and torch for invalid arguments
        raise PublishError(f'{architecture} cannot be created with the arguments of the training: {e}') from e
    if run.classes and len(run.classes) != model.num_classes:
        raise PublishError(
            f'{run.folder / "classes.txt"} names {len(run.classes)} classes, and the model has {model.num_classes}. '
            'Write one name per line, or remove the file.')
    return model


def _plain(value: Any) -> Any:
    """Converts arguments to what YAML and JSON can hold: those of a checkpoint may have types of torch."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
