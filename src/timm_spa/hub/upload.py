"""Upload of a repository's files to the Hub as one commit."""
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
HTTP_LIBRARIES = ('httpx', 'requests')  # used by the releases of huggingface_hub so far


class PublishError(TimmSpaError, RuntimeError, ValueError):
    """Weights cannot be published; the message names the cause, the state of the repository and what to do."""


@dataclasses.dataclass(frozen=True)
class Published:
    """Result of an upload.

    Attributes:
        url: Page of the commit, or of the pull request.
        commit: Full id of the commit.
        changed: Whether the upload changed any file of the repository.
        notes: Remarks for the user, one per line.
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
        raise PublishError(
            f'Tag {tag} cannot be set on a pull request, which has no commit before it is merged. Leave out the tag or '
            'the pull request.')
    notes = list(notes)
    with _clear_errors(repo_id, 'Nothing was uploaded.'):
        api, before, tagged = _open_repository(repo_id, private, tag)
    remote = {file.rfilename for file in before.siblings or ()}
    names = (file.relative_to(folder).as_posix() for file in folder.rglob('*') if file.is_file())
    files = sorted(name for name in names if name not in (CARD, *OWN_FILES))
    if CARD not in remote or replace_card:
        files.append(CARD)
    else:
        notes.append(f'The {CARD} of {repo_id} is unchanged; --replace-card replaces it.')
    others = remote - {*files, *RUN_FILES, CARD, '.gitattributes'}
    if others:
        notes.append(f'Other files of {repo_id} are unchanged: {", ".join(sorted(others))}.')
    try:
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message=message, create_pr=create_pr,
            parent_commit=before.sha, delete_patterns=list(RUN_FILES))  # files of another training run
    except Exception as e:
        raise PublishError(f'{_cause(e, repo_id)} {_state_after(api, before)}') from e
    changed = commit.oid != before.sha
    if tag and not tagged:
        with _clear_errors(repo_id, f'The weights are published as {commit.oid}, without the tag {tag}.'):
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    elif tag and changed:
        raise PublishError(
            f'The weights are published as {commit.oid}, without the tag {tag}: it names the previous commit and is '
            'never moved. Choose another tag.')
    return Published(commit.pr_url or commit.commit_url, commit.oid, changed, notes)


def _open_repository(repo_id: str, private: bool, tag: Optional[str]) -> Tuple[HfApi, Any, bool]:
    """Checks network, token, visibility and tag before an upload."""
    url = f'{constants.ENDPOINT}/api/whoami-v2'
    hf_raise_for_status(get_session().get(url, headers=build_hf_headers(token=True), timeout=PROBE_TIMEOUT))
    api = HfApi(token=True, library_name='timm_spa', library_version=__version__)
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    info = api.model_info(repo_id)
    if private and not info.private:
        raise PublishError(
            f'{repo_id} is public, but --private was given. Make the repository private on the Hub, or leave out '
            '--private.')
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags} if tag else {}
    if tag in tags and tags[tag] != info.sha:
        raise PublishError(
            f'{repo_id} already has a tag {tag}, for commit {tags[tag]}, and tags are never moved. Choose another tag.')
    return api, info, tag in tags


def _state_after(api: HfApi, before: Any) -> str:
    """Describes the repository after a failed upload: it has the whole commit or nothing of it."""
    try:
        now = api.model_info(before.id, timeout=PROBE_TIMEOUT).sha
    except Exception:
        return f'Could not ask the Hub for the state of {before.id}. Run the same command again to resume.'
    if now == before.sha:
        state = 'is unchanged' if len(before.siblings or ()) > 1 else 'exists, but is empty'
        return f'{before.id} {state}. Run the same command again to resume; uploaded files are not sent again.'
    return (
        f'{before.id} has a new commit, {now}. Run the same command again: it changes nothing if this is the commit of '
        'the upload.')


@contextmanager
def _clear_errors(repo_id: str, state: str) -> Iterator[None]:
    try:
        yield
    except PublishError as e:
        raise PublishError(f'{e} {state}') from None
    except Exception as e:  # errors of huggingface_hub and of its HTTP library
        raise PublishError(f'{_cause(e, repo_id)} {state}') from e


def _cause(error: Exception, repo_id: str) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return 'No token on this machine. Log in with `hf auth login`, or set HF_TOKEN.'
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set. Unset it to publish.'
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
        401: f'The Hub does not accept the token for {repo_id}. Log in with another one: `hf auth login`.',
        403: f'The token has no permission to write to {repo_id}. Ask its owner, or use another token.',
        404: f'{repo_id} was not found, or the token has no access to it. Check the name and the token.',
        412: f'{repo_id} was changed by another commit during the upload.',
    }.get(status, f'The Hub answered with status {status} ({message}).')
