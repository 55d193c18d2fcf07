"""Weight files on the Hub, found within seconds or refused with one clear error.

Asked for weights without a network, huggingface_hub tries again for half a minute and more, and the error that comes
out of timm in the end may name a file that nobody asked for.
"""
import logging
from pathlib import Path
from typing import Optional, Union

from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, get_session

__all__ = ['HubWeightsError', 'locate_weights']

_logger = logging.getLogger(__name__)

PROBE_TIMEOUT = 5  # seconds


class HubWeightsError(RuntimeError):
    """Weights could not be had from the Hub; the message names the repository, the cause and the ways out."""

    def __init__(self, repo_id: str, filename: str, cause: str):
        super().__init__(
            f'No weights: {filename} of {repo_id} is not in the cache, and {cause}. Three ways out: connect to '
            f'{constants.ENDPOINT} (`hf auth login` first, if the repository is private); or set HF_HUB_OFFLINE=1 and '
            f'HF_HOME to a cache that holds it (from a connected machine); or name a local file with '
            f"timm.create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file='model.safetensors')).")


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
            file.
    """
    cached = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
    cached = cached if isinstance(cached, str) else None
    problem = 'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else _probe(repo_id, filename, revision)
    if problem is None:
        try:
            return hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir)
        except Exception as e:
            problem = f'the download failed: {type(e).__name__}: {e}'
    if cached is None:
        raise HubWeightsError(repo_id, filename, problem)
    _logger.info(f'Using the cached {filename} of {repo_id}: {problem}.')
    return cached


def _probe(repo_id: str, filename: str, revision: Optional[str]) -> Optional[str]:
    """Asks once for the file's head, and returns what stands in the way of a download, if anything does."""
    url = hf_hub_url(repo_id, filename, revision=revision)
    try:
        response = get_session().head(url, headers=build_hf_headers(), timeout=PROBE_TIMEOUT, follow_redirects=False)
    except Exception as e:  # whatever the HTTP library of the day raises, the file can't be had
        return f'the Hub cannot be reached ({type(e).__name__}: {e})'
    status = response.status_code
    if status < 400:
        return None
    if status in (401, 403, 404):
        return f'the Hub has no such file or repository that this account may read (status {status} for {url})'
    return f'the Hub answers with status {status} for {url}'
