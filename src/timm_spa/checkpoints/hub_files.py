"""Files on the Hub: found in the cache or downloaded, checked for damage, with one clear error within seconds.

Without a network, huggingface_hub retries for half a minute or longer, and the final error of timm may name another
file. Neither library checks the cached file.
"""
import logging
import os
import re
from pathlib import Path
from typing import Optional, Tuple, Union

import safetensors
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.sha import sha_fileobj

from .._errors import TimmSpaError

__all__ = ['HubFileMissing', 'HubWeightsError', 'endpoint', 'locate_file', 'locate_weights', 'without_password']

_logger = logging.getLogger(__name__)

PROBE_TIMEOUT = 5  # seconds, where HF_HUB_ETAG_TIMEOUT is not set


class HubWeightsError(TimmSpaError, RuntimeError):
    """A file of the Hub cannot be loaded. The message names file, repository, cause and remedies."""


class HubFileMissing(HubWeightsError):
    """The repository exists, but the file does not."""


def without_password(text: str) -> str:
    """Masks names and passwords in the addresses of a text."""
    return re.sub(r'://[^/\s@]*@', '://***@', text)


def endpoint() -> str:
    """Returns the address of the Hub without passwords, for messages."""
    return without_password(constants.ENDPOINT)


def locate_weights(
        repo_id: str,
        filename: str,
        revision: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
) -> str:
    """Finds a safetensors file as `locate_file` does; a truncated file is refused too."""
    path = locate_file(repo_id, filename, revision, cache_dir)
    try:
        with safetensors.safe_open(path, framework='pt'):
            pass
    except Exception as e:  # safetensors raises its own error and those of the file system
        raise HubWeightsError(
            f'Damaged weights: {filename} of {repo_id} is truncated or not a safetensors file ({e}). Delete '
            f'{os.path.realpath(path)} and load it again with a connection to the Hub.') from e
    return path


def locate_file(
        repo_id: str,
        filename: str,
        revision: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
) -> str:
    """Finds a file of a Hub repository, in the cache or by download.

    While the Hub cannot be reached, the cached file is taken without a check for a newer one.

    Args:
        repo_id: Repository, organization/name.
        filename: File in the repository.
        revision: Branch, tag or commit; the main branch if None.
        cache_dir: Cache of the Hub; the user's if None.

    Returns:
        Path of the file.

    Raises:
        HubWeightsError: The file is not in the cache and cannot be downloaded, or its digest is not the Hub's.
    """
    cached = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
    path = cached if isinstance(cached, str) else ''
    is_commit = re.fullmatch(r'[0-9a-f]{40}', revision or '')  # its files never change: no request needed
    if not (path and is_commit):
        digest, problem, missing = ('', 'HF_HUB_OFFLINE is set', False) if constants.HF_HUB_OFFLINE else _ask(
            hf_hub_url(repo_id, filename, revision=revision), revision)
        if problem is None:
            try:
                path = hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir)
            except Exception as e:  # errors of the HTTP library, and a full disk
                problem = f'the download failed: {type(e).__name__}: {without_password(str(e))}'
        if not path:
            raise (HubFileMissing if missing else HubWeightsError)(
                f'No weights: {filename} of {repo_id} is not in the cache, and {problem}. Three remedies: connect to '
                f'{endpoint()} (`hf auth login` first, if the repository is private); or set HF_HUB_OFFLINE=1 '
                f'and HF_HOME to a cache that holds it (from a connected machine); or name a local file with '
                f"timm.create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file='model.safetensors')), "
                'or with --checkpoint of timm-spa.')
        if problem:
            _logger.info(f'Using the cached {filename} of {repo_id}: {problem}.')
        elif path != cached and re.fullmatch(r'[0-9a-f]{64}', digest) and _sha256(path) != digest:
            os.unlink(os.path.realpath(path))  # otherwise the cache would keep serving the damaged file
            raise HubWeightsError(
                f'Damaged weights: {filename} of {repo_id} changed during the download (expected SHA-256 {digest}). It '
                'is deleted. Load it again.')
    return path


def _ask(url: str, revision: Optional[str]) -> Tuple[str, Optional[str], bool]:
    """Sends one HEAD request.

    Returns:
        The digest of the file; why it cannot be downloaded, None if it can; and whether the repository lacks it.
    """
    timeout = constants.HF_HUB_ETAG_TIMEOUT if os.environ.get('HF_HUB_ETAG_TIMEOUT') else PROBE_TIMEOUT
    try:
        return get_hf_file_metadata(url, timeout=timeout).etag or '', None, False
    except Exception as e:  # errors of huggingface_hub and of the HTTP library
        status = getattr(getattr(e, 'response', None), 'status_code', None)
        if status is None:
            return '', f'the Hub cannot be reached ({type(e).__name__}: {without_password(str(e))})', False
        if isinstance(e, RevisionNotFoundError):
            reason = f'revision {revision!r} does not exist in the repository'
        elif isinstance(e, EntryNotFoundError):
            reason = 'the file does not exist in the repository'
        elif status in (401, 403, 404):
            reason = 'this account cannot read the file or repository, or it does not exist'
        else:
            reason = 'the Hub did not serve the file'
        return '', f'{reason} (status {status} for {without_password(url)})', isinstance(e, EntryNotFoundError)


def _sha256(path: str) -> str:
    with open(path, 'rb') as f:
        return sha_fileobj(f).hex()
