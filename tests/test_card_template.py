"""Facts that only the user knows: one error lists all that card.yaml lacks, and a template has a field for each."""
import os

import pytest
import timm
import torch
import yaml
from hub_server import OWNER
from published import NAME, SHIPPED

import timm_spa_cli
from timm_spa.checkpoints.reading import CheckpointError
from timm_spa.hub.facts import NEEDED, MissingFactsError
from timm_spa.hub.publish import publish, write_repository
from timm_spa.training.run_record import card_facts

MODEL = 'spa_mobilenetv2_cifar'
ALL = set(NEEDED) - {'accuracy.top1', 'dataset.id'}


@pytest.fixture
def run(tmp_path):
    """A training that started from a file, with an accuracy on a dataset without a name."""
    folder = tmp_path / 'run'
    folder.mkdir()
    model = timm.create_model(MODEL, num_classes=3)
    torch.save(dict(state_dict=model.state_dict(), epoch=0), folder / 'best.pth')
    (folder / 'args.yaml').write_text(f'model: {MODEL}\nnum_classes: 3\ninitial_checkpoint: start.pth\n')
    (folder / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1,eval_top5\n0,1,1,20,100\n')
    return folder


def write(run):
    return write_repository(run.parent / 'out', run / 'best.pth', f'{MODEL}.mine')


def test_from_nothing_to_a_repository(run, capsys):
    command = ['publish', str(run / 'best.pth'), '--model', f'{MODEL}.mine', '--dry-run', str(run.parent / 'out')]
    assert timm_spa_cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    for name in ALL:
        assert f'{name} ({NEEDED[name]}' in error
    assert 'top-1 is 20.0 %' in error
    assert "initial_checkpoint 'start.pth'" in error
    assert f'Fill them in in {run / "card.yaml"}, which was written with an empty field for each of them.' in error
    assert not (run.parent / 'out').exists()
    text = (run / 'card.yaml').read_text()
    assert yaml.safe_load(text) == dict(license=None, dataset=dict(name=None), base_model=None)
    for name in ALL:
        assert f'{name.rpartition(".")[2]}:  # {NEEDED[name]}\n' in text
    assert 'about: What the weights are for.' in text

    # as it stands, and partly filled in
    with pytest.raises(MissingFactsError, match=f'lacks 3 facts .*Fill them in in {run / "card.yaml"}.$') as e:
        write(run)
    assert set(e.value.missing) == ALL
    assert (run / 'card.yaml').read_text() == text
    text = text.replace('license:', 'license: mit')
    (run / 'card.yaml').write_text(text)
    assert card_facts(run) == dict(license='mit')
    with pytest.raises(MissingFactsError, match='lacks 2 facts'):
        write(run)
    (run / 'card.yaml').write_text(text.replace('name:', 'name: My images').replace('base_model:', "base_model: ''"))
    write(run)
    card = (run.parent / 'out' / 'README.md').read_text()
    assert 'license: mit' in card
    assert 'My images' in card


def test_a_card_yaml_that_lacks_facts_is_not_changed(run):
    own = '# mine\nabout: Images of ants.\ndataset: {split: val}\naccuracy: {top5: 90}\n'
    (run / 'card.yaml').write_text(own)
    template = run / 'card.template.yaml'
    with pytest.raises(MissingFactsError, match=f'lacks 4 facts .* in {template}, .*, and rename it to card.yaml.$'):
        write(run)
    assert (run / 'card.yaml').read_text() == own
    assert yaml.safe_load(template.read_text()) == dict(
        about='Images of ants.', dataset=dict(split='val', name=None), accuracy=dict(top5=90, top1=None), license=None,
        base_model=None)
    assert 'top1:  # ' in template.read_text()


def test_no_template_without_need_or_permission(run, tmp_path, monkeypatch):
    write_repository(tmp_path / 'shipped', SHIPPED, NAME)
    assert not SHIPPED.with_name('card.yaml').exists()
    with pytest.raises(CheckpointError, match='has 3 classes'):
        write_repository(tmp_path / 'out', run / 'best.pth', f'{MODEL}.mine', num_classes=4)
    assert not (run / 'card.yaml').exists(), 'other errors come first'
    replace = os.replace

    def refuse(source, target, **kwargs):
        if str(target).endswith('card.yaml'):
            raise PermissionError(13, 'Permission denied')
        replace(source, target, **kwargs)

    monkeypatch.setattr('pathlib.Path.replace', lambda self, target: refuse(self, target))
    with pytest.raises(MissingFactsError, match='lacks 3 facts .*No template could be written: .*Permission denied'):
        write(run)


def test_results_on_a_benchmark_of_the_hub(run, hub, monkeypatch):
    """In the current format, beside those in the metadata of the card; published, replaced and kept with the rest."""
    hub_names = pytest.importorskip('huggingface_hub._eval_results')
    dataset = 'dataset: {name: Ants, split: val, task_id: classification'
    (run / 'card.yaml').write_text(f'license: mit\nbase_model: ""\n{dataset}}}\n')
    with pytest.raises(MissingFactsError, match='lacks 1 fact .*: dataset.id .id of the benchmark'):
        write(run)
    (run / 'card.yaml').write_text(f'license: mit\nbase_model: ""\n{dataset}, id: org/ants-1}}\n')
    write(run)
    file = run.parent / 'out' / '.eval_results' / 'ants-1.yaml'
    (entry,) = hub_names.parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ('org/ants-1', 'classification', 20.0)
    assert entry.notes == 'top-1 accuracy in percent, split val'
    assert 'model-index:' in (run.parent / 'out' / 'README.md').read_text()
    summary = run / 'summary.csv'
    summary.write_text(summary.read_text().replace(',20,', ',30,'))
    write(run)
    assert yaml.safe_load(file.read_text())[0]['value'] == 30.0
    monkeypatch.setenv('HF_TOKEN', OWNER)
    publish(run / 'best.pth', f'{MODEL}.mine', 'org/mine')
    assert hub.files('org/mine')['.eval_results/ants-1.yaml'] == file.read_bytes()
    # without a benchmark there is no such file
    (run / 'card.yaml').write_text('license: mit\nbase_model: ""\ndataset: {name: Ants, id: org/ants-1}\n')
    write_repository(run.parent / 'other', run / 'best.pth', f'{MODEL}.mine')
    assert not (run.parent / 'other' / '.eval_results').exists()
