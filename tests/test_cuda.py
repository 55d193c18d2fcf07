"""What runs on the CPU runs on a GPU, and computes the same there."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from timm.utils import reparameterize_model

import timm_spa  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')

MODELS = {
    'spa_resnet18': 96, 'spa_b_resnet18': 96, 'spa_c_resnet50': 96, 'se_preresnet18_cifar': 32, 'spa_mobilenetv2': 96,
    'spa_c_mobilenetv2_cifar': 32, 'spa_preresnet18_cifar': 32, 'spa_densenet_cifar': 32, 'spa_vgg16_bn': 96,
    'spa_tf_efficientnet_lite0': 96, 'gated base=regnety_002': 96, 'gated base=convnext_atto': 96}


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32, whose 10 bits would hide a fault."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def make(text):
    """A net with random weights and statistics, and an input for it; gates as they are initialized."""
    torch.manual_seed(0)
    name, *words = text.split()
    kwargs = dict(word.split('=') for word in words)
    if kwargs:
        kwargs['neutral'] = False
    net = timm.create_model(name, **kwargs).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
    size = MODELS.get(text, 96)
    return net, torch.randn(3, 3, size, size + (0 if size == 32 else 8))


def rel(y, expected):
    """The distance of two tensors relative to the second."""
    return ((y.double().cpu() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_same_as_on_cpu(name, channels_last):
    """Built and fused, in float32, under autocast and in half precision."""
    net, x = make(name)
    expected = net.double()(x.double())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.float().to('cuda', memory_format=layout)
    x = x.to('cuda', memory_format=layout)
    assert rel(net(x), expected) < 1e-4
    for dtype, tolerance in ((torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
        with torch.autocast('cuda', dtype):
            assert rel(net(x), expected) < tolerance
    fused = reparameterize_model(copy.deepcopy(net))
    assert rel(fused(x), expected) < 1e-4
    assert rel(fused.half()(x.half()), expected) < 2e-2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', MODELS)
def test_training(name, dtype):
    """Mixed precision with a loss scaler: finite gradients everywhere, and the loss of one batch falls."""
    net, x = make(name)
    net, x = net.train().cuda(), x.repeat(4, 1, 1, 1).cuda()
    target = torch.arange(len(x), device='cuda')
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler('cuda', init_scale=256., enabled=dtype == torch.float16)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast('cuda', dtype):
            loss = F.cross_entropy(net(x), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        without = [n for n, p in net.named_parameters() if p.grad is None]
        assert not without
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('name', MODELS)
def test_gradients(name):
    """Those of a GPU are those of the CPU."""
    net, x = make(name)
    net = net.double()
    net(x.double()).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    net = net.cuda()
    net(x.double().cuda()).square().mean().backward()
    for n, p in net.named_parameters():
        assert rel(p.grad, expected[n]) < 1e-8 or p.grad.abs().max() < 1e-12, n


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_graph_capture(name, fused):
    """Nothing waits for the GPU: a CUDA graph takes a forward pass up."""
    net, x = make(name)
    net, x = net.cuda(), x.cuda()
    if fused:
        net = reparameterize_model(net)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        net(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net(x)
    expected = net(x.flip(0)).clone()
    x.copy_(x.flip(0))
    graph.replay()
    assert rel(y, expected.cpu()) < 1e-5


@pytest.mark.parametrize('name', ['spa_resnet18', 'spa_c_resnet18', 'spa_mobilenetv2', 'gated base=regnety_002'])
def test_compile(name):
    """Inductor's kernels give what eager code gives, with a gradient and without."""
    net, x = make(name)
    net, x = net.cuda(), x.cuda()
    torch._dynamo.reset()
    compiled = torch.compile(net)
    with torch.no_grad():
        assert rel(compiled(x), net(x).cpu()) < 1e-4
    net.train()
    state = copy.deepcopy(net.state_dict())
    compiled(x).square().mean().backward()
    found = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    net.load_state_dict(state)
    net(x).square().mean().backward()
    for n, p in net.named_parameters():
        assert rel(found[n], p.grad.cpu()) < 2e-2 or p.grad.abs().max() < 1e-5, n


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group('nccl', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('name', MODELS)
def test_synchronized_batch_norm(name, process_group):
    net, x = make(name)
    net, x = net.train().cuda(), x.cuda()
    before = net(x)
    converted = convert_sync_batchnorm(copy.deepcopy(net)).cuda()
    ddp = nn.parallel.DistributedDataParallel(converted, device_ids=[0])
    after = ddp(x)
    assert rel(after, before.detach().cpu()) < 1e-4
    after.square().mean().backward()
    assert all(p.grad is not None for p in converted.parameters())
