"""Model cards, made of what was measured and of nothing else."""
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoints.config_file import class_labels, config_problems
from ..checkpoints.files import ReadError, read_text
from ..checkpoints.reading import CheckpointError, read_header, stored_epoch
from ..predict import load_model, predict
from ..training.run_record import Run
from .card_sections import (
    CardError,
    cost_of,
    description,
    details,
    evaluation,
    evidence,
    figures,
    limits,
    recipe,
    shapes,
    start_weights,
)
from .comparison import comparison_table, read_results
from .markdown import listed, paragraphs, wrapped

__all__ = ['CardError', 'card_of_folder', 'check_repository_name', 'make_card']

TEMPLATE = Path(__file__).with_name('card_template.md')
# data sets that a tag names: the Hub's id and the name
DATASETS: Dict[str, Tuple[str, str]] = {'in1k': ('ILSVRC/imagenet-1k', 'ImageNet-1k')}


def make_card(
        model_name: str,
        repo_id: Optional[str] = None,
        run: Optional[Run] = None,
        *,
        config: Mapping[str, Any],
        weights: Optional[Union[str, Path]] = None,
        epoch: Optional[int] = None,
        results: Optional[Union[str, Path]] = None,
) -> ModelCard:
    """Makes the card of a repository. A fact that is not known leaves its line out.

    Args:
        model_name: Name of the weights, architecture and tag, e.g. 'spa_resnet50.tmm_in1k'.
        repo_id: Repository, 'organization/name'. If None, the card shows how to load the registered weights of the
            name, or from the folder itself if there are none.
        run: What lies beside the checkpoint.
        config: Content of the repository's config.json.
        weights: The safetensors file, to state how it is stored.
        epoch: Epoch of the run that the weights are of (a training checkpoint knows it); the accuracy is then that of
            its row in summary.csv, unless card.yaml has one that was measured on the published file. If None, it is
            taken from card.yaml, or from the metadata of `weights` ('epoch').
        results: Folder of a sweep, `train_scripts/results/<sweep>`, with the controls to compare with.

    Returns:
        The card; `card.save(path)` writes it.

    Raises:
        CardError: A fact is missing that a card must state, or facts contradict each other.
        CheckpointError: `weights` cannot be read, or are of a smaller model.
        RunError: A file of a control's run cannot be read, or it is no control.
        SummaryError: The metrics of a control are no table.
    """
    run = run or Run()
    facts = run.facts
    check_repository_name(repo_id)
    _check_agreement(model_name, config, run)
    row = run.row(_agreed_epoch(run, weights, epoch))
    if run.args.get('model_ema') and run.args.get('model_ema_force_cpu'):
        row = None  # timm measured the weights that are not averaged then
    dataset = _dataset(model_name, run)
    scores = _scores(run, row, config['num_classes'])
    for k, value in scores.items():
        if not 0 <= value <= 100:  # nor is it for NaN
            raise CardError(f'The top-{k} accuracy of {model_name} is said to be {value} %.')
    if scores and 'name' not in dataset:
        raise CardError(
            f'The accuracy {scores} is of an unnamed data set. Name it in card.yaml beside the checkpoint: '
            '"dataset: {name: ..., id: its id on the Hub, if it has one}".')
    cfg = config['pretrained_cfg']
    licence = facts.get('license') or cfg.get('license')
    if not licence:
        raise CardError(
            f'Nobody but you can choose the licence of {model_name}, and a card must name it. Say in card.yaml beside '
            'the checkpoint: "license: apache-2.0", or another identifier of the Hub.')
    try:
        cost, examples = cost_of(config), shapes(config)
    except Exception as e:  # timm's and torch's, for arguments that are not the model's
        raise CardError(f'{config["architecture"]} cannot be made with the arguments of config.json: {e}') from e
    if weights is not None and cost.parameters > os.path.getsize(weights):
        raise CheckpointError(
            f'{weights} is too small for the {cost.parameters:,} parameters of the model in config.json.')
    data = ModelCardData(
        license=licence,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_spa'],
        datasets=[dataset['id']] if 'id' in dataset else None,
        base_model=_base_model(config, run) or None,
        widget=_widget(config, run, weights),
        model_name=model_name if scores else None,
        eval_results=[
            EvalResult(
                task_type='image-classification',
                task_name='Image classification',
                dataset_type=dataset.get('id') or dataset.get('type', 'imagefolder'),
                dataset_name=dataset['name'],
                dataset_split=dataset.get('split'),
                metric_type='accuracy',
                metric_name=f'Top-{k} accuracy',
                metric_value=value,
            ) for k, value in scores.items()] or None,
    )
    comparison = comparison_table(read_results(results, config['architecture']), run, config['architecture']) \
        if results else []
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding='utf-8'),
        title=model_name,
        about=paragraphs(description(config, scores, dataset), facts.get('about')),
        details=details(config, dataset, weights, cost),
        source=_source(model_name, repo_id),
        repository=repo_id or '.',
        top_k=min(5, config['num_classes']),
        mode='L' if config['pretrained_cfg']['input_size'][0] == 1 else 'RGB',
        **examples,
        commands=[wrapped(command) for command in facts.get('commands') or listed(run.record.get('command'))],
        recipe=recipe(run),
        training=facts.get('training', '').strip(),
        evidence=evidence(run, alone=not comparison),
        comparison=comparison,
        evaluation=evaluation(run, row, dataset.get('split'), scores),
        figures=figures(run),
        runtimes=facts.get('runtimes', '').strip(),
        limits=limits(config, dataset, facts),
    )


def card_of_folder(
        folder: Union[str, Path],
        repo_id: Optional[str] = None,
        results: Optional[Union[str, Path]] = None,
) -> ModelCard:
    """Makes the card of a repository's folder from the files in it.

    Args:
        folder: Folder with config.json, as `timm-spa publish --dry-run` writes it.
        repo_id: Repository that the folder is of, as for `make_card`.
        results: As for `make_card`.

    Returns:
        The card.

    Raises:
        CheckpointError: model.safetensors cannot be read.
        CardError: The folder has no config.json that a model can be made of, or as for `make_card`.
        RunError: As for `make_card`, also for the files of the folder.
        SummaryError: As for `make_card`, also for the files of the folder.
    """
    folder = Path(folder)
    try:
        config = json.loads(read_text(folder / 'config.json'))
    except (ReadError, ValueError, RecursionError) as e:
        raise CardError(f'{folder} is no folder of a repository: config.json cannot be read ({e}).') from e
    problems = config_problems(config)
    if problems:
        raise CardError(f'{folder}: {"; ".join(problems)}.')
    architecture = config['architecture']
    name = '.'.join(filter(None, (architecture, config['pretrained_cfg'].get('tag'))))
    cfg = timm.get_pretrained_cfg(name) if name in timm.list_pretrained(f'{architecture}.*') else None
    candidates = (folder / 'model.safetensors', Path(cfg.file) if cfg and cfg.file else None)
    weights = next((path for path in candidates if path and path.is_file()), None)
    return make_card(name, repo_id, Run.read(folder), config=config, weights=weights, results=results)


def _source(model_name: str, repo_id: Optional[str]) -> str:
    """Returns what `timm.create_model` loads the weights by."""
    if repo_id:
        return f'hf-hub:{repo_id}'
    return model_name if model_name in timm.list_pretrained(model_name.partition('.')[0]) else 'local-dir:.'


def _check_agreement(model_name: str, config: Mapping[str, Any], run: Run) -> None:
    architecture = model_name.partition('.')[0]
    claims = {
        'architecture': [('config.json', config.get('architecture')), ('args.yaml', _untagged(run.args.get('model'))),
                         ('run.json', _untagged(run.record.get('model'))), ('the name', architecture)],
        'number of classes': [('config.json', config.get('num_classes')), ('args.yaml', run.args.get('num_classes'))],
        'seed': [('args.yaml', run.args.get('seed')), ('run.json', run.record.get('seed'))],
    }
    for what, sources in claims.items():
        said = [(source, value) for source, value in sources if value is not None]
        if len({value for _, value in said}) > 1:
            raise CardError(f'The {what} is ' + ', '.join(f'{value} by {source}' for source, value in said) + '.')
    if not timm.is_model(architecture):
        raise CardError(f'There is no model {architecture!r} to make a card of.')


def _untagged(name: Optional[str]) -> Optional[str]:
    return None if name is None else str(name).partition('.')[0]


def _agreed_epoch(run: Run, weights: Optional[Union[str, Path]], epoch: Optional[int]) -> Optional[int]:
    stored = None if weights is None else stored_epoch(read_header(weights).facts)
    said = {e for e in (epoch, run.facts.get('epoch'), stored) if e is not None}
    if len(said) > 1:
        raise CardError(f'The weights are of epoch {" and ".join(map(str, sorted(said)))}: only one can be true.')
    found = next(iter(said), None)
    if found is not None and run.summary and run.row(found) is None:
        raise CardError(f'The weights are of epoch {found}, which summary.csv does not have.')
    return found


def _dataset(model_name: str, run: Run) -> Dict[str, str]:
    dataset_id, name = DATASETS.get(model_name.partition('.')[2].rpartition('_')[2], (None, None))
    loaded = str(run.args.get('dataset') or '')
    if loaded.startswith('hfds/'):
        dataset_id = loaded.removeprefix('hfds/')
    found = dict(id=dataset_id, name=name or dataset_id, split=run.args.get('val_split'))
    found.update(run.facts.get('dataset', {}))
    return {k: ' '.join(str(v).split()) for k, v in found.items() if v is not None}


def _scores(run: Run, row: Optional[Mapping[str, float]], num_classes: int) -> Dict[int, float]:
    """Returns the accuracy by k: what was measured on the published file, else that of the run's own evaluation."""
    ks = (1, 5) if num_classes > 5 else (1,)  # the best five of five are always right
    measured = run.facts.get('accuracy')
    if measured:
        if 'top1' not in measured:
            raise CardError("'accuracy' in card.yaml lacks 'top1'.")
        return {k: measured[f'top{k}'] for k in ks if f'top{k}' in measured}
    return {k: round(row[f'eval_top{k}'], 3) for k in ks if f'eval_top{k}' in row} if row else {}


def _base_model(config: Mapping[str, Any], run: Run) -> Optional[str]:
    if 'base_model' in run.facts:
        return run.facts['base_model']
    for option in ('initial_checkpoint', 'pretrained_path'):
        if run.args.get(option):
            raise CardError(
                f'Training started from a file (args.yaml has {option} {run.args[option]!r}). Say in card.yaml whose '
                'weights these are, "base_model: organization/name", or "base_model: \'\'" if they are not on the Hub.')
    start = start_weights(run)
    cfg = timm.get_pretrained_cfg(start) if start else None
    return cfg.hf_hub_id.partition('@')[0] if cfg and cfg.hf_hub_id else None


def _widget(
        config: Mapping[str, Any],
        run: Run,
        weights: Optional[Union[str, Path]],
) -> Optional[List[Dict[str, Any]]]:
    """Returns the pictures for the Hub's page, with what these weights say of them."""
    pictures = run.facts.get('widget')
    if not pictures:
        return None
    if weights is None:
        raise CardError("'widget' in card.yaml needs the weights: what they say of a picture is computed.")
    model: Any = load_model(config['architecture'], weights, config['num_classes'])
    model.pretrained_cfg.update(config['pretrained_cfg'], **class_labels(config))
    entries = []
    for entry in pictures:
        if not {'src', 'picture'} <= entry.keys():
            raise CardError(f"An entry of 'widget' in card.yaml needs 'src' and 'picture', and is {entry}.")
        prediction = next(predict(model, [run.folder / entry['picture']]))
        if prediction.error:
            raise CardError(f'The picture {entry["picture"]} of card.yaml cannot be read: {prediction.error}')
        entries.append(dict(src=entry['src'], output=[
            dict(label=c['name'], score=round(c['probability'], 4)) for c in prediction.classes]))
    return entries


def check_repository_name(repo_id: Optional[str]) -> None:
    """Checks that a name can stand in the code of a card.

    Args:
        repo_id: Repository, 'organization/name', or None.

    Raises:
        CardError: It is no name of a repository.
    """
    if repo_id is not None and not re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id, re.ASCII):
        raise CardError(f'A repository is organization/name, and {repo_id!r} is not.')
