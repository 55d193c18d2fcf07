"""Fixtures that several test files use."""
import pytest

from timm_spa import run


@pytest.fixture(scope='session')
def timm_scripts():
    """The folder of timm's scripts: from TIMM_SCRIPTS, the cache, or a checked download."""
    try:
        return run.find_script('train').parent
    except run.ScriptError as e:
        pytest.skip(str(e))
