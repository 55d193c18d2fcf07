"""Attention for any CNN of timm, with its pretrained weights kept: `add_attention`, and the model `gated`.

A gate stands behind the last norm layer or convolution of a residual branch: before the residual sum, before layer
scale, stochastic depth and the activation. timm's layers of norm and activation have a place between the two, `drop`,
where the gate goes; a bare norm layer becomes one of these, with an activation that does nothing. They keep what is
there when timm converts them to synchronized or frozen ones. A convolution becomes one of the same class with a gate.
timm's names of parameters stay. Those of a gate have `.attn.` in them, as 'layer1.0.bn3.drop.attn.fc1.weight'.

Two things do not work with timm's layers of norm and activation: torch's own conversion to synchronized ones drops what
is in `drop`, so that it takes timm's, `timm.layers.convert_sync_batchnorm`; and timm's freezing does not look into it,
so that `freeze_batch_norm_2d` has to be called on every `GateSlot` too.
"""
import dataclasses
import re
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    FrozenBatchNormAct2d,
    GroupNorm,
    GroupNorm1,
    GroupNorm1Act,
    GroupNormAct,
    LayerNorm2d,
    LayerNormAct2d,
    SyncBatchNormAct,
    conv2d_same,
)
from timm.models import (
    generate_default_cfgs,
    load_pretrained,
    load_state_dict,
    register_model,
)
from timm.models._hub import load_state_dict_from_path
from timm.models.byobnet import RepVggBlock
from timm.models.ghostnet import GhostModule

from ._block_types import BLOCK_TYPES, default_places, named_places
from ._entrypoints import list_models
from ._gated_net import adopt
from ._gates import GATES, create_gate
from ._pretrained import attached_cfg, check_fit, locate, warm_cfg
from ._warm_start import gate_weights, gated_modules, neutral_factors
from .names import check_model_name

__all__ = ['GateSlot', 'GatedConv2d', 'GatedConv2dSame', 'GatedGhostModule', 'add_attention', 'create_gated', 'gated']


class GateSlot(nn.Module):
    """The gate of one of timm's norm-activation layers, between norm and activation."""

    def __init__(self, attn: nn.Module, norm_name: str, parameters: Tuple[str, ...], drop: nn.Module):
        """
        Args:
            attn: Gate.
            norm_name: Name of the norm layer in the model.
            parameters: Names of its affine parameters.
            drop: What stood in the place before.
        """
        super().__init__()
        self.gated_prefix, self.gated_parameters = norm_name, parameters
        self.drop = drop
        self.attn = attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gates the normalized map (N, C, H, W)."""
        return self.attn(self.drop(x))


class _Gated(nn.Module):
    """Mixin that takes over an existing module and gates the output of the next base class."""

    def __init__(self, original: nn.Module, attn: nn.Module, parameters: Tuple[str, ...]):
        """
        Args:
            original: The module; its parameters and layers are taken over.
            attn: Gate.
            parameters: Names of the parameters in which the output is linear, all together.
        """
        adopt(self, original)
        self.gated_parameters = parameters
        self.attn: nn.Module = attn


class GatedConv2d(_Gated, nn.Conv2d):
    """A convolution with a gate on its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C', H, W) to (N, C, H / stride, W / stride)."""
        return self.attn(F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups))


class GatedConv2dSame(_Gated, Conv2dSame):
    """A convolution padded as TensorFlow does, with a gate on its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C', H, W) to (N, C, H / stride, W / stride)."""
        return self.attn(conv2d_same(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups))


class GatedGhostModule(_Gated, GhostModule):
    """GhostNet's module with a gate on both of its maps, the second of which is computed from the first."""
    if TYPE_CHECKING:  # TorchScript would read it
        primary_conv: nn.Module
        cheap_operation: nn.Module
    inverse_parameters = ('cheap_operation.0.weight',)  # reads the first map

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C', H, W) to (N, C, H / stride, W / stride)."""
        maps = self.primary_conv(x)
        return self.attn(torch.cat([maps, self.cheap_operation(maps)], 1)[:, :self.out_chs])


CONVS: Dict[type, Any] = {nn.Conv2d: GatedConv2d, Conv2dSame: GatedConv2dSame}
# norm layers of maps (N, C, H, W), and the layer of norm and activation that each becomes
NORMS: Dict[type, Callable[[Any], nn.Module]] = {
    nn.BatchNorm2d: lambda norm: BatchNormAct2d(norm.num_features, apply_act=False),
    nn.SyncBatchNorm: lambda norm: SyncBatchNormAct(norm.num_features),
    nn.GroupNorm: lambda norm: GroupNormAct(norm.num_channels, norm.num_groups, apply_act=False),
    GroupNorm: lambda norm: GroupNormAct(norm.num_channels, norm.num_groups, apply_act=False),
    GroupNorm1: lambda norm: GroupNorm1Act(norm.num_channels, apply_act=False),
    LayerNorm2d: lambda norm: LayerNormAct2d(norm.normalized_shape[0], apply_act=False),
}
# they list the parameters to synchronize when they are made
WRAPPERS = ('DistributedDataParallel', 'FullyShardedDataParallel', 'FSDPModule')
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNormAct2d)
NORM_ACTS = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d, GroupNormAct, GroupNorm1Act, LayerNormAct2d)


def add_attention(
        model: nn.Module,
        gate: str = 'spa',
        where: Union[None, str, re.Pattern, Sequence[Union[str, re.Pattern]]] = None,
        pyramid_sizes: Sequence[int] = (1, 4, 7),
        rd_ratio: float = 1. / 16,
        neutral: bool = True,
) -> nn.Module:
    """Adds a gate at the end of every residual branch of a CNN, and leaves its outputs as they are until it is trained.

    Every gate is made neutral: the weights of its last layer are zero, it is 1/2 everywhere, and the parameters in
    which the gated map is linear are doubled. Feature extractors (`features_only=True`) take attention too, but those
    made by torch.fx, which have no blocks any more. The gates of a network without batch norm have group norm.

    Args:
        model: CNN of timm, with its weights loaded. It is changed in place.
        gate: Name of the gate, a key of `timm_spa.models.GATES` that reads the map it gates.
        where: Names of blocks, norm layers or convolutions, as they are, with wildcards or as regular expressions;
            every block of a type that is known if None.
        pyramid_sizes: Side lengths of SPA's averages, in cells.
        rd_ratio: Reduced width of the gates over their channels.
        neutral: Keep the outputs; gates as they are initialized if False, to train from scratch.

    Returns:
        The same model.

    Raises:
        ValueError: The gate is unknown, reads the block's input or can't be neutral; the model has no block of a type
            that is known, has gates, or is wrapped for distributed training; or a module named can't be gated. The
            model is as it was then.
    """
    _check_gate(gate, neutral)
    if gate == 'none':
        return model
    modules = dict(model.named_modules())
    kinds = {kind.__name__ for module in modules.values() for kind in type(module).__mro__}
    for wrapper in kinds.intersection(WRAPPERS):
        raise ValueError(f'Add attention before {wrapper}, which does not know parameters that are added later.')
    names = list(default_places(model)) if where is None else named_places(modules, where)
    if next(gated_modules(model), None) is not None:
        raise ValueError(f'{type(model).__name__} has gates already. Add attention to the plain network.')
    if not names:
        files = [module.rpartition('.')[2].lstrip('_') for module in BLOCK_TYPES]
        raise ValueError(
            f'{type(model).__name__} has no block of a type that is known here. Name norm layers or convolutions with '
            f'where=[...], or take a network with the blocks of one of these files of timm: {", ".join(files)}.')
    _check_places(model, modules, names, neutral)
    # a network without batch norm gets none; one group needs no statistics either, and goes with every width
    norm_layer = nn.BatchNorm2d if any(isinstance(m, _BATCH_NORMS) for m in modules.values()) else GroupNorm1
    for name in names:
        module: Any = modules[name]
        tensor = next(module.parameters(), next(module.buffers(), torch.empty(0)))
        channels = _channels(module)
        attn = create_gate(
            gate, channels, channels, pyramid_sizes, rd_ratio, norm_layer=norm_layer, device=tensor.device,
            dtype=tensor.dtype)
        attn.train(module.training)
        modules[name] = _attach(name, module, attn)
        if name:
            model.set_submodule(name, modules[name])
    if neutral:
        tensors = model.state_dict()
        with torch.no_grad():
            for key, factor in neutral_factors(model).items():
                tensors[key].mul_(factor)
    return model


def _check_gate(gate: str, neutral: bool) -> None:
    if gate not in GATES:
        raise ValueError(f'gate must be one of {", ".join(map(repr, GATES))}, got {gate!r}.')
    if gate.endswith(('_b', '_c')):
        raise ValueError(
            f"The gate {gate!r} reads the block's input, which timm's blocks do not hand on. The models that have it: "
            f'{", ".join(list_models(f"{gate}_*"))}.')
    if neutral and GATES[gate].doublings is None:
        raise ValueError(f'No weights make the gate {gate!r} neutral: it has none. Use neutral=False.')


def _check_places(model: nn.Module, modules: Dict[str, nn.Module], names: List[str], neutral: bool) -> None:
    """Raises a ValueError that names the first module that can't be gated."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    tensors = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in names:
        module, kind = modules[name], type(modules[name]).__name__
        padded = getattr(module, 'padding_mode', 'zeros')  # by another function than F.conv2d
        if type(module) not in (*NORMS, *NORM_ACTS, *CONVS, GhostModule, RepVggBlock) or padded != 'zeros':
            raise ValueError(
                f'{name or "The model itself"} is a {kind}, which can not be gated: it is no norm layer of maps '
                '(N, C, H, W), no convolution whose output is linear in its weights, and no block of a known type.')
        if isinstance(module, GhostModule) and type(module.primary_conv[-1]) not in (nn.Identity, nn.ReLU):
            raise ValueError(f'{name} has an activation which is not linear from 0 on: its gate can not be neutral.')
        if isinstance(module, RepVggBlock) and not (module.reparam_conv is None and type(module.attn) is nn.Identity):
            raise ValueError(f'{name} is a {kind} that is fused already or has an attention of its own.')
        if not name and not isinstance(module, RepVggBlock):
            raise ValueError(f'The model is a single {kind}, which can not be replaced in itself.')
        for ancestor in (name[:i] for i, character in enumerate(name) if character == '.'):
            if any(hasattr(modules[ancestor], method) for method in ('fuse', 'reparameterize', 'switch_to_deploy')):
                remedy = 'the block itself' if isinstance(modules[ancestor], RepVggBlock) else 'a module outside of it'
                raise ValueError(
                    f'{name} is inside of {ancestor}, a {type(modules[ancestor]).__name__}, which timm fuses for '
                    f'inference: its gate would be lost then. Name {remedy}.')
        if uses[id(module)] > 1 or any(tensors[id(p)] > 1 for p in module.parameters(recurse=False)):
            raise ValueError(f'{name} is used in more than one place of the model, or shares its weights.')
        if neutral and not _linear_parameters(module):
            raise ValueError(f'{name} is a {kind} without affine parameters: its gate can not be neutral.')


def _linear_parameters(module: Any) -> Tuple[str, ...]:
    """Returns the names of the tensors that scale a module's output when they are all scaled alike."""
    if isinstance(module, GhostModule):
        names = [f'{conv}.1.{key}' for conv in ('primary_conv', 'cheap_operation') for key in ('weight', 'bias')]
        return tuple(names)
    if isinstance(module, RepVggBlock):
        branches = ['conv_kxk.bn', 'conv_1x1.bn', *(['identity'] if module.identity is not None else [])]
        return tuple(f'{branch}.{key}' for branch in branches for key in ('weight', 'bias'))
    return tuple(key for key in ('weight', 'bias') if getattr(module, key, None) is not None)


def _channels(module: Any) -> int:
    if isinstance(module, RepVggBlock):
        return module.conv_kxk.bn.num_features
    if isinstance(module, GhostModule):
        return module.out_chs
    for key in ('out_channels', 'num_features', 'num_channels'):
        if hasattr(module, key):
            return getattr(module, key)
    return len(module.weight) if module.weight is not None else module.normalized_shape[0]


def _attach(name: str, module: Any, attn: nn.Module) -> nn.Module:
    """Returns what takes the place of a module, with the gate in it."""
    parameters = _linear_parameters(module)
    if type(module) in CONVS:
        return CONVS[type(module)](module, attn, parameters)
    if isinstance(module, GhostModule):
        return GatedGhostModule(module, attn, parameters)
    if isinstance(module, RepVggBlock):
        module.attn = attn  # timm's own place for it, behind the sum of the branches, which fusing keeps
        module.gated_parameters = parameters
        return module
    if type(module) in NORMS:
        norm = NORMS[type(module)](module)
        norm.__dict__.update({k: v for k, v in module.__dict__.items() if k != '_modules'})
        module = norm
    module.drop = GateSlot(attn, name, parameters, getattr(module, 'drop', nn.Identity()))
    return module


default_cfgs = generate_default_cfgs({'gated.warm_a1_in1k': warm_cfg('resnet50.a1_in1k')})


@register_model
def gated(pretrained: bool = False, base: str = 'resnet50.a1_in1k', **kwargs: Any) -> nn.Module:
    """Any CNN of timm with `add_attention`, by data alone, for timm's scripts and the Hub; see `create_gated`."""
    return create_gated('gated', pretrained, base=base, **kwargs)


def create_gated(
        variant: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Any = None,
        *,
        base: str,
        gate: str = 'spa',
        where: Union[None, str, Sequence[str]] = None,
        pyramid_sizes: Sequence[int] = (1, 4, 7),
        rd_ratio: float = 1. / 16,
        neutral: Optional[bool] = None,
        **kwargs: Any,
) -> nn.Module:
    """Creates a model of timm and adds attention to it.

    Args:
        variant: Name of the model with attention.
        pretrained: Load weights: those that are given, of this model or of the plain one, or else timm's of `base`.
        pretrained_cfg: Configuration or tag, as timm passes it.
        pretrained_cfg_overlay: Fields of the configuration to replace, e.g. `file`.
        cache_dir: Cache of the Hub to use.
        base: Name of timm's model, with the tag of its weights if it is not the default.
        gate: Name of the gate, see `add_attention`.
        where: Modules to gate, see `add_attention`.
        pyramid_sizes: Side lengths of SPA's averages, in cells.
        rd_ratio: Reduced width of the gates over their channels.
        neutral: Keep the function of the plain net, see `add_attention`; if None, where its weights are loaded.
        **kwargs: Arguments of `base`.

    Returns:
        The model, or its feature extractor for `features_only=True`.

    Raises:
        HubWeightsError: The weights are on the Hub, and could not be had, or are damaged.
        RuntimeError: `base` is no model of timm, or weights do not fit.
        ValueError: See `add_attention`.
    """
    if not isinstance(base, str) or ':' in base:  # an address, which a config.json from anywhere could have
        raise RuntimeError(f'The base of {variant} is the name of a model of timm, and not {base!r}.')
    name = base.partition('.')[0]
    check_model_name(name, RuntimeError, f'The base of {variant} is unknown. ')
    kwargs.pop('pretrained_model_args', None)  # the published arguments, which are those given here
    cfg = attached_cfg(variant, base, pretrained_cfg, pretrained_cfg_overlay)
    attach = partial(add_attention, gate=gate, where=where, pyramid_sizes=pyramid_sizes, rd_ratio=rd_ratio)
    create = partial(timm.create_model, name, pretrained_cfg=cfg.to_dict(), cache_dir=cache_dir, **kwargs)
    located = locate(cfg, cache_dir) if pretrained and not cfg.custom_load else None
    source = located or cfg.file or cfg.state_dict
    features_only = kwargs.get('features_only', False)
    model: Any
    if not pretrained or not source:
        model = attach(create(pretrained=pretrained), neutral=pretrained if neutral is None else neutral)
    else:
        model = attach(create(), neutral=False)
        load = load_state_dict_from_path if cfg.source == 'local-dir' else load_state_dict
        state = source if isinstance(source, dict) else load(source)
        if _has_gates(state, model):
            weights = str(located or cfg.file or 'The given state dict')
            _load(model, variant, state, cfg, weights, features_only, kwargs.get('in_chans', cfg.input_size[0]))
        else:
            model = create(pretrained=True, pretrained_cfg_overlay=dict(state_dict=state, file='', source=''))
            # weights with a gate that has no parameters look like those of the plain net
            attach(model, neutral=not (cfg.source and gate == 'ge') if neutral is None else neutral)
    fields = dataclasses.replace(cfg, state_dict=None).to_dict()
    for key in ('num_classes', 'classifier') if features_only else ():  # as timm does
        fields.pop(key, None)
    model.pretrained_cfg = model.default_cfg = fields
    return model


def _flat(name: str) -> str:
    return name.replace('.', '_')  # as timm renames the modules of a feature extractor


def _has_gates(state: Dict[str, torch.Tensor], model: nn.Module) -> bool:
    keys = set(map(_flat, gate_weights(model)))
    return any(_flat(key) in keys for key in state)


def _load(
        model: Any,
        variant: str,
        state: Dict[str, torch.Tensor],
        cfg: Any,
        weights: str,
        features_only: bool,
        in_chans: int,
) -> None:
    """Loads a checkpoint of the same gated model, strictly but for the layers that timm adapts."""
    own = {_flat(key): key for key in model.state_dict()}
    named = {own.get(_flat(key), key): value for key, value in state.items() if not features_only or _flat(key) in own}
    check_fit(named, model, weights, variant)
    load_pretrained(
        model, dict(cfg.to_dict(), state_dict=named, source='', file=''),
        num_classes=0 if features_only else model.num_classes, in_chans=in_chans, strict=not features_only)
