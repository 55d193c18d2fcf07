"""Models that every host is tested with: one with SPA, one with `add_attention`, and the plain model."""
import timm
import torch

import timm_spa

KINDS = ('spa', 'add_attention', 'plain')
ACTIVE = dict(zero_init_last=False)  # timm initializes branches to zero, which would hide the gates
# names and arguments, for hosts that create the model themselves
NAMES = {
    'spa': ('spa_resnet18', ACTIVE),
    'add_attention': ('gated', dict(ACTIVE, base='resnet18', gate='spa')),
    'plain': ('resnet18', ACTIVE),
}


def make(kind, **kwargs):
    """Creates a model with active gates. Neutral gates would hide changes by a host."""
    torch.manual_seed(0)
    if kind == 'add_attention':
        model = timm_spa.add_attention(timm.create_model('resnet18', **ACTIVE, **kwargs), neutral=False)
    else:
        model = timm.create_model(NAMES[kind][0], **ACTIVE, **kwargs)
    assert (len(gates(model)) == 8) == (kind != 'plain')
    return model.eval()


def gates(model):
    return [m for m in model.modules() if isinstance(m, timm_spa.SpatialPyramidAttention)]


def images(count=2, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def check_backward(model, loss, kind):
    """Checks that every trainable parameter gets a finite gradient, and that gradients of gates are not zero."""
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    gate_norms = [p.grad.norm().item() for name, p in trained.items() if '.attn.' in name]
    assert bool(gate_norms) == (kind != 'plain')
    assert all(norm > 0 for norm in gate_norms)
