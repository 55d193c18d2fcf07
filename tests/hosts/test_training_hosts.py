"""Trainers: Lightning, fastai, accelerate, and LoRA with peft."""
import copy

import pytest
import torch
import torch.nn.functional as F
from networks import KINDS, check_backward, images, make
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [pytest.mark.slow, pytest.mark.parametrize('kind', KINDS)]
LABELS = torch.arange(8) % 3


def loader():
    return DataLoader(TensorDataset(images(8), LABELS), batch_size=4)


def train_bare(model):
    """Trains for one epoch with SGD, as every host should."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    for pixels, labels in loader():
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    return model


def check_trained(model, kind):
    """Checks that training with a host gives the same weights as training without it."""
    expected = train_bare(make(kind, num_classes=3))
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-4, atol=1e-5)
    start = make(kind, num_classes=3)
    trained = dict(model.named_parameters())
    assert all(not torch.equal(p, trained[name]) for name, p in start.named_parameters())


@pytest.mark.host('Lightning', 'lightning')
def test_lightning(kind, tmp_path):
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make(kind, num_classes=3).train()

        def training_step(self, batch, batch_idx):
            pixels, labels = batch
            return F.cross_entropy(self.model(pixels), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    model = Classifier()
    lightning.Trainer(
        max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path).fit(model, loader())
    check_trained(model.model, kind)


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


@pytest.mark.host('accelerate', 'accelerate')
def test_accelerate(kind):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = make(kind, num_classes=3).train()
    model, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01), loader())
    for pixels, labels in batches:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(pixels), labels))
        optimizer.step()
    check_trained(accelerator.unwrap_model(model), kind)


@pytest.mark.host('peft, LoRA', 'peft', catch='the convolutions of the gates are `attn.fc1` and `attn.fc2`')
def test_lora(kind):
    from peft import LoraConfig, get_peft_model

    bare = make(kind, num_classes=3)
    config = LoraConfig(target_modules=r'.*(conv2|attn\.fc[12])', modules_to_save=['fc'])
    model = get_peft_model(copy.deepcopy(bare), config)
    model.eval()
    torch.testing.assert_close(model(images()), bare(images()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'lora_B' in name:
                p.normal_(std=0.02)
    adapted = model(images())
    check_backward(model, adapted.square().mean(), kind)
    assert not torch.allclose(adapted, bare(images()))
    torch.testing.assert_close(model.merge_and_unload()(images()), adapted, rtol=1e-4, atol=1e-5)
