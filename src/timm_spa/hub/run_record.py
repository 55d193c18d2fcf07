"""What a training run left beside its checkpoint: the facts that a card may state."""
import dataclasses
import json
import os
import reprlib
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import yaml

from .._errors import TimmSpaError
from .._files import ReadError, read_text
from ..training_log import read_classes, read_summary, write_summary

__all__ = ['ARGUMENTS', 'FACTS', 'Run', 'RunError', 'card_facts', 'checked', 'load_yaml', 'read_arguments']

LARGEST_DOCUMENT = 100_000  # values

NUMBER = (int, float)
TEXT = (str, int, float)  # a name that YAML reads as a number is one
# keys of card.yaml, and of the mappings in it
FACTS: Dict[str, Any] = dict(
    about=str,
    dataset=dict(name=TEXT, id=TEXT, type=TEXT, split=TEXT, note=TEXT),
    accuracy=dict(top1=NUMBER, top5=NUMBER, command=str, note=str),
    epoch=int,
    base_model=str,
    license=str,
    commands=[str],
    training=str,
    runtimes=str,
    limits=str,
    figures=list,
    widget=[dict(src=str, picture=str)],
)
# of args.yaml and run.json those that a card or a configuration is made of; there may be others
ARGUMENTS: Dict[str, Any] = dict(
    model=str, model_kwargs=dict, num_classes=int, in_chans=int, img_size=int, input_size=[int], gp=str, bn_eps=NUMBER,
    mean=[NUMBER], std=[NUMBER], interpolation=str, crop_pct=NUMBER, seed=int, dataset=str, val_split=str)
RECORD: Dict[str, Any] = dict(
    model=str, seed=int, command=str, seconds=NUMBER, hardware=str, python=str, versions=dict)


class RunError(TimmSpaError, ValueError):
    """A file of a run does not hold what it should; the message names the file and what is wrong."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of a training run, each empty if there is none.

    Attributes:
        args: `args.yaml`, the arguments as timm's train.py wrote them.
        summary: `summary.csv`, the metrics of each epoch.
        record: `run.json`, as `train_scripts/sweep.py` writes it: model, seed, command, seconds, hardware, python,
            versions.
        facts: `card.yaml`, what the owner of the weights knows beside these; all keys are optional:
            'about' (a paragraph below the title), 'dataset' (with 'name', its Hub 'id', 'type', 'split' that the
            accuracy is of, 'note'), 'accuracy' (measured on the published file: 'top1', 'top5', the 'command' that
            prints it, 'note'), 'epoch' (the one in summary.csv that the weights are of), 'base_model' (its Hub id),
            'license' (of the weights, which nobody else can choose), 'commands' (if the one of run.json is not all),
            'training', 'runtimes' (of exported files) and 'limits' (paragraphs), 'figures' (a list of a picture's
            'file' and its 'text'), 'widget' (a list of a picture's address 'src' and its file 'picture').
        classes: `classes.txt`, the names of the classes in the order of the model's outputs.
        folder: Where these were read; files that `facts` names are relative to it.
    """
    args: Dict[str, Any] = dataclasses.field(default_factory=dict)
    summary: List[Dict[str, float]] = dataclasses.field(default_factory=list)
    record: Dict[str, Any] = dataclasses.field(default_factory=dict)
    facts: Dict[str, Any] = dataclasses.field(default_factory=dict)
    classes: List[str] = dataclasses.field(default_factory=list)
    folder: Path = Path()

    @classmethod
    def read(cls, folder: Union[str, Path]) -> 'Run':
        """Reads what a folder of a run, of a sweep's results or of a repository has; it may have none of the files."""
        folder = Path(folder)
        summary = folder / 'summary.csv'
        return cls(
            args=read_arguments(folder),
            summary=read_summary(summary) if summary.exists() else [],
            record=checked(_read_mapping(folder / 'run.json'), RECORD, folder / 'run.json'),
            facts=card_facts(folder),
            classes=read_classes(folder),
            folder=folder,
        )

    def write(self, folder: Path) -> None:
        """Writes all of the run but its classes and figures, so that a card can be made again from the folder alone."""
        if self.args:
            (folder / 'args.yaml').write_text(yaml.safe_dump(self.args, allow_unicode=True), encoding='utf-8')
        if self.summary:
            write_summary(folder / 'summary.csv', self.summary)
        if self.record:
            (folder / 'run.json').write_text(json.dumps(self.record, indent=2) + '\n', encoding='utf-8')
        if self.facts:
            (folder / 'card.yaml').write_text(yaml.safe_dump(self.facts, allow_unicode=True), encoding='utf-8')

    def row(self, epoch: Optional[int]) -> Optional[Dict[str, float]]:
        """Returns the metrics of an epoch, None if there are none."""
        return next((row for row in self.summary if row['epoch'] == epoch), None)


def read_arguments(folder: Path) -> Dict[str, Any]:
    """Reads args.yaml of a folder, if it has one; raises a RunError for what it should not hold."""
    return checked(_read_mapping(folder / 'args.yaml'), ARGUMENTS, folder / 'args.yaml')


def _read_mapping(path: Path) -> Dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    try:
        text = read_text(path)
        content = json.loads(text) if path.suffix == '.json' else load_yaml(text)
    except (ReadError, ValueError, RecursionError, yaml.YAMLError) as e:
        cause = ' '.join(str(e).split())
        raise RunError(cause if isinstance(e, ReadError) else f'{path} cannot be read: {cause}') from e
    if not isinstance(content, dict):
        raise RunError(f'{path} should hold names with values, and holds a {type(content).__name__}.')
    return content


class _Loader(yaml.SafeLoader):
    """Knows no merge keys, which can grow without end."""

    def flatten_mapping(self, node: Any) -> None:
        """Leaves a merge key as it is, which then is an error."""


def load_yaml(text: str) -> Any:
    """Reads a YAML document that may come from anywhere.

    A ValueError says that it is larger than a description of a run, once what it repeats by a name is written out.
    """
    try:
        content = yaml.load(text, _Loader)  # noqa: S506  derived from SafeLoader
        _count(content, {})
    except RecursionError:
        raise ValueError('it is nested too deeply.') from None
    return content


def _count(value: Any, counted: Dict[int, Optional[int]]) -> int:
    """Counts the values of a document once its YAML aliases are written out."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in counted:
        counted[id(value)] = None  # until its parts are counted
        counted[id(value)] = 1 + sum(
            _count(part, counted) for part in (value.values() if isinstance(value, dict) else value))
    size = counted[id(value)]
    if size is None or size > LARGEST_DOCUMENT:
        raise ValueError('it repeats parts of itself without end.' if size is None else f'it holds {size:,} values.')
    return size


def card_facts(folder: Path) -> Dict[str, Any]:
    """Reads card.yaml of a folder, if it has one; raises a RunError for what it should not hold."""
    path = folder / 'card.yaml'
    facts = _read_mapping(path)
    for key, value in facts.items():
        if key not in FACTS:
            raise RunError(f'{path} has the unknown key {key!r}. Known are: {", ".join(FACTS)}.')
        _check(value, FACTS[key], key, path)
    return facts


def checked(content: Dict[str, Any], kinds: Dict[str, Any], path: Union[str, Path]) -> Dict[str, Any]:
    """Returns the content of a file after a check of the kinds of some of its values, where they are not None."""
    for key, kind in kinds.items():
        if content.get(key) is not None:
            _check(content[key], kind, key, path)
    return content


def _check(value: Any, kind: Any, name: str, path: Union[str, Path]) -> None:
    if isinstance(kind, dict):
        unknown = [k for k in value if k not in kind] if isinstance(value, dict) else [value]
        if unknown:
            shown = ', '.join(str(k)[:60] for k in unknown[:6])
            raise RunError(f'{path}: {name!r} takes {", ".join(kind)}, and has {shown}.')
        for key, part in value.items():
            _check(part, kind[key], f'{name}: {key}', path)
    elif isinstance(kind, list) and isinstance(value, (list, tuple)):
        for part in value:
            _check(part, kind[0], f'an entry of {name}', path)
    elif isinstance(kind, list) or not isinstance(value, kind) or isinstance(value, bool):
        right = {NUMBER: 'number', TEXT: 'text'}.get(kind) if isinstance(kind, tuple) else (
            'list' if isinstance(kind, list) else kind.__name__)
        raise RunError(f'{path}: {name!r} should be a {right}, and is {reprlib.repr(value)}.')
