"""Class activation maps, compared with a hand-written Grad-CAM and with known layers."""
import csv
import json

import pytest
import timm
import torch
from marks import slow_unless
from PIL import Image
from timm.utils import reparameterize_model

import timm_spa
import timm_spa_cli
from timm_spa.explain import METHODS, ExplainError, cam
from timm_spa.explain.class_activation import last_map_layer
from timm_spa.predict import ModelError, class_names, find_class, image_reader, load_model, sample_image, sample_images

pytest.importorskip('torchcam', reason='torchcam needs Python 3.11')

COFFEE, CAT = (str(sample_image(name)) for name in ('coffee', 'chelsea'))
SHIPPED = 'spa_tf_efficientnet_lite0.grocery81'
GATED = dict(base='regnety_002', neutral=False)
# layer of the last feature map, by a part of the model's name
LAST = {
    'resnet': 'layer4', 'resnext': 'layer4', 'mobilenetv2': 'bn2', 'mobilenetv4': 'blocks', 'efficientnet': 'bn2',
    'densenet': 'features', 'vgg': 'features', 'gated': 'layer4'}


def make(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **(GATED if name == 'gated' else {}), **kwargs).eval()
    return model, torch.randn(2, 3, 64, 64)


@pytest.mark.quick(8)
@pytest.mark.parametrize('name', slow_unless(timm_spa.list_models()[::8].__contains__, timm_spa.list_models()))
def test_layer_of_the_last_feature_map(name):
    with torch.device('meta'):
        model = timm.create_model(name).eval()
        layer = last_map_layer(model, torch.empty(1, *model.pretrained_cfg['input_size']))
    expected = next(layer for part, layer in LAST.items() if part in name)
    assert layer == expected


@pytest.mark.parametrize('name', [
    'spa_resnet18', 'spa_preresnet18_cifar', 'spa_mobilenetv2', 'spa_mobilenetv4_conv_small', 'spa_densenet_cifar',
    'spa_vgg16_cifar', 'gated', 'resnet18', 'convnext_atto', 'regnety_002', 'ghostnetv2_100', 'efficientnet_b0'])
def test_grad_cam_by_hand(name):
    """Gradients of the class score, averaged over the feature map, weight the channels; negative values are clipped."""
    model, x = make(name)
    if 'cifar' in name:
        x = x[:, :, :32, :32]
    features = model.forward_features(x).detach().requires_grad_()
    scores = model.forward_head(features)
    classes = torch.tensor([3, 7])
    scores.gather(1, classes[:, None]).sum().backward()
    expected = (features.grad.mean((2, 3), keepdim=True) * features).sum(1).clamp(min=0).detach()
    expected = expected / expected.amax((1, 2), keepdim=True).clamp(min=1e-30)
    result = cam(model, x, classes)
    assert result.maps.shape == (2, *features.shape[2:])
    torch.testing.assert_close(result.maps, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result.probabilities, scores.softmax(1).gather(1, classes[:, None])[:, 0].detach())
    assert cam(model, x).classes.tolist() == scores.argmax(1).tolist()


@pytest.mark.quick(3)
@pytest.mark.parametrize('method', METHODS)
def test_every_method(method):
    model, x = make('spa_resnet18')
    first, second = (cam(model, x, method=method, layer='layer2') for _ in range(2))
    assert torch.equal(first.maps, second.maps), 'also where the method draws random numbers'
    assert first.maps.shape == (2, 8, 8)
    assert first.layer == 'layer2'
    assert 0 <= first.maps.min() <= first.maps.max() <= 1
    assert first.maps.amax((1, 2)).tolist() == [1, 1]


def state_of(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    parameters = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return hooks, [m.training for m in model.modules()], parameters, [v.clone() for v in model.state_dict().values()]


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('fails', [False, True])
def test_the_model_is_unchanged(method, fails):
    model, x = make('spa_resnet18')
    model.train()
    model.layer2.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before, random = state_of(model), torch.get_rng_state()
    if fails:
        with pytest.raises((RuntimeError, ExplainError)):
            cam(model, x, torch.tensor([0, 1000]), method, 'layer1')
        with pytest.raises(RuntimeError):
            cam(model, x[:, :1], method=method, layer='layer1')
    else:
        cam(model, x, method=method, layer='layer1')
    after = state_of(model)
    assert after[:2] == before[:2]
    for (required, gradient), (requires_now, gradient_now) in zip(before[2], after[2], strict=True):
        assert required == requires_now
        assert (gradient is None) == (gradient_now is None)
        assert gradient is None or torch.equal(gradient, gradient_now)
    assert all(torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))
    assert torch.equal(random, torch.get_rng_state())


def test_every_form_of_a_model():
    model, x = make('spa_resnet18')
    expected = cam(model, x)
    with torch.inference_mode():
        assert torch.equal(cam(model, x.clone()).maps, expected.maps)
    frozen, _ = make('spa_resnet18')
    frozen.requires_grad_(False)
    assert torch.equal(cam(frozen, x).maps, expected.maps)
    for other in (make('spa_resnet18')[0].to(memory_format=torch.channels_last), reparameterize_model(model)):
        result = cam(other, x)
        assert result.layer == 'layer4'
        torch.testing.assert_close(result.maps, expected.maps, rtol=1e-3, atol=1e-4)
    half = cam(make('spa_resnet18')[0].bfloat16(), x.bfloat16())
    assert half.maps.dtype == torch.float32
    assert (half.maps - expected.maps).abs().mean() < 0.1


def test_invalid_arguments():
    model, x = make('spa_resnet18')
    with pytest.raises(ExplainError, match="Unknown method 'campp'. Choose from gradcam, gradcam"):
        cam(model, x, method='campp')
    with pytest.raises(ExplainError, match="does not have the layer 'layer9'. .* conv1, bn1, act1, maxpool, layer1,"):
        cam(model, x, layer='layer9')
    with pytest.raises(ExplainError, match='Classes must be numbers from 0 to 999'):
        cam(model, x, torch.tensor([0, 1000]))
    with pytest.raises(ExplainError, match='compiled'):
        cam(torch.compile(model), x)
    with pytest.raises(ExplainError, match='VisionTransformer cannot be explained: it lacks a feature map'):
        cam(timm.create_model('test_vit').eval(), torch.randn(1, 3, 160, 160))
    with pytest.raises(ExplainError, match='of Sequential was not found: the model lacks forward_features'):
        cam(torch.nn.Sequential(model), x)


def explain(*arguments):
    return timm_spa_cli.main(['explain', *map(str, arguments)])


def test_cam_by_command(tmp_path, capsys):
    broken = tmp_path / 'broken.jpg'
    broken.write_bytes(b'not an image')
    arguments = ['cam', COFFEE, broken, CAT, '--compare', 'spa_mobilenetv2_cifar.tmm_tin200']
    for folder in ('a', 'b'):
        assert explain(*arguments, '--out', tmp_path / folder) == 1
    captured = capsys.readouterr()
    assert captured.err.count('broken.jpg could not be read') == 2, 'once per call'
    files = sorted(path.name for path in (tmp_path / 'a').iterdir())
    assert files == ['cam.csv', 'cam.png', 'cam.svg']
    for name in files:
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes(), 'the same bytes'
    explain(*arguments, '--json')
    printed = json.loads(capsys.readouterr().out)
    assert [p['picture'] for p in printed] == [COFFEE, CAT] * 2
    model = load_model(SHIPPED)
    result = cam(model, image_reader(model)(COFFEE)[None])
    assert printed[0]['class'] == class_names(model)[result.classes.item()]['name']
    assert printed[0]['probability'] == pytest.approx(result.probabilities.item(), abs=1e-4)
    torch.testing.assert_close(torch.tensor(printed[0]['map']), result.maps[0], atol=1e-4, rtol=0)
    with open(tmp_path / 'a' / 'cam.csv', newline='') as f:
        rows = [row for row in csv.DictReader(f) if row['picture'] == COFFEE and row['model'] == SHIPPED]
    assert [float(row['activation']) for row in rows] == pytest.approx(result.maps.flatten().tolist(), abs=1e-4)


def test_a_checkpoint_is_compared_with_the_published_weights(tmp_path, capsys):
    name = 'spa_mobilenetv2_cifar.tmm_tin200'
    torch.manual_seed(0)
    torch.save(timm.create_model(name).state_dict(), tmp_path / 'mine.pth')
    mine = str(tmp_path / 'mine.pth')
    assert explain('cam', COFFEE, '--model', name, '--checkpoint', mine, '--compare', name, '--json') == 0
    printed = json.loads(capsys.readouterr().out)
    assert [p['model'] for p in printed] == [mine, name]
    assert printed[0]['map'] != printed[1]['map']


def test_a_chosen_class_and_many_images(tmp_path, capsys):
    assert explain('cam', *sample_images()[:5], '--class', 'red-beet', '--out', tmp_path, '--dark', '--json') == 0
    assert {p['class'] for p in json.loads(capsys.readouterr().out)} == {'Red-Beet'}
    assert sorted(path.name for path in tmp_path.glob('*.png')) == ['cam-1.png', 'cam-2.png']
    with Image.open(tmp_path / 'cam-1.png') as image:
        assert sum(image.convert('RGB').getpixel((0, 0))) < 60
    assert explain('cam', COFFEE, '--class', 'Red-Beets') == 1
    err = capsys.readouterr().err
    assert "does not have the class 'Red-Beets'. Did you mean Red-Beet? A number from 0 to 80 also" in err
    assert explain('cam', COFFEE, '--method', 'cam') == 1
    assert "Unknown method 'cam'" in capsys.readouterr().err


def test_classes_of_a_batch():
    """A class for each image, in any container of integers, or one class for all images."""
    model, x = make('spa_resnet18')
    expected = cam(model, x, torch.tensor([3, 7]))
    for classes in ([3, 7], (3, 7), torch.tensor([3, 7], dtype=torch.int32)):
        assert torch.equal(cam(model, x, classes).maps, expected.maps)
    assert torch.equal(cam(model, x, 3).maps[0], expected.maps[0])
    assert cam(model, x, 3).classes.tolist() == [3, 3]
    for classes in ([3], [3, 7, 1], [[3, 7]], [3., 7.], ['3', '7'], 'ab', [True, False], 3.5, [None, 1]):
        with pytest.raises(ExplainError, match='Expected the number of a class for each of 2 images'):
            cam(model, x, classes)
    for classes in (-1, [0, 1000]):
        with pytest.raises(ExplainError, match='Classes must be numbers from 0 to 999'):
            cam(model, x, classes)


def test_invalid_batches_and_models():
    model, x = make('spa_resnet18')
    for images in (x[:0], x[0], [x], None):
        with pytest.raises(ExplainError, match='Expected a batch of at least one image'):
            cam(model, images)
    for kwargs in (dict(num_classes=0), dict(features_only=True)):
        without = timm.create_model('spa_resnet18', **kwargs).eval()
        for layer in (None, 'layer4'):
            with pytest.raises(ExplainError, match='lacks forward_features|does not return class scores'):
                cam(without, x, layer=layer)
    for method in ([], None):
        with pytest.raises(ExplainError, match='Unknown method'):
            cam(model, x, method=method)


@pytest.mark.parametrize('layer', ['global_pool', 'fc', 'unused'])
@pytest.mark.parametrize('method', ['gradcam', 'scorecam'])
def test_layers_without_a_feature_map(layer, method):
    model, x = make('spa_resnet18')
    model.unused = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(ExplainError, match=f"layer '{layer}' cannot be explained: its output is not a feature map"):
        cam(model, x, layer=layer, method=method)


def named(labels, descriptions=None):
    with torch.device('meta'):
        model = timm.create_model('mobilenetv2_cifar', num_classes=len(labels))
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names=labels, label_descriptions=descriptions)
    return model


def test_a_class_is_found_by_its_name_before_its_number():
    model = named(['0', '1', '10', '2', '3', 'ant', 'Ant'])
    assert [find_class(model, label) for label in ('0', '1', '10', '2', '3', 2, '5', 'ant', 'Ant')] == [
        0, 1, 2, 3, 4, 3, 5, 5, 6]
    with pytest.raises(ModelError, match=r"'ANT' is ambiguous: 2 classes .* of one of them: 5 \(ant\), 6 \(Ant\)"):
        find_class(model, 'ANT')
    for label in ('7', '-1', '²', '1.0'):
        with pytest.raises(ModelError, match='does not have the class .* number from 0 to 6 also'):
            find_class(model, label)


def test_two_classes_with_the_same_name():
    """ImageNet's cranes, a bird and a machine."""
    with torch.device('meta'):
        model = timm.create_model('resnet18')
    labels = [entry['label'] for entry in class_names(model)]
    with pytest.raises(ModelError, match=f"'crane' is ambiguous: 2 classes .*134 .{labels[134]}., 517 .{labels[517]}"):
        find_class(model, 'crane')
    assert find_class(model, labels[517]) == find_class(model, '517') == 517


def test_a_folder_of_images(tmp_path, capsys):
    images = tmp_path / 'images'
    for i, source in enumerate((COFFEE, CAT)):
        (images / str(i)).mkdir(parents=True)
        with open(source, 'rb') as f:
            (images / str(i) / 'x.jpg').write_bytes(f.read())
    paths = [str(images / str(i) / 'x.jpg') for i in (0, 1)]
    assert explain('cam', images, '--out', tmp_path / 'out') == 0
    *lines, written = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == paths, 'file names are the same'
    assert written == f'Wrote {tmp_path / "out"}: cam.csv, cam.png, cam.svg.'
    assert (tmp_path / 'out' / 'cam.png').exists()
    assert explain('gates', images, '--blocks', 'blocks.6.0', '--out', tmp_path / 'gates', '--json') == 0
    assert list(json.loads(capsys.readouterr().out)) == paths
    assert len(list((tmp_path / 'gates').glob('*.png'))) == 2
    assert explain('gates', COFFEE, '--blocks', 'blocks.6.0', '--out', COFFEE) == 1
    assert 'cannot be used: it is a file. Name a folder to write to' in capsys.readouterr().err
    (tmp_path / 'empty').mkdir()
    for kind in ('cam', 'gates'):
        assert explain(kind, tmp_path / 'empty') == 1
        assert 'it is a folder without images' in capsys.readouterr().err
