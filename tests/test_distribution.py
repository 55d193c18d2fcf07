"""What is published on a package index: its contents, its description, and that it works where it was installed."""
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from test_sample_images import IMAGE_SUFFIXES

import timm_spa

ROOT = Path(__file__).parent.parent
LARGEST = 20e6  # bytes

pytestmark = pytest.mark.slow


def build(folder):
    """The wheel, and the source distribution that it is made of, so that nothing else in the checkout gets into it."""
    environment = dict(os.environ, SOURCE_DATE_EPOCH='1700000000')
    subprocess.run(
        [sys.executable, '-m', 'build', '--outdir', folder, ROOT], check=True, capture_output=True, env=environment)
    (wheel,), (source,) = folder.glob('*.whl'), folder.glob('*.tar.gz')
    return wheel, source


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp('dist'))


@pytest.fixture(scope='module')
def wheel(built):
    return built[0]


@pytest.fixture(scope='module')
def source(built):
    return built[1]


def test_the_source_is_the_whole_project(source):
    """What git knows, so that its tests pass where it was unpacked."""
    if not (ROOT / '.git').exists():
        pytest.skip('needs a checkout of git')
    known = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tarfile.open(source) as archive:
        packed = {name.partition('/')[2] for name in archive.getnames()}
    assert [name for name in known.split('\0') if name not in packed] == []


def test_the_wheel_has_the_packages_and_what_they_read(wheel):
    """And nothing else: no tests, no documentation, no bytecode."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not re.match(r'timm_spa-[^/]*\.dist-info/', name)}
    expected = {
        str(path.relative_to(ROOT / 'src')) for path in (ROOT / 'src').rglob('*')
        if path.is_file() and '__pycache__' not in path.parts and '.egg-info' not in str(path)}
    for folder in ('accelerate', 'recipes'):
        files = (ROOT / 'train_scripts' / folder).iterdir()
        expected |= {f'timm_spa/{folder}/{path.name}' for path in files if path.is_file()}
    assert names == expected
    assert not [name for name in names if Path(name).suffix.lower() in {*IMAGE_SUFFIXES, '.png'}]


def test_sizes(wheel, source):
    assert wheel.stat().st_size < LARGEST
    assert source.stat().st_size < LARGEST


def test_the_same_source_is_the_same_wheel(wheel, tmp_path):
    again, _ = build(tmp_path)
    assert again.read_bytes() == wheel.read_bytes()


def test_an_index_shows_the_description(wheel, source):
    done = subprocess.run(
        [sys.executable, '-m', 'twine', 'check', '--strict', wheel, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_demo_where_it_was_installed(wheel, tmp_path):
    """In an environment without the checkout, which borrows everything else of this one."""
    venv.create(tmp_path / 'env', with_pip=True)
    python = tmp_path / 'env' / 'bin' / 'python'
    ask = [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))']
    site = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    (site / 'borrowed.pth').write_text(sysconfig.get_path('purelib'))
    subprocess.run(
        [python, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--ignore-installed', wheel], check=True)
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    where = subprocess.run(
        [python, '-c', 'import timm_spa; print(timm_spa.__file__)'], check=True, capture_output=True, text=True,
        cwd=tmp_path, env=environment)
    assert Path(where.stdout.strip()).is_relative_to(site)
    command = tmp_path / 'env' / 'bin' / 'timm-spa'
    done = subprocess.run([command, 'demo'], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert 'espresso' in done.stdout
    version = subprocess.run([command, '--version'], capture_output=True, text=True, env=environment).stdout
    assert version == f'timm_spa {timm_spa.__version__}\n'
