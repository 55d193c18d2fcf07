"""What several test files share."""
import pytest
from hub_server import Hub, point_at


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine that is the only one that huggingface_hub knows, with an empty cache and no token."""
    hub = Hub()
    point_at(monkeypatch, hub.url, tmp_path / 'home' / 'hub')
    yield hub
    hub.close()
