"""Attribution: grad-cam, torchcam, captum."""
import pytest
import torch
import torch.nn.functional as F
from networks import KINDS, check_backward, images, make

pytestmark = [pytest.mark.slow, pytest.mark.parametrize('kind', KINDS)]
IMAGE = images(1, 128)


def most_likely_class(model):
    with torch.no_grad():
        return model(IMAGE).argmax().item()


def grad_cam(model):
    """Computes Grad-CAM of the last feature map for the most likely class, scaled to 0 to 1."""
    features = model.forward_features(IMAGE)
    features.retain_grad()
    model.forward_head(features).max().backward()
    heat = (features.grad.mean((2, 3), keepdim=True) * features).sum(1).relu().detach()
    return (heat - heat.min()) / (heat.max() - heat.min())


@pytest.mark.host('grad-cam', 'grad-cam')
def test_grad_cam(kind):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = make(kind)
    with GradCAM(model, [model.layer4]) as cam:
        heat = cam(IMAGE, [ClassifierOutputTarget(most_likely_class(model))])
    expected = F.interpolate(grad_cam(make(kind))[None], (128, 128), mode='bilinear')[0]
    torch.testing.assert_close(torch.from_numpy(heat), expected, rtol=0, atol=0.01)  # OpenCV resizes in fixed point


@pytest.mark.host('torchcam', 'torchcam')
def test_torchcam(kind):
    from torchcam.methods import GradCAM

    model = make(kind)
    with GradCAM(model, target_layer='layer4') as extractor:
        heat, = extractor(most_likely_class(make(kind)), model(IMAGE))
    torch.testing.assert_close(heat, grad_cam(make(kind)), rtol=0, atol=1e-3)


@pytest.mark.host('captum', 'captum')
def test_captum(kind):
    from captum.attr import IntegratedGradients, LayerGradCam

    model = make(kind)
    target = most_likely_class(model)
    heat = LayerGradCam(model, model.layer4).attribute(IMAGE, target=target)[0].relu().detach()
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    torch.testing.assert_close(heat, grad_cam(make(kind)), rtol=0, atol=1e-3)
    zeros = torch.zeros_like(IMAGE)
    attribution = IntegratedGradients(model).attribute(IMAGE, zeros, target=target, n_steps=64)
    with torch.no_grad():
        difference = (model(IMAGE) - model(zeros))[0, target]
    torch.testing.assert_close(attribution.sum().float(), difference, rtol=0.05, atol=0.01)
    check_backward(model, model(images()).square().mean(), kind)
