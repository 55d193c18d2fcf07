"""Weight files on the Hub, found within seconds and whole, or refused with one clear error.

Asked for weights without a network, huggingface_hub tries again for half a minute and more, and the error that comes
out of timm in the end may name a file that nobody asked for. Neither looks at what lies in the cache.
"""
import logging
import os
import re
from pathlib import Path
from typing import Optional, Union

import safetensors
from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, get_session
from huggingface_hub.utils.sha import sha_fileobj

from .._errors import TimmSpaError

__all__ = ['HubWeightsError', 'endpoint', 'locate_weights', 'without_password']

_logger = logging.getLogger(__name__)

PROBE_TIMEOUT = 5  # seconds


class HubWeightsError(TimmSpaError, RuntimeError):
    """Weights of the Hub can't be had or can't be used; the message names file, repository, cause and ways out."""


def without_password(text: str) -> str:
    """Masks names and passwords in the addresses of a text."""
    return re.sub(r'://[^/\s@]*@', '://***@', text)


def endpoint() -> str:
    """Returns the address of the Hub, as it may be printed."""
    return without_password(constants.ENDPOINT)


def locate_weights(
        repo_id: str,
        filename: str,
        revision: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
) -> str:
    """Finds a file of a Hub repository, in the cache or by download.

    Args:
        repo_id: Repository, 'organization/name'.
        filename: File in it.
        revision: Branch, tag or commit; the main branch if None.
        cache_dir: Cache to use; huggingface_hub's own if None.

    Returns:
        Path of the file. While the Hub can't be reached it is the cached one, unchecked for a newer.

    Raises:
        HubWeightsError: The file is not cached, and offline mode is on, the Hub can't be reached, or it has no such
            file; or the file is damaged.
    """
    cached = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
    path = cached if isinstance(cached, str) else ''
    is_commit = re.fullmatch(r'[0-9a-f]{40}', revision or '')  # which never changes: no need to ask
    if not (path and is_commit):
        problem = 'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else _probe(repo_id, filename, revision)
        if problem is None:
            try:
                path = hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir)
            except Exception as e:  # whatever the HTTP library of the day raises, and a full disk
                problem = f'the download failed: {type(e).__name__}: {without_password(str(e))}'
        if not path:
            raise HubWeightsError(
                f'No weights: {filename} of {repo_id} is not in the cache, and {problem}. Three ways out: connect to '
                f'{endpoint()} (`hf auth login` first, if the repository is private); or set HF_HUB_OFFLINE=1 '
                f'and HF_HOME to a cache that holds it (from a connected machine); or name a local file with '
                f"timm.create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file='model.safetensors')).")
        if problem:
            _logger.info(f'Using the cached {filename} of {repo_id}: {problem}.')
    damage = _damage(Path(path))
    if damage:
        raise HubWeightsError(
            f'Damaged weights: {filename} of {repo_id} is not what was published: {damage}. Delete '
            f'{os.path.realpath(path)} and load it again with a connection to the Hub.')
    return path


def _probe(repo_id: str, filename: str, revision: Optional[str]) -> Optional[str]:
    """Asks once for the file's head, and returns what stands in the way of a download, if anything does."""
    url = hf_hub_url(repo_id, filename, revision=revision)
    try:
        response = get_session().head(url, headers=build_hf_headers(), timeout=PROBE_TIMEOUT, follow_redirects=False)
    except Exception as e:  # whatever the HTTP library of the day raises, the file can't be had
        return f'the Hub cannot be reached ({type(e).__name__}: {without_password(str(e))})'
    status = response.status_code
    if status < 400:
        return None
    reason = {
        'EntryNotFound': 'the repository has no such file',
        'RevisionNotFound': f'the repository has no revision {revision!r}',
    }.get(response.headers.get('X-Error-Code', ''))
    if reason is None and status in (401, 403, 404):
        reason = 'the Hub has no such file or repository that this account may read'
    return f'{reason or "the Hub does not serve it"} (status {status} for {without_password(url)})'


def _damage(path: Path) -> Optional[str]:
    """Returns what is wrong with a file of the cache, if anything is."""
    if path.suffix == '.safetensors':
        try:
            with safetensors.safe_open(path, framework='pt'):
                pass
        except Exception as e:  # safetensors has its own error, and hands on those of the file system
            return f'it is truncated or no safetensors file ({e})'
    # the cache links to a large file by its digest
    digest = Path(os.readlink(path)).name if path.is_symlink() else ''
    if re.fullmatch(r'[0-9a-f]{64}', digest):
        with open(path, 'rb') as f:
            found = sha_fileobj(f).hex()
        if found != digest:
            return f'its bytes changed (their SHA-256 is {found}, and was {digest})'
    return None
