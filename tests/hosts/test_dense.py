"""Nets as backbones: torchvision's detectors and feature extractors, segmentation_models_pytorch."""
import pytest
import timm
import torch
from nets import KINDS, NAMES, check_backward, images, make, set_norms

pytestmark = [pytest.mark.slow, pytest.mark.parametrize('kind', KINDS)]


@pytest.mark.host('torchvision, Faster R-CNN', 'torchvision')
def test_faster_rcnn(kind):
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    backbone = make(kind, num_classes=0, global_pool='')
    backbone.out_channels = backbone.num_features
    model = FasterRCNN(
        backbone, num_classes=2, rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(['0'], 7, 2), min_size=64, max_size=64)
    seen = []
    backbone.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output.detach())))
    boxes = dict(boxes=torch.tensor([[8., 8., 40., 40.]]), labels=torch.tensor([1]))
    losses = model.train()(list(images().sigmoid()), [boxes, boxes])
    check_backward(model, sum(losses.values()), kind)
    (pixels, maps), = seen
    torch.testing.assert_close(maps, make(kind, num_classes=0, global_pool='').train()(pixels).detach())


@pytest.mark.host('torchvision, create_feature_extractor', 'torchvision')
def test_feature_extractor(kind):
    from torchvision.models.feature_extraction import create_feature_extractor

    net = make(kind)
    extractor = create_feature_extractor(net, {'layer2': 'middle', 'layer4': 'last'})
    maps, bare = extractor(images()), make(kind)
    torch.testing.assert_close(maps['last'], bare.forward_features(images()))
    torch.testing.assert_close(maps['middle'], bare.forward_intermediates(images(), indices=[2])[1][0])
    check_backward(extractor, maps['last'].square().mean(), kind)


@pytest.mark.host(
    'segmentation_models_pytorch, Unet', 'segmentation-models-pytorch',
    catch='names begin with `tu-`; the base of `tu-gated` is an argument of the model: `smp.Unet(\'tu-gated\', '
          'base=\'resnet18\', gate=\'spa\')`')
def test_unet(kind):
    import segmentation_models_pytorch as smp

    name, kwargs = NAMES[kind]
    model = smp.Unet(f'tu-{name}', encoder_weights=None, classes=2, **kwargs).eval()
    set_norms(model)
    bare = timm.create_model(name, features_only=True, **kwargs).eval()
    bare.load_state_dict(model.encoder.model.state_dict())
    torch.testing.assert_close(model.encoder(images())[1:], bare(images()))
    assert model(images()).shape == (2, 2, 64, 64)
    check_backward(model, model(images()).square().mean(), kind)
