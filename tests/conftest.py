"""What several test files share."""
import contextlib
import resource

import pytest
from hub_server import Hub, point_at

from timm_spa import run


@pytest.fixture(scope='session')
def timm_scripts():
    """The folder of timm's scripts: from TIMM_SCRIPTS, the cache, or a checked download."""
    try:
        return run.find_script('train').parent
    except run.ScriptError as e:
        pytest.skip(str(e))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine that is the only one that huggingface_hub knows, with an empty cache and no token."""
    hub = Hub()
    point_at(monkeypatch, hub.url, tmp_path / 'home' / 'hub')
    yield hub
    hub.close()


@pytest.fixture
def disk_of():
    """A context in which no file can grow beyond a size, as if the disk were full then."""
    @contextlib.contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
