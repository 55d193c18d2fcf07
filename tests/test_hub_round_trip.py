"""From a checkpoint to the Hub and back with the real client, and failures on the way."""
import copy
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hub_server import OWNER, STRANGER, File, Hub, point_at
from huggingface_hub import HfApi, __version__, constants
from huggingface_hub.errors import HfHubHTTPError

import timm_spa
from timm_spa.checkpoints.hub_files import HubWeightsError
from timm_spa.hub.publish import PublishError, publish, write_repository

MODEL = 'spa_mobilenetv2_cifar'
NAME = f'{MODEL}.tmm_tin200'
REPO = f'org/{NAME}'
SOURCE = f'hf-hub:{REPO}'
ROOT = Path(timm_spa.__file__).parent
resumes_downloads = pytest.mark.skipif(
    int(__version__.partition('.')[0]) < 2, reason=f'huggingface_hub {__version__} handles some downloads differently')
LOAD = '''
import sys, timm, timm_spa, torch
with torch.no_grad():
    print(timm.create_model(sys.argv[1], pretrained=True).eval()(torch.ones(1, 3, 32, 32)).tolist())
'''


def repository(folder):
    """Writes the folder of a repository with the shipped weights, and returns the file of the weights."""
    shutil.copytree(ROOT.parent.parent / 'hub_cards' / NAME, folder)
    shutil.copy(ROOT / 'weights' / f'{NAME}.safetensors', folder / 'model.safetensors')
    return folder / 'model.safetensors'


@pytest.fixture
def weights(tmp_path):
    return repository(tmp_path / 'repository')


@pytest.fixture(scope='module')
def state(tmp_path_factory):
    """Returns the content of a Hub after these weights were published."""
    hub, cache = Hub(), tmp_path_factory.mktemp('cache')
    with pytest.MonkeyPatch.context() as patch:
        point_at(patch, hub.url, cache)
        patch.setenv('HF_TOKEN', OWNER)
        publish(repository(cache / 'repository'), NAME, REPO)
    hub.close()
    return dict(repositories=hub.repositories, large_files=hub.large_files)


@pytest.fixture
def published(hub, state):
    """A Hub with the weights, for a user without a token."""
    vars(hub).update(copy.deepcopy(state))
    return hub


@pytest.fixture(scope='module')
def shipped():
    """The logits of the model with the shipped weights."""
    return logits(MODEL)


def change(weights):
    """Writes other weights: the bias of the classifier is larger by 1."""
    tensors = safetensors.torch.load_file(weights)
    tensors['classifier.bias'] = tensors['classifier.bias'].float() + 1
    safetensors.torch.save_file(tensors, weights)


def logits(source=SOURCE, **kwargs):
    with torch.no_grad():
        return timm.create_model(source, pretrained=True, **kwargs).eval()(torch.ones(1, 3, 32, 32))


def by_name(repo=REPO):
    """Loads by the name of the architecture, as a registered configuration would."""
    return logits(MODEL, pretrained_cfg_overlay=dict(file=None, hf_hub_id=repo, hf_hub_filename='model.safetensors'))


def cached():
    """Returns the weight files that are visible in the cache."""
    return [p for p in Path(constants.HF_HUB_CACHE).glob('*/snapshots/*/model.safetensors') if p.exists()]


def downloads(hub):
    return [r for r in hub.requests if r.startswith('GET')]


def round_trip(weights, repo, shipped):
    """Publishes twice, with tags and a change in between, and loads each version by all of its names."""
    first = publish(weights, NAME, repo, tag='v1', private=True)
    assert first.changed
    assert not publish(weights, NAME, repo, tag='v1', private=True).changed
    assert torch.equal(logits(f'hf-hub:{repo}'), shipped)
    change(weights)
    second = publish(weights, NAME, repo, tag='v2', private=True)
    assert second.changed
    newer = logits(f'hf-hub:{repo}')
    torch.testing.assert_close(newer, shipped + 1)
    for revision in ('v1', first.commit):
        assert torch.equal(logits(f'hf-hub:{repo}@{revision}'), shipped)
    for revision in ('v2', second.commit):
        assert torch.equal(logits(f'hf-hub:{repo}@{revision}'), newer)
    assert torch.equal(by_name(repo), newer)
    assert torch.equal(by_name(f'{repo}@v1'), shipped)
    return first, second


def test_cold_warm_offline(published, shipped, tmp_path, monkeypatch):
    """Another process fills the cache; afterwards nothing is downloaded again and no network is needed."""
    process = subprocess.run(
        [sys.executable, '-c', LOAD, SOURCE], env=published.environment(tmp_path / 'home'), capture_output=True,
        text=True, check=True)
    assert any('/objects/' in r for r in downloads(published))
    assert torch.equal(torch.tensor(eval(process.stdout)), shipped)
    published.requests.clear()
    assert torch.equal(logits(), shipped)
    assert published.requests
    assert not downloads(published)
    published.requests.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert torch.equal(logits(), shipped)
    assert torch.equal(by_name(), shipped)
    assert not published.requests


def test_revisions(hub, weights, shipped, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', OWNER)
    first, second = round_trip(weights, REPO, shipped)
    hub.requests.clear()
    torch.testing.assert_close(logits(f'{SOURCE}@{first.commit}') + 1, logits(f'{SOURCE}@{second.commit}'))
    assert not hub.requests, 'a cached commit never changes'
    hub.repositories[REPO].refs['main'] = first.commit  # reverted
    assert torch.equal(logits(), shipped)
    with pytest.raises(HubWeightsError, match="revision 'v3' does not exist in the repository"):
        by_name(f'{REPO}@v3')


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get('HF_TOKEN'), reason='needs HF_TOKEN of a user who may create and delete models')
def test_the_real_hub(weights, shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    api = HfApi()
    repo = f'{api.whoami()["name"]}/timm-spa-test-{uuid.uuid4().hex[:8]}'
    try:
        round_trip(weights, repo, shipped)
    finally:
        api.delete_repo(repo, missing_ok=True)


@resumes_downloads
def test_over_xet(hub, weights, shipped, tmp_path, monkeypatch):
    """The Hub's storage protocol. With an undocumented address, hf_xet stores files in a local folder."""
    hf_xet = pytest.importorskip('hf_xet', reason='the client of the Xet protocol is not installed')
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    monkeypatch.setenv('HF_TOKEN', OWNER)
    hub.xet_store = tmp_path / 'store'
    write_repository(tmp_path / 'same', weights, NAME)
    [hashed] = hf_xet.hash_files([str(tmp_path / 'same' / 'model.safetensors')])
    sha256 = hashlib.sha256((tmp_path / 'same' / 'model.safetensors').read_bytes()).hexdigest()
    hub.xet_hashes[sha256] = hashed.hash
    try:
        assert publish(weights, NAME, REPO).changed
    except PublishError as e:
        if not any(hub.xet_store.rglob('*')):
            pytest.skip(f'this release of hf_xet cannot store files in a folder: {e}')
        raise
    assert not publish(weights, NAME, REPO).changed
    assert torch.equal(logits(), shipped)
    assert cached()[0].resolve().stat().st_size > 5_000_000
    assert not [r for r in hub.requests if CONTENT in r], 'nothing was downloaded from Git LFS'


def test_a_pull_request(published, shipped, weights, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', STRANGER)
    change(weights)
    publish(weights, NAME, REPO, create_pr=True)
    torch.testing.assert_close(logits(f'{SOURCE}@refs/pr/1'), shipped + 1)


def test_a_private_repository(published, shipped, monkeypatch):
    published.repositories[REPO].private = True
    for token in (None, STRANGER, 'hf_wrong'):
        if token:
            monkeypatch.setenv('HF_TOKEN', token)
        with pytest.raises(HfHubHTTPError):  # timm's, for config.json
            logits()
        with pytest.raises(HubWeightsError, match='this account cannot read the file or repository'):
            by_name()
    assert not cached()
    monkeypatch.setenv('HF_TOKEN', OWNER)
    assert torch.equal(logits(), shipped)
    assert torch.equal(by_name(), shipped)


FILE, CONTENT = '/resolve/.*safetensors', '/objects/'


@pytest.mark.quick(10)
@pytest.mark.parametrize(('fault', 'cause'), [
    (dict(method='HEAD', pattern=FILE, status=404), 'cannot read the file or repository'),
    (dict(method='HEAD', pattern=FILE, status=401), 'cannot read the file or repository'),
    (dict(method='HEAD', pattern=FILE, status=503), 'did not serve the file .status 503'),
    (dict(method='HEAD', pattern=FILE, at=2, status=503), 'download failed'),
    (dict(method='HEAD', pattern=FILE, drop=True), 'cannot be reached'),
    (dict(method='GET', pattern=CONTENT, status=404), 'download failed'),
    (dict(method='GET', pattern=CONTENT, status=503), 'download failed: .*503'),
    (dict(method='GET', pattern=CONTENT, drop=True), 'download failed'),
    (dict(method='GET', pattern=CONTENT, short=100_000), 'download failed'),
    (dict(method='GET', pattern=CONTENT, flip=True), 'changed during the download'),
], ids=lambda value: '-'.join(map(str, value.values())) if isinstance(value, dict) else '')
@pytest.mark.parametrize('load', [logits, by_name])
def test_failures_of_a_download(published, shipped, fault, cause, load):
    published.fail(**fault)
    with pytest.raises(HubWeightsError, match=cause) as e:
        load()
    message = str(e.value)
    assert f'model.safetensors of {REPO}' in message
    assert 'pytorch_model.bin' not in message
    published.heal()
    assert not cached(), 'a truncated or damaged file is visible'
    assert torch.equal(load(), shipped)


def test_damage_during_a_download_without_symlinks(published, shipped, monkeypatch):
    """As on Windows: the name of the file in the cache is not its digest."""
    monkeypatch.setattr('huggingface_hub.file_download.are_symlinks_supported', lambda cache_dir=None: False)
    published.fail('GET', CONTENT, flip=True)
    with pytest.raises(HubWeightsError, match='changed during the download'):
        logits()
    published.heal()
    assert torch.equal(logits(), shipped)
    assert not cached()[0].is_symlink()


@resumes_downloads
def test_a_temporary_failure_is_retried(published, shipped):
    published.fail('GET', CONTENT, short=100_000, times=2)
    assert torch.equal(logits(), shipped)


def delete_named_file(message):
    named = Path(re.search(r'Delete (\S+)', message)[1])
    assert named.is_file()
    assert not named.is_symlink(), 'deleting only the link would not help'
    named.unlink()


@pytest.mark.parametrize(('damage', 'cause'), [
    (lambda content: content[:len(content) // 2], 'truncated'),
    (lambda content: b'', 'truncated'),
])
@pytest.mark.parametrize('load', [logits, by_name])
def test_a_damaged_cache(published, shipped, monkeypatch, damage, cause, load):
    load()
    blob = cached()[0].resolve()
    blob.write_bytes(damage(blob.read_bytes()))
    messages = []
    for offline in (False, True):
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
        with pytest.raises(HubWeightsError, match=f'Damaged weights: model.safetensors of {REPO} .*{cause}') as e:
            load()
        messages.append(str(e.value))
    assert messages[0] == messages[1]
    delete_named_file(messages[0])
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    assert torch.equal(load(), shipped)


@pytest.mark.parametrize('kwargs', [dict(num_classes=5), dict(features_only=True), dict()])
def test_weights_of_another_model_are_refused(published, kwargs):
    tensors = {f'other.{k}': v for k, v in timm.create_model(MODEL).state_dict().items()}
    repository = published.repositories[REPO]
    files = dict(repository.commits[repository.refs['main']])
    content = safetensors.torch.save(tensors)
    files['model.safetensors'] = File(hashlib.sha256(content).hexdigest(), content, large=False)
    repository.commit('main', files)
    with pytest.raises(HubWeightsError, match=rf'model.safetensors of {REPO} .* not fit {MODEL}; .* missing: '):
        timm.create_model(SOURCE, pretrained=True, **kwargs)


def test_adapted_models_load(published):
    """timm adapts the weights to another number of classes or channels, and to feature extraction."""
    model = timm.create_model(SOURCE, pretrained=True, num_classes=5, in_chans=1)
    shipped = timm.create_model(MODEL, pretrained=True)
    assert torch.equal(model.blocks[0][0].attn.pyramid_weight, shipped.blocks[0][0].attn.pyramid_weight)
    assert model.pretrained_cfg['source'] == 'hf-hub'
    assert model.pretrained_cfg['hf_hub_id'] == REPO
    assert 'file' not in model.pretrained_cfg
    timm.create_model(SOURCE, pretrained=True, features_only=True)


@resumes_downloads
def test_a_full_disk(published, shipped, disk_of):
    with disk_of(3_000_000), pytest.raises(HubWeightsError, match='download failed: OSError'):
        logits()
    assert not cached()
    assert torch.equal(logits(), shipped)


def kill_when_reached(fault, command, environment):
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert fault.reached.wait(60), process.stdout.read()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_killed_during_a_download(published, shipped, tmp_path):
    fault = published.fail('GET', CONTENT, hang=True)
    kill_when_reached(fault, [sys.executable, '-c', LOAD, SOURCE], published.environment(tmp_path / 'home'))
    assert not cached()
    published.heal()
    assert torch.equal(logits(), shipped)


@pytest.mark.parametrize(('method', 'pattern'), [
    pytest.param('PUT', CONTENT, marks=pytest.mark.slow), ('POST', '/commit/')])
def test_killed_while_publishing(published, shipped, weights, tmp_path, monkeypatch, method, pattern):
    before = published.head(REPO)
    large_files = dict(published.large_files)
    change(weights)
    command = [sys.executable, '-m', 'timm_spa', 'publish', str(weights), '--model', NAME, '--repo', REPO]
    fault = published.fail(method, pattern, hang=True)
    kill_when_reached(fault, command, published.environment(tmp_path / 'home', OWNER))
    assert published.head(REPO) == before
    assert len(published.repositories[REPO].commits) == 2
    if method == 'PUT':
        assert published.large_files == large_files, 'a partial file'
    assert torch.equal(logits(), shipped)
    published.heal()
    monkeypatch.setenv('HF_TOKEN', OWNER)
    assert publish(weights, NAME, REPO).changed
    torch.testing.assert_close(logits(), shipped + 1)
