"""Trainers: Lightning, fastai, accelerate, and LoRA of peft."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import KINDS, NAMES, check_backward, gates, images, make, set_norms
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [pytest.mark.slow, pytest.mark.parametrize('kind', KINDS)]
LABELS = torch.arange(8) % 3


def loader():
    return DataLoader(TensorDataset(images(8), LABELS), batch_size=4)


def train_bare(net):
    """What a host should do: an epoch of plain SGD."""
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.01)
    for pixels, labels in loader():
        optimizer.zero_grad()
        F.cross_entropy(net(pixels), labels).backward()
        optimizer.step()
    return net


def check_trained(net, kind):
    """Trained by a host, the net has the weights that it has without."""
    expected = train_bare(make(kind, num_classes=3))
    torch.testing.assert_close(dict(net.state_dict()), dict(expected.state_dict()), rtol=1e-4, atol=1e-5)
    start = make(kind, num_classes=3)
    trained = dict(net.named_parameters())
    assert all(not torch.equal(p, trained[name]) for name, p in start.named_parameters())


@pytest.mark.host('Lightning', 'lightning')
def test_lightning(kind, tmp_path):
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make(kind, num_classes=3).train()

        def training_step(self, batch, batch_idx):
            pixels, labels = batch
            return F.cross_entropy(self.net(pixels), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    model = Classifier()
    lightning.Trainer(
        max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path).fit(model, loader())
    check_trained(model.net, kind)


@pytest.mark.host('fastai, Learner', 'fastai')
def test_fastai(kind):
    from fastai.vision.all import DataLoaders, Learner, OptimWrapper

    def sgd(params, **kwargs):
        return OptimWrapper(params, torch.optim.SGD)

    learner = Learner(
        DataLoaders(loader(), loader(), device=torch.device('cpu')), make(kind, num_classes=3),
        loss_func=F.cross_entropy, opt_func=sgd)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=0.01)
    check_trained(learner.model, kind)


@pytest.mark.host(
    'fastai, vision_learner by name', 'fastai',
    catch='the base of `gated` is an argument of `create_timm_model`')
def test_fastai_by_name(kind):
    from fastai.vision.all import DataLoaders, create_timm_model, vision_learner

    name, kwargs = NAMES[kind]
    batches = DataLoaders(loader(), loader(), device=torch.device('cpu'))
    learner = vision_learner(batches, name, n_out=3, pretrained=False, normalize=False, loss_func=F.cross_entropy)
    assert bool(gates(learner.model)) == (kind != 'plain')
    model, _ = create_timm_model(name, 3, pretrained=False, **kwargs)
    hosted = set_norms(model).eval()
    bare = timm.create_model(name, num_classes=0, global_pool='', **kwargs).eval()
    bare.load_state_dict(hosted[0].model.state_dict())
    torch.testing.assert_close(hosted[0](images()), bare(images()))
    learner.model = hosted
    before = copy.deepcopy(dict(hosted.named_parameters()))
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=0.01)
    trained = dict(hosted.named_parameters())
    assert all(not torch.equal(p, trained[name]) and trained[name].isfinite().all() for name, p in before.items())


@pytest.mark.host('accelerate', 'accelerate')
def test_accelerate(kind):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = make(kind, num_classes=3).train()
    net, optimizer, batches = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.01), loader())
    for pixels, labels in batches:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(net(pixels), labels))
        optimizer.step()
    check_trained(accelerator.unwrap_model(net), kind)


@pytest.mark.host('peft, LoRA', 'peft', catch='the convolutions of the gates are `attn.fc1` and `attn.fc2`')
def test_lora(kind):
    from peft import LoraConfig, get_peft_model

    bare = make(kind, num_classes=3)
    config = LoraConfig(target_modules=r'.*(conv2|attn\.fc[12])', modules_to_save=['fc'])
    net = get_peft_model(copy.deepcopy(bare), config)
    net.eval()
    torch.testing.assert_close(net(images()), bare(images()))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if 'lora_B' in name:
                p.normal_(std=0.02)
    adapted = net(images())
    check_backward(net, adapted.square().mean(), kind)
    assert not torch.allclose(adapted, bare(images()))
    torch.testing.assert_close(net.merge_and_unload()(images()), adapted, rtol=1e-4, atol=1e-5)
