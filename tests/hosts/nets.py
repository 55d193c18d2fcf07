"""The nets that every host gets: one with SPA, one that attention was added to, and the plain one."""
import timm
import torch
import torch.nn as nn

import timm_spa

KINDS = ('spa', 'add_attention', 'plain')
ACTIVE = dict(zero_init_last=False)  # timm's branches begin as zeros, and a gate of zeros shows nothing
# the name and the arguments for a host that creates the net itself
NAMES = {
    'spa': ('spa_resnet18', ACTIVE),
    'add_attention': ('gated', dict(ACTIVE, base='resnet18', gate='spa')),
    'plain': ('resnet18', ACTIVE),
}


def make(kind, **kwargs):
    """Makes a network whose gates and norm layers act: neutral ones would hide what a host does to them."""
    torch.manual_seed(0)
    if kind == 'add_attention':
        net = timm_spa.add_attention(timm.create_model('resnet18', **ACTIVE, **kwargs), neutral=False)
    else:
        net = timm.create_model(NAMES[kind][0], **ACTIVE, **kwargs)
    assert (len(gates(net)) == 8) == (kind != 'plain')
    return set_norms(net).eval()


def set_norms(net):
    """Gives every batch norm statistics, scales and shifts that are neither 0 nor 1, as training does."""
    generator = torch.Generator().manual_seed(2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor, low, high in ((module.running_mean, -.3, .3), (module.running_var, .5, 2.),
                                          (module.weight, .5, 1.5), (module.bias, -.2, .2)):
                    tensor.uniform_(low, high, generator=generator)
    return net


def gates(net):
    return [m for m in net.modules() if isinstance(m, timm_spa.SpatialPyramidAttention)]


def images(count=2, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def check_backward(net, loss, kind):
    """Every parameter that is trained gets a finite gradient, those of the gates included."""
    loss.backward()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    of_gates = [p.grad.norm().item() for name, p in trained.items() if '.attn.' in name]
    assert bool(of_gates) == (kind != 'plain')
    assert all(norm > 0 for norm in of_gates)
