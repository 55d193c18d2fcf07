"""Attention for CNNs of timm: the same function until it is trained, gates that learn, and timm's tools still work."""
import copy
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from marks import slow_unless
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch.distributed.fsdp import fully_shard

import timm_spa
from timm_spa.checkpoints.warm_start import gated_modules
from timm_spa.layers import SpatialPyramidAttention
from timm_spa.models import GATES
from timm_spa.models._block_types import BLOCK_TYPES

IMAGES = torch.randn(2, 3, 112, 56, generator=torch.Generator().manual_seed(0))
# a name for each family and kind of block, and the number of its gates
NETS = {
    'resnet18': 8, 'seresnet50': 16, 'resnet50_gn': 16, 'resnext26ts': 8, 'resnet26d': 8, 'wide_resnet50_2': 16,
    'resnetv2_50': 16, 'resnest14d': 4, 'res2net50_26w_4s': 16, 'legacy_seresnet18': 8, 'skresnet18': 8,
    'tresnet_m': 21, 'regnetx_002': 13, 'regnety_002': 13, 'regnetz_005': 21, 'gernet_s': 14, 'repvgg_a0': 21,
    'efficientnet_b0': 16, 'tf_efficientnet_lite0': 16, 'efficientnetv2_rw_t': 39, 'mobilenetv2_100': 17,
    'mobilenetv3_small_050': 11, 'mobilenetv4_conv_small': 12, 'mnasnet_small': 15, 'fbnetc_100': 21,
    'ghostnet_100': 16, 'ghostnetv2_100': 16, 'rexnet_100': 16, 'cspresnet50': 13, 'darknet53': 23,
    'cs3darknet_s': 9, 'ese_vovnet19b_dw': 4, 'dla34': 12, 'densenet121': 58, 'rdnet_tiny': 21, 'convnext_atto': 12,
    'convnextv2_atto': 12, 'starnet_s1': 15, 'legacy_xception': 12, 'xception41': 13, 'vgg11_bn': 8, 'vgg11': 8,
    'hrnet_w18_small': 23,
}
# what a gate is put on: a bare norm layer, one with an activation, one of groups, a convolution, two of these, a block
KINDS = ['resnet18', 'regnety_002', 'resnet50_gn', 'convnext_atto', 'ghostnet_100', 'repvgg_a0']
LARGE = (  # similar blocks are in a smaller network
    'wide_resnet50_2', 'darknet53', 'seresnet50', 'resnet50_gn', 'efficientnetv2_rw_t', 'resnet26d', 'resnext26ts',
    'resnetv2_50', 'regnetz_005', 'fbnetc_100', 'ghostnetv2_100', 'convnextv2_atto', 'xception41', 'vgg11',
    'res2net50_26w_4s', 'legacy_seresnet18', 'cspresnet50', 'rexnet_100')
WHOLE_SIZES = ('tresnet_m', 'dla34', 'hrnet_w18_small')  # take no odd sizes


def random_net(name, **kwargs):
    """A plain net with random affine parameters and statistics of its norm layers."""
    torch.manual_seed(0)
    if name.startswith('vgg'):
        kwargs['mlp_ratio'] = 1 / 64  # 100 million parameters of the head fewer
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, 'running_var', None) is not None:
                module.running_var.uniform_(0.5, 1.5)
                module.running_mean.uniform_(-0.5, 0.5)
            if getattr(module, 'bias', None) is not None and getattr(module, 'weight', module.bias).ndim == 1:
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for parameter_name, p in model.named_parameters():
            if parameter_name.endswith('gamma'):  # layer scale starts near zero
                p.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.quick(12)
@pytest.mark.parametrize('name', slow_unless(lambda name: name not in LARGE, NETS))
def test_same_outputs_until_trained(name):
    """Then every parameter of a gate has a gradient after three steps, and what was learned is in the state dict."""
    model = random_net(name, num_classes=10)
    names = set(model.state_dict())
    sizes = [(64, 96), (96, 64) if name in WHOLE_SIZES else (97, 75)]
    images = [torch.randn(2, 3, *size) for size in sizes]
    with torch.no_grad():
        expected = [model(x) for x in images]
        assert timm_spa.add_attention(model) is model
        assert max(relative(model(x), y) for x, y in zip(images, expected, strict=True)) <= 1e-6
    added = set(model.state_dict()) - names
    assert names < set(model.state_dict())
    assert all('.attn.' in key for key in added)
    assert sum(key.endswith('.attn.fc1.weight') for key in added) == NETS[name]

    parameters = {n: p for n, p in model.named_parameters() if n in added}
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(images[0]), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert [key for key, p in parameters.items() if not p.grad.any()] == []

    again = timm_spa.add_attention(random_net(name, num_classes=10), neutral=False)
    again.load_state_dict(model.eval().state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(images[0]), model(images[0]))


CHANGES = [
    convert_sync_batchnorm, torch.nn.DataParallel, torch.nn.Module.bfloat16,
    lambda model: torch.compile(model, backend='eager')]


@pytest.mark.parametrize(('name', 'change'), [
    *(('resnet18', change) for change in CHANGES),
    *(pytest.param('regnety_002', change, marks=pytest.mark.slow) for change in CHANGES),
    ('regnety_002', freeze_batch_norm_2d)])  # the bare frozen layer is torchvision's, which is refused
@torch.no_grad()
def test_of_a_model_that_was_changed_before(name, change):
    model = change(random_net(name))
    images = torch.randn(2, 3, 64, 64).to(next(model.parameters()).dtype)
    expected = model(images)
    timm_spa.add_attention(model)
    assert relative(model(images), expected) <= 1e-6
    assert len(list(gated_modules(model))) == NETS[name]


@pytest.mark.parametrize(('name', 'gate'), slow_unless(lambda name: name in ('resnet18', 'convnext_atto'), [
    (name, gate) for name in KINDS for gate in ('se', 'se_bias', 'cbam', 'gc', 'ge_conv', 'spa')]))
def test_every_gate_in_double_precision(name, gate):
    model = random_net(name).double()
    images = torch.randn(2, 3, 65, 96, dtype=torch.double)
    with torch.no_grad():
        expected = model(images)
        timm_spa.add_attention(model, gate)
        assert relative(model(images), expected) <= 1e-12
        for _, module in gated_modules(model):  # that it is the gates which keep the function
            for p in module.attn.parameters():
                p.uniform_(-1, 1)
        assert relative(model(images), expected) > 1e-3


def test_gates_as_initialized():
    model = random_net('resnet18')
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    timm_spa.add_attention(model, 'ge', neutral=False)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert timm_spa.add_attention(timm.create_model('resnet18'), 'none').layer1[0].bn2.__class__ is torch.nn.BatchNorm2d


@pytest.mark.parametrize(('where', 'gated'), [
    ('layer4.1.bn2', ['layer4.1.bn2']),
    (['layer1.0', 'layer4.?'], ['layer1.0.bn2', 'layer4.0.bn2', 'layer4.1.bn2']),
    (re.compile(r'layer\d\.0\.conv1'), [f'layer{i}.0.conv1' for i in (1, 2, 3, 4)]),
])
def test_where(where, gated):
    model = random_net('resnet18')
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        timm_spa.add_attention(model, where=where)
        assert torch.equal(model(images), expected)
    found = [name.removesuffix('.drop') for name, _ in gated_modules(model)]
    assert found == gated


def tied():
    model = timm.create_model('resnet18')
    model.layer1[1].bn2 = model.layer1[0].bn2
    return model


@pytest.mark.parametrize(('model', 'kwargs', 'message'), [
    ('resnet18', dict(gate='spam'), "gate must be one of ((?!_[bc]').)*'spa'((?!_[bc]').)* got 'spam'"),
    ('resnet18', dict(gate='spa_b'), "reads the block's input.*spa_b_resnet50"),
    ('resnet18', dict(gate='se_c'), "reads the block's input.*se_c_preresnet18_cifar"),
    ('resnet18', dict(gate='ge'), "The gate 'ge' cannot be neutral.*neutral=False"),
    ('resnet18', dict(where='layer5.0.bn2'), r"No module of the model matches 'layer5.0.bn2'.*layer\d.0.bn2"),
    ('resnet18', dict(where='layer1'), 'layer1 is a Sequential, which cannot be gated'),
    ('resnet18', dict(where=['layer1.0', 'fc']), 'fc is a Linear'),
    ('resnet18', dict(pyramid_sizes=(0, 4)), 'pyramid_sizes'),
    ('resnetv2_50x1_bit', {}, r'stages.0.blocks.0.conv3 is a StdConv2d'),
    ('vit_tiny_patch16_224', {},
     'VisionTransformer does not contain a block of a known type.*where=.*resnet, .*convnext'),
    ('swin_tiny_patch4_window7_224', {}, 'does not contain a block of a known type'),
    ('spa_resnet18', {}, 'has gates already'),
    ('resnet18', dict(where=[]), 'where is empty. Give names of blocks, .* leave it out'),
    ('resnet18', dict(where=''), 'The model itself is a ResNet, which cannot be gated'),
    ('resnet18', dict(where='*'), 'act1 is a ReLU, which cannot be gated'),
    ('resnet18', dict(where=re.compile('.*')), 'act1 is a ReLU, which cannot be gated'),
    ('repvgg_a0', dict(where='stages.*.conv_kxk.bn'),
     r'stages.0.0.conv_kxk.bn is inside stages.0.0, a RepVggBlock that timm fuses.* Choose the block itself'),
    ('mobileone_s0', dict(where='stages.0.0.conv_kxk.0.bn'), 'inside stages.0.0, a MobileOneBlock.* outside of it'),
    (tied, {}, 'layer1.0.bn2 is used several times'),
    (lambda: torch.nn.Conv2d(3, 8, 3), dict(where=''), 'a single Conv2d'),
    (lambda: freeze_batch_norm_2d(timm.create_model('resnet18')), {}, 'layer1.0.bn2 is a FrozenBatchNorm2d'),
])
def test_errors_leave_the_model_unchanged(model, kwargs, message):
    model = timm.create_model(model) if isinstance(model, str) else model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        timm_spa.add_attention(model, **kwargs)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('wrap', ['DistributedDataParallel', 'fully_shard'])
def test_refuses_a_model_wrapped_for_several_processes(wrap):
    """The gradients of its gates would differ from process to process."""
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = timm.create_model('resnet18')
        if wrap == 'fully_shard':
            model = fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh('cpu', (1,)))
        else:
            model = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match='(DistributedDataParallel|FSDPModule) does not see .* before wrapping'):
            timm_spa.add_attention(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_norm_layer_without_affine_parameters_is_named():
    model = timm.create_model('resnet18')
    model.layer2[0].bn2 = torch.nn.BatchNorm2d(128, affine=False)
    with pytest.raises(ValueError, match='layer2.0.bn2 is a BatchNorm2d without affine parameters'):
        timm_spa.add_attention(model)
    timm_spa.add_attention(model, neutral=False)
    with pytest.raises(ValueError, match='has gates already'):
        timm_spa.add_attention(model)


def test_every_block_type_is_one_of_timm():
    for module, types in BLOCK_TYPES.items():
        loaded = __import__(module, fromlist=list(types))
        assert all(isinstance(getattr(loaded, name), type) for name in types), module


def test_layer_scale_and_stochastic_depth_come_after():
    """In training mode too: the gated map is the norm layer's output, whatever the block does with it then."""
    for name, kwargs in (
            ('convnext_atto', dict(drop_path_rate=0.5)), ('mobilenetv4_conv_small', dict(drop_path_rate=0.5)),
            ('resnet18', dict(drop_path_rate=0.5, drop_block_rate=0.1))):
        model = random_net(name, **kwargs).train()
        images = torch.randn(4, 3, 64, 64)
        torch.manual_seed(1)
        with torch.no_grad():
            expected = model(images)
            model = timm_spa.add_attention(random_net(name, **kwargs).train())
            torch.manual_seed(1)
            assert relative(model(images), expected) <= 1e-6


def trained(name, **kwargs):
    """A net whose gates are not neutral any more, with statistics of its own maps."""
    model = timm_spa.add_attention(random_net(name, num_classes=10, **kwargs)).train()
    for module in model.modules():
        if isinstance(module, SpatialPyramidAttention):
            torch.nn.init.normal_(module.fc2.weight, std=0.5)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.
    with torch.no_grad():
        model(IMAGES)
    return model.eval()


@pytest.mark.quick(3)
@pytest.mark.parametrize('name', KINDS)
class TestTools:
    def check(self, model, original, tolerance=0.):
        with torch.no_grad():
            assert relative(model(IMAGES), original(IMAGES)) <= tolerance

    def test_copies(self, name):
        model = trained(name)
        self.check(copy.deepcopy(model), model)
        self.check(pickle.loads(pickle.dumps(model)), model)
        self.check(ModelEmaV3(model).module, model)
        self.check(copy.deepcopy(model).to(memory_format=torch.channels_last), model, 1e-3)

    def test_script_and_fx(self, name):
        model = trained(name)
        self.check(torch.jit.script(model), model, 1e-4)
        features = timm.create_model(name, features_only=True, feature_cls='fx')
        with pytest.raises(ValueError, match='does not contain a block of a known type'):
            timm_spa.add_attention(features)
        self.check(torch.fx.symbolic_trace(model), model, 1e-4)

    def test_batch_norm_converted(self, name):
        model = trained(name)
        frozen = freeze_batch_norm_2d(copy.deepcopy(model))
        self.check(frozen, model, 1e-4)
        self.check(unfreeze_batch_norm_2d(frozen).eval(), model, 1e-4)
        sync = convert_sync_batchnorm(copy.deepcopy(model))
        assert sync.state_dict().keys() == model.state_dict().keys()
        assert len(list(gated_modules(sync))) == NETS[name]

    def test_frozen_in_training(self, name):
        """The remedy that the documentation names: timm's freezing leaves the statistics of the gates live."""
        model = freeze_batch_norm_2d(trained(name))
        for module in list(model.modules()):
            if isinstance(module, timm_spa.models.GateSlot):
                freeze_batch_norm_2d(module)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.train()(IMAGES)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_fuse(self, name):
        model = trained(name)
        self.check(timm.utils.reparameterize_model(copy.deepcopy(model)), model, 1e-3)

    def test_parameters_and_head(self, name):
        model = trained(name)
        groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.9)
        assert {id(p) for group in groups for p in group['params']} == {id(p) for p in model.parameters()}
        model.set_grad_checkpointing()
        model.train()(IMAGES).sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if '.attn.' in n)
        model.reset_classifier(3)
        assert model.eval()(IMAGES).shape == (2, 3)

    def test_features_in_both_orders(self, name):
        plain = random_net(name, features_only=True)
        with torch.no_grad():
            expected = plain(IMAGES)
            given = timm_spa.add_attention(plain)(IMAGES)
            assert len(list(gated_modules(plain))) > 3
            assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
            asked = timm.create_model('gated', base=name, features_only=True).eval()
            asked.load_state_dict(plain.state_dict())
            assert all(torch.equal(a, b) for a, b in zip(asked(IMAGES), expected, strict=True))


@pytest.mark.parametrize('name', slow_unless(lambda name: name == 'resnet18', KINDS))
def test_compiled_in_one_graph_and_exported(name):
    model = trained(name)
    torch._dynamo.reset()
    with torch.no_grad():
        for other in (torch.compile(model, fullgraph=True, backend='aot_eager'),
                      torch.export.export(model, (IMAGES,)).module()):
            assert relative(other(IMAGES), model(IMAGES)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'regnety_002', 'convnext_atto', 'ghostnet_100', 'mobilenetv4_conv_small'])
def test_compiled_by_inductor(name):
    model = trained(name)
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative(torch.compile(model, fullgraph=True)(IMAGES), model(IMAGES)) <= 1e-4


def test_every_gate_says_whether_it_can_be_neutral():
    assert {gate for gate, row in GATES.items() if row.doublings is None} == {'ge'}
