"""Equality with the authors' code: what their models computed is on file, and ours compute it from the same weights."""
import json
from pathlib import Path

import golden_fill
import pytest
import timm
import torch
import torch.nn.functional as F
from authors import ConversionError, convert_state_dict

import timm_spa  # noqa: F401

FOLDER = Path(__file__).parent / 'golden'
# the authors' model, ours, and the arguments with which ours is theirs
MODELS = {
    'spa_resnet18': ('spa_resnet18', dict(pyramid_sizes=(1, 2, 4))),
    'spa2_resnet18': ('spa_resnet18', {}),
    'spa2_resnet50': ('spa_resnet50', {}),
    'spa_mobilenet_v2': ('spa_mobilenetv2', {}),
    'MobileNetV2': ('mobilenetv2_cifar', {}),
    'SEMobileNetV2': ('se_mobilenetv2_cifar', {}),
    'GEMobileNetV2': ('ge_mobilenetv2_cifar', {}),
    'SPAAMobileNetV2': ('spa_mobilenetv2_cifar', {}),
    'SPABMobileNetV2': ('spa_b_mobilenetv2_cifar', {}),
    'SPACMobileNetV2': ('spa_c_mobilenetv2_cifar', {}),
    'ResNet18': ('preresnet18_cifar', {}),
    'SEResNet18': ('se_preresnet18_cifar', {}),
    'GEResNet18': ('ge_preresnet18_cifar', {}),
    'SEBResNet18': ('se_b_preresnet18_cifar', {}),
    'SECResNet18': ('se_c_preresnet18_cifar', {}),
    'SPAResNet18': ('spa_preresnet18_cifar', {}),
    'SPABResNet18': ('spa_b_preresnet18_cifar', {}),
    'SPACResNet18': ('spa_c_preresnet18_cifar', {}),
    'VGG16': ('vgg16_cifar', {}),
    'SEVGG16': ('se_vgg16_cifar', {}),
    'GEVGG16': ('ge_vgg16_cifar', {}),
    'SPAVGG16': ('spa_vgg16_cifar', {}),
    'dense': ('densenet_cifar', {}),
    'se_dense': ('se_densenet_cifar', {}),
    'ge_dense': ('ge_densenet_cifar', {}),
    'spa_dense': ('spa_densenet_cifar', {}),
    'spa_b_dense': ('spa_b_densenet_cifar', {}),
    'spa_c_dense': ('spa_c_densenet_cifar', {}),
}
TRAINED = [path.stem for path in sorted(FOLDER.glob('*.json')) if 'train' in json.loads(path.read_text())]


def test_no_file_is_left_out():
    # the plain ResNet-50 is timm's; it is the source of a warm start in test_warm_start.py
    assert {path.stem for path in FOLDER.glob('*.json')} == {*MODELS, 'old_resnet50'}


def load(name):
    golden = json.loads((FOLDER / f'{name}.json').read_text())
    weights = {k: torch.from_numpy(v) for k, v in golden_fill.weights(golden).items()}
    model_name, kwargs = MODELS[name]
    model = timm.create_model(model_name, num_classes=golden['num_classes'], **kwargs).double()
    model.load_state_dict(convert_state_dict(weights, model), strict=True)
    return golden, weights, model


def rel(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('name', MODELS)
def test_logits(name):
    """Also for images whose maps no pyramid divides; and in float32."""
    golden, _, model = load(name)
    model.eval()
    assert sum(p.numel() for p in model.parameters()) == golden['params']
    for key in ('eval', 'eval_200x168'):
        if key in golden:
            images = torch.from_numpy(golden_fill.images(golden[key]['input']))
            expected = torch.tensor(golden[key]['logits'], dtype=torch.float64)
            with torch.no_grad():
                assert rel(model(images), expected) < 1e-8
    images, expected = images.float(), expected
    with torch.no_grad():
        assert rel(model.float()(images), expected) < 1e-5


@pytest.mark.quick(8)
@pytest.mark.parametrize('name', TRAINED)
def test_gradients(name):
    """Training mode: the loss and the norm of every parameter's gradient."""
    golden, weights, model = load(name)
    train = golden['train']
    model.train()
    loss = F.cross_entropy(
        model(torch.from_numpy(golden_fill.images(train['input']))), torch.tensor(train['targets']))
    assert loss.item() == pytest.approx(train['loss'], rel=1e-8)
    loss.backward()

    # the authors' names in the order of ours: convert a state dict that holds the index of each tensor
    numbers = {key: torch.full_like(value, i) for i, (key, value) in enumerate(weights.items())}
    theirs = {ours: list(weights)[int(v.flatten()[0])] for ours, v in convert_state_dict(numbers, model).items()}
    assert len(train['grad_norm']) == len(list(model.parameters()))
    for ours, parameter in model.named_parameters():
        expected = train['grad_norm'][theirs[ours]]
        if expected > 1e-9:
            assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-6), ours
        else:
            assert parameter.grad.norm().item() < 1e-9, ours
    for ours, buffer in model.named_buffers():
        if theirs[ours] in train['running_norm_after_forward']:
            expected = train['running_norm_after_forward'][theirs[ours]]
            assert buffer.norm().item() == pytest.approx(expected, rel=1e-8), ours


def test_wrapped_checkpoints_and_files(tmp_path):
    """As the authors' training script saves them: nested, with the prefix of data parallelism, among other entries."""
    golden, weights, model = load('SPAAMobileNetV2')
    expected = convert_state_dict(weights, model)
    wrapped = dict(epoch=3, best_acc=0.5, state_dict={f'module.{k}': v for k, v in weights.items()})
    torch.save(wrapped, tmp_path / 'model_best.pth.tar')
    for source in (wrapped, tmp_path / 'model_best.pth.tar', str(tmp_path / 'model_best.pth.tar')):
        converted = convert_state_dict(source, model)
        assert list(converted) == list(expected)
        assert all(torch.equal(converted[k], expected[k]) for k in expected)


class Payload:
    """Runs code when it is unpickled, which must not happen."""

    def __reduce__(self):
        return (pytest.fail, ('code of the checkpoint was run',))


def test_files_that_are_not_weights(tmp_path):
    model = timm.create_model('spa_mobilenetv2_cifar')
    torch.save(dict(state_dict=Payload()), tmp_path / 'payload.pth')
    (tmp_path / 'page.pth').write_text('<!DOCTYPE html><html>404</html>')
    (tmp_path / 'page.safetensors').write_text('<!DOCTYPE html><html>404</html>')
    (tmp_path / 'empty.pth').touch()
    for name in ('payload.pth', 'page.pth', 'page.safetensors', 'empty.pth'):
        with pytest.raises(ConversionError, match=rf'{name} cannot be read as weights'):
            convert_state_dict(tmp_path / name, model)
    with pytest.raises(ConversionError, match='none.pth does not exist'):
        convert_state_dict(tmp_path / 'none.pth', model)


def test_what_does_not_fit_is_named():
    golden, weights, model = load('SPAAMobileNetV2')
    weights['layers.3.SPA3.weight'] = weights['layers.3.SPA3.weight'][:, :2]
    weights['extra.weight'] = torch.zeros(1)
    del weights['bn1.bias']
    with pytest.raises(ConversionError) as e:
        convert_state_dict(weights, model)
    message = str(e.value)
    assert '1 missing: bn1.bias' in message
    assert '1 unexpected: extra.weight' in message
    assert 'blocks.2.0.attn.pyramid_weight (2,), expected (3,)' in message
    with pytest.raises(ConversionError, match='and .* more'):
        convert_state_dict(weights, timm.create_model('spa_resnet18'))
    with pytest.raises(ConversionError, match='no rules .* Linear'):
        convert_state_dict(weights, torch.nn.Linear(2, 2))
    with pytest.raises(ConversionError, match='not a state dict'):
        convert_state_dict({'epoch': 3}, model)
