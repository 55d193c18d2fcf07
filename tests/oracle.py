"""Reference implementation of Spatial Pyramid Attention, written from the equations of the paper.

Pooling, resizing and norm layers are computed with plain arithmetic in float64. The implementation is slow and
differentiable. It uses neither the package nor torch's pooling, resizing, convolution and norm layers.
"""
import math

import torch


def average_pool(x, size):
    """Cell (i, j) is the mean over rows floor(i H / n) to ceil((i + 1) H / n) and the corresponding columns."""
    height, width = x.shape[-2:]
    rows = []
    for i in range(size):
        top, bottom = i * height // size, math.ceil((i + 1) * height / size)
        row = []
        for j in range(size):
            left, right = j * width // size, math.ceil((j + 1) * width / size)
            cell = x[:, :, top:bottom, left:right]
            row.append(cell.sum((2, 3)) / ((bottom - top) * (right - left)))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def resize_nearest(x, height, width):
    """Pixel (i, j) is a copy of pixel (floor(i h / H), floor(j w / W))."""
    h, w = x.shape[-2:]
    rows = torch.tensor([i * h // height for i in range(height)])
    columns = torch.tensor([j * w // width for j in range(width)])
    return x[:, :, rows][:, :, :, columns]


def conv1x1(x, weight):
    return torch.einsum('nchw,oc->nohw', x, weight[:, :, 0, 0])


def batch_norm(x, p, prefix, training, eps=1e-5):
    if training:
        mean = x.mean((0, 2, 3))
        var = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
    else:
        mean, var = p[prefix + '.running_mean'], p[prefix + '.running_var']
    scale = p[prefix + '.weight'] / (var + eps).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + p[prefix + '.bias'][:, None, None]


def relu(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


def spatial_pyramid_attention(p, x, block_input, variant, pyramid_sizes, training):
    """Computes equations (1) to (5). `p` holds the parameters of a layer by name."""
    source = x if variant == 'a' else block_input
    if 'matcher.fc1.weight' in p:
        source = relu(batch_norm(conv1x1(source, p['matcher.fc1.weight']), p, 'matcher.bn1', training))
        source = batch_norm(conv1x1(source, p['matcher.fc2.weight']), p, 'matcher.bn2', training)
    sizes = sorted(pyramid_sizes, reverse=True)
    finest = sizes[0]
    pyramid = 0
    for weight, size in zip(p['pyramid_weight'], sizes, strict=True):
        pyramid = pyramid + weight * resize_nearest(average_pool(source, size), finest, finest)
    hidden = relu(batch_norm(conv1x1(pyramid, p['fc1.weight']), p, 'bn', training))
    gate = 1 / (1 + torch.exp(-conv1x1(hidden, p['fc2.weight'])))
    return x * resize_nearest(gate, *x.shape[-2:])
