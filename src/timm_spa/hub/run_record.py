"""What a training run left beside its checkpoint: the facts that a card may state."""
import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import yaml

from .._errors import TimmSpaError
from .._files import ReadError, read_text
from ..training_log import read_classes, read_summary

__all__ = ['FACTS', 'Run', 'RunError', 'load_yaml']

LARGEST_DOCUMENT = 100_000  # values

# keys of card.yaml, and of the mappings in it
FACTS: Dict[str, Any] = dict(
    about=str,
    dataset=('name', 'id', 'type', 'split', 'note'),
    accuracy=('top1', 'top5', 'command', 'note'),
    epoch=int,
    base_model=str,
    license=str,
    commands=list,
    training=str,
    limits=str,
    figures=list,
    widget=list,
)


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
            'training' and 'limits' (paragraphs), 'figures' (a list of a picture's 'file' and its 'text'),
            'widget' (a list of a picture's address 'src' and its file 'picture').
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
        """Reads what a folder has of a run.

        Args:
            folder: Folder of a run, of a sweep's results or of a repository.

        Returns:
            The run; without any of its files one that is empty.

        Raises:
            RunError: A file cannot be read, or card.yaml has a key that no card knows.
            SummaryError: summary.csv is no table of metrics.
        """
        folder = Path(folder)
        summary = folder / 'summary.csv'
        return cls(
            args=_read_mapping(folder / 'args.yaml'),
            summary=read_summary(summary) if summary.exists() else [],
            record=_read_mapping(folder / 'run.json'),
            facts=_checked_facts(folder / 'card.yaml'),
            classes=read_classes(folder),
            folder=folder,
        )

    def row(self, epoch: Optional[int]) -> Optional[Dict[str, float]]:
        """Returns the metrics of an epoch, None if there are none."""
        return next((row for row in self.summary if row['epoch'] == epoch), None)


def _read_mapping(path: Path) -> Dict[str, Any]:
    if not path.exists():
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

    Args:
        text: The document.

    Returns:
        Its content.

    Raises:
        ValueError: It is larger than a description of a run, once what it repeats by a name is written out.
        yaml.YAMLError: It is no YAML of plain values.
    """
    try:
        content = yaml.load(text, _Loader)  # noqa: S506  a safe one
        _count(content, {})
    except RecursionError:
        raise ValueError('it is nested too deeply.') from None
    return content


def _count(value: Any, counted: Dict[int, Optional[int]]) -> int:
    """Counts the values of a document as they would be written out, those that YAML repeats by a name too."""
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


def _checked_facts(path: Path) -> Dict[str, Any]:
    facts = _read_mapping(path)
    for key, value in facts.items():
        kind = FACTS.get(key)
        if kind is None:
            raise RunError(f'{path} has the unknown key {key!r}. Known are: {", ".join(FACTS)}.')
        if isinstance(kind, tuple):
            unknown = [k for k in value if k not in kind] if isinstance(value, dict) else [value]
            if unknown:
                raise RunError(f'{path}: {key!r} takes {", ".join(kind)}, and has {", ".join(map(str, unknown))}.')
        elif not isinstance(value, kind):
            raise RunError(f'{path}: {key!r} should be a {kind.__name__}, and is {value!r}.')
    return facts
