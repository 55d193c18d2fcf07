"""What several test files share."""
import contextlib
import resource
import shutil

import pytest
from hub_server import OWNER, Hub, point_at
from published import CARDS, NAME, SHIPPED

from timm_spa.hub.publish import write_repository
from timm_spa.training import runner as run


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


@pytest.fixture(scope='module')
def dry_run(tmp_path_factory):
    """What `--dry-run` writes for the shipped weights."""
    run = tmp_path_factory.mktemp('run')
    shutil.copy(SHIPPED, run / 'best.safetensors')
    for name in ('args.yaml', 'summary.csv', 'run.json', 'card.yaml', 'scales.png'):
        shutil.copy(CARDS / name, run)
    sweep = CARDS.parent.parent / 'train_scripts' / 'results' / 'tin200'
    write_repository(run.parent / 'repository', run / 'best.safetensors', NAME, results=sweep)
    return run.parent / 'repository'


@pytest.fixture
def weights_to_publish(dry_run, tmp_path):
    """A repository's folder that a test may change; its card need not be made again."""
    shutil.copytree(dry_run, tmp_path / 'repository')
    return tmp_path / 'repository' / 'model.safetensors'


@pytest.fixture
def owner(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', OWNER)
