"""Inference elsewhere: ONNX Runtime, OpenVINO, and int8. They have no backward pass."""
import copy
import warnings

import pytest
import torch
import torch.nn as nn
from nets import KINDS, images, make

pytestmark = [pytest.mark.slow, pytest.mark.parametrize('kind', KINDS)]


def check_int8(logits, net):
    """Rounding to int8 changes the logits a little, and says nothing about which."""
    expected = net(images())
    error = (logits - expected).norm() / (expected - expected.mean()).norm()
    assert 0 < error < 0.1


def onnx_file(net, path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        torch.onnx.export(net, (images(),), str(path), dynamo=False, input_names=['image'])
    return str(path)


def run_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {'image': images().numpy()})[0])


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad():
        yield


@pytest.mark.host('ONNX Runtime', 'onnxruntime', catch='`timm-spa export --dynamic size` keeps batch and size free')
def test_onnx_runtime(kind, tmp_path):
    net = make(kind)
    torch.testing.assert_close(run_onnx(onnx_file(net, tmp_path / 'net.onnx')), net(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.host('ONNX Runtime, int8', 'onnxruntime')
def test_onnx_runtime_int8(kind, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter([dict(image=images().numpy())])

        def get_next(self):
            return next(self.batches, None)

    net = make(kind)
    path = onnx_file(net, tmp_path / 'net.onnx')
    quantize_static(path, tmp_path / 'int8.onnx', Reader(), per_channel=True)
    check_int8(run_onnx(tmp_path / 'int8.onnx'), net)


@pytest.mark.host('OpenVINO', 'openvino', catch='compared with `INFERENCE_PRECISION_HINT` f32')
def test_openvino(kind):
    import openvino

    net = make(kind)
    model = openvino.convert_model(net, example_input=images())
    compiled = openvino.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    torch.testing.assert_close(torch.from_numpy(compiled(images().numpy())[0]), net(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.host('torchao, PT2E int8', 'torchao')
def test_pt2e(kind):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    net = make(kind)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(copy.deepcopy(net), (images(),)).module(), quantizer)
    prepared(images())
    check_int8(convert_pt2e(prepared)(images()), net)


@pytest.mark.limit('`torchao.quantization.quantize_` on convolutions', 'torchao')
def test_torchao_on_convs(kind):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    net = make(kind)
    with pytest.raises(RuntimeError, match='shape .* is invalid'):
        quantize_(net, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Conv2d))


@pytest.mark.limit('`torch.jit.optimize_for_inference` of nets that pool to 7x7 or 4x4 cells', 'torch')
def test_optimize_for_inference(kind):
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(7))
    net = pooled.eval() if kind == 'plain' else make(kind)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        optimized = torch.jit.optimize_for_inference(torch.jit.trace(net, images()))
    with pytest.raises(RuntimeError, match='not divisible by the output size is not supported'):
        optimized(images())
