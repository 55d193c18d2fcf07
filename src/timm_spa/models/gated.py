"""Attention for any CNN of timm, with its pretrained weights kept: `add_attention`, and the model `gated`.

timm's parameter names stay. The names of a gate's tensors have `.attn.` in them, e.g.
'layer1.0.bn3.drop.attn.fc1.weight'. `_gate_slots` says where a gate stands.

timm's batch-norm conversions preserve the gates. Two other tools do not work with them:

* torch's own `convert_sync_batchnorm` drops them. Use `timm.layers.convert_sync_batchnorm`.
* timm's `freeze_batch_norm_2d` does not reach them. Call it on every `GateSlot` too.
"""
import contextlib
import dataclasses
import re
from collections import Counter
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Union

import timm
import torch
import torch.nn as nn
from timm.layers import GroupNorm1
from timm.models import generate_default_cfgs, register_model
from timm.models.byobnet import RepVggBlock
from timm.models.ghostnet import GhostModule
from torch.nn.utils import parametrize

from .._names import check_model_name
from ..checkpoints.warm_start import gate_weights, gated_modules, neutral_factors
from ..layers.own_gate import OwnGate, check_gate_function, check_not_shared
from ._attached import record_attention
from ._block_types import BLOCK_TYPES, default_places, named_places
from ._builder import Weights, attached_cfg, load_weights, read_weights, warm_cfg
from ._entrypoints import list_models
from ._extractor import EXTRACTOR_ARGUMENTS, Part
from ._gate_slots import (
    BATCH_NORMS,
    CONVS,
    NORM_ACTS,
    NORMS,
    GatedConv2d,
    GatedConv2dSame,
    GatedGhostModule,
    GateSlot,
    attach,
    gated_channels,
    linear_parameters,
    scaled_parameters,
)
from ._gate_table import GATES, GateLike, create_gate, reads_block_input
from ._timm_bases import plain_filter, pretrained_arguments

__all__ = ['GateSlot', 'GatedConv2d', 'GatedConv2dSame', 'GatedGhostModule', 'add_attention', 'create_gated', 'gated']

# they list the parameters to synchronize when they are made
WRAPPERS = ('DistributedDataParallel', 'FullyShardedDataParallel', 'FSDPModule')


def add_attention(
        model: nn.Module,
        gate: GateLike = 'spa',
        where: Union[None, str, re.Pattern, Sequence[Union[str, re.Pattern]]] = None,
        pyramid_sizes: Sequence[int] = (1, 4, 7),
        rd_ratio: float = 1. / 16,
        neutral: bool = True,
) -> nn.Module:
    """Adds a gate at the end of every residual branch of a CNN. Its outputs are unchanged until it is trained.

    Every gate starts neutral: the weights of its last layer are zero, so the gate is 1/2 everywhere, and the parameters
    in which the gated feature map is linear are doubled. A layer of your own is used as `x + scale * (layer(x) - x)`,
    with one learned scale per channel that starts at zero. Feature extractors (`features_only=True`) are supported,
    except those made by torch.fx, which have no blocks. SPA, coordinate attention and gather-excite use group norm in a
    network without batch norm.

    A whole model of timm keeps a record of its gates: `timm_spa.save_pretrained` and timm's `save_for_hf` write it to
    config.json, from which `timm.create_model('local-dir:...')` rebuilds the model.

    Args:
        model: CNN of timm with its weights. It is changed in place.
        gate: Name of the gate: 'spa', 'se', 'se_bias', 'ese', 'eca', 'ecam', 'ceca', 'cbam', 'lcbam', 'gc', 'gca',
            'coord', 'scoord', 'ela', 'strip', 'ge_conv', 'ge' (with `neutral=False`), or 'none'. Or a class or function
            that makes any layer that maps (N, C, H, W) to the same shape from the number of channels.
        where: Names of blocks, norm layers or convolutions: exact names, wildcards or regular expressions. None for
            every block of a known type.
        pyramid_sizes: Side lengths of SPA's averages, in cells.
        rd_ratio: Reduced width of the gates over their channels, at least 1 for SPA, and 4 or 8 for other gates.
        neutral: Keep the outputs. If False, the gates stay as initialized, to train from scratch.

    Returns:
        The same model.

    Raises:
        ValueError: The gate is unknown, reads the block's input, can't learn or can't be neutral; the model has no
            block of a known type, has gates, or is wrapped for distributed training; or a module can't be gated.
        UsageError: A gate of your own cannot be created, or changes the shape of the feature map.

    The model is unchanged if anything fails.
    """
    names = _attach_gates(model, gate, where, pyramid_sizes, rd_ratio, neutral)
    if names:
        places = {} if where is None else dict(where=names)  # exact names: a pattern may be no text
        record_attention(model, gate=gate, pyramid_sizes=tuple(pyramid_sizes), rd_ratio=rd_ratio, **places)
    return model


def _attach_gates(
        model: nn.Module,
        gate: GateLike,
        where: Union[None, str, re.Pattern, Sequence[Union[str, re.Pattern]]],
        pyramid_sizes: Sequence[int],
        rd_ratio: float,
        neutral: bool,
) -> List[str]:
    """Adds gates as `add_attention` does, without the record. Returns the names of the gated modules."""
    _check_gate(gate, neutral)
    if gate == 'none':
        return []
    modules = dict(model.named_modules())
    kinds = {kind.__name__ for module in modules.values() for kind in type(module).__mro__}
    for wrapper in kinds.intersection(WRAPPERS):
        raise ValueError(
            f'{wrapper} does not see parameters that are added later. Add attention before wrapping the model.')
    names = list(default_places(model)) if where is None else named_places(modules, where)
    if next(gated_modules(model), None) is not None:
        raise ValueError(
            f'{type(model).__name__} has gates already. Add attention to the plain model, in one call: where takes the '
            'names of several modules.')
    if not names:
        files = [module.rpartition('.')[2].lstrip('_') for module in BLOCK_TYPES]
        raise ValueError(
            f'{type(model).__name__} does not contain a block of a known type. Choose norm layers or convolutions with '
            f'where=[...], or a network with the blocks of one of these files of timm: {", ".join(files)}.')
    doublings = GATES[gate].doublings if isinstance(gate, str) else OwnGate.doublings
    min_width = GATES[gate].min_added_width if isinstance(gate, str) else 1
    _check_places(model, modules, names, neutral and doublings != 0)
    # no batch norm in a network without it; group norm of one group needs no statistics and fits every width
    norm_layer = nn.BatchNorm2d if any(isinstance(m, BATCH_NORMS) for m in modules.values()) else GroupNorm1
    gates = {}
    for name in names:
        module: Any = modules[name]
        tensor = next(module.parameters(), next(module.buffers(), torch.empty(0)))
        channels = gated_channels(module)
        gates[name] = create_gate(
            gate, channels, channels, pyramid_sizes, rd_ratio, norm_layer=norm_layer, min_width=min_width,
            device=tensor.device, dtype=tensor.dtype).train(module.training)
    check_not_shared(gate, gates.values())
    with contextlib.ExitStack() as undo:
        for name, attn in gates.items():
            for changed in (modules[name], modules[name.rpartition('.')[0]]):
                undo.callback(_restore, changed, dict(changed.__dict__), dict(changed._modules))
            modules[name] = attach(name, modules[name], attn)
            if name:
                model.set_submodule(name, modules[name])
        if neutral:
            tensors = model.state_dict()
            with torch.no_grad():
                for key, factor in neutral_factors(model, GATES).items():
                    before = tensors[key].clone()
                    tensors[key].mul_(factor)
                    undo.callback(tensors[key].copy_, before)
        undo.pop_all()  # nothing failed
    return names


def _restore(module: nn.Module, attributes: Dict[str, Any], children: Dict[str, Optional[nn.Module]]) -> None:
    """Gives a module the attributes and children that it had, after an error."""
    module.__dict__.clear()
    module.__dict__.update(attributes)
    module._modules.clear()
    module._modules.update(children)


def _check_gate(gate: GateLike, neutral: bool) -> None:
    if not isinstance(gate, str):
        check_gate_function(gate)
        return
    if gate in GATES and reads_block_input(gate):
        raise ValueError(
            f"The gate {gate!r} reads the block's input, which timm's blocks do not pass on. Use one of its models: "
            f'{", ".join(list_models(f"{gate}_*"))}.')
    if gate not in GATES:
        valid = ', '.join(repr(name) for name in GATES if not reads_block_input(name))
        raise ValueError(
            f'gate must be one of {valid}, or a class or function that makes a module from a number of channels, got '
            f'{gate!r}.')
    if neutral and GATES[gate].doublings is None:
        raise ValueError(f'The gate {gate!r} cannot be neutral: it has no weights. Use neutral=False.')


def _check_places(model: nn.Module, modules: Dict[str, nn.Module], names: List[str], scaled: bool) -> None:
    """Raises a ValueError that names the first module that cannot be gated.

    With `scaled`, the parameters in which a gated feature map is linear are going to be scaled.
    """
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    tensors = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in names:
        module, kind = modules[name], type(modules[name]).__name__
        _check_parameters(name, module)
        padded = getattr(module, 'padding_mode', 'zeros')  # by another function than F.conv2d
        if type(module) not in (*NORMS, *NORM_ACTS, *CONVS, GhostModule, RepVggBlock) or padded != 'zeros':
            raise ValueError(
                f'{name or "The model itself"} is a {kind}, which cannot be gated. Choose a norm layer of feature maps '
                '(N, C, H, W), a convolution that is linear in its weights, or a block of a known type.')
        if isinstance(module, GhostModule) and type(module.primary_conv[-1]) not in (nn.Identity, nn.ReLU):
            raise ValueError(
                f'{name} has an activation that does not commute with doubling: its gate cannot be neutral.')
        if isinstance(module, RepVggBlock) and not (module.reparam_conv is None and type(module.attn) is nn.Identity):
            raise ValueError(f'{name} is a {kind} that is already fused or has attention.')
        if not name and not isinstance(module, RepVggBlock):
            raise ValueError(f'The model is a single {kind}, which cannot be replaced. Wrap it in nn.Sequential.')
        for ancestor in (name[:i] for i, character in enumerate(name) if character == '.'):
            if any(hasattr(modules[ancestor], method) for method in ('fuse', 'reparameterize', 'switch_to_deploy')):
                remedy = 'the block itself' if isinstance(modules[ancestor], RepVggBlock) else 'a module outside of it'
                raise ValueError(
                    f'{name} is inside {ancestor}, a {type(modules[ancestor]).__name__} that timm fuses for inference. '
                    f'The gate would be lost. Choose {remedy}.')
        if uses[id(module)] > 1 or any(tensors[id(p)] > 1 for p in module.parameters(recurse=False)):
            raise ValueError(f'{name} is used several times in the model, or shares its weights, and cannot be gated.')
        if scaled and not linear_parameters(module):
            raise ValueError(
                f'{name} is a {kind} without affine parameters: its gate cannot be neutral. Use neutral=False.')


def _check_parameters(name: str, module: nn.Module) -> None:
    """Raises a ValueError if a tensor that a neutral gate doubles is computed from others before every call."""
    from torch.nn.utils import prune  # `import timm_spa` does not need it

    own = module.state_dict(keep_vars=True)
    computed = [key for key in scaled_parameters(module) if key not in own]
    if parametrize.is_parametrized(module):
        remedy = 'torch.nn.utils.parametrize.remove_parametrizations'
    elif not computed:
        return
    elif prune.is_pruned(module):
        remedy = 'torch.nn.utils.prune.remove'
    elif f'{computed[0]}_g' in own:
        remedy = 'torch.nn.utils.remove_weight_norm'
    elif f'{computed[0]}_u' in own:
        remedy = 'torch.nn.utils.remove_spectral_norm'
    else:
        remedy = 'the function that undoes this'
    key = computed[0] if computed else 'weight'
    raise ValueError(
        f'{name} cannot be gated: its {key} is computed from other tensors before every call (pruning, weight norm, '
        f'spectral norm or another parametrization). Call {remedy} on it first, and apply it again afterwards.')


default_cfgs = generate_default_cfgs({'gated.warm_a1_in1k': warm_cfg('resnet50.a1_in1k')})


@register_model
def gated(pretrained: bool = False, base: str = 'resnet50.a1_in1k', **kwargs: Any) -> nn.Module:
    """Any CNN of timm with `add_attention`, described by plain data for scripts and the Hub. See `create_gated`."""
    return create_gated('gated', pretrained, base=base, **kwargs)


def create_gated(
        variant: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Any = None,
        *,
        base: str,
        gate: GateLike = 'spa',
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
            The network is always the one that timm makes for its pretrained weights.
        pretrained_cfg: Configuration or tag, as timm passes it.
        pretrained_cfg_overlay: Fields of the configuration to replace, e.g. `file`.
        cache_dir: Cache of the Hub to use.
        base: Name of timm's model, with the tag of its weights if it is not the default.
        gate: Name of the gate, see `add_attention`.
        where: Modules to gate, see `add_attention`.
        pyramid_sizes: Side lengths of SPA's averages, in cells.
        rd_ratio: Reduced width of the gates over their channels.
        neutral: Keep the function of the plain network, see `add_attention`; if None, where its weights are loaded.
        **kwargs: Arguments of `base`.

    Returns:
        The model, or its feature extractor for `features_only=True`.

    Raises:
        HubWeightsError: The weights are on the Hub, and could not be loaded, are damaged or do not fit.
        RuntimeError: `base` is no model of timm, or has no weights.
        ValueError: See `add_attention`.
        WeightsError: The weights do not fit.
    """
    if not isinstance(base, str) or ':' in base:  # an untrusted config.json could hold an address
        raise RuntimeError(f'base of {variant} must be the name of a timm model, got {base!r}.')
    name = base.partition('.')[0]
    check_model_name(name, RuntimeError, f'The base of {variant} is unknown. ')
    kwargs.pop('pretrained_model_args', None)  # the published arguments; those given here are the same
    cfg = attached_cfg(variant, base, pretrained_cfg, pretrained_cfg_overlay)
    kwargs = {**pretrained_arguments(name), **kwargs}
    features_only = kwargs.get('features_only', False)
    create = partial(timm.create_model, name, pretrained_cfg=cfg.to_dict(), cache_dir=cache_dir)
    attach_to = partial(_attach_gates, gate=gate, pyramid_sizes=pyramid_sizes, rd_ratio=rd_ratio)
    keeps_function = bool(neutral) and not pretrained  # loading sees to it otherwise

    # a feature extractor gets its gates and weights from the whole network
    whole_kwargs = {key: value for key, value in kwargs.items() if not (features_only and key in EXTRACTOR_ARGUMENTS)}
    with torch.device('meta') if features_only and not pretrained else contextlib.nullcontext():
        whole: Any = create(**whole_kwargs)
        attach_to(whole, where=where, neutral=keeps_function)
    model: Any = whole
    if features_only:
        model = create(**kwargs)
        part = Part(model, whole)
        if part.places:
            attach_to(model, where=part.places, neutral=keeps_function)
    if pretrained:
        if neutral is None:  # the file of a repository is the model's own, also where gates have no weights to show it
            neutral = not cfg.source or bool(gate_weights(whole))
        _check_gate(gate, neutral)
        state_dict, weights = read_weights(cfg, cache_dir) or (
            create(pretrained=True, **whole_kwargs).state_dict(), Weights(f'The weights of {base}'))
        if features_only:
            state_dict = part.completed(state_dict)
        load_weights(
            whole, variant, state_dict, weights, plain_filter(name, whole), kwargs.get('in_chans', cfg.input_size[0]),
            needs_classifier=not features_only, neutral=neutral)
        if features_only:
            part.load()
    fields = dataclasses.replace(cfg, state_dict=None).to_dict()
    for key in ('num_classes', 'classifier') if features_only else ():  # as timm does
        fields.pop(key, None)
    model.pretrained_cfg = model.default_cfg = fields
    return model
