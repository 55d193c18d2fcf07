"""Model cards, written from the files of a training run."""
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
from ..checkpoints.run_arguments import untagged
from ..predict import load_model, predict
from ..training.run_record import Run
from .card_sections import (
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
from .eval_results import eval_results
from .facts import refuse_missing
from .markdown import paragraphs, wrapped
from .upload import PublishError

__all__ = ['CardError', 'benchmark_files', 'card_of_folder', 'check_repository_name', 'make_card']

CardError = PublishError  # earlier name
TEMPLATE = Path(__file__).with_name('card_template.md')
# datasets by the end of a tag: the id on the Hub, and the name
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
    """Creates the card of a repository. Lines about unknown facts are left out.

    Args:
        model_name: Name of the weights, architecture and tag, e.g. 'spa_resnet50.tmm_in1k'. Without a tag, the title
            is the name of the repository.
        repo_id: Repository, 'organization/name'. If None, the card shows how to load the registered weights of
            `model_name`, or how to load from the folder if no weights are registered.
        run: Files next to the checkpoint.
        config: Content of the repository's config.json.
        weights: The safetensors file; the card states its size and data types.
        epoch: Epoch of the weights. The accuracy is that of its row in summary.csv, unless card.yaml has an accuracy
            that was measured on the published file. If None, the epoch is read from card.yaml or from the metadata of
            `weights`.
        results: Folder of a sweep with the baselines to compare with, e.g. `train_scripts/results/tin200`.

    Returns:
        The card; `card.save(path)` writes it.

    Raises:
        MissingFactsError: Required facts are missing. The message lists all of them.
        PublishError: Facts contradict each other.
        CheckpointError: `weights` cannot be read, or are too small for the model.
        RunError: A file of a baseline's run cannot be read, or the run cannot be compared.
        RunError: The metrics of a baseline are not a table.
    """
    run = run or Run()
    facts = run.facts
    check_repository_name(repo_id)
    _check_agreement(model_name, config, run)
    row, dataset, scores = _measured(model_name, run, config, weights, epoch)
    license_id = facts.get('license') or config['pretrained_cfg'].get('license')
    refuse_missing(model_name, _missing_facts(run, license_id, dataset, scores))
    try:
        cost, examples = cost_of(config), shapes(config)
    except Exception as e:  # errors of timm and torch for invalid arguments
        raise PublishError(f'{config["architecture"]} cannot be created with the arguments of config.json: {e}') from e
    if weights is not None and cost.parameters > os.path.getsize(weights):
        raise CheckpointError(
            f'{weights} is too small for the {cost.parameters:,} parameters of the model in config.json. Write the '
            'repository again with `timm-spa publish`.')
    data = ModelCardData(
        license=license_id,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_spa'],
        datasets=[dataset['id']] if 'id' in dataset else None,
        base_model=_base_model(config, run) or None,
        widget=_widget(config, run, weights),
        model_name=model_name if scores else None,
        eval_results=[_eval_result(dataset, k, value) for k, value in scores.items()] or None,
    )
    architecture, command = config['architecture'], run.record.get('command')
    comparison = comparison_table(read_results(results, architecture), run, architecture) if results else []
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding='utf-8'),
        title=repo_id.partition('/')[2] if repo_id and '.' not in model_name else model_name,
        about=paragraphs(description(config, scores, dataset), facts.get('about')),
        details=details(config, dataset, weights, cost),
        source=_source(model_name, repo_id),
        repository=repo_id or '.',
        top_k=min(5, config['num_classes']),
        mode='L' if config['pretrained_cfg']['input_size'][0] == 1 else 'RGB',
        **examples,
        commands=[wrapped(text) for text in facts.get('commands') or [command or ''] if text],
        recipe=recipe(run),
        training=facts.get('training', '').strip(),
        evidence=evidence(run, alone=not comparison),
        comparison=comparison,
        evaluation=evaluation(run, row, dataset.get('split'), scores),
        figures=figures(run),
        runtimes=facts.get('runtimes', '').strip(),
        limits=limits(config, dataset, facts),
    )


def _measured(
        model_name: str,
        run: Run,
        config: Mapping[str, Any],
        weights: Optional[Union[str, Path]],
        epoch: Optional[int],
) -> Tuple[Optional[Dict[str, float]], Dict[str, str], Dict[int, float]]:
    """Returns the metrics of the epoch of the weights, facts about the dataset, and the accuracy by k."""
    row = run.row(_agreed_epoch(run, weights, epoch))
    if run.args.get('model_ema') and run.args.get('model_ema_force_cpu'):
        row = None  # timm measured the weights without averaging in this case
    return row, _dataset(model_name, run), _scores(run, row, config['num_classes'])


def benchmark_files(
        model_name: str,
        run: Run,
        config: Mapping[str, Any],
        weights: Union[str, Path],
        epoch: Optional[int] = None,
) -> Dict[str, str]:
    """Returns files with results on a benchmark of the Hub, by path. The arguments are those of `make_card`."""
    _, dataset, scores = _measured(model_name, run, config, weights, epoch)
    return eval_results(dataset, scores)


def card_of_folder(
        folder: Union[str, Path],
        repo_id: Optional[str] = None,
        results: Optional[Union[str, Path]] = None,
) -> ModelCard:
    """Creates the card of a repository's folder from the files in it.

    Args:
        folder: Folder as written by `timm-spa publish --dry-run`.
        repo_id: As for `make_card`.
        results: As for `make_card`.

    Returns:
        The card.

    Raises:
        CheckpointError: model.safetensors cannot be read.
        PublishError: config.json is missing or does not describe a model, or as for `make_card`.
        RunError: As for `make_card`, also for the files of the folder.
        RunError: As for `make_card`, also for the files of the folder.
    """
    folder = Path(folder)
    try:
        config = json.loads(read_text(folder / 'config.json'))
    except (ReadError, ValueError, RecursionError) as e:
        raise PublishError(
            f'{folder} is not the folder of a repository: config.json cannot be read ({e}). Write the folder with '
            '`timm-spa publish --dry-run`.') from e
    problems = config_problems(config)
    if problems:
        raise PublishError(f'{folder}: {"; ".join(problems)}.')
    architecture = config['architecture']
    name = '.'.join(filter(None, (architecture, config['pretrained_cfg'].get('tag'))))
    cfg = timm.get_pretrained_cfg(name) if name in timm.list_pretrained(f'{architecture}.*') else None
    candidates = (folder / 'model.safetensors', Path(cfg.file) if cfg and cfg.file else None)
    weights = next((path for path in candidates if path and path.is_file()), None)
    return make_card(name, repo_id, Run.read(folder), config=config, weights=weights, results=results)


def _missing_facts(
        run: Run,
        license_id: Optional[str],
        dataset: Mapping[str, str],
        scores: Mapping[int, float],
) -> Dict[str, str]:
    """Returns the facts that card.yaml lacks, with the cause why they are needed."""
    missing = {} if license_id else {'license': ''}
    measured = run.facts.get('accuracy')
    if measured and 'top1' not in measured:
        missing['accuracy.top1'] = ''
    if (scores or measured) and 'name' not in dataset:
        missing['dataset.name'] = ', '.join(f'top-{k} is {value} %' for k, value in scores.items())
    if 'task_id' in dataset and 'id' not in dataset:
        missing['dataset.id'] = ''
    option = next((key for key in ('initial_checkpoint', 'pretrained_path') if run.args.get(key)), None)
    if option and 'base_model' not in run.facts:
        missing['base_model'] = f'args.yaml has {option} {run.args[option]!r}'
    return missing


def _source(model_name: str, repo_id: Optional[str]) -> str:
    """Returns the first argument of `timm.create_model` for these weights."""
    if repo_id:
        return f'hf-hub:{repo_id}'
    return model_name if model_name in timm.list_pretrained(model_name.partition('.')[0]) else 'local-dir:.'


def _check_agreement(model_name: str, config: Mapping[str, Any], run: Run) -> None:
    architecture = model_name.partition('.')[0]
    claims = {
        'architecture': {
            'the name': architecture, 'config.json': config.get('architecture'),
            'args.yaml': untagged(run.args.get('model')), 'run.json': untagged(run.record.get('model'))},
        'number of classes': {'config.json': config.get('num_classes'), 'args.yaml': run.args.get('num_classes')},
        'seed': {'args.yaml': run.args.get('seed'), 'run.json': run.record.get('seed')},
    }
    for fact, values in claims.items():
        known = {source: value for source, value in values.items() if value not in (None, '')}
        if len(set(known.values())) > 1:
            listed = ', '.join(f'{value} ({source})' for source, value in known.items())
            raise PublishError(f'Conflicting {fact}: {listed}. Correct the wrong file, or move it to another folder.')
    if not timm.is_model(architecture):
        raise PublishError(
            f'Unknown model {architecture!r}: it is not registered in timm. `timm-spa list` prints the models.')


def _agreed_epoch(run: Run, weights: Optional[Union[str, Path]], epoch: Optional[int]) -> Optional[int]:
    stored = None if weights is None else stored_epoch(read_header(weights).facts)
    epochs = sorted({e for e in (epoch, run.facts.get('epoch'), stored) if e is not None})
    if len(epochs) > 1:
        raise PublishError(
            f'Conflicting epochs of the weights: {" and ".join(map(str, epochs))}. Correct "epoch" in card.yaml.')
    if epochs and run.summary and run.row(epochs[0]) is None:
        raise PublishError(
            f'The weights are from epoch {epochs[0]}, but summary.csv has no row for it. Use the summary.csv of the '
            'same training.')
    return epochs[0] if epochs else None


def _dataset(model_name: str, run: Run) -> Dict[str, str]:
    dataset_id, name = DATASETS.get(model_name.partition('.')[2].rpartition('_')[2], (None, None))
    loaded = str(run.args.get('dataset') or '')
    if loaded.startswith('hfds/'):
        dataset_id = loaded.removeprefix('hfds/')
    dataset = dict(id=dataset_id, name=name or dataset_id, split=run.args.get('val_split'))
    dataset.update(run.facts.get('dataset', {}))
    return {k: ' '.join(str(v).split()) for k, v in dataset.items() if v is not None}


def _scores(run: Run, row: Optional[Mapping[str, float]], num_classes: int) -> Dict[int, float]:
    """Returns the accuracy by k: as measured on the published file, else from the run's own evaluation."""
    ks = (1, 5) if num_classes > 5 else (1,)  # top-5 of five classes is always 100 %
    measured = run.facts.get('accuracy')
    if measured:
        scores = {k: measured[f'top{k}'] for k in ks if f'top{k}' in measured}
    else:
        scores = {k: round(row[f'eval_top{k}'], 3) for k in ks if row and f'eval_top{k}' in row}
    for k, value in scores.items():
        if not 0 <= value <= 100:  # also refuses NaN
            raise PublishError(
                f'Invalid top-{k} accuracy: {value}, expected a percentage from 0 to 100. Correct '
                f'{"card.yaml" if measured else "summary.csv"} next to the checkpoint.')
    return scores


def _eval_result(dataset: Mapping[str, str], k: int, value: float) -> EvalResult:
    return EvalResult(
        task_type='image-classification',
        task_name='Image classification',
        dataset_type=dataset.get('id') or dataset.get('type', 'imagefolder'),
        dataset_name=dataset['name'],
        dataset_split=dataset.get('split'),
        metric_type='accuracy',
        metric_name=f'Top-{k} accuracy',
        metric_value=value,
    )


def _base_model(config: Mapping[str, Any], run: Run) -> Optional[str]:
    if 'base_model' in run.facts:
        return run.facts['base_model']
    start = start_weights(run)
    cfg = timm.get_pretrained_cfg(start) if start else None
    return cfg.hf_hub_id.partition('@')[0] if cfg and cfg.hf_hub_id else None


def _widget(
        config: Mapping[str, Any],
        run: Run,
        weights: Optional[Union[str, Path]],
) -> Optional[List[Dict[str, Any]]]:
    """Returns the example images of the Hub's page, with the predictions of these weights."""
    images = run.facts.get('widget')
    if not images:
        return None
    if weights is None:
        raise PublishError(
            "'widget' in card.yaml needs the weights to compute predictions, and model.safetensors is missing. Add the "
            'file, or remove the entry.')
    model: Any = load_model(config['architecture'], weights, config['num_classes'])
    model.pretrained_cfg.update(config['pretrained_cfg'], **class_labels(config))
    entries = []
    for entry in images:
        if not {'src', 'picture'} <= entry.keys():
            raise PublishError(f"Invalid entry of 'widget' in card.yaml: expected 'src' and 'picture', got {entry}.")
        prediction = next(predict(model, [run.folder / entry['picture']]))
        if prediction.error:
            raise PublishError(
                f"Image {entry['picture']} of 'widget' in card.yaml cannot be read: {prediction.error}")
        entries.append(dict(src=entry['src'], output=[
            dict(label=c['name'], score=round(c['probability'], 4)) for c in prediction.classes]))
    return entries


def check_repository_name(repo_id: Optional[str]) -> None:
    """Checks the name of a repository, which a card shows inside code.

    Args:
        repo_id: Repository, 'organization/name', or None.

    Raises:
        PublishError: The name is invalid.
    """
    if repo_id is not None and not re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id, re.ASCII):
        raise PublishError(f'{repo_id!r} is not the name of a repository. Expected ORGANIZATION/NAME.')
