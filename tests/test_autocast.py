"""Mixed precision on CUDA, by data types alone: tensors without memory need no GPU."""
import contextlib

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import timm_spa  # noqa: F401

NETS = (
    'resnet18', 'spa_resnet18', 'spa_b_resnet18', 'spa_c_resnet50', 'ge_resnet50', 'cbam_resnet50', 'spa_mobilenetv2',
    'ge_mobilenetv2', 'spa_c_preresnet18_cifar', 'spa_densenet_cifar', 'spa_vgg16_cifar')


@contextlib.contextmanager
def autocast_of_cuda(dtype):
    """What `torch.autocast('cuda', dtype)` sets; it refuses to without a GPU."""
    before = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
    torch.set_autocast_enabled('cuda', True)
    torch.set_autocast_dtype('cuda', dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled('cuda', before[0])
        torch.set_autocast_dtype('cuda', before[1])


def float32_outputs(net, image, grad, dtype=torch.bfloat16):
    """Names of the modules whose output is not in half precision."""
    seen = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.dtype}))
    with autocast_of_cuda(dtype), torch.set_grad_enabled(grad):
        net(image)
    assert len(seen) > 5
    return [name for name, kind in seen.items() if kind != dtype]


@pytest.mark.quick(5)
@pytest.mark.parametrize('grad', [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize('name', NETS)
def test_half_precision_stays_half(name, grad):
    """CUDA's autocast resizes in float32. A gate in float32 would make the rest of the net float32, as it once did."""
    with FakeTensorMode():
        try:
            torch.nn.Linear(1, 1, device='cuda')
        except RuntimeError as e:
            pytest.skip(f'torch {torch.__version__} asks for a GPU even for tensors without memory: {e}')
        net = timm.create_model(name, device='cuda').train(grad)
        image = torch.empty(2, *net.pretrained_cfg['input_size'], device='cuda')
        assert float32_outputs(net, image, grad) == []
