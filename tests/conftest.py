"""Fixtures used by several test files."""
import collections
import contextlib
import re
import resource
import shutil
import textwrap

import pytest
from hub_server import OWNER, Hub, point_at
from published import CARDS, NAME, SHIPPED
from test_one_form import make_model

from timm_spa._errors import TimmSpaError
from timm_spa.hub.publish import write_repository
from timm_spa.training import runner


def pytest_terminal_summary(terminalreporter):
    """Prints how many tests were skipped for each reason. `-rs` would print a line for each place in the code."""
    reasons = collections.Counter()
    for report in terminalreporter.stats.get('skipped', ()):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else report.longrepr)
        reasons[textwrap.shorten(re.sub('^Skipped: ', '', reason), 90, placeholder=' ...')] += 1
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f'skipped {count}: {reason}')


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items):
    """Marks the cases of tests with `quick(n)` as slow, except for n that are spread evenly."""
    tests = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker('quick') and not item.get_closest_marker('slow'):
            tests[item.path, item.cls, item.originalname].append(item)
    for cases in tests.values():
        count = cases[0].get_closest_marker('quick').args[0]
        quick = {i * len(cases) // count for i in range(count)}
        for i, case in enumerate(cases):
            if i not in quick:
                case.add_marker(pytest.mark.slow)


@pytest.fixture(scope='session')
def timm_scripts():
    """Folder of timm's scripts: from TIMM_SCRIPTS, the cache, or a verified download."""
    try:
        return runner.find_script('train').parent
    except TimmSpaError as e:
        pytest.skip(str(e))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local Hub server that huggingface_hub uses, with an empty cache and without a token."""
    hub = Hub()
    point_at(monkeypatch, hub.url, tmp_path / 'home' / 'hub')
    yield hub
    hub.close()


@pytest.fixture
def disk_of():
    """A context manager that limits the file size to simulate a full disk."""
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
    """The folder that `publish --dry-run` writes for the shipped weights."""
    run = tmp_path_factory.mktemp('run')
    shutil.copy(SHIPPED, run / 'best.safetensors')
    for name in ('args.yaml', 'summary.csv', 'run.json', 'card.yaml', 'scales.png'):
        shutil.copy(CARDS / name, run)
    sweep = CARDS.parent.parent / 'train_scripts' / 'results' / 'tin200'
    write_repository(run.parent / 'repository', run / 'best.safetensors', NAME, results=sweep)
    return run.parent / 'repository'


@pytest.fixture
def weights_to_publish(dry_run, tmp_path):
    """The weights in a copy of the dry-run folder that a test may modify."""
    shutil.copytree(dry_run, tmp_path / 'repository')
    return tmp_path / 'repository' / 'model.safetensors'


@pytest.fixture
def owner(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', OWNER)


@pytest.fixture
def small_net():
    """A small model with ten classes, quick to export."""
    return make_model('resnet18', num_classes=10, stem_width=16, channels=(8, 16, 24, 32))
