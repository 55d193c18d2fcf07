"""Upload of a repository's files to the Hub: one commit or none, and an error that says what is there now."""
import dataclasses
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Tuple

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from .. import __version__
from .._errors import TimmSpaError
from ..checkpoints.hub_files import PROBE_TIMEOUT, endpoint, without_password

__all__ = ['CARD', 'Published', 'PublishError', 'upload']

CARD = 'README.md'
OWN_FILES = ('run.json', 'card.yaml')  # not uploaded: the card has their content
RUN_FILES = ('args.yaml', 'summary.csv')
HTTP_LIBRARIES = ('httpx', 'requests')  # that huggingface_hub used so far


class PublishError(TimmSpaError, RuntimeError):
    """Weights could not be published; the message says why, what is on the Hub now, and how to go on."""


@dataclasses.dataclass(frozen=True)
class Published:
    """What became of a repository.

    Attributes:
        url: Page of the commit, or of the pull request.
        commit: Its full id.
        changed: Whether there was anything to commit.
        notes: Remarks for the reader, a line each.
    """
    url: str
    commit: str
    changed: bool
    notes: List[str]


def upload(
        folder: Path,
        repo_id: str,
        message: str,
        notes: Sequence[str] = (),
        *,
        private: bool = False,
        create_pr: bool = False,
        tag: Optional[str] = None,
        replace_card: bool = False,
) -> Published:
    """Uploads the files of a repository's folder as one commit; the arguments are those of `publish`."""
    if create_pr and tag:
        raise PublishError('A tag names a commit, and a pull request has none before it is merged. Leave one out.')
    notes = list(notes)
    with _clear_errors(repo_id, 'Nothing was uploaded.'):
        api, before, tagged = _open_repository(repo_id, private, tag)
    remote = {file.rfilename for file in before.siblings or ()}
    files = sorted(file.name for file in folder.iterdir() if file.name not in (CARD, *OWN_FILES))
    if CARD not in remote or replace_card:
        files.append(CARD)
    else:
        notes.append(f'{repo_id} has a {CARD}, which is kept (--replace-card replaces it).')
    others = remote - {*files, *RUN_FILES, CARD, '.gitattributes'}
    if others:
        notes.append(f'{repo_id} has other files too, which stay: {", ".join(sorted(others))}.')
    try:
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message=message, create_pr=create_pr,
            parent_commit=before.sha, delete_patterns=list(RUN_FILES))  # those of another training run
    except Exception as e:
        raise PublishError(f'{_cause(e, repo_id)} {_state_after(api, before)}') from e
    changed = commit.oid != before.sha
    if tag and not tagged:
        with _clear_errors(repo_id, f'The weights are published as {commit.oid}, and have no tag {tag}.'):
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    elif tag and changed:
        raise PublishError(
            f'The weights are published as {commit.oid}. Tag {tag} names the commit before it and is not moved: '
            'choose another.')
    return Published(commit.pr_url or commit.commit_url, commit.oid, changed, notes)


def _open_repository(repo_id: str, private: bool, tag: Optional[str]) -> Tuple[HfApi, Any, bool]:
    """Checks network, token, visibility and tag before an upload."""
    url = f'{constants.ENDPOINT}/api/whoami-v2'
    hf_raise_for_status(get_session().get(url, headers=build_hf_headers(token=True), timeout=PROBE_TIMEOUT))
    api = HfApi(token=True, library_name='timm_spa', library_version=__version__)
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    info = api.model_info(repo_id)
    if private and not info.private:
        raise PublishError(f'{repo_id} is public, and --private asks for a private one. Change it on the Hub first.')
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags} if tag else {}
    if tag in tags and tags[tag] != info.sha:
        raise PublishError(f'{repo_id} has the tag {tag} already, for {tags[tag]}. It is not moved: choose another.')
    return api, info, tag in tags


def _state_after(api: HfApi, before: Any) -> str:
    """Describes the repository after a failed upload: the commit is there as a whole or not at all."""
    try:
        now = api.model_info(before.id, timeout=PROBE_TIMEOUT).sha
    except Exception:
        return f'What {before.id} holds cannot be asked now. Give the same command again to go on.'
    if now == before.sha:
        state = 'is as it was' if len(before.siblings or ()) > 1 else 'is there, and empty'
        return f'{before.id} {state}. Give the same command again to go on; what was uploaded already is kept.'
    return f'{before.id} has the new commit {now}. Give the same command again: if it is this one, none is added.'


@contextmanager
def _clear_errors(repo_id: str, state: str) -> Iterator[None]:
    try:
        yield
    except PublishError as e:
        raise PublishError(f'{e} {state}') from None
    except Exception as e:  # huggingface_hub's, and whatever the HTTP library of the day raises
        raise PublishError(f'{_cause(e, repo_id)} {state}') from e


def _cause(error: Exception, repo_id: str) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return 'There is no token on this machine: `hf auth login` asks for one, or set HF_TOKEN.'
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set: unset it to publish.'
    # huggingface_hub wraps the error that has the cause
    chain: List[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    known = (e for e in chain if hasattr(e, 'response') or type(e).__module__.startswith(HTTP_LIBRARIES))
    origin = next(known, error)
    message = without_password(f'{type(origin).__name__}: {" ".join(str(origin).split()).rstrip(".")}')
    status = getattr(getattr(origin, 'response', None), 'status_code', None)
    if status is None:
        unanswered = type(origin).__module__.startswith(HTTP_LIBRARIES)
        return f'{endpoint()} does not answer ({message}).' if unanswered else f'{message}.'
    return {
        401: f'The Hub does not accept the token of this machine for {repo_id}: `hf auth login` sets another.',
        403: f'The token of this machine has no right to write to {repo_id}: ask its owner, or use one that has.',
        404: f'The Hub has no {repo_id} that the token of this machine may see.',
        412: f'{repo_id} was changed by somebody else in the meantime.',
    }.get(status, f'The Hub answered with status {status} ({message}).')
