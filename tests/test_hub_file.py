"""Weights on the Hub: found, or refused at once with one message that says what to do."""
import http.server
import json
import shutil
import threading
import time

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants

import timm_spa  # noqa: F401
from timm_spa.checkpoints import hub_files as _hub_file
from timm_spa.checkpoints.hub_files import HubFileMissing, HubWeightsError, locate_file
from timm_spa.predict import load_model

REPOSITORY = 'timm/resnet18.a1_in1k'
COMMIT = '0' * 39 + '1'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network: the reserved address answers nobody."""
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    point_at(monkeypatch, 'http://127.0.0.1:9')
    return tmp_path / 'hub'


def point_at(monkeypatch, endpoint):
    monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
    monkeypatch.setattr(
        constants, 'HUGGINGFACE_CO_URL_TEMPLATE', endpoint + '/{repo_id}/resolve/{revision}/{filename}')


def fill(cache, plain):
    """Lays a file as huggingface_hub does."""
    snapshot = cache / ('models--' + REPOSITORY.replace('/', '--')) / 'snapshots' / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / 'refs').mkdir()
    (snapshot.parent.parent / 'refs' / 'main').write_text(COMMIT)
    safetensors.torch.save_file(plain.state_dict(), snapshot / 'model.safetensors')


def serve(status, monkeypatch):
    """A Hub that answers every request alike."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):  # noqa: N802
            self.send_response(status)
            self.send_header('Content-Length', '0')
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_at(monkeypatch, f'http://127.0.0.1:{server.server_port}')
    return server


def assert_clear(message):
    assert REPOSITORY in message
    assert 'model.safetensors' in message
    assert 'pytorch_model.bin' not in message
    for way_out in ('connect to', 'HF_HUB_OFFLINE', 'pretrained_cfg_overlay=dict(file='):
        assert way_out in message


def test_no_network(cache):
    start = time.monotonic()
    with pytest.raises(HubWeightsError, match='cannot be reached') as e:
        timm.create_model('spa_resnet18', pretrained=True)
    assert time.monotonic() - start < 10, 'the retries of huggingface_hub take half a minute and more'
    assert_clear(str(e.value))


def test_offline_mode_with_an_empty_cache(cache, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(HubWeightsError, match='HF_HUB_OFFLINE is set') as e:
        timm.create_model('spa_resnet18', pretrained=True)
    assert_clear(str(e.value))


@pytest.mark.parametrize(('status', 'cause'), [
    (404, 'cannot read the file or repository'), (503, 'did not serve the file .* 503')])
def test_the_hub_says_no(cache, monkeypatch, status, cause):
    server = serve(status, monkeypatch)
    try:
        with pytest.raises(HubWeightsError, match=cause) as e:
            timm.create_model('spa_resnet18', pretrained=True)
    finally:
        server.shutdown()
    assert_clear(str(e.value))


@pytest.mark.parametrize('offline', [False, True])
def test_a_filled_cache_is_enough(cache, monkeypatch, offline):
    """Also without offline mode while the network is down; and the path of the cache is no part of the model."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
    plain = timm.create_model('resnet18').eval()
    fill(cache, plain)
    model = timm.create_model('spa_resnet18', pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images))
    assert model.pretrained_cfg['hf_hub_id'] == REPOSITORY
    assert 'file' not in model.pretrained_cfg
    features = timm.create_model('spa_resnet18', pretrained=True, features_only=True)
    assert 'file' not in features.pretrained_cfg


def test_another_cache_and_a_local_file(cache, tmp_path):
    """`cache_dir` is obeyed, and a local file needs no Hub at all."""
    plain = timm.create_model('resnet18')
    fill(cache, plain)
    shutil.move(cache, tmp_path / 'elsewhere')
    with pytest.raises(HubWeightsError):
        timm.create_model('spa_resnet18', pretrained=True)
    timm.create_model('spa_resnet18', pretrained=True, cache_dir=tmp_path / 'elsewhere')
    file = next((tmp_path / 'elsewhere').rglob('*.safetensors'))
    timm.create_model('spa_resnet18', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


@pytest.fixture
def no_retries(monkeypatch):
    """huggingface_hub waits between its attempts: half a minute and more in all."""
    def sleep(seconds):
        raise AssertionError(f'waits {seconds} s for another attempt')

    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', sleep)


@pytest.mark.parametrize(('name', 'file'), [
    ('resnet18', 'model.safetensors'), ('resnet18.a1_in1k', 'model.safetensors'),
    (f'hf-hub:{REPOSITORY}', 'config.json'), ('vit_base_patch16_224.augreg_in21k', 'model.safetensors')])
def test_any_model_of_timm_without_a_network(name, file, cache, no_retries):
    """For prediction, plain models fail as fast as those of this package, with the same message."""
    with pytest.raises(HubWeightsError, match='cannot be reached') as e:
        load_model(name)
    assert file in str(e.value)
    for way_out in ('connect to', 'HF_HUB_OFFLINE', 'pretrained_cfg_overlay=dict(file=', '--checkpoint'):
        assert way_out in str(e.value)


@pytest.mark.parametrize('name', ['resnet18', f'hf-hub:{REPOSITORY}'])
@torch.no_grad()
def test_any_model_of_timm_from_the_cache(name, cache, no_retries):
    plain = timm.create_model('resnet18').eval()
    fill(cache, plain)
    (snapshot,) = cache.glob('*/snapshots/*')
    cfg = {key: value for key, value in plain.pretrained_cfg.items() if key not in ('hf_hub_id', 'url', 'tag')}
    (snapshot / 'config.json').write_text(json.dumps(dict(
        architecture='resnet18', num_classes=1000, pretrained_cfg=dict(cfg, mean=[0.1, 0.2, 0.3]))))
    model = load_model(name, fuse=False)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images), plain(images))
    assert model.pretrained_cfg['hf_hub_id'] == REPOSITORY
    assert str(cache) not in json.dumps(model.pretrained_cfg, default=str)
    assert (list(model.pretrained_cfg['mean']) == [0.1, 0.2, 0.3]) == (':' in name)


def test_the_timeout_is_the_users(cache, monkeypatch):
    seen = []

    def ask(url, timeout):
        seen.append(timeout)
        raise OSError('no network')

    monkeypatch.setattr(_hub_file, 'get_hf_file_metadata', ask)
    monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 33)
    for value in ('33', None):
        if value:
            monkeypatch.setenv('HF_HUB_ETAG_TIMEOUT', value)
        else:
            monkeypatch.delenv('HF_HUB_ETAG_TIMEOUT')
        with pytest.raises(HubWeightsError, match='no network'):
            locate_file(REPOSITORY, 'model.safetensors')
    assert seen == [33, _hub_file.PROBE_TIMEOUT]


def test_a_repository_with_weights_of_another_format(cache, monkeypatch):
    """timm looks for these itself; nothing is refused before."""
    def locate(repo_id, filename, revision=None, cache_dir=None):
        raise HubFileMissing('the repository has no such file')

    created = []
    monkeypatch.setattr('timm_spa.predict.loading.locate_weights', locate)
    monkeypatch.setattr(timm, 'create_model', lambda name, **kwargs: created.append((name, kwargs)) or 1 / 0)
    with pytest.raises(RuntimeError, match='resnet18 could not be loaded: division by zero'):
        load_model('resnet18')
    assert created == [('resnet18', dict(pretrained=True))]
