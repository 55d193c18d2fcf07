"""Conversion: the written file makes the model compute what its source did, or there is no file and a reason."""
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision

import timm_spa.detection
import timm_spa_cli
from timm_spa._errors import UsageError
from timm_spa.hub import CheckpointError
from timm_spa.hub.convert import convert

GOLDEN = Path(__file__).parent / 'golden'


def randomized(model, seed=0):
    """Gives norm layers, statistics and gates values that a trained model might have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1 and value.is_floating_point() and not name.endswith('fc.bias'):
                low = -0.5 if name.endswith(('bias', 'running_mean')) else 0.5
                value.copy_(torch.rand(value.shape, generator=generator) + low)
            elif '.attn.' in name and value.ndim == 4:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model.eval()


def saved(net, path, /, **metadata):
    safetensors.torch.save_file(net.state_dict(), path, metadata=dict(format='pt', **metadata))
    return path


def loaded(path, name, **kwargs):
    model = timm.create_model(name, **kwargs)
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    return model.eval()


def difference(actual, expected, size=32, seed=3):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        actual, expected = actual.double()(images), expected.double()(images)
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(('theirs', 'ours', 'size'), [
    ('resnet18', 'spa_resnet18', 64), ('mobilenet_v2', 'spa_b_mobilenetv2', 64), ('densenet121', 'spa_densenet121', 64),
    pytest.param('vgg16_bn', 'spa_vgg16_bn', 224, marks=pytest.mark.slow)])
def test_base_models_of_torchvision(theirs, ours, size, tmp_path):
    plain = randomized(getattr(torchvision.models, theirs)(weights=None, num_classes=7))
    weights = plain.state_dict()
    if theirs == 'densenet121':  # its first published file
        weights = {re.sub(r'(denselayer\d+\.(?:norm|conv))(\d)', r'\1.\2', key): v for key, v in weights.items()}
        assert 'features.denseblock1.denselayer1.norm.1.weight' in weights
    torch.save({k: v for k, v in weights.items() if 'num_batches' not in k}, tmp_path / 'plain.pth')
    done = convert(tmp_path / 'plain.pth', tmp_path / 'out.safetensors', ours)
    assert done.kind == 'plain'
    model = loaded(tmp_path / 'out.safetensors', ours, num_classes=7)
    assert difference(model, plain, size) < 1e-6


@pytest.mark.parametrize(('dtype', 'bits'), [('float32', 24), ('float16', 11), ('bfloat16', 8)])
def test_storage(dtype, bits, tmp_path, capsys):
    model = randomized(timm.create_model('spa_mobilenetv2_cifar', num_classes=5))
    with torch.no_grad():
        model.classifier.bias[3] = 1001.0625
    source = saved(model, tmp_path / 'in.safetensors')
    output = tmp_path / 'out.safetensors'
    arguments = ['convert', str(source), str(output), '--model', 'spa_mobilenetv2_cifar', '--dtype', dtype]
    assert timm_spa_cli.main(arguments) == 0
    step = 2.0 ** (10 - bits)  # between neighbours in [512, 1024)
    error = abs(round(1001.0625 / step) * step - 1001.0625)
    out = capsys.readouterr().out
    assert ': the model itself.' in out
    message = f'largest error {error:.3g}, in classifier.bias' if error else 'every value is exact'
    assert message in out
    tensors = safetensors.torch.load_file(output)
    dtypes = {name: str(t.dtype).removeprefix('torch.') for name, t in tensors.items()}
    kinds = {'running_mean': 'float32', 'running_var': 'float32', 'num_batches_tracked': 'int64'}
    assert dtypes == {name: kinds.get(name.rpartition('.')[2], dtype) for name in model.state_dict()}
    assert tensors['classifier.bias'][3].item() == round(1001.0625 / step) * step
    with safetensors.safe_open(output, 'pt') as f:
        assert f.metadata()['model'] == 'spa_mobilenetv2_cifar'
        assert len(f.metadata()['source_sha256']) == 64
    assert not list(tmp_path.glob('.*')), 'nothing partial is left'

    before = output.read_bytes()
    assert timm_spa_cli.main(arguments) == 1
    assert 'exists already. Add --overwrite' in capsys.readouterr().err
    assert output.read_bytes() == before
    assert timm_spa_cli.main([*arguments, '--overwrite']) == 0


def test_values_too_large_for_float16(tmp_path):
    model = timm.create_model('spa_mobilenetv2_cifar', num_classes=5)
    with torch.no_grad():
        model.conv_stem.weight[0, 0, 0, 0] = -70000.0
    source = saved(model, tmp_path / 'in.safetensors')
    with pytest.raises(CheckpointError, match=r'conv_stem.weight \(70000\).*bfloat16'):
        convert(source, tmp_path / 'out.safetensors', 'spa_mobilenetv2_cifar', dtype='float16')
    assert not (tmp_path / 'out.safetensors').exists()
    convert(source, tmp_path / 'out.safetensors', 'spa_mobilenetv2_cifar', dtype='bfloat16')


def test_a_file_of_another_model_with_the_same_tensors(tmp_path):
    """Its names and shapes fit; what the file says of itself counts."""
    one = timm.create_model('spa_preresnet18_cifar', num_classes=5, pyramid_sizes=(1, 2, 8))
    metadata = dict(model='spa_preresnet18_cifar', model_args='{"pyramid_sizes": [1, 2, 8]}')
    path = saved(one, tmp_path / 'in.safetensors', **metadata)
    for name, kwargs in (
            ('spa_preresnet18_cifar', dict(pyramid_sizes=(1, 2, 4))),
            ('spa_b_preresnet18_cifar', dict(pyramid_sizes=(1, 2, 8)))):
        with pytest.raises(CheckpointError, match=rf'weights of spa_preresnet18_cifar pyramid_sizes=.*, not of {name}'):
            convert(path, tmp_path / 'o.safetensors', name, **kwargs)
    convert(path, tmp_path / 'o.safetensors', 'spa_preresnet18_cifar', pyramid_sizes=(1, 2, 8))
    convert(path, tmp_path / 'same.safetensors', 'spa_preresnet18_cifar')
    assert (tmp_path / 'same.safetensors').read_bytes() == (tmp_path / 'o.safetensors').read_bytes()


@pytest.mark.parametrize(('source', 'target'), [
    ('se_preresnet18_cifar', 'spa_preresnet18_cifar'), ('cbam_mobilenetv2', 'spa_mobilenetv2')])
def test_other_gates_are_refused(source, target, tmp_path):
    path = saved(timm.create_model(source, num_classes=5), tmp_path / 'in.safetensors')
    with pytest.raises(CheckpointError, match=f'does not fit {target}. Compared with '):
        convert(path, tmp_path / 'o.safetensors', target)
    assert not (tmp_path / 'o.safetensors').exists()


@pytest.mark.parametrize('trained_by_timm', [False, True])
def test_a_plain_network_with_layers_called_attn(trained_by_timm, tmp_path):
    """They are its own: the gates that the model has decide, and not the names."""
    plain = randomized(timm.create_model('skresnet18', num_classes=5))
    assert any('.attn.' in name for name in plain.state_dict())
    path = tmp_path / 'plain.pth'
    torch.save(dict(state_dict=plain.state_dict(), arch='skresnet18') if trained_by_timm else plain.state_dict(), path)
    done = convert(path, tmp_path / 'out.safetensors', 'gated', base='skresnet18')
    assert done.kind == 'plain'
    model = loaded(tmp_path / 'out.safetensors', 'gated', num_classes=5, base='skresnet18')
    assert difference(model, plain) < 1e-6
    torch.save(randomized(model).state_dict(), path)
    assert convert(path, tmp_path / 'again.safetensors', 'gated', base='skresnet18').kind == 'same'
    with pytest.raises(CheckpointError, match='does not fit gated. Compared with '):
        convert(path, tmp_path / 'se.safetensors', 'gated', base='skresnet18', gate='se')
    saved(plain, tmp_path / 'plain.safetensors')
    detector = timm_spa.detection.retinanet(
        'gated', 2, str(tmp_path / 'plain.safetensors'), backbone_kwargs=dict(base='skresnet18'))
    body = detector.backbone.body.state_dict()
    own = {name: value for name, value in plain.state_dict().items() if name in body and '.bn.' not in name}
    assert any('.attn.' in name for name in own)
    assert all(torch.equal(body[name], value) for name, value in own.items())


# what is refused

class Payload:
    """Runs code when it is unpickled, which must not happen."""

    def __reduce__(self):
        return (pytest.fail, ('code of the checkpoint was run',))


def malicious(path):
    torch.save(dict(state_dict=Payload()), path)


def truncated(path):
    torch.save(timm.create_model('spa_mobilenetv2_cifar').state_dict(), path)
    path.write_bytes(path.read_bytes()[:-5000])


@pytest.mark.parametrize(('write', 'what'), [
    (malicious, 'pickle'),
    (truncated, 'truncated'),
    (lambda path: path.touch(), 'empty'),
    (lambda path: path.write_text('<!DOCTYPE html><html>404</html>'), 'web page'),
    (lambda path: path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'), 'LFS pointer'),
    (lambda path: None, 'does not exist'),
])
def test_files_that_are_no_weights(write, what, tmp_path, capsys):
    source, output = tmp_path / 'in.pth', tmp_path / 'out.safetensors'
    write(source)
    assert timm_spa_cli.main(['convert', str(source), str(output), '--model', 'spa_mobilenetv2_cifar']) == 1
    err = capsys.readouterr().err
    assert err.startswith(f'timm-spa: {source} ')
    assert what in err
    assert not output.exists()


def test_weights_of_something_else(tmp_path):
    resnet = saved(timm.create_model('resnet18', num_classes=5), tmp_path / 'resnet.safetensors')
    with pytest.raises(CheckpointError, match='does not fit spa_resnet34. Compared with the plain .*missing: layer1.2'):
        convert(resnet, tmp_path / 'o.safetensors', 'spa_resnet34')
    with pytest.raises(UsageError, match="kind must be one of same, plain, got 'authors'"):
        convert(resnet, tmp_path / 'o.safetensors', 'spa_resnet34', kind='authors')
    with pytest.raises(CheckpointError, match=r'Compared with the model itself.*missing: .*\.attn\.'):
        convert(resnet, tmp_path / 'o.safetensors', 'spa_resnet18', kind='same')
    torch.save({'layer.weight': torch.zeros(2)}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='has no classifier.*layer.weight'):
        convert(tmp_path / 'x.pth', tmp_path / 'o.safetensors', 'spa_resnet18')
    model = timm.create_model('spa_mobilenetv2_cifar', num_classes=5)
    torch.nn.init.constant_(model.bn1.weight, float('nan'))
    with pytest.raises(CheckpointError, match='not finite: bn1.weight'):
        convert(saved(model, tmp_path / 'nan.safetensors'), tmp_path / 'o.safetensors', 'spa_mobilenetv2_cifar')
    assert not (tmp_path / 'o.safetensors').exists()


@pytest.mark.parametrize(('options', 'message'), [
    (['--model', 'spa_resnet7'], "Unknown model 'spa_resnet7'"), (['--dtype', 'int8'], 'dtype must be one of'),
    (['--from', 'elsewhere'], 'must be one of same, plain'), (['--model-kwargs', 'colour=1'], 'colour'),
    (['--model-kwargs', 'colour'], 'KEY=VALUE, got colour'),
])
def test_arguments_that_are_wrong(options, message, tmp_path, capsys):
    source = saved(timm.create_model('spa_mobilenetv2_cifar'), tmp_path / 'in.safetensors')
    arguments = ['convert', str(source), str(tmp_path / 'o.safetensors'), '--model', 'spa_mobilenetv2_cifar', *options]
    assert timm_spa_cli.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert timm_spa_cli.main(['convert', str(source), str(tmp_path / 'o.pth'), '--model', 'spa_mobilenetv2_cifar']) == 1
    assert 'must end in .safetensors' in capsys.readouterr().err


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = timm.create_model('spa_mobilenetv2_cifar')
    source, output = saved(model, tmp_path / 'in.safetensors'), tmp_path / 'o.safetensors'
    output.write_bytes(b'before')

    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('safetensors.torch.save_file', disk_full)
    with pytest.raises(OSError, match='No space left'):
        convert(source, output, 'spa_mobilenetv2_cifar', overwrite=True)
    assert output.read_bytes() == b'before'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in.safetensors', 'o.safetensors']
