"""Weights and inputs of the golden files, from closed formulas.

The golden files hold what the authors' models compute for weights and inputs that nobody has to store: every value is a
formula of the index of its tensor and of its own index, in exact integer arithmetic and single rounded operations, so
that they are the same to the bit on every machine. The files hold names, shapes and results, no weights.
"""
import hashlib

import numpy as np

INPUT_TENSOR = 1000003  # stands for the index of a tensor where an input is filled
MASK = 2**64 - 1


def signed(tensor, count):
    """`count` values in [-1, 1): the finaliser of splitmix64 over consecutive integers."""
    with np.errstate(over='ignore'):
        z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64((tensor << 32) & MASK)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return 2 * ((z >> np.uint64(11)).astype(np.float64) * 2.0**-53) - 1


def shapes(golden):
    """Names and shapes in the order of the authors' state dict. 'x bn C' is short for a whole norm layer."""
    out = {}
    for entry in golden['state_dict']:
        name, *rest = entry.split(' ')
        if rest[:1] == ['bn']:
            for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
                out[f'{name}.{leaf}'] = (int(rest[1]),)
            out[f'{name}.num_batches_tracked'] = ()
        else:
            out[name] = tuple(int(n) for n in rest[0].split(',')) if rest else ()
    return out


def weights(golden):
    """The authors' state dict as float64 arrays that hold float32 values."""
    gains, names = golden['fill']['gains'], shapes(golden)
    out, digest, tensor = {}, hashlib.sha256(), 0
    for name, shape in names.items():
        if name.endswith('num_batches_tracked'):
            out[name] = np.zeros((), dtype=np.int64)
            continue
        owner, _, leaf = name.rpartition('.')
        parts = name.split('.')
        in_attention = bool({'transform', 'matcher'} & set(parts)) or 'fc' in parts[1:]
        in_norm = f'{owner}.running_mean' in names
        s = signed(tensor, int(np.prod(shape)))
        if len(shape) == 5:
            values = 0.5 * np.arange(1, s.size + 1) + 0.05 * s
        elif len(shape) in (2, 4):
            gain = gains['attn_gain'] if in_attention else gains['gain']
            values = s * (gain * np.sqrt(3.0 / int(np.prod(shape[1:]))))
        elif leaf == 'running_var' or (leaf == 'weight' and in_norm):
            values = 1.0 + 0.2 * s
        elif leaf == 'bias' and in_attention:
            values = 0.5 + 0.1 * s
        else:
            values = 0.1 * s
        single = values.astype('<f4')
        digest.update(single.tobytes())
        out[name] = single.astype(np.float64).reshape(shape)
        tensor += 1
    assert digest.hexdigest() == golden['fill']['sha256'], 'not the weights that the golden file was made with'
    return out


def images(shape):
    """A batch of (B, C, H, W) images as float64 that holds float32 values."""
    b, c, h, w = np.ogrid[tuple(slice(n) for n in shape)]
    height, width = shape[2:]

    def triangle(p):
        return 4 * np.abs(p % (height * width) / (height * width) - 0.5) - 1

    wave = triangle((1 + b) * h * width + (1 + c) * w * height)
    envelope = 1 + triangle((1 + b) * h * width + w * height)
    noise = signed(INPUT_TENSOR, int(np.prod(shape))).reshape(shape)
    return (envelope * (wave + noise) + 0.25 * (c - b)).astype(np.float32).astype(np.float64)
