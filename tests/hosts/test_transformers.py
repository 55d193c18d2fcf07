"""transformers: classifiers from a published folder, a pipeline, the Trainer, a backbone and a detector."""
from importlib import resources

import pytest
import safetensors.torch
import timm
import torch
import yaml
from nets import KINDS, NAMES, check_backward, gates, images, make
from PIL import Image

from timm_spa.hub.publish import write_repository

pytestmark = [pytest.mark.slow, pytest.mark.parametrize('kind', KINDS)]
IMPORT_FIRST = '`import timm_spa` first, or transformers blames the version of timm'


@pytest.fixture
def repository(kind, tmp_path):
    """A folder as `timm-spa publish --dry-run` writes it, with weights in float16."""
    (name, kwargs), run = NAMES[kind], tmp_path / 'run'
    run.mkdir()
    state = {key: v.half() if v.is_floating_point() else v for key, v in make(kind, num_classes=3).state_dict().items()}
    safetensors.torch.save_file(state, run / 'best.safetensors')
    (run / 'classes.txt').write_text('ant\nbee\ncat\n')
    (run / 'card.yaml').write_text('license: mit\n')
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(model=name, model_kwargs=kwargs, num_classes=3)))
    write_repository(tmp_path / 'repository', run / 'best.safetensors', f'{name}.mine')
    return tmp_path / 'repository'


@pytest.fixture
def bare(repository):
    return timm.create_model(f'local-dir:{repository}', pretrained=True).eval()


@pytest.mark.host(
    'transformers, AutoModelForImageClassification', 'transformers',
    catch=f'{IMPORT_FIRST}; `dtype=torch.float32` for a float16 file whose config.json has no `dtype`, or AdamW gives '
          'NaN')
def test_classification(kind, repository, bare):
    from transformers import AutoModelForImageClassification

    hosted = AutoModelForImageClassification.from_pretrained(repository)
    torch.testing.assert_close(hosted(images()).logits, bare(images()))
    check_backward(hosted, hosted(images(), labels=torch.tensor([0, 2])).loss, kind)
    torch.optim.AdamW(hosted.parameters(), 1e-3).step()
    assert all(p.isfinite().all() for p in hosted.parameters()), 'in float16 they are not'


@pytest.mark.host('transformers, pipeline', 'transformers', catch=IMPORT_FIRST)
def test_pipeline(kind, repository, bare):
    from transformers import pipeline

    photograph = Image.open(resources.files('timm_spa') / 'images' / 'Red-Beet.jpg')
    answers = pipeline('image-classification', model=str(repository))(photograph)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(bare), is_training=False)
    with torch.no_grad():
        expected = bare(transform(photograph).unsqueeze(0)).softmax(1)[0].tolist()
    assert {a['label']: a['score'] for a in answers} == pytest.approx(
        dict(zip(('ant', 'bee', 'cat'), expected, strict=True)), abs=1e-5)


@pytest.mark.host('transformers, Trainer', 'transformers', catch=IMPORT_FIRST)
def test_trainer(kind, repository, tmp_path):
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

    model = AutoModelForImageClassification.from_pretrained(repository)
    before = {name: p.clone() for name, p in model.named_parameters()}
    pictures = [dict(pixel_values=image, labels=i % 3) for i, image in enumerate(images(8))]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path / 'out'), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, report_to='none',
            save_strategy='no', disable_tqdm=True, use_cpu=True),
        train_dataset=pictures)
    trainer.train()
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in model.named_parameters())
    bare = make(kind, num_classes=3)
    bare.load_state_dict({name.removeprefix('timm_model.'): v for name, v in model.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(trainer.predict(pictures).predictions), bare(images(8)))


@pytest.mark.host('transformers, TimmBackbone', 'transformers', catch='a folder is named `local-dir:FOLDER`')
def test_timm_backbone(kind, repository):
    from transformers import TimmBackbone

    name = f'local-dir:{repository}'
    hosted = TimmBackbone.from_pretrained(name, out_indices=(1, 2, 3, 4)).eval()
    bare = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    maps = hosted(images()).feature_maps
    torch.testing.assert_close(list(maps), bare(images()))
    check_backward(hosted, sum(m.square().mean() for m in maps), kind)


@pytest.mark.host(
    'transformers, DETR', 'transformers',
    catch='replaces the norm layers, and with them the gates that `add_attention` attached: take a `spa_` name')
def test_detr(kind, request):
    from transformers import DetrConfig, DetrForObjectDetection, TimmBackboneConfig

    if kind == 'add_attention':
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason='the gates are gone'))
    backbone = TimmBackboneConfig(backbone=NAMES[kind][0], out_indices=[1, 2, 3, 4])
    torch.manual_seed(0)
    model = DetrForObjectDetection(DetrConfig(
        backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5, num_labels=2))
    assert bool(gates(model)) == (kind != 'plain')
    hosted = model.model.backbone.model
    bare = timm.create_model(NAMES[kind][0], features_only=True, out_indices=(1, 2, 3, 4), **NAMES[kind][1]).eval()
    hosted.load_state_dict(bare.state_dict(), strict=False)  # frozen norm layers count no batches
    labels = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[.5, .5, .2, .2]])) for _ in range(2)]
    model.train()
    seen = []
    hosted.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    check_backward(model, model(images(), labels=labels).loss, kind)
    (pixels, maps), = seen
    torch.testing.assert_close([m.detach() for m in maps], [m.detach() for m in bare(pixels)])


@pytest.mark.limit('transformers, `TimmBackbone.from_pretrained(FOLDER)` without `local-dir:`', 'transformers')
def test_timm_backbone_of_a_folder(kind, repository):
    from transformers import TimmBackbone

    with pytest.raises(ValueError, match='has no source prefix'):
        TimmBackbone.from_pretrained(str(repository))
