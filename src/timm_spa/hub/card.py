"""Model cards, made of what was measured and of nothing else."""
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from timm.models import model_entrypoint

from .._errors import TimmSpaError
from ..predict import load_model, predict
from ..profile import count_cost
from .comparison import comparison_table, read_results
from .markdown import link, listed, numbers, paragraphs, plain, wrapped
from .run_record import Run

__all__ = ['CardError', 'card_of_folder', 'check_repository_name', 'make_card']

TEMPLATE = Path(__file__).with_name('card_template.md')
# data sets that a tag names: the Hub's id and the name
DATASETS: Dict[str, Tuple[str, str]] = {'in1k': ('ILSVRC/imagenet-1k', 'ImageNet-1k')}


class CardError(TimmSpaError, ValueError):
    """A card lacks a fact that it cannot do without, or two facts contradict; the message says which and where."""


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
        RunError: A file of a control's run cannot be read, or it is no control.
        SummaryError: The metrics of a control are no table.
    """
    run = run or Run()
    facts = run.facts
    check_repository_name(repo_id)
    _check_agreement(model_name, config, run)
    row = run.row(_agreed_epoch(run, weights, epoch))
    dataset = _dataset(model_name, run)
    scores = _scores(run, row, config['num_classes'])
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
        about=paragraphs(_description(config, scores, dataset), facts.get('about')),
        details=_details(config, dataset, weights),
        source=_source(model_name, repo_id),
        top_k=min(5, config['num_classes']),
        **_shapes(config),
        commands=[wrapped(command) for command in facts.get('commands') or listed(run.record.get('command'))],
        recipe=_recipe(run),
        training=facts.get('training', '').strip(),
        evidence=_evidence(run, alone=not comparison),
        comparison=comparison,
        evaluation=_evaluation(run, row, dataset.get('split'), scores),
        figures=_figures(run),
        limits=_limits(config, dataset, facts),
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
        CardError: The folder has no config.json that can be read, or as for `make_card`.
        RunError: As for `make_card`, also for the files of the folder.
        SummaryError: As for `make_card`, also for the files of the folder.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise CardError(f'{folder} is no folder of a repository: config.json cannot be read ({e}).') from e
    architecture = str(config.get('architecture', ''))
    name = '.'.join(filter(None, (architecture, config.get('pretrained_cfg', {}).get('tag'))))
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


def _metadata(weights: Optional[Union[str, Path]]) -> Dict[str, str]:
    if weights is None:
        return {}
    with safe_open(weights, 'pt') as f:
        return f.metadata() or {}


def _agreed_epoch(run: Run, weights: Optional[Union[str, Path]], epoch: Optional[int]) -> Optional[int]:
    stored = _metadata(weights).get('epoch')
    said = {int(e) for e in (epoch, run.facts.get('epoch'), stored) if e is not None}
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
    measured = run.facts.get('accuracy') or {}
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
    start = _start(run)
    cfg = timm.get_pretrained_cfg(start) if start else None
    return cfg.hf_hub_id.partition('@')[0] if cfg and cfg.hf_hub_id else None


def _start(run: Run) -> Optional[str]:
    """Returns the name of the weights that training started from, if a name says them."""
    name = str(run.args.get('model') or '')
    if name == 'gated':
        name = str((run.args.get('model_kwargs') or {}).get('base') or '')
    return name if name and run.args.get('pretrained') and not run.args.get('pretrained_path') else None


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
    model.pretrained_cfg.update(config['pretrained_cfg'], **{
        key: config[key] for key in ('label_names', 'label_descriptions') if key in config})
    entries = []
    for entry in pictures:
        prediction = next(predict(model, [run.folder / entry['picture']]))
        if prediction.error:
            raise CardError(f'The picture {entry["picture"]} of card.yaml cannot be read: {prediction.error}')
        entries.append(dict(src=entry['src'], output=[
            dict(label=c['name'], score=round(c['probability'], 4)) for c in prediction.classes]))
    return entries


def _description(config: Mapping[str, Any], scores: Mapping[int, float], dataset: Mapping[str, str]) -> str:
    text = (model_entrypoint(config['architecture']).__doc__ or '').strip()
    if not scores:
        return text
    split = f', split "{plain(dataset["split"])}"' if 'split' in dataset else ''
    said = ', '.join(f'top-{k} {value} %' for k, value in scores.items())
    return f'{text}\n\n{said[0].upper()}{said[1:]} on {plain(dataset["name"])}{split}.'


def _details(
        config: Mapping[str, Any],
        dataset: Mapping[str, str],
        weights: Optional[Union[str, Path]],
) -> List[Tuple[str, str]]:
    cfg = config['pretrained_cfg']
    cost = count_cost(config['architecture'], **_model_args(config))
    channels, height, width = cfg['input_size']
    papers = cfg.get('paper_ids') or ()
    rows = [
        ('type', 'image classification, feature backbone'),
        ('parameters', f'{cost.parameters / 1e6:.2f} M ({cost.parameters:,})'),
        ('GMACs', f'{cost.macs / 1e9:.3f}'),
        ('activations', f'{cost.activations / 1e6:.2f} M'),
        ('image', f'{height}x{width}, {channels} channels, mean {numbers(cfg["mean"])}, std {numbers(cfg["std"])}, '
                  f'{cfg["interpolation"]} interpolation, centre crop of {cfg["crop_pct"]}'),
        ('classes', str(config['num_classes']) + (
            ', in the order of `label_names` in config.json' if config.get('label_names') else '')),
    ]
    if weights is not None:
        with safe_open(weights, 'pt') as f:
            dtypes = {f.get_slice(key).get_dtype() for key in f.keys()} - {'I64'}  # noqa: SIM118  no mapping
        names = dict(F32='float32', F16='float16', BF16='bfloat16')
        stored = ', '.join(sorted(names.get(d, d) for d in dtypes))
        rows.append(('storage', f'{stored}, {os.path.getsize(weights) / 1e6:.1f} MB'))
    rows.append(('papers', ', '.join(link(p) for p in ([papers] if isinstance(papers, str) else papers))))
    if 'name' in dataset:
        known = f' (`{dataset["id"]}`)' if 'id' in dataset else ''
        rows.append(('data set', ', '.join(filter(None, (dataset['name'] + known, dataset.get('note'))))))
    rows.append(('original', cfg.get('origin_url')))
    return [(name, plain(value)) for name, value in rows if value]


def _shapes(config: Mapping[str, Any]) -> Dict[str, Any]:
    size = config['pretrained_cfg']['input_size']

    def output(**kwargs: Any) -> Any:
        model = timm.create_model(
            config['architecture'], device=torch.device('meta'), **dict(_model_args(config), **kwargs)).eval()
        with torch.no_grad():
            return model(torch.empty(1, *size, device='meta'))

    return dict(
        input_size=', '.join(map(str, size)),
        map_shapes=[tuple(m.shape) for m in output(features_only=True)],
        embedding_shape=tuple(output(num_classes=0).shape),
    )


def _model_args(config: Mapping[str, Any]) -> Dict[str, Any]:
    return dict(config.get('model_args') or {}, num_classes=config['num_classes'])


def _recipe(run: Run) -> List[str]:
    args = run.args
    if not args:
        return []
    words = [f'optimizer `{args["opt"]}`'] if args.get('opt') else []
    for key, name in (
            ('momentum', 'momentum'), ('lr', 'learning rate'), ('weight_decay', 'weight decay'),
            ('batch_size', 'batch size of a process')):
        value = args.get(key)
        if value is not None:
            words.append(f'{name} {value:g}' if isinstance(value, (int, float)) else f'{name} {value}')
    lines = [', '.join(words)] if words else []
    if _start(run):
        lines.append(f'start: the weights of `{_start(run)}`')
    if run.summary:
        schedule = f', schedule `{args["sched"]}`' if args.get('sched') else ''
        epochs = int(run.summary[-1]['epoch']) + 1
        lines.append(f'{epochs} epoch{"s" if epochs > 1 else ""}{schedule}')
    extras = [
        f'{name} {args[key]}' for key, name in (
            ('smoothing', 'label smoothing'), ('mixup', 'mixup'), ('cutmix', 'cutmix'), ('aa', 'augmentation'),
            ('reprob', 'random erasing'), ('drop', 'dropout'), ('drop_path', 'drop path'),
            ('model_ema_decay', 'EMA of the weights with decay'))
        if args.get(key) and (key != 'model_ema_decay' or args.get('model_ema'))]
    if args.get('amp'):
        extras.append(f'mixed precision {args.get("amp_dtype") or "float16"}')
    lines += [', '.join(extras)] if extras else []
    return [*map(plain, lines), 'all arguments: `args.yaml`; every epoch: `summary.csv`']


def _evidence(run: Run, alone: bool) -> List[str]:
    record = run.record
    lines = [f'hardware: {record["hardware"]}'] if record.get('hardware') else []
    if record.get('seconds'):
        hours = f'{record["seconds"] / 3600:.2f} hours'
        lines.append(f'{hours}, of the last part of an interrupted run' if record.get('resumed') else hours)
    versions = [f'Python {record["python"]}'] if record.get('python') else []
    versions += [f'{name} {version}' for name, version in (record.get('versions') or {}).items()]
    if versions:
        lines.append(', '.join(versions))
    seed = run.args.get('seed', record.get('seed'))
    if seed is not None:
        unknown = ': no spread is known, and nothing here compares attention with its absence' if alone else ''
        lines.append(f'one run, seed {seed}{unknown}')
    return [plain(line) for line in lines]


def _evaluation(
        run: Run,
        row: Optional[Mapping[str, float]],
        split: Optional[str],
        scores: Mapping[int, float],
) -> str:
    measured = run.facts.get('accuracy') or {}
    lines = []
    if measured.get('command'):
        said = ', '.join(f'top-{k} {value} %' for k, value in scores.items())
        lines.append(f'```bash\n{wrapped(measured["command"])}\n```')
        lines.append(f'prints {said}.')
    if measured.get('note'):
        lines.append(measured['note'].strip())
    if row:
        said = ', '.join(f'top-{k} {round(row[f"eval_top{k}"], 3)} %' for k in scores if f'eval_top{k}' in row)
        own = run.args.get('val_split')
        on = f' on split "{plain(str(own))}"' if own and own != split else ''
        text = f"The run's own evaluation{on} after epoch {int(row['epoch']) + 1} of {len(run.summary)}: {said}."
        best = max(r['eval_top1'] for r in run.summary)
        if not on and row['eval_top1'] == best and len(run.summary) > 1:
            text += ' It is the best of them on the same pictures; there is no held-out set beside these.'
        lines.append(text)
    return paragraphs(*lines)


def _figures(run: Run) -> List[Tuple[str, str]]:
    """Returns the files and texts of pictures beside the card."""
    figures = []
    for entry in run.facts.get('figures') or ():
        file = str(entry.get('file')) if isinstance(entry, dict) else ''
        if not re.fullmatch(r'[\w-][\w.-]*\.(png|jpg|svg|webp)', file, re.ASCII) or not (run.folder / file).is_file():
            raise CardError(
                f"'figures' in card.yaml has {entry!r}. Each needs a 'file', a picture that lies in {run.folder}, "
                "and a 'text'.")
        figures.append((file, plain(' '.join(str(entry.get('text') or '').split()))))
    return figures


def _limits(config: Mapping[str, Any], dataset: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    text = (
        f'It gives every picture one of its {config["num_classes"]} classes, also one that shows none of them. How it '
        'does on pictures from elsewhere is not measured.')
    if 'ImageNet' in dataset.get('name', ''):
        text += (
            ' Classes and pictures come from ImageNet, collected from the web for research, with known biases in who '
            'and what is shown.')
    return paragraphs(text, 'Not for any decision about people.', facts.get('limits'))


def check_repository_name(repo_id: Optional[str]) -> None:
    """Checks that a name can stand in the code of a card.

    Args:
        repo_id: Repository, 'organization/name', or None.

    Raises:
        CardError: It is no name of a repository.
    """
    if repo_id is not None and not re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id, re.ASCII):
        raise CardError(f'A repository is organization/name, and {repo_id!r} is not.')
