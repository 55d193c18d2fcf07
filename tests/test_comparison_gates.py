"""The gates that are compared with SPA, against their equations."""
import pytest
import torch
from oracle import spatial_pyramid_attention
from test_layer import VARIANTS, make_inputs, rel
from timm.layers import GroupNorm1, LayerNorm2d, RmsNorm2d

from timm_spa.layers import SqueezeExcite
from timm_spa.models import GATES, create_gate


@pytest.mark.parametrize('gate', [g for g in GATES if not g.startswith('spa')])
@pytest.mark.parametrize('size', [(8, 8), (5, 7)])
def test_comparison_gates(gate, size):
    """Same shape and place as SPA's; each gate is a factor between 0 and 1, 'none' is exactly 1, and 'gca' adds."""
    torch.manual_seed(0)
    layer = create_gate(gate, channels=16, in_channels=12, rd_ratio=0.5).eval()
    x, block_input = make_inputs(2, 16, 12, size, size, dtype=torch.float32)
    y = layer(x, block_input)
    ratio = y / x
    assert y.shape == x.shape
    if gate != 'gca':
        assert (y == x).all() if gate == 'none' else ((ratio > 0) & (ratio < 1)).all()
    other = layer(x, block_input + 1)
    assert torch.equal(other, y) != layer.reads_block_input
    if layer.reads_block_input:
        with pytest.raises(ValueError, match='need block_input, got None'):
            layer(x)


@pytest.mark.parametrize('variant', VARIANTS)
def test_squeeze_excite_is_its_equation(variant):
    """SE, SE+ and SE++: SPA's oracle with a pyramid of the global mean alone, its weight one and no norm layer."""
    layer = SqueezeExcite(16, 12, variant, rd_ratio=0.25).double().eval()
    x, block_input = make_inputs(2, 16, 12, (5, 7), (10, 14))
    p = dict(layer.state_dict(), pyramid_weight=torch.ones(1).double())
    zeros, ones = torch.zeros(4).double(), torch.ones(4).double()
    p |= {'bn.weight': ones, 'bn.bias': zeros, 'bn.running_mean': zeros, 'bn.running_var': ones - 1e-5}
    expected = spatial_pyramid_attention(p, x, block_input, variant, (1,), training=False)
    assert rel(layer(x, block_input), expected) < 1e-12


def test_gather_excite_is_the_sigmoid_of_the_mean():
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(create_gate('ge', 6, 6)(x), x * x.flatten(2).mean(2)[..., None, None].sigmoid())


def test_channel_matcher_of_squeeze_excite():
    """It is there only where channels differ, and has a width of its own."""
    assert type(SqueezeExcite(16, 16, 'c').matcher) is torch.nn.Identity
    assert SqueezeExcite(16, 12, 'c', rd_channels=4, matcher_rd_channels=3).matcher.fc1.out_channels == 3
    assert SqueezeExcite(16, 12, 'c', rd_channels=4).matcher.fc1.out_channels == 4


@pytest.mark.parametrize('size', [(16, 24), (17, 9)])
def test_gather_excite_conv_repeats_its_cells(size):
    """The gathered map is resized by repetition: every pixel has the gate of its cell, and none in between."""
    layer = create_gate('ge_conv', 6, 6).eval()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 6, *size)
    cells = layer.gather(x)
    assert cells.min() < 0 < cells.max(), 'no activation behind the last norm layer'
    assert cells.shape[2:] == tuple(-(-length // 8) for length in size)
    rows, columns = (torch.arange(n) * cells.shape[i] // n for i, n in zip((2, 3), size, strict=True))
    torch.testing.assert_close(layer(x), x * cells[:, :, rows][..., columns].sigmoid())


@pytest.mark.parametrize('channels', [8, 16, 40, 64, 80])
def test_global_context_has_a_width_of_at_least_four(channels):
    """Its layer norm over one value is a constant: no image would change the gate, and nothing could be learned."""
    torch.manual_seed(0)
    layer = create_gate('gc', channels, channels)
    assert layer.layer.mlp_scale.fc1.out_channels == max(4, channels // 16)
    x = torch.randn(2, channels, 8, 8, requires_grad=True)
    gates = layer(x) / x
    assert (gates[0] - gates[1]).abs().max() > 1e-3
    gates.square().sum().backward()
    # softmax over the map ignores the bias of its scores
    assert all(p.grad.abs().max() > 1e-7 for name, p in layer.named_parameters() if not name.endswith('conv_attn.bias'))


LEARNS = [
    ('spa', GroupNorm1, (1,), 2), ('spa', GroupNorm1, (2, 1), 1), ('spa', LayerNorm2d, (1, 4), 2),
    ('spa', torch.nn.InstanceNorm2d, (2,), 1), ('spa_c', LayerNorm2d, (1, 4), 2), ('se', LayerNorm2d, (1,), 1),
    ('se_c', GroupNorm1, (1,), 1), ('ge_conv', LayerNorm2d, (1,), 1), ('gc', LayerNorm2d, (1,), 1),
    ('cbam', LayerNorm2d, (1,), 1), ('spa', torch.nn.BatchNorm2d, (1,), 1)]
CONSTANT = [
    ('spa', GroupNorm1, (1,), 1), ('spa', torch.nn.GroupNorm, (1,), 1), ('spa', LayerNorm2d, (4, 1), 1),
    ('spa', RmsNorm2d, (4, 1), 1), ('spa', torch.nn.InstanceNorm2d, (1,), 4), ('spa_b', LayerNorm2d, (7,), 1),
    ('spa_c', LayerNorm2d, (7,), 1), ('se_c', LayerNorm2d, (7,), 1), ('se_c', torch.nn.InstanceNorm2d, (7,), 4),
    ('spa_c', torch.nn.InstanceNorm2d, (1,), 4)]


@pytest.mark.parametrize(('gate', 'norm_layer', 'pyramid_sizes', 'width'), [*LEARNS, *CONSTANT])
def test_gates_that_would_be_constant_are_refused(gate, norm_layer, pyramid_sizes, width):
    def create():
        return create_gate(gate, 8, 6, pyramid_sizes, width / 8, norm_layer=norm_layer)

    if (gate, norm_layer, pyramid_sizes, width) in CONSTANT:
        with pytest.raises(ValueError, match=f'gate {gate!r} of 8 channels cannot learn: its norm layer .*larger'):
            create()
        return
    differs = 0.
    for seed in range(5):  # for some weights a ReLU is zero
        torch.manual_seed(seed)
        layer = create()
        for p in layer.parameters():
            torch.nn.init.normal_(p)
        x, block_input = torch.randn(4, 8, 16, 16) + torch.randn(4, 8, 1, 1), torch.randn(4, 6, 16, 16)
        block_input += torch.randn(4, 6, 1, 1)
        gates = layer(x, block_input) / x
        differs = max(differs, (gates - gates[:1]).abs().max().item())
    assert differs > 1e-3
