"""transformers: classifiers from a published folder, a pipeline, the Trainer, a backbone and a detector."""

import pytest
import safetensors.torch
import timm
import torch
import yaml
from nets import KINDS, NAMES, check_backward, gates, images, make
from PIL import Image

from timm_spa.hub.publish import write_repository
from timm_spa.predict import sample_image

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

    photograph = Image.open(sample_image('chelsea'))
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


def backbone_of(repository):
    """The network that timm makes of a folder, as a feature extractor, as the pages tell to."""
    return timm.create_model(f'local-dir:{repository}', pretrained=True, features_only=True, out_indices=(1, 2, 3, 4))


@pytest.mark.host(
    'transformers, TimmBackbone.from_pretrained', 'transformers',
    catch='resets the running statistics of every batch norm; a folder is named `local-dir:FOLDER`')
@pytest.mark.xfail(strict=True, raises=AssertionError, reason='the statistics are reset')
def test_timm_backbone_from_pretrained(kind, repository):
    from transformers import TimmBackbone

    hosted = TimmBackbone.from_pretrained(f'local-dir:{repository}', out_indices=(1, 2, 3, 4)).eval()
    torch.testing.assert_close(list(hosted(images()).feature_maps), backbone_of(repository).eval()(images()))


@pytest.mark.host(
    'transformers, TimmBackbone with the state of timm\'s feature extractor', 'transformers',
    catch='`backbone._backbone.load_state_dict(timm.create_model(NAME, pretrained=True, features_only=True, '
          'out_indices=...).state_dict())`')
def test_timm_backbone(kind, repository):
    from transformers import TimmBackbone

    hosted = TimmBackbone.from_pretrained(f'local-dir:{repository}', out_indices=(1, 2, 3, 4)).eval()
    bare = backbone_of(repository).eval()
    hosted._backbone.load_state_dict(bare.state_dict())
    maps = hosted(images()).feature_maps
    assert all(torch.equal(hosted_map, bare_map) for hosted_map, bare_map in zip(maps, bare(images()), strict=True))
    check_backward(hosted, sum(m.square().mean() for m in maps), kind)


def make_detr(**kwargs):
    from transformers import DetrConfig, DetrForObjectDetection

    torch.manual_seed(0)
    return DetrForObjectDetection(DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5, num_labels=2, **kwargs))


@pytest.mark.host(
    'transformers, `use_pretrained_backbone=True`', 'transformers',
    catch='ignored without a message: the weights are random; load them as in the row of DETR')
@pytest.mark.xfail(strict=True, raises=AssertionError, reason='the option is ignored')
def test_use_pretrained_backbone(kind, repository):
    model = make_detr(backbone=f'local-dir:{repository}', use_pretrained_backbone=True)
    weight = dict(backbone_of(repository).named_parameters())['conv1.weight']
    torch.testing.assert_close(model.model.backbone.model.conv1.weight, weight)


@pytest.mark.host(
    'transformers, DETR', 'transformers',
    catch='`backbone_config=TimmBackboneConfig(backbone=NAME, out_indices=[1, 2, 3, 4])`, then '
          '`model.model.backbone.model.load_state_dict(timm.create_model(NAME, pretrained=True, features_only=True, '
          'out_indices=(1, 2, 3, 4)).state_dict(), strict=False)`; replaces the norm layers, and with them the gates '
          'that `add_attention` attached: take a `spa_` name')
def test_detr(kind, request, repository):
    """With `backbone_config`, transformers does not ask the Hub whether it has the model."""
    from transformers import TimmBackboneConfig

    if kind == 'add_attention':
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason='the gates are gone'))
    model = make_detr(backbone_config=TimmBackboneConfig(
        backbone=f'local-dir:{repository}', out_indices=[1, 2, 3, 4]))
    assert bool(gates(model)) == (kind != 'plain')
    bare, hosted = backbone_of(repository).eval(), model.model.backbone.model
    missing = hosted.load_state_dict(bare.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(key.endswith('num_batches_tracked') for key in missing.unexpected_keys), 'frozen layers count none'
    labels = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[.5, .5, .2, .2]])) for _ in range(2)]
    model.train()
    seen = []
    hosted.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    check_backward(model, model(images(), labels=labels).loss, kind)
    (pixels, maps), = seen
    torch.testing.assert_close([m.detach() for m in maps], [m.detach() for m in bare(pixels)])


@pytest.mark.limit(
    'transformers, `AutoBackbone.from_pretrained(NAME)` and `backbone=NAME` with `backbone_kwargs` without a network: '
    'take `AutoBackbone.from_config(TimmBackboneConfig(backbone=NAME))` and `backbone_config=TimmBackboneConfig(...)`',
    'transformers')
def test_auto_backbone_asks_the_hub(kind, monkeypatch):
    from huggingface_hub import HfApi
    from transformers import AutoBackbone, TimmBackboneConfig

    def no_network(*args, **kwargs):
        raise ConnectionError('no network')

    monkeypatch.setattr(HfApi, 'repo_exists', no_network)
    name = NAMES[kind][0]
    with pytest.raises(ConnectionError):
        AutoBackbone.from_pretrained(name)
    with pytest.raises(ConnectionError):
        make_detr(backbone=name, backbone_kwargs=dict(out_indices=[1, 2, 3, 4]))
    config = TimmBackboneConfig(backbone=name, out_indices=[4])
    assert len(AutoBackbone.from_config(config)(images()).feature_maps) == 1


@pytest.mark.limit('transformers, `TimmBackbone.from_pretrained(FOLDER)` without `local-dir:`', 'transformers')
def test_timm_backbone_of_a_folder(kind, repository):
    from transformers import TimmBackbone

    with pytest.raises(ValueError, match='has no source prefix'):
        TimmBackbone.from_pretrained(str(repository))
