"""The sections of a model card, each made of what is known."""
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import timm
import torch
from timm.models import model_entrypoint

from .._errors import TimmSpaError
from ..checkpoints.config_file import class_labels
from ..checkpoints.reading import read_header
from ..profile import ModelCost, count_cost
from ..training.run_record import Run
from .markdown import link, numbers, paragraphs, plain, wrapped

__all__ = [
    'CardError', 'cost_of', 'description', 'details', 'evaluation', 'evidence', 'figure_file', 'figures', 'limits',
    'recipe', 'shapes', 'start_weights']


class CardError(TimmSpaError, ValueError):
    """A card lacks a required fact, or two facts contradict each other; the message says which and where."""


def start_weights(run: Run) -> Optional[str]:
    """Returns the name of the weights that training started from, if a name says them."""
    name = str(run.args.get('model') or '')
    if name == 'gated':
        name = str((run.args.get('model_kwargs') or {}).get('base') or '')
    return name if name and run.args.get('pretrained') and not run.args.get('pretrained_path') else None


def description(config: Mapping[str, Any], scores: Mapping[int, float], dataset: Mapping[str, str]) -> str:
    """Describes the model and its accuracy."""
    text = (model_entrypoint(config['architecture']).__doc__ or '').strip()
    if not scores:
        return text
    split = f', split "{plain(dataset["split"])}"' if 'split' in dataset else ''
    said = ', '.join(f'top-{k} {value} %' for k, value in scores.items())
    return f'{text}\n\n{said[0].upper()}{said[1:]} on {plain(dataset["name"])}{split}.'


def details(
        config: Mapping[str, Any],
        dataset: Mapping[str, str],
        weights: Optional[Union[str, Path]],
        cost: ModelCost,
) -> List[Tuple[str, str]]:
    """Returns the rows of the table of the model: name and value."""
    cfg = config['pretrained_cfg']
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
            ', in the order of `label_names` in config.json' if class_labels(config) else '')),
    ]
    if weights is not None:
        names = dict(F32='float32', F16='float16', BF16='bfloat16')
        stored = ', '.join(sorted(names.get(d, d) for d in read_header(weights).dtypes - {'I64'}))
        rows.append(('storage', f'{stored}, {os.path.getsize(weights) / 1e6:.1f} MB'))
    rows.append(('papers', ', '.join(link(p) for p in ([papers] if isinstance(papers, str) else papers))))
    if 'name' in dataset:
        known = f' (`{dataset["id"]}`)' if 'id' in dataset else ''
        rows.append(('data set', ', '.join(filter(None, (dataset['name'] + known, dataset.get('note'))))))
    rows.append(('original', cfg.get('origin_url')))
    return [(name, plain(value)) for name, value in rows if value]


def cost_of(config: Mapping[str, Any]) -> ModelCost:
    """Counts what the model of a configuration costs."""
    return count_cost(config['architecture'], config['pretrained_cfg']['input_size'], **_model_args(config))


def shapes(config: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns the shapes that the examples of use state: input, feature maps and embedding."""
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
    """Returns what the arguments of the training say, a line each."""
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
    if start_weights(run):
        lines.append(f'start: the weights of `{start_weights(run)}`')
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
    files = 'all arguments: `args.yaml`' + ('; every epoch: `summary.csv`' if run.summary else '')
    return [*map(plain, lines), files]


def evidence(run: Run, alone: bool) -> List[str]:
    """Returns hardware, duration, versions and seed, a line each; `alone` if nothing is compared with the run."""
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
        said = ', '.join(f'top-{k} {value} %' for k, value in scores.items())
        lines.append(f'```bash\n{wrapped(measured["command"])}\n```')
        lines.append(f'prints {said}.')
    if measured.get('note'):
        lines.append(measured['note'].strip())
    if row:
        said = ', '.join(f'top-{k} {round(row[f"eval_top{k}"], 3)} %' for k in scores if f'eval_top{k}' in row)
        own, last = run.args.get('val_split'), int(run.summary[-1]['epoch']) + 1
        on = f' on split "{plain(str(own))}"' if own and own != split else ''
        text = f"The run's own evaluation{on} after epoch {int(row['epoch']) + 1} of {last}: {said}."
        best = max(r.get('eval_top1', -1) for r in run.summary)
        if not on and row.get('eval_top1') == best and 1 < len(run.summary) == last:
            text += ' It is the best of them on the same pictures; there is no held-out set beside these.'
        lines.append(text)
    return paragraphs(*lines)


def figure_file(run: Run, entry: Any) -> Optional[str]:
    """Returns the name of the file of a figure in card.yaml, None if it is no picture beside it."""
    file = str(entry.get('file')) if isinstance(entry, dict) else ''
    is_picture = re.fullmatch(r'[\w-][\w.-]*\.(png|jpg|svg|webp)', file, re.ASCII)
    return file if is_picture and (run.folder / file).is_file() else None


def figures(run: Run) -> List[Tuple[str, str]]:
    """Returns the files and texts of pictures beside the card."""
    figures = []
    for entry in run.facts.get('figures') or ():
        file = figure_file(run, entry)
        if file is None:
            raise CardError(
                f"'figures' in card.yaml has {entry!r}. Each needs a 'file', a picture that lies in {run.folder}, "
                "and a 'text'.")
        figures.append((file, plain(' '.join(str(entry.get('text') or '').split()))))
    return figures


def limits(config: Mapping[str, Any], dataset: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """Describes what the weights should not be used for."""
    text = (
        f'It gives every picture one of its {config["num_classes"]} classes, also one that shows none of them. How it '
        'does on pictures from elsewhere is not measured.')
    if 'ImageNet' in dataset.get('name', ''):
        text += (
            ' Classes and pictures come from ImageNet, collected from the web for research, with known biases in who '
            'and what is shown.')
    return paragraphs(text, 'Not for any decision about people.', facts.get('limits'))
