"""ImageNet weights and photographs: a network with neutral gates recognizes what the plain network recognizes."""
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import timm_spa
import timm_spa_cli
from timm_spa.predict import sample_image
from timm_spa_cli.demo import imagenet_weights

PLAIN = 'tf_efficientnet_lite0'


@pytest.fixture(scope='module')
def photographs():
    transform = timm.data.create_transform(**timm.data.resolve_data_config(
        {}, pretrained_cfg=timm.get_pretrained_cfg(PLAIN).to_dict()))
    return torch.stack([transform(Image.open(sample_image(name))) for name in ('coffee', 'chelsea')])


def converted(source, name, folder, *options, **kwargs):
    path = folder / f'{name}.safetensors'
    assert timm_spa_cli.main(['convert', str(source), str(path), '--model', name, *options]) == 0
    model = timm.create_model(name, **kwargs).eval()
    model.load_state_dict(load_file(path), strict=True)
    return model


@torch.no_grad()
def test_the_same_logits(photographs, tmp_path, capsys):
    published = imagenet_weights()
    plain = converted(published, PLAIN, tmp_path)
    assert 'EfficientNet-PyTorch' in capsys.readouterr().out
    expected = plain(photographs)
    assert timm.data.ImageNetInfo().index_to_description(expected[0].argmax().item()) == 'espresso'
    for gate in ('spa', 'spa_b', 'spa_c', 'se', 'cbam', 'ge'):
        model = converted(published, f'{gate}_{PLAIN}', tmp_path)
        torch.testing.assert_close(model(photographs), expected, rtol=0, atol=1e-5)
    model = converted(
        published, 'gated', tmp_path, '--model-kwargs', f'base={PLAIN}', 'gate=se_bias', base=PLAIN, gate='se_bias')
    torch.testing.assert_close(model(photographs), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(timm_spa.add_attention(plain)(photographs), expected, rtol=0, atol=1e-5)
