"""Where a net looks: grad-cam, torchcam, captum."""
import pytest
import torch
import torch.nn.functional as F
from nets import KINDS, check_backward, images, make

pytestmark = [pytest.mark.slow, pytest.mark.parametrize('kind', KINDS)]
PICTURE = images(1, 128)


def likeliest(net):
    with torch.no_grad():
        return net(PICTURE).argmax().item()


def grad_cam(net):
    """Grad-CAM of the last map and the likeliest class by its definition, between 0 and 1."""
    maps = net.forward_features(PICTURE)
    maps.retain_grad()
    net.forward_head(maps).max().backward()
    return stretch((maps.grad.mean((2, 3), keepdim=True) * maps).sum(1).relu().detach())


def stretch(heat):
    return (heat - heat.min()) / (heat.max() - heat.min())


@pytest.mark.host('grad-cam', 'grad-cam')
def test_grad_cam(kind):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net = make(kind)
    with GradCAM(net, [net.layer4]) as cam:
        heat = cam(PICTURE, [ClassifierOutputTarget(likeliest(net))])
    # it stretches the map to 0 to 1 once more after it has enlarged it, which misses the peak
    expected = stretch(F.interpolate(grad_cam(make(kind))[None], (128, 128), mode='bilinear')[0])
    torch.testing.assert_close(torch.from_numpy(heat), expected, rtol=0, atol=1e-5)


@pytest.mark.host('torchcam', 'torchcam')
def test_torchcam(kind):
    from torchcam.methods import GradCAM

    net = make(kind)
    with GradCAM(net, target_layer='layer4') as extractor:
        heat, = extractor(likeliest(make(kind)), net(PICTURE))
    torch.testing.assert_close(heat, grad_cam(make(kind)), rtol=0, atol=1e-3)


@pytest.mark.host('captum', 'captum')
def test_captum(kind):
    from captum.attr import IntegratedGradients, LayerGradCam

    net = make(kind)
    target = likeliest(net)
    heat = LayerGradCam(net, net.layer4).attribute(PICTURE, target=target)[0].relu().detach()
    heat = stretch(heat)
    torch.testing.assert_close(heat, grad_cam(make(kind)), rtol=0, atol=1e-3)
    zeros = torch.zeros_like(PICTURE)
    attribution = IntegratedGradients(net).attribute(PICTURE, zeros, target=target, n_steps=64)
    with torch.no_grad():
        gained = (net(PICTURE) - net(zeros))[0, target]
    torch.testing.assert_close(attribution.sum().float(), gained, rtol=0.05, atol=0.01)
    check_backward(net, net(images()).square().mean(), kind)
