"""What a training run left beside its checkpoint: the facts that a card may state."""
import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import yaml

from ..checkpoints.run_arguments import read_arguments
from ..checkpoints.run_files import NUMBER, TEXT, RunError, check, checked, read_mapping
from .log import read_classes, read_summary, write_summary

__all__ = ['FACTS', 'Run', 'card_facts']


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
# of run.json those that a card is made of; there may be others
RECORD: Dict[str, Any] = dict(
    model=str, seed=int, command=str, seconds=NUMBER, hardware=str, python=str, versions=dict)


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
            record=checked(read_mapping(folder / 'run.json'), RECORD, folder / 'run.json'),
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


def card_facts(folder: Path) -> Dict[str, Any]:
    """Reads card.yaml of a folder, if it has one; raises a RunError for what it should not hold."""
    path = folder / 'card.yaml'
    facts = read_mapping(path)
    for key, value in facts.items():
        if key not in FACTS:
            raise RunError(f'{path} has the unknown key {key!r}. Known are: {", ".join(FACTS)}.')
        check(value, FACTS[key], key, path)
    return facts
