"""Sections of a model card."""
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import timm
import torch
from timm.models import model_entrypoint

from ..checkpoints.config_file import class_labels
from ..checkpoints.reading import read_header
from ..models import GATES
from ..profile import ModelCost, count_cost
from ..training.run_record import Run
from .markdown import link, numbers, paragraphs, plain, wrapped
from .upload import PublishError

__all__ = [
    'cost_of', 'description', 'details', 'evaluation', 'evidence', 'figure_file', 'figures', 'limits', 'recipe',
    'shapes', 'start_weights']


def start_weights(run: Run) -> Optional[str]:
    """Returns the name of the weights that training started from, None if they have no name."""
    name = str(run.args.get('model') or '')
    if name == 'gated':
        name = str((run.args.get('model_kwargs') or {}).get('base') or '')
    return name if name and run.args.get('pretrained') and not run.args.get('pretrained_path') else None


def description(config: Mapping[str, Any], scores: Mapping[int, float], dataset: Mapping[str, str]) -> str:
    """Describes the model and its accuracy."""
    text = (model_entrypoint(config['architecture']).__doc__ or '').strip()
    args = config.get('model_args') or {}
    if config['architecture'] == 'gated' and args.get('gate', 'spa') in GATES:
        base = plain(str(args.get('base', 'resnet50.a1_in1k')))
        text = f'{base} of timm with {GATES[args.get("gate", "spa")].description}.'
    if not scores:
        return text
    split = f', split "{plain(dataset["split"])}"' if 'split' in dataset else ''
    return f'{text}\n\n{_percentages(scores).capitalize()} on {plain(dataset["name"])}{split}.'


def _percentages(scores: Mapping[int, float]) -> str:
    return ', '.join(f'top-{k} {value} %' for k, value in scores.items())


def details(
        config: Mapping[str, Any],
        dataset: Mapping[str, str],
        weights: Optional[Union[str, Path]],
        cost: ModelCost,
) -> List[Tuple[str, str]]:
    """Returns names and values for the table of the model."""
    cfg = config['pretrained_cfg']
    channels, height, width = cfg['input_size']
    papers = cfg.get('paper_ids') or ()
    rows = [
        ('type', 'image classification, feature backbone'),
        ('parameters', f'{cost.parameters / 1e6:.2f} M ({cost.parameters:,})'),
        ('GMACs', f'{cost.macs / 1e9:.3f}'),
        ('activations', f'{cost.activations / 1e6:.2f} M'),
        ('image', f'{height}x{width}, {channels} channels, mean {numbers(cfg["mean"])}, std {numbers(cfg["std"])}, '
                  f'{cfg["interpolation"]} interpolation, center crop of {cfg["crop_pct"]}'),
        ('classes', str(config['num_classes']) + (
            ', in the order of `label_names` in config.json' if class_labels(config) else '')),
    ]
    if weights is not None:
        names = dict(F32='float32', F16='float16', BF16='bfloat16')
        stored = ', '.join(sorted(names.get(d, d) for d in read_header(weights).dtypes - {'I64'}))
        rows.append(('storage', f'{stored}, {os.path.getsize(weights) / 1e6:.1f} MB'))
    rows.append(('papers', ', '.join(link(p) for p in ([papers] if isinstance(papers, str) else papers))))
    if 'name' in dataset:
        hub_id = f' (`{dataset["id"]}`)' if 'id' in dataset else ''
        rows.append(('dataset', ', '.join(filter(None, (dataset['name'] + hub_id, dataset.get('note'))))))
    rows.append(('original', cfg.get('origin_url')))
    return [(name, plain(value)) for name, value in rows if value]


def cost_of(config: Mapping[str, Any]) -> ModelCost:
    """Counts the parameters and operations of the model of a configuration."""
    return count_cost(config['architecture'], config['pretrained_cfg']['input_size'], **_model_args(config))


def shapes(config: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the shapes in the examples of use: input, feature maps and embedding."""
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


def recipe(run: Run) -> List[str]:
    """Returns the training recipe from the arguments of the training, one item per line."""
    args = run.args
    if not args:
        return []
    words = [f'optimizer `{args["opt"]}`'] if args.get('opt') else []
    for key, name in (
            ('momentum', 'momentum'), ('lr', 'learning rate'), ('weight_decay', 'weight decay'),
            ('batch_size', 'batch size per process')):
        value = args.get(key)
        if value is not None:
            words.append(f'{name} {value:g}' if isinstance(value, (int, float)) else f'{name} {value}')
    lines = [', '.join(words)] if words else []
    if start_weights(run):
        lines.append(f'start weights: `{start_weights(run)}`')
    if run.summary:
        schedule = f', schedule `{args["sched"]}`' if args.get('sched') else ''
        epochs = int(run.summary[-1]['epoch']) + 1
        lines.append(f'{epochs} epoch{"s" if epochs > 1 else ""}{schedule}')
    extras = [
        f'{name} {args[key]}' for key, name in (
            ('smoothing', 'label smoothing'), ('mixup', 'mixup'), ('cutmix', 'cutmix'), ('aa', 'augmentation'),
            ('reprob', 'random erasing'), ('drop', 'dropout'), ('drop_path', 'drop path'),
            ('model_ema_decay', 'weight averaging (EMA) with decay'))
        if args.get(key) and (key != 'model_ema_decay' or args.get('model_ema'))]
    if args.get('amp'):
        extras.append(f'mixed precision {args.get("amp_dtype") or "float16"}')
    lines += [', '.join(extras)] if extras else []
    files = 'all arguments: `args.yaml`' + ('; every epoch: `summary.csv`' if run.summary else '')
    return [*map(plain, lines), files]


def evidence(run: Run, alone: bool) -> List[str]:
    """Returns hardware, duration, versions and seed, one per line.

    With `alone`, the last line says that the card compares the run with no other run.
    """
    record = run.record
    lines = [f'hardware: {record["hardware"]}'] if record.get('hardware') else []
    if record.get('seconds'):
        hours = f'training time: {record["seconds"] / 3600:.2f} hours'
        lines.append(f'{hours} since the run was resumed' if record.get('resumed') else hours)
    versions = [f'Python {record["python"]}'] if record.get('python') else []
    versions += [f'{name} {version}' for name, version in (record.get('versions') or {}).items()]
    if versions:
        lines.append(', '.join(versions))
    seed = run.args.get('seed', record.get('seed'))
    if seed is not None:
        single = ': unknown spread over seeds, and no comparison with a model without attention' if alone else ''
        lines.append(f'one run, seed {seed}{single}')
    return [plain(line) for line in lines]


def evaluation(
        run: Run,
        row: Optional[Mapping[str, float]],
        split: Optional[str],
        scores: Mapping[int, float],
) -> str:
    """Describes how the accuracy was measured, and the run's own evaluation."""
    measured = run.facts.get('accuracy') or {}
    lines = []
    if measured.get('command'):
        lines.append(f'```bash\n{wrapped(measured["command"])}\n```')
        lines.append(f'The command prints {_percentages(scores)}.')
    if measured.get('note'):
        lines.append(measured['note'].strip())
    if row:
        scores = {k: round(row[f'eval_top{k}'], 3) for k in scores if f'eval_top{k}' in row}
        own, last = run.args.get('val_split'), int(run.summary[-1]['epoch']) + 1
        on = f' on split "{plain(str(own))}"' if own and own != split else ''
        text = f"The run's own evaluation{on} after epoch {int(row['epoch']) + 1} of {last}: {_percentages(scores)}."
        best = max(r.get('eval_top1', -1) for r in run.summary)
        if not on and row.get('eval_top1') == best and 1 < len(run.summary) == last:
            text += ' This is the best of all epochs on these images, without a separate test set.'
        lines.append(text)
    return paragraphs(*lines)


def figure_file(run: Run, entry: Any) -> Optional[str]:
    """Returns the file name of a figure in card.yaml, None if the entry is invalid or the file is missing."""
    file = str(entry.get('file')) if isinstance(entry, dict) else ''
    is_image = re.fullmatch(r'[\w-][\w.-]*\.(png|jpg|svg|webp)', file, re.ASCII)
    return file if is_image and (run.folder / file).is_file() else None


def figures(run: Run) -> List[Tuple[str, str]]:
    """Returns file names and captions of the figures in card.yaml."""
    figures = []
    for entry in run.facts.get('figures') or ():
        file = figure_file(run, entry)
        if file is None:
            raise PublishError(
                f"Invalid entry of 'figures' in card.yaml: {entry!r}. Expected 'file', an image in {run.folder}, and "
                "'text'.")
        figures.append((file, plain(' '.join(str(entry.get('text') or '').split()))))
    return figures


def limits(config: Mapping[str, Any], dataset: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """Describes the limits of the weights."""
    text = (
        f'The model assigns one of its {config["num_classes"]} classes to every image, even if the image shows none of '
        'them. Its accuracy on images from other sources was not measured.')
    if 'ImageNet' in dataset.get('name', ''):
        text += (
            ' Classes and images come from ImageNet, which was collected from the web for research and has known '
            'biases in the people and things it shows.')
    return paragraphs(text, 'Do not use it for decisions about people.', facts.get('limits'))
