"""Protection of private data in the files of a training run: tokens, passwords and paths."""
import dataclasses
import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, List, Tuple

from huggingface_hub import get_token

from ..training.run_record import Run
from .upload import PublishError

__all__ = ['refuse_secrets', 'without_private_paths']

# tokens of the Hub, of GitHub and of cloud services; a password in an address
SECRETS = re.compile(
    r'\b(?:hf_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|sk-[\w-]{20,})'
    r'|://[^/\s:@]*:[^/\s:@]+@')


def refuse_secrets(run: Run) -> None:
    """Refuses to publish a run that contains a secret.

    Args:
        run: Files next to a checkpoint.

    Raises:
        PublishError: A value looks like a token or a password; the message names its field.
    """
    own = get_token()

    def look(value: Any, field: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                look(part, f'{field}: {key}')
        elif isinstance(value, (list, tuple)):
            for part in value:
                look(part, field)
        elif isinstance(value, str) and (SECRETS.search(value) or (own and own in value)):
            raise PublishError(
                f'{field} has what looks like a token or a password, and the file would be published. Remove it from '
                'the file, and revoke it if others could have seen it.')

    for name, content in (('args.yaml', run.args), ('run.json', run.record), ('card.yaml', run.facts)):
        look(content, name)


def without_private_paths(run: Run) -> Tuple[Run, List[str]]:
    """Shortens paths of this machine in the arguments and the command to their last part.

    Args:
        run: Files next to a checkpoint.

    Returns:
        The run with shortened paths, and a note about each of them.
    """
    notes: List[str] = []

    def shorten(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {k: shorten(v, str(k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [shorten(v, key) for v in value]
        short = _shortened(value) if isinstance(value, str) else value
        if short != value:
            notes.append(f'{key}: {value!r} is a path of this machine, and is published as {short!r}.')
        return short

    return dataclasses.replace(run, args=shorten(run.args, 'args'), record=shorten(run.record, 'run')), notes


def _shortened(value: str) -> str:
    """Returns text with each path reduced to its last part: the whole text, a quoted part, or a word."""
    def replace(match: Any) -> str:
        text = match[0]
        quote = text[0] if text[0] in '\'"' else ''
        return f'{quote}{_shortened(text[1:-1])}{quote}' if quote else _last_part(text)

    whole = _last_part(value)
    return whole if whole != value else re.sub(r''''[^']*'|"[^"]*"|(?<![^\s='",])[^\s='",]+''', replace, value)


def _last_part(value: str) -> str:
    """Returns the last part of a path that is absolute or leaves the working folder; any other text unchanged."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(value)
        if len(path.parts) > 1 and (path.is_absolute() or path.parts[0] == '..' or path.parts[0].startswith('~')):
            return path.name
    return value
