"""What every model promises beyond timm's own suite (`make timm-suite`)."""
import json
import pydoc
import sys
from pathlib import Path

import pytest
import timm
import torch
from marks import slow_unless
from timm.models import save_for_hf

import timm_spa
from timm_spa.layers import SpatialPyramidAttention
from timm_spa.models._entrypoints import split_gate

MODELS = timm_spa.list_models()
# one name per kind of block and variant, where a property does not depend on width and depth
KINDS = (
    'spa_resnet18', 'spa_b_resnet18', 'spa_c_resnet50', 'spa_mobilenetv2_050', 'spa_c_mobilenetv2',
    'spa_mobilenetv2_cifar', 'spa_b_preresnet18_cifar', 'se_c_preresnet50_cifar', 'spa_c_densenet_cifar',
    'spa_c_vgg16_cifar')

# the deeper and wider nets have the blocks of the others: what holds of a block is tested on them in the slow run
DEEP = (
    '34', '101', '152', '161', '169', '201', '121_cifar', '_075', '_140', '50d', 'wide', 'b_resnext', 'c_resnext',
    'b_efficientnet', 'c_efficientnet', '_tf_', 'conv_medium', 'e_mobilenetv2_cifar', 'e_densenet', 'e_vgg', 'ge_pre',
    'b_vgg', 'b_densenet', 'resnext50')
ALSO_SLOW = slow_unless(
    lambda name: name in (*KINDS, 'spa_preresnet50_cifar', 'spa_tf_efficientnet_lite0')
    or not any(part in name for part in (*DEEP, 'preresnet50')), MODELS)

# timm's nets with gates added, which have timm's initialization
ATTACHED = ('gated', 'spa_mobilenetv4_conv_small', 'spa_mobilenetv4_conv_medium')

# trainable parameters of the authors' models, 1000 or 100 classes (counted by running their code)
PARAMETERS = {
    'spa_resnet18': 11_776_816,
    'spa_resnet34': 21_955_376,
    'spa_resnet50': 28_073_912,
    'spa_resnet101': 49_296_491,
    'spa_resnet152': 66_777_118,
    'spa_mobilenetv2': 3_562_227,
    'preresnet50_cifar': 23_693_476,
    'preresnet101_cifar': 42_685_604,
    'se_preresnet50_cifar': 26_208_420,
    'se_preresnet101_cifar': 47_428_772,
    'se_b_preresnet50_cifar': 26_033_316,
    'se_b_preresnet101_cifar': 47_253_668,
    'se_c_preresnet50_cifar': 26_737_796,
    'se_c_preresnet101_cifar': 47_958_148,
    'spa_preresnet50_cifar': 26_210_356,
    'spa_preresnet101_cifar': 47_432_935,
    'spa_b_preresnet50_cifar': 26_035_252,
    'spa_b_preresnet101_cifar': 47_257_831,
    'spa_c_preresnet50_cifar': 26_739_732,
    'spa_c_preresnet101_cifar': 47_962_311,
}

def describe_gate(gate):
    """The prefix of the models with that gate, by what it computes; for two of table III, timm's class or ours."""
    layer = getattr(gate, 'layer', gate)
    kind = type(layer).__name__
    prefix = {
        'SpatialPyramidAttention': 'spa', 'SqueezeExcite': 'se', 'GatherExcite': 'ge', 'CbamModule': 'cbam',
        'GlobalContext': 'gc', 'NoGate': 'none'}.get(kind, kind)
    if gate.reads_block_input:
        return f'{prefix}_c' if layer.variant == 'c' else f'{prefix}_b'
    return prefix


def image_size(name):
    return timm.get_pretrained_cfg(name).input_size[1:]


def small_images(name, batch=2):
    """Images as small as the model's five stages allow, to be quick."""
    return torch.randn(batch, 3, *(min(n, 64) for n in image_size(name)))


def test_every_row_of_the_tables_has_a_name():
    """Tables I to VI: every backbone, variant and control (timm has resnet50, seresnet50 and mobilenetv2_100)."""
    gates = ('', 'se_', 'ge_', 'spa_', 'spa_b_', 'spa_c_')
    expected = {f'{g}resnet{d}' for g in gates[3:] for d in (18, 34, 50, 101, 152)}
    expected |= {'ge_resnet50', 'cbam_resnet50', 'gc_resnet50'}
    expected |= {'spa_mobilenetv2', 'spa_mobilenetv2_050', 'spa_mobilenetv2_075', 'spa_mobilenetv2_140'}
    expected |= {'spa_b_mobilenetv2', 'spa_c_mobilenetv2', 'se_mobilenetv2', 'ge_mobilenetv2', 'cbam_mobilenetv2'}
    expected |= {f'{g}preresnet{d}_cifar' for g in gates for d in (18, 34, 50, 101, 152)}
    expected |= {f'{g}preresnet{d}_cifar' for g in ('se_b_', 'se_c_') for d in (18, 50, 101)}
    nets = ('mobilenetv2_cifar', 'densenet_cifar', 'densenet121_cifar', 'vgg16_cifar')
    expected |= {f'{g}{net}' for g in gates for net in nets}
    expected |= {f'spa_densenet{d}' for d in (121, 161, 169, 201)} | {'spa_vgg16_bn'}
    # and what is none of the paper's
    others = ('resnet50d', 'resnet101d', 'resnext50_32x4d', 'resnext101_32x8d', 'wide_resnet50_2', 'efficientnet_lite0',
              'tf_efficientnet_lite0')
    expected |= {f'{g}{net}' for g in gates[3:] for net in others}
    expected |= {f'{g}_tf_efficientnet_lite0' for g in ('se', 'ge', 'cbam')}
    assert set(MODELS) == expected | set(ATTACHED)


@pytest.mark.parametrize('name', MODELS)
def test_names_are_found(name):
    """By a search in the sources, by help() on the module, and by timm under the module of the family."""
    module = sys.modules[timm.models.model_entrypoint(name).__module__]
    assert f"'{name}'" in Path(module.__file__).read_text()
    assert f'{name}(pretrained' in pydoc.render_doc(module, renderer=pydoc.plaintext)
    assert name in timm.list_models(module=module.__name__.rpartition('.')[2])
    assert '.' in getattr(module, name).__doc__


@pytest.mark.quick(30)
@pytest.mark.parametrize('name', MODELS)
def test_structure(name):
    """One gate a block, of the kind in the name; parameters as the authors'; names of the plain model kept."""
    model = timm.create_model(name, device='meta')
    gate = 'spa' if name == 'gated' else split_gate(name)[1]
    gates = [m.attn for m in model.modules() if hasattr(m, 'attn')]
    blocks = {'resnet18': 8, 'resnet34': 16, 'resnet50': 16, 'resnet101': 33, 'resnet152': 50, 'mobilenetv2': 17,
              'densenet121': 58, 'densenet161': 78, 'densenet169': 82, 'densenet201': 98, 'densenet_cifar': 58,
              'vgg16': 13, 'resnext50': 16, 'resnext101': 33, 'efficientnet_lite0': 16, 'v4_conv_small': 12,
              'v4_conv_medium': 22, 'gated': 16}
    assert len(gates) == next(count for base, count in blocks.items() if base in name)
    assert {describe_gate(g) for g in gates} == {
        {'se': 'SEModule', 'ge': 'GatherExciteConv'}.get(gate, gate) if name.endswith(('_mobilenetv2', '_lite0'))
        else gate}
    if name in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    if not name.endswith('_cifar'):
        plain = {'mobilenetv2': 'mobilenetv2_100', 'gated': 'resnet50'}.get(split_gate(name)[0], split_gate(name)[0])
        plain = timm.create_model(plain, device='meta')
        own = {k: v.shape for k, v in model.state_dict().items() if '.attn.' not in k}
        assert own == {k: v.shape for k, v in plain.state_dict().items()}


@pytest.mark.parametrize('sizes', [(1, 2), (1, 2, 4), (1, 4, 7), (1, 2, 4, 7)])
def test_pyramids_of_table_v(sizes):
    """The authors' four settings, and what they make of a ResNet-50: 16 more parameters for each size."""
    model = timm.create_model('spa_resnet50', pyramid_sizes=sizes, device='meta')
    assert sum(p.numel() for p in model.parameters()) == 28_073_912 + 16 * (len(sizes) - 3)


@pytest.mark.quick(13)
@pytest.mark.parametrize('name', [case for case in ALSO_SLOW if case.values[0] not in ATTACHED])
def test_meta_device_then_init_weights(name):
    """Every parameter and buffer gets a value: nothing of the uninitialized memory is left."""
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=10)
    model.to_empty(device='cpu')
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(77)
    model.init_weights()
    for key, value in model.state_dict().items():
        assert not (value == 77).any(), key
    for m in model.modules():
        if isinstance(m, SpatialPyramidAttention):
            assert (m.pyramid_weight == 1).all()
    with torch.no_grad():
        assert model.eval()(small_images(name)).isfinite().all()


@pytest.mark.parametrize('name', KINDS)
def test_device_and_dtype_keywords(name):
    model = timm.create_model(name, dtype=torch.bfloat16, device='cpu').eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert model(small_images(name).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('name', KINDS)
def test_model_arguments(name):
    """in_chans, global_pool, drop rates and the pyramid, in training mode."""
    kwargs = {} if 'densenet' in name or 'vgg' in name else dict(drop_path_rate=0.1)
    kwargs |= dict(num_classes=7, in_chans=1, global_pool='avgmax', drop_rate=0.1)
    model = timm.create_model(name, gate='spa', pyramid_sizes=(1, 3), **kwargs)
    assert model(small_images(name)[:, :1]).shape == (2, 7)
    assert all(m.pyramid_sizes == [3, 1] for m in model.modules() if isinstance(m, SpatialPyramidAttention))
    with pytest.raises(ValueError, match=r'pyramid_sizes .* got \(\)'):
        timm.create_model(name, gate='spa', pyramid_sizes=())
    with pytest.raises(ValueError, match=r"gate must be one of 'none', 'se', .*'spa_c', .* got 'sap'"):
        timm.create_model(name, gate='sap')


@pytest.mark.parametrize(('name', 'norm_layer'), [
    ('spa_resnet50', 'groupnorm'), ('spa_c_resnet50', timm.layers.GroupNorm), ('spa_vgg16_cifar', 'groupnorm'),
    ('se_c_preresnet18_cifar', 'groupnorm'), ('ge_mobilenetv2', 'groupnorm1')])
def test_group_norm(name, norm_layer):
    """That of the gates has one group, which every width has."""
    model = timm.create_model(name, norm_layer=norm_layer, num_classes=7).eval()
    norms = [m for gate in model.modules() if hasattr(gate, 'attn') for m in gate.attn.modules()
             if isinstance(m, (torch.nn.GroupNorm, torch.nn.BatchNorm2d))]
    assert {(type(m), m.num_groups) for m in norms} == {(timm.layers.GroupNorm1, 1)}
    with torch.no_grad():
        assert model(small_images(name)).shape == (2, 7)


@pytest.mark.parametrize(('name', 'kwargs', 'message'), [
    *(('spa_resnet18', dict(rd_ratio=ratio), 'rd_ratio must be a positive number, got')
      for ratio in (0, -1, float('nan'), float('inf'), '1/16')),
    ('spa_resnet18', dict(block_args=dict(attn_layer='se')), "no attn_layer, got 'se'. Choose attention with gate="),
    ('spa_preresnet18_cifar', dict(avg_down=True), 'do not support avg_down'),
    ('se_preresnet50_cifar', dict(avg_down=True), 'do not support avg_down'),
    *((name, dict(base='nothing'), f"base of {name} must be one of .*, got 'nothing'. .* gated") for name in (
        'spa_resnet18', 'spa_vgg16_bn', 'spa_densenet121', 'spa_mobilenetv2', 'spa_mobilenetv4_conv_small')),
    ('spa_preresnet18_cifar', dict(block_args=dict(attn_layer='se')), 'do not support attn_layer'),
])
def test_arguments_that_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, device='meta', **kwargs)


@pytest.mark.quick(18)
@pytest.mark.parametrize('name', ALSO_SLOW)
def test_features_and_their_reduction(name):
    """The reduction of a feature map is the image over the map, also for the nets whose stem keeps the resolution."""
    model = timm.create_model(name, features_only=True).eval()
    images = small_images(name)
    with torch.no_grad():
        maps = model(images)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [images.shape[-1] // m.shape[-1] for m in maps] == model.feature_info.reduction()
    with torch.no_grad():
        last = timm.create_model(name, features_only=True, out_indices=(len(maps) - 1,)).eval()(images)
    assert [m.shape for m in last] == [maps[-1].shape]


@pytest.mark.parametrize('name', ['spa_vgg16_bn', 'spa_resnet18', 'spa_mobilenetv2_cifar'])
def test_features_with_gradient_checkpointing(name):
    """The same maps, and the same gradients of the first convolution."""
    kwargs = dict(mlp_ratio=1 / 64) if name == 'spa_vgg16_bn' else {}
    model, gradients, images = timm.create_model(name, features_only=True, **kwargs), [], small_images(name)
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sum(m.square().mean() for m in model(images)).backward()
        gradients.append(next(model.parameters()).grad.clone())
    torch.testing.assert_close(*gradients)


# timm's DenseNet and VGG have neither drop path nor output_stride
@pytest.mark.quick(8)
@pytest.mark.parametrize('name', [name for name in KINDS if 'densenet' not in name and 'vgg' not in name])
@pytest.mark.parametrize('output_stride', [8, 16])
def test_output_stride(name, output_stride):
    """Dilation keeps the resolution and every parameter."""
    if 'cifar' in name:
        output_stride //= 4
    model = timm.create_model(name, output_stride=output_stride, num_classes=5).eval()
    images = small_images(name)
    with torch.no_grad():
        assert images.shape[-1] // model.forward_features(images).shape[-1] == output_stride
    plain = timm.create_model(name, num_classes=5)
    assert model.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize('name', ALSO_SLOW)
def test_layer_decay_groups(name):
    """Every parameter has a group, and a gate is in the group of its block."""
    model = timm.create_model(name, device='meta')
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    for parameter, group in groups.items():
        block, separator, _ = parameter.partition('.attn.')
        if separator:
            # timm's VGG makes every layer a group; a gate goes with its activation
            assert group == next((g for n, g in groups.items() if n.startswith(f'{block}.conv')), group)


@pytest.mark.parametrize('name', KINDS)
def test_channels_last_and_autocast(name):
    model = timm.create_model(name).eval().double()
    images = small_images(name).double()
    with torch.no_grad():
        expected = model(images)
        model = model.to(memory_format=torch.channels_last)
        actual = model(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(actual, expected)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert model.float()(images.float()).dtype == torch.bfloat16


@pytest.mark.parametrize('name', slow_unless(lambda name: name in ('spa_b_resnet18', 'spa_mobilenetv2_050'), KINDS))
def test_export_with_a_dynamic_batch(name):
    # in single precision, a net of random weights may round further than any tolerance that still catches faults
    model = timm.create_model(name).eval().double()
    images = small_images(name).double()
    batch = torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        more = torch.cat([images, images, images])
        torch.testing.assert_close(exported(more), model(more))


@pytest.mark.parametrize('name', slow_unless(lambda name: name == 'spa_b_preresnet18_cifar', KINDS))
def test_compile_is_one_graph(name):
    """`fullgraph=True` raises on any graph break, in eval and in training mode."""
    torch._dynamo.reset()
    model = timm.create_model(name).double()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    images = small_images(name).double()
    compiled(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize('name', KINDS)
def test_model_arguments_survive_config_json(name, tmp_path):
    """What made the model is written as data, and makes it again."""
    model = timm.create_model(name, num_classes=3, pyramid_sizes=(1, 2)).eval()
    save_for_hf(model, tmp_path, model_args=dict(pyramid_sizes=(1, 2)), safe_serialization=True)
    assert json.loads((tmp_path / 'config.json').read_text())['model_args']['pyramid_sizes'] == [1, 2]
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = small_images(name)
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_import_brings_in_models_and_layers_only():
    """No training, plotting or command line code, and no module of the Hub's that timm does not import itself."""
    import subprocess
    import sys

    code = (
        'import sys, timm, timm.data; before = set(sys.modules); import timm_spa; '
        'print(*sorted({m for m in set(sys.modules) - before}))')
    new = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    allowed = (
        'timm_spa', 'timm_spa.checkpoints', 'timm_spa.layers', 'timm_spa.models', 'timm_spa._errors', 'timm_spa._names',
        'timm_spa._timm_release')
    assert 'timm_spa.models.resnet' in new
    assert [m for m in new if m not in allowed and not m.startswith(tuple(a + '.' for a in allowed[1:]))] == []


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('spa_vgg16_bn', dict(mlp_ratio=1 / 64)), ('spa_vgg16_bn', dict(mlp_ratio=1 / 64, gate='se_bias')),
    ('spa_c_vgg16_cifar', {})])
def test_initialization_of_vgg(name, kwargs):
    """As timm's: every bias is zero, and convolutions have the spread of their outputs; on the meta device too."""
    for device in ('cpu', 'meta'):
        model = timm.create_model(name, device=device, **kwargs)
        if device == 'meta':
            model.to_empty(device='cpu').init_weights()
        for key, module in model.named_modules():
            if getattr(module, 'bias', None) is not None:
                assert not module.bias.any(), key
            if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 10_000:
                spread = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
                assert module.weight.std().item() == pytest.approx(spread, rel=0.05), key
            elif isinstance(module, torch.nn.Linear):
                assert module.weight.std().item() == pytest.approx(0.01, rel=0.05), key
