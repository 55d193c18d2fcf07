"""Programs that take the name of a model, by their own command lines under `timm-spa with`: `make more-hosts`.

What a program leaves behind is compared with timm's model of that name: all of its tensors, or what it computes.
"""
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from nets import gates, set_norms
from PIL import Image

BIN = Path(sys.executable).parent
WITH = [sys.executable, '-c', 'from timm_spa_cli import main; raise SystemExit(main())', 'with']
NAMES = dict(spa='spa_resnet18', add_attention='gated', plain='resnet18')

pytestmark = [pytest.mark.slow, pytest.mark.parametrize('kind', NAMES)]


def run(*command, cwd, launcher=WITH):
    """Runs a program of this environment without a network, with its folder on PYTHONPATH."""
    done = subprocess.run(
        [*launcher, BIN / command[0], *map(str, command[1:])], cwd=cwd, capture_output=True, text=True, timeout=500,
        env={**os.environ, 'HF_HUB_OFFLINE': '1', 'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}',
             'PYTHONPATH': os.pathsep.join(filter(None, [str(cwd), os.environ.get('PYTHONPATH')]))})
    assert done.returncode == 0, f'{done.stdout[-4000:]}\n{done.stderr[-4000:]}'
    return done


def need(distribution):
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        pytest.skip(f'{distribution} is not installed here: `make more-hosts`')


def make(kind, **kwargs):
    torch.manual_seed(0)
    net = timm.create_model(NAMES[kind], **kwargs)
    assert bool(gates(net)) == (kind != 'plain')
    return set_norms(net).eval()


def write_images(folder, count=8, size=64):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f'{i}.png')


def take(state, prefix):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load(path):
    return torch.load(path, map_location='cpu', weights_only=False)


def test_timmx(kind, tmp_path):
    need('timmx')
    import onnxruntime

    net = make(kind, num_classes=3)
    torch.save(net.state_dict(), tmp_path / 'weights.pth')
    run('timmx', 'export', 'onnx', NAMES[kind], '--output', 'model.onnx', '--checkpoint', 'weights.pth',
        '--num-classes', '3', '--input-size', '3', '64', '64', '--no-slim', cwd=tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    logits, = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), net(pixels), rtol=1e-3, atol=1e-4)
    if kind == 'spa':
        with pytest.raises(AssertionError, match='spa_resnet18'):
            run('timmx', 'export', 'onnx', NAMES[kind], '--output', 'x.onnx', cwd=tmp_path, launcher=[])


def test_lightly_train(kind, tmp_path):
    """lightly-train looks for timm before it imports it."""
    need('lightly-train')
    write_images(tmp_path / 'images')
    run('lightly-train', 'pretrain', 'out=out', 'data=images', f'model=timm/{NAMES[kind]}', 'method=simclr', 'epochs=1',
        'batch_size=4', 'num_workers=0', 'accelerator=cpu', 'transform_args.image_size=[64,64]', cwd=tmp_path)
    state = load(tmp_path / 'out' / 'exported_models' / 'exported_last.pt')
    assert state['bn1.num_batches_tracked'] > 0
    make(kind).load_state_dict(state)


def test_anomalib(kind, tmp_path):
    need('anomalib')
    write_images(tmp_path / 'data' / 'good', 12)
    write_images(tmp_path / 'data' / 'bad', 4)
    run('anomalib', 'train', '--model', 'Padim', '--model.backbone', NAMES[kind], '--model.n_features', '50',
        '--model.pre_trained', 'false', '--model.layers', '[layer1,layer2]', '--data', 'anomalib.data.Folder',
        '--data.name', 'x', '--data.root', 'data', '--data.normal_dir', 'good', '--data.abnormal_dir', 'bad',
        '--data.train_batch_size', '4', '--data.eval_batch_size', '4', '--data.num_workers', '0',
        '--trainer.accelerator', 'cpu', '--default_root_dir', 'out', cwd=tmp_path)
    path, = (path for path in (tmp_path / 'out').rglob('*.ckpt') if not path.is_symlink())
    state = take(load(path)['state_dict'], 'model.feature_extractor.feature_extractor.')
    net = timm.create_model(NAMES[kind], features_only=True, out_indices=(1, 2))
    net.load_state_dict(state)
    assert bool(gates(net)) == (kind != 'plain')


def test_lightning_ddp(kind, tmp_path):
    """Two processes, of which Lightning starts the second."""
    need('lightning')
    (tmp_path / 'train.py').write_text(f'''
import lightning
import timm
import torch

class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model({NAMES[kind]!r}, num_classes=3)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

trainer = lightning.Trainer(
    max_epochs=1, accelerator='cpu', devices=2, strategy='ddp', logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Classifier(), torch.utils.data.DataLoader(torch.randn(8, 3, 64, 64), batch_size=2))
print(f'rank {{trainer.global_rank}} of {{trainer.world_size}}', flush=True)
''')
    done = run('python', 'train.py', cwd=tmp_path)
    assert sorted(line for line in done.stdout.splitlines() if line.startswith('rank')) == [
        'rank 0 of 2', 'rank 1 of 2']


def test_open_clip(kind, tmp_path):
    need('open-clip-torch')
    pytest.importorskip('webdataset', reason='wants open_clip_torch[training]')
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'open_clip_config.json').write_text(json.dumps(dict(
        model_cfg=dict(
            embed_dim=32, vision_cfg=dict(timm_model_name=NAMES[kind], timm_model_pretrained=False, timm_pool='avg',
                                          timm_proj='linear', image_size=64),
            text_cfg=dict(context_length=16, vocab_size=49408, width=64, heads=2, layers=1)),
        preprocess_cfg={})))
    run('python', '-m', 'open_clip_train.main', '--model', 'local-dir:model', '--dataset-type', 'synthetic',
        '--train-num-samples', '8', '--batch-size', '4', '--epochs', '1', '--workers', '0', '--device', 'cpu',
        '--precision', 'fp32', '--logs', 'logs', '--name', 'run', '--warmup', '0', '--lr', '1e-3', cwd=tmp_path)
    path, = (tmp_path / 'logs').rglob('epoch_1.pt')
    state = take(load(path)['state_dict'], 'visual.trunk.')
    assert state['bn1.num_batches_tracked'] > 0
    make(kind, num_classes=0).load_state_dict(state)


def test_mmpretrain(kind, tmp_path):
    """It has a way of its own, `custom_imports`. The base of `gated` is an argument of the backbone."""
    need('onedl-mmpretrain')
    base = dict(base='resnet18') if kind == 'add_attention' else {}
    (tmp_path / 'config.py').write_text(f'''
custom_imports = dict(imports=['timm_spa'])
model = dict(
    type='ImageClassifier', backbone=dict(type='TIMMBackbone', model_name={NAMES[kind]!r}, **{base!r}),
    neck=dict(type='GlobalAveragePooling'), head=dict(type='LinearClsHead', num_classes=3, in_channels=512))
data_preprocessor = dict(num_classes=3)
''')
    (tmp_path / 'program.py').write_text('''
import mmpretrain
import torch

model = mmpretrain.get_model('config.py')
torch.save(model.backbone.timm_model.state_dict(), 'backbone.pth')
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
torch.save((x, model.eval().extract_feat(x)[0].detach()), 'features.pth')
''')
    run('python', 'program.py', cwd=tmp_path, launcher=[])
    net = timm.create_model(NAMES[kind], num_classes=0, **base).eval()
    net.load_state_dict(load(tmp_path / 'backbone.pth'))
    pixels, features = load(tmp_path / 'features.pth')
    with torch.no_grad():
        torch.testing.assert_close(net(pixels), features)
