"""Files of a training run and the facts in them that a model card states."""
import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import yaml

from ..checkpoints.run_arguments import read_arguments
from ..checkpoints.run_files import NUMBER, TEXT, RunError, check, checked, read_mapping
from .log import read_classes, read_summary, write_summary

__all__ = ['FACTS', 'Run', 'card_facts']

# keys of card.yaml with the types of their values
FACTS: Dict[str, Any] = dict(
    about=str,
    dataset=dict(name=TEXT, id=TEXT, type=TEXT, split=TEXT, task_id=TEXT, note=TEXT),
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
# keys of run.json that a card uses
RECORD: Dict[str, Any] = dict(
    model=str, seed=int, command=str, seconds=NUMBER, hardware=str, python=str, versions=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of the files of a training run, each empty if the file does not exist.

    Attributes:
        args: `args.yaml`, the arguments as timm's train.py wrote them.
        summary: `summary.csv`, the metrics of each epoch.
        record: `run.json`, as `train_scripts/sweep.py` writes it: model, seed, command, seconds, hardware, python,
            versions.
        facts: `card.yaml`, written by the owner of the weights. All keys are optional: 'about' (first paragraph),
            'dataset' ('name', 'id' on the Hub, 'type', 'split' of the accuracy, 'note', and for a benchmark of the Hub
            'task_id' of its eval.yaml), 'accuracy' (of the published
            file: 'top1', 'top5', 'command' that measures it, 'note'), 'epoch' (of the weights, in summary.csv),
            'base_model' (its id on the Hub), 'license' (of the weights), 'commands' (if run.json does not list all),
            'training', 'runtimes' and 'limits' (paragraphs), 'figures' (a list of 'file' and 'text'), 'widget' (a list
            of images with the address 'src' and the file 'picture').
        classes: `classes.txt`, the class names in the order of the model's outputs.
        folder: The folder of these files; paths in `facts` are relative to it.
    """
    args: Dict[str, Any] = dataclasses.field(default_factory=dict)
    summary: List[Dict[str, float]] = dataclasses.field(default_factory=list)
    record: Dict[str, Any] = dataclasses.field(default_factory=dict)
    facts: Dict[str, Any] = dataclasses.field(default_factory=dict)
    classes: List[str] = dataclasses.field(default_factory=list)
    folder: Path = Path()

    @classmethod
    def read(cls, folder: Union[str, Path]) -> 'Run':
        """Reads the folder of a run, of a sweep's results or of a repository; any file may be missing."""
        folder = Path(folder)
        summary = folder / 'summary.csv'
        return cls(
            args=read_arguments(folder),
            summary=read_summary(summary) if summary.exists() else [],
            record=checked(read_mapping(folder / 'run.json'), RECORD, folder / 'run.json'),
            facts=card_facts(folder),
            classes=read_classes(folder),
            folder=folder,
        )

    def write(self, folder: Path) -> None:
        """Writes all files that a card is made of, except classes.txt and figures."""
        if self.args:
            (folder / 'args.yaml').write_text(yaml.safe_dump(self.args, allow_unicode=True), encoding='utf-8')
        if self.summary:
            write_summary(folder / 'summary.csv', self.summary)
        if self.record:
            (folder / 'run.json').write_text(json.dumps(self.record, indent=2) + '\n', encoding='utf-8')
        if self.facts:
            (folder / 'card.yaml').write_text(yaml.safe_dump(self.facts, allow_unicode=True), encoding='utf-8')

    def row(self, epoch: Optional[int]) -> Optional[Dict[str, float]]:
        """Returns the metrics of an epoch, None if it is missing."""
        return next((row for row in self.summary if row['epoch'] == epoch), None)


def card_facts(folder: Path) -> Dict[str, Any]:
    """Reads card.yaml of a folder, empty if missing; raises a RunError for an unknown key or a wrong type."""
    path = folder / 'card.yaml'
    facts: Dict[str, Any] = {}
    for key, value in read_mapping(path).items():
        if key not in FACTS:
            raise RunError(f'{path} has the unknown key {key!r}. Use one of {", ".join(FACTS)}.')
        if isinstance(value, dict):
            value = {part: content for part, content in value.items() if content is not None}
        if value in (None, {}):  # an empty field of a template
            continue
        check(value, FACTS[key], key, path)
        facts[key] = value
    return facts
