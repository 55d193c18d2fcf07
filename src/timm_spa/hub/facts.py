"""Facts in card.yaml that a model card needs, and a template for the missing ones."""
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence

import yaml

from ..checkpoints.files import replacing
from ..checkpoints.run_files import read_mapping
from .upload import PublishError

__all__ = ['MissingFactsError', 'refuse_missing', 'template_written']

CARD_YAML, TEMPLATE = 'card.yaml', 'card.template.yaml'
# facts that a card may need, with their descriptions
NEEDED = {
    'license': "license of the weights, an identifier of the Hub's list, e.g. apache-2.0",
    'dataset.name': 'name of the dataset that the accuracy was measured on',
    'dataset.id': 'id of the benchmark on the Hub, organization/name',
    'accuracy.top1': 'top-1 accuracy of the published file, in percent',
    'base_model': "repository of the start weights, organization/name, or '' if they are not on the Hub",
}
OPTIONAL = """
# Optional: a first paragraph, the accuracy of the published file, limits, and figures next to this file.
# about: What the weights are for.
# accuracy: {top1: 91.2, command: "python -m timm_spa.run validate ..."}
# limits: What the weights are not for.
# figures: [{file: cam.png, text: Regions that support the class.}]
"""


class MissingFactsError(PublishError):
    """card.yaml lacks facts that a card needs.

    Attributes:
        missing: Names of the facts, keys of `NEEDED`.
    """

    def __init__(self, message: str, missing: Sequence[str]):
        super().__init__(message)
        self.missing = tuple(missing)


def refuse_missing(title: str, reasons: Mapping[str, str]) -> None:
    """Raises one error for all facts that a card lacks.

    Args:
        title: Title of the card.
        reasons: Cause by fact, '' where the description of the fact says it all.

    Raises:
        MissingFactsError: A fact is missing.
    """
    if not reasons:
        return
    listed = '; '.join(
        f'{name} ({NEEDED[name]}{f"; {reason}" if reason else ""})' for name, reason in reasons.items())
    raise MissingFactsError(
        f'card.yaml lacks {len(reasons)} fact{"s" if len(reasons) > 1 else ""} that the card of {title} needs: '
        f'{listed}. Add them to card.yaml next to the checkpoint.', list(reasons))


def template_written(error: MissingFactsError, folder: Path, facts: Mapping[str, Any]) -> MissingFactsError:
    """Writes a template with the missing facts, and returns the error with the name of the file.

    Args:
        error: The error about the missing facts.
        folder: Folder of the checkpoint.
        facts: Content of its card.yaml. The file itself is never changed.
    """
    card = folder / CARD_YAML
    listed = str(error).rpartition(' Add them')[0]
    if card.exists() and set(error.missing) <= set(_names(read_mapping(card))):
        return MissingFactsError(f'{listed} Fill them in in {card}.', error.missing)
    path = folder / TEMPLATE if card.exists() else card
    try:
        with replacing(path) as partial:
            partial.write_text(_template(error.missing, facts), encoding='utf-8')
    except OSError as e:
        return MissingFactsError(f'{error} No template could be written: {e}', error.missing)
    remedy = f'Fill them in in {path}, which was written with an empty field for each of them'
    return MissingFactsError(
        f'{listed} {remedy}{f", and rename it to {CARD_YAML}" if path != card else ""}.', error.missing)


def _names(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of facts, with a dot in those of nested ones."""
    for key, value in facts.items():
        yield key
        if isinstance(value, dict):
            yield from (f'{key}.{part}' for part in value)


def _template(missing: Sequence[str], facts: Mapping[str, Any]) -> str:
    content: Dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in facts.items()}
    marks: List[str] = []
    for name in missing:
        key, _, part = name.partition('.')
        marks.append(f'EMPTY{len(marks)}')
        if part:
            content.setdefault(key, {})[part] = marks[-1]
        else:
            content[key] = marks[-1]
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    for mark, name in zip(marks, missing, strict=True):
        text = text.replace(f': {mark}\n', f':  # {NEEDED[name]}\n')
    header = '# Facts for the model card, written by `timm-spa publish`. Fill in the empty fields.\n'
    return f'{header}{text}{OPTIONAL if not facts else ""}'
