"""Checks of the arguments, splits and classes of timm's scripts, with a parser in place of each script."""
import argparse
import logging
import tarfile
from pathlib import Path

import pytest
import timm
import timm.data
import timm.models
import timm.task
import torch
from PIL import Image

import timm_spa  # noqa: F401
from timm_spa._errors import TimmSpaError
from timm_spa.training.guard import TrainingError
from timm_spa.training.image_folder import class_names, is_image_folder, number_of_classes, split_folders
from timm_spa.training.script_guard import guarded_script

MODEL = 'spa_mobilenetv2_cifar'
OPTIONS = {
    'train': ['dataset', 'train-split', 'val-split', 'class-map', 'pretrained-path', 'initial-checkpoint', 'resume',
              'output', 'experiment', 'input-key'],
    'validate': ['dataset', 'split', 'class-map', 'checkpoint', 'real-labels', 'valid-labels', 'results-file'],
    'inference': ['dataset', 'split', 'class-map', 'checkpoint', 'results-dir', 'results-file'],
    'benchmark': [],
    'onnx_export': ['checkpoint'],
}


def parse(script, *argv):
    """Parses the arguments that the guard reads, as a script does."""
    parser = argparse.ArgumentParser(prog=script)
    parser.add_argument('data', nargs='?')
    if script in ('train', 'validate', 'inference'):
        parser.add_argument('--data-dir')
    parser.add_argument('--model', default=MODEL)
    parser.add_argument('--num-classes', type=int)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--device-modules', nargs='+')
    for flag in ('pretrained', 'fullname', 'no-console-results'):
        parser.add_argument(f'--{flag}', action='store_true')
    for option in OPTIONS[script]:
        parser.add_argument(f'--{option}', default={'split': 'validation', 'input-key': None}.get(option, ''))
    if script == 'train':
        parser.set_defaults(train_split='train', val_split='validation')
        config_parser = argparse.ArgumentParser(add_help=False)
        config_parser.add_argument('-c', '--config', default='')
        config, argv = config_parser.parse_known_args([*map(str, argv)])
        if config.config:
            import yaml

            parser.set_defaults(**yaml.safe_load(Path(config.config).read_text()))
    return parser.parse_args([*map(str, argv)])


def opened(script, *argv):
    """Parses arguments and opens the data sets as a script does."""
    with guarded_script(script):
        args = parse(script, *argv)
        root, common = args.data or args.data_dir, dict(class_map=args.class_map)
        if script == 'train':
            common.update(name=args.dataset, root=root)
            train = timm.data.create_dataset(split=args.train_split, is_training=True, **common)
            return args, train, args.val_split and timm.data.create_dataset(
                split=args.val_split, is_training=False, **common)
        timm.models.create_model(args.model, pretrained=args.pretrained, num_classes=args.num_classes)
        args.num_classes = args.num_classes or 1000
        return args, timm.data.create_dataset(name=args.dataset, root=root, split=args.split, **common)


def images(folder, *classes, count=1):
    for label in classes:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new('RGB', (8, 8), (i, i, i)).save(folder / label / f'{i}.png')


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with images in DATA/train (a, b, c, d) and DATA/val (which lacks b)."""
    monkeypatch.chdir(tmp_path)
    images(tmp_path / 'DATA' / 'train', *'abcd')
    images(tmp_path / 'DATA' / 'val', *'acd')
    (tmp_path / 'file').write_text('no weights')
    (tmp_path / 'empty').mkdir()
    return tmp_path


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """The folder of a run with four classes."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    folder.mkdir()
    state = dict(state_dict=timm.create_model(MODEL, num_classes=4).state_dict(), epoch=0, args=argparse.Namespace(
        num_classes=4, model=MODEL))
    torch.save(state, folder / 'model_best.pth.tar')
    return folder


@pytest.fixture
def best(checkpoints, here):
    """A checkpoint of four classes next to their names, which are not in alphabetical order."""
    (here / 'run').mkdir()
    (here / 'run' / 'model_best.pth.tar').symlink_to(checkpoints / 'model_best.pth.tar')
    (here / 'run' / 'classes.txt').write_text('d\nc\nb\na\n')
    return here / 'run' / 'model_best.pth.tar'


def targets(dataset):
    return {Path(file).parent.name: int(target) for file, target in dataset.reader.samples}


# splits

@pytest.mark.parametrize(('script', 'argv', 'message'), [
    ('validate', ['DATA', '--split', 'vall'], "Split 'vall' not found in DATA: .* Set --split to one of train, val"),
    ('validate', ['DATA', '--split', ''], "Split '' not found in DATA"),
    ('validate', ['DATA', '--split', '.', '--class-map', 'abcd.txt'], r"Split '\.' not found in DATA"),
    ('validate', ['--data-dir', 'DATA/', '--split', 'test'], "Split 'test' not found in DATA/"),
    ('inference', ['DATA', '--split', 'vall'], 'Set --split to one of train, val'),
    ('train', ['DATA', '--val-split', 'vall'], 'Set --val-split to one of train, val'),
    ('train', ['DATA', '--train-split', 'trian'], 'Set --train-split to one of train, val'),
    ('train', ['DATA', '--val-split', 'vall', '--dataset', 'torch/image_folder'], "Split 'vall' not found in DATA"),
])
def test_missing_split(here, script, argv, message):
    (here / 'abcd.txt').write_text('a\nb\nc\nd\n')
    with pytest.raises(TimmSpaError, match=message):
        opened(script, *argv, '--num-classes', 4)


@pytest.mark.parametrize('argv', [
    ['DATA/val'], ['DATA/val/'], ['DATA', '--split', 'val'], ['DATA', '--split', 'validation'],
    ['DATA', '--split', 'val[:50%]'], ['.', '--split', 'DATA/val']])
def test_existing_split(here, argv):
    _, dataset = opened('validate', *argv, '--num-classes', 3)
    assert targets(dataset) == dict(a=0, c=1, d=2)


def test_split_folders(tmp_path):
    def splits(*files):
        return split_folders(tmp_path, [str(tmp_path / file) for file in files])

    assert splits('train/a/1.png', 'Val/b/1.png', 'x/c/1.png') == ['Val', 'train']
    assert splits('train/1.png', 'bus/1.png') == [], 'a class of that name'
    assert splits('one/a/1.png', 'one/b/1.png', 'two/a/1.png', 'two/b/1.png', 'c/1.png') == ['one', 'two']
    assert splits('animals/cat/1.png', 'animals/mouse/1.png', 'things/mouse/1.png', 'things/pen/1.png') == [], (
        'groups of classes')
    assert splits('a/1.png', '2.png') == []


def test_names_of_image_folders():
    folders = ['', 'folder', 'x/y', 'torch/folder', 'TORCH/Image_Folder']
    assert [name for name in (*folders, 'hfds/x', 'torch/cifar10', 'WDS/x') if is_image_folder(name)] == folders


def test_other_types_of_datasets_are_not_checked(here, monkeypatch):
    calls = []
    monkeypatch.setattr('timm_spa.training.script_guard._timm_create_dataset', lambda name, **kwargs: calls.append(
        (name, kwargs)) or argparse.Namespace())
    opened('validate', '--dataset', 'hfds/x', '--split', 'vall', '--num-classes', 4)
    opened('validate', 'nowhere', '--dataset', 'wds/x', '--num-classes', 4)
    assert calls == [('hfds/x', dict(root=None, split='vall', class_map='')),
                     ('wds/x', dict(root='nowhere', split='validation', class_map=''))]


# classes

def test_validation_has_the_class_numbers_of_the_training(here):
    args, train, validation = opened('train', 'DATA')
    assert args.num_classes == 4
    assert targets(train) == dict(a=0, b=1, c=2, d=3)
    assert targets(validation) == dict(a=0, c=2, d=3)


def test_validation_class_that_training_lacks(here):
    images(here / 'DATA' / 'val', 'z')
    with pytest.raises(TimmSpaError, match='DATA/val has class folders .* 4 classes of the training data .*: z'):
        opened('train', 'DATA')


def test_class_map_is_used_unchanged(here):
    (here / 'map.txt').write_text('d\nc\na\n\n')
    args, train, validation = opened('train', 'DATA', '--class-map', 'map.txt')
    assert args.num_classes == 3, 'an empty line is no class'
    assert targets(train) == targets(validation) == dict(d=0, c=1, a=2)
    _, dataset = opened('validate', 'DATA', '--split', 'val', '--class-map', 'map.txt', '--num-classes', 9)
    assert targets(dataset) == dict(d=0, c=1, a=2)
    with pytest.raises(TimmSpaError, match=r'--class-map map\.txt has 3 classes, but the model has 2 outputs'):
        opened('validate', 'DATA', '--split', 'val', '--class-map', 'map.txt', '--num-classes', 2)


def test_class_map_in_the_folder_of_the_split(here):
    """timm looks for the file there too; a missing file is one message, also with --num-classes."""
    (here / 'DATA' / 'train' / 'order.txt').write_text('d\nc\nb\na\n')
    _, train, _ = opened('train', 'DATA', '--class-map', 'order.txt', '--val-split', '')
    assert targets(train) == dict(d=0, c=1, b=2, a=3)
    with pytest.raises(TimmSpaError, match=r'Cannot locate .* file \(nope\.txt\)\. Check --data-dir and --class-map'):
        opened('train', 'DATA', '--class-map', 'nope.txt', '--num-classes', 4)


def test_torchvision_cannot_keep_class_numbers(here):
    with pytest.raises(TimmSpaError, match='DATA/val has 3 of the 4 classes .* Remove --dataset'):
        opened('train', 'DATA', '--dataset', 'torch/folder')


def test_more_class_folders_than_outputs(here):
    with pytest.raises(TimmSpaError, match=r'--num-classes is 2, but DATA/train has 4 classes \(a, b, c, d\)'):
        opened('train', 'DATA', '--num-classes', 2)


def test_more_outputs_than_class_folders(here, caplog):
    assert opened('train', 'DATA', '--num-classes', 4)[0].num_classes == 4
    assert 'outputs' not in caplog.text
    assert opened('train', 'DATA', '--num-classes', 10)[0].num_classes == 10
    assert '10 outputs, but DATA/train has 4 classes: 6 outputs have no images' in caplog.text


def test_number_of_classes_is_inferred(here, checkpoints, caplog):
    """From the class folders, or from the checkpoint if there is one."""
    caplog.set_level(logging.INFO)
    assert opened('train', 'DATA')[0].num_classes == 4
    assert '--num-classes 4: the number of classes in DATA/train' in caplog.text
    images(here / 'TWO' / 'train', *'ab')
    checkpoint = checkpoints / 'model_best.pth.tar'
    with guarded_script('train'):
        assert parse('train', 'TWO', '--resume', checkpoint).num_classes == 4
    with guarded_script('train'):
        assert parse('train', 'TWO', '--resume', 'auto').num_classes == 2
    with guarded_script('train'):
        assert parse('train', 'TWO', '--dataset', 'hfds/x').num_classes is None
    assert '--num-classes is missing' in caplog.text
    for script in ('validate', 'inference', 'onnx_export'):
        with guarded_script(script):
            assert parse(script, 'DATA', '--checkpoint', checkpoint).num_classes == 4
    with guarded_script('validate'):
        assert parse('validate', 'DATA', '--checkpoint', checkpoints).num_classes == 4, 'a folder of checkpoints'


def test_training_and_validation_read_the_same_images(here, caplog):
    opened('train', 'DATA/val')
    assert 'Training and validation read the same images, from DATA/val' in caplog.text
    caplog.clear()
    opened('train', 'DATA')
    opened('train', 'DATA/val', '--val-split', '')
    assert 'the same images' not in caplog.text


def test_images_outside_class_folders(here):
    images(here / 'DATA' / 'train', '.')
    images(here / 'flat', '.')
    for script, argv in (('train', ['DATA']), ('validate', ['flat', '--num-classes', 1])):
        with pytest.raises(TimmSpaError, match='has images outside class folders'):
            opened(script, *argv)
    assert len(opened('inference', 'flat', '--num-classes', 3)[1]) == 1
    (here / 'real.json').write_text('[]')
    assert len(opened('validate', 'flat', '--num-classes', 3, '--real-labels', 'real.json')[1]) == 1


def test_classes_of_a_checkpoint(here, best):
    _, dataset = opened('validate', 'DATA', '--split', 'val', '--checkpoint', best)
    assert targets(dataset) == dict(d=0, c=1, a=3)
    images(here / 'DATA' / 'val', 'z')
    with pytest.raises(TimmSpaError, match=r'not among the 4 classes of .*classes\.txt: z\. .*--class-map FILE'):
        opened('validate', 'DATA', '--split', 'val', '--checkpoint', best)


def test_classes_of_another_checkpoint(here, best):
    (best.parent / 'classes.txt').write_text('a\nb\nc\nd\ne\n')
    with pytest.raises(TimmSpaError, match=r'classes\.txt has 5 classes, but .*model_best\.pth\.tar has 4 outputs'):
        opened('validate', 'DATA', '--split', 'val', '--checkpoint', best)


def test_checkpoint_without_class_names(here, checkpoints):
    checkpoint = checkpoints / 'model_best.pth.tar'
    _, dataset = opened('validate', 'DATA', '--split', 'train', '--checkpoint', checkpoint)
    assert targets(dataset) == dict(a=0, b=1, c=2, d=3)
    with pytest.raises(TimmSpaError, match=r'DATA/val has 3 class folders \(a, c, d\), but the model has 4 outputs'):
        opened('validate', 'DATA', '--split', 'val', '--checkpoint', checkpoint)


def test_valid_labels(here, best, checkpoints):
    for labels, expected in (('0\n1\n3\n', dict(d=0, c=1, a=2)), ('3\n0\n1\n', dict(a=0, d=1, c=2))):
        (here / 'valid.txt').write_text(labels)
        _, dataset = opened('validate', 'DATA', '--split', 'val', '--checkpoint', best, '--valid-labels', 'valid.txt')
        assert targets(dataset) == expected
    _, dataset = opened('validate', 'DATA', '--split', 'val', '--checkpoint', checkpoints / 'model_best.pth.tar',
                        '--valid-labels', 'valid.txt')
    assert targets(dataset) == dict(a=0, c=1, d=2)
    for labels, message in (
            ('0\nx\n', r'--valid-labels valid\.txt cannot be read: .* Expected one number per line'),
            ('0\n-1\n', 'has the number -1, but the model has the outputs 0 to 3'),
            ('0\n4\n', 'has the number 4, but the model has the outputs 0 to 3')):
        (here / 'valid.txt').write_text(labels)
        with pytest.raises(TimmSpaError, match=message):
            opened('validate', 'DATA', '--split', 'val', '--checkpoint', best, '--valid-labels', 'valid.txt')


def test_classes_of_published_weights(here):
    """The order is that of the published class names."""
    published = f'{MODEL}.tmm_tin200'
    names = timm.get_pretrained_cfg(published).label_names
    images(here / 'WORDS' / 'val', names[7], names[150])
    argv = ['--split', 'val', '--model', published, '--pretrained', '--num-classes']
    _, dataset = opened('validate', 'WORDS', *argv, 200)
    assert targets(dataset) == {names[7]: 7, names[150]: 150}
    with pytest.raises(TimmSpaError, match='not among the 200 classes of the weights of .*: a, c, d'):
        opened('validate', 'DATA', *argv, 200)
    with pytest.raises(TimmSpaError, match='have 200 classes, but --num-classes is 4: the classifier would be random'):
        opened('validate', 'DATA', *argv, 4)


def test_names_of_a_checkpoint_in_inference(here, best, checkpoints):
    """The class names of Tiny-ImageNet in the model's configuration are replaced or removed."""
    for path, names in ((best, ['d', 'c', 'b', 'a']), (checkpoints / 'model_best.pth.tar', None)):
        with guarded_script('inference'):
            model = timm.models.create_model(f'{MODEL}.tmm_tin200', num_classes=4, checkpoint_path=str(path))
        assert model.pretrained_cfg['label_names'] == names
        assert model.pretrained_cfg['label_descriptions'] is None
        state = torch.load(path, weights_only=False)['state_dict']
        assert torch.equal(model.classifier.weight, state['classifier.weight'])


def test_more_class_names_than_outputs_in_inference(best):
    (best.parent / 'classes.txt').write_text('a\nb\nc\nd\ne\n')
    with guarded_script('inference'):
        model = timm.models.create_model(f'{MODEL}.tmm_tin200', num_classes=4, checkpoint_path=str(best))
    assert model.pretrained_cfg['label_names'] is None


def test_number_of_classes_of_a_state_dict(here, best):
    torch.save(torch.load(best, weights_only=False)['state_dict'], here / 'tensors.pth')
    with guarded_script('validate'):
        assert parse('validate', 'DATA', '--checkpoint', 'tensors.pth').num_classes == 4


def test_duplicate_image_names_in_inference(here):
    assert opened('inference', 'DATA', '--num-classes', 4, '--split', 'val')[0].fullname
    assert not opened('inference', 'DATA', '--num-classes', 4, '--split', 'val', '--no-console-results')[0].fullname
    assert not opened('inference', 'DATA/val/a', '--num-classes', 4)[0].fullname


def test_tar_files(here):
    with tarfile.open(here / 'data.tar', 'w') as tar:
        tar.add(here / 'DATA' / 'train', 'x')
    assert opened('train', 'data.tar', '--val-split', '')[0].num_classes == 4
    with pytest.raises(TimmSpaError, match=r'--num-classes is 3, but data\.tar has 4 classes'):
        opened('train', 'data.tar', '--num-classes', 3)


def test_class_names_in_the_order_of_outputs():
    assert class_names({'b': 0, 'a': 1, '': 2}) == ['b', 'a']
    assert class_names({'b': 0, 'a': 2}) == [], 'output 1 has no name'
    assert class_names({'b': 0, 'a': 0}) == []
    assert class_names({}) == []
    assert number_of_classes({'b': 0, 'a': 5, '': 6}) == 6


# errors

@pytest.mark.parametrize(('script', 'argv', 'message'), [
    ('train', [], r"split 'train' cannot be read: no folder given\. Add --data-dir"),
    ('validate', [], "split 'validation' cannot be read: no folder given"),
    ('train', ['nowhere'], r"'train' cannot be read from nowhere: it does not exist\. Check --data-dir"),
    ('train', ['empty'], 'Found 0 images'),
    ('train', ['DATA', '--class-map', 'other.txt'], r'Found 0 images .* Check --data-dir and --class-map'),
    ('train', ['DATA', '--resume', 'nope'], r'--resume nope does not exist\. .* Files in .*: .*other\.txt'),
    ('train', ['DATA', '--resume', 'DATA'], '--resume DATA is a folder'),
    ('train', ['DATA', '--resume', 'file'], 'file cannot be read as weights'),
    ('train', ['DATA', '--pretrained-path', 'nope'], '--pretrained-path nope does not exist'),
    ('train', ['DATA', '--initial-checkpoint', 'nope'], '--initial-checkpoint nope does not exist'),
    ('train', ['DATA', '--class-map', 'nope.txt'],
     r'from DATA: Cannot locate .* file \(nope\.txt\)\. Check --data-dir and --class-map'),
    ('train', ['DATA', '--class-map', 'file'],
     r'from DATA: Unsupported class map file .* Check --data-dir and --class-map'),
    ('train', ['DATA', '--config', 'nope'], '--config nope is not a file'),
    ('train', ['DATA', '--config', 'finetune_warm'], 'or recipe:finetune_warm'),
    ('train', ['DATA', '--config', 'file'], '--config file: expected lines "option: value", got a str'),
    ('train', ['DATA', '--config', 'broken.yaml'], r'--config broken\.yaml cannot be read as YAML'),
    ('train', ['DATA', '--config', 'typo.yaml'], "key 'num_classess', .*Did you mean num_classes"),
    ('train', ['DATA', '--output', 'file'], '--output file cannot be used: file is not a folder'),
    ('train', ['DATA', '--model', 'spa_resnet5'], "Unknown model 'spa_resnet5'. Did you mean spa_resnet50"),
    ('inference', ['DATA', '--model', 'spa_resnet5'], 'Did you mean spa_resnet50'),
    ('validate', ['DATA', '--model', 'spa_resnet5'], 'Did you mean spa_resnet50'),
    ('benchmark', ['--model', 'spa_resnet5'], 'Did you mean spa_resnet50'),
    ('onnx_export', ['--model', 'spa_resnet5'], 'Did you mean spa_resnet50'),
    ('validate', ['DATA', '--checkpoint', 'nope'], '--checkpoint nope does not exist'),
    ('validate', ['DATA', '--checkpoint', 'empty'], r'--checkpoint empty is a folder without files \*\.pth\.tar'),
    ('inference', ['DATA', '--checkpoint', 'DATA'], '--checkpoint DATA is a folder'),
    ('validate', ['DATA', '--real-labels', 'nope'], '--real-labels nope does not exist'),
    ('validate', ['DATA', '--valid-labels', 'nope'], '--valid-labels nope does not exist'),
    ('validate', ['DATA', '--results-file', 'no/x.csv'],
     '--results-file no/x.csv cannot be written: no is not a folder'),
    ('validate', ['DATA', '--results-file', 'DATA'], '--results-file DATA cannot be written: it is a folder'),
    ('inference', ['DATA', '--results-dir', 'file'], '--results-dir file cannot be written'),
    ('validate', ['DATA', '--device', 'xyz'], '--device xyz cannot be used: .* Try --device cpu'),
])
def test_invalid_arguments(here, script, argv, message):
    (here / 'other.txt').write_text('q\n')
    (here / 'broken.yaml').write_text('[1')
    (here / 'typo.yaml').write_text('num_classess: 3\n')
    with guarded_script(script), pytest.raises(TimmSpaError, match=message):
        parse(script, *argv)


@pytest.mark.parametrize(('script', 'argv'), [
    ('validate', ['DATA', '--model', 'all']), ('validate', ['DATA', '--model', 'spa_*']),
    ('validate', ['DATA', '--model', 'file']), ('benchmark', ['--model', 'spa_resnet*']),
    ('validate', ['DATA', '--results-file', 'new.csv']), ('inference', ['DATA', '--results-dir', 'new/folder']),
    ('train', ['DATA', '--output', 'new/folder']), ('train', ['DATA', '--resume', 'auto']),
    ('train', ['DATA', '--device', 'xyz', '--device-modules', 'timm'])])
def test_valid_arguments_are_unchanged(here, script, argv):
    with guarded_script(script):
        guarded = parse(script, *argv, '--num-classes', 4)
    assert vars(guarded) == vars(parse(script, *argv, '--num-classes', 4))


def test_unknown_options_are_refused_by_the_script(here, capsys):
    with guarded_script('train'), pytest.raises(SystemExit, match='2'):
        parse('train', 'nowhere', '--bogus')
    assert 'unrecognized arguments: --bogus' in capsys.readouterr().err


def test_pretrained_path_implies_pretrained(here, checkpoints):
    """timm's script ignores --pretrained-path without --pretrained."""
    with guarded_script('train'):
        assert parse('train', 'DATA', '--pretrained-path', checkpoints / 'model_best.pth.tar').pretrained
    with guarded_script('train'):
        assert not parse('train', 'DATA').pretrained


def test_cuda_devices(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with guarded_script('validate'):
        assert parse('validate', 'DATA', '--device', 'cuda:1').device == 'cuda:1'
    with guarded_script('validate'), pytest.raises(TimmSpaError, match=(
            r'--device cuda:2 cannot be used: torch .* finds 2 CUDA devices\. Try --device cpu')):
        parse('validate', 'DATA', '--device', 'cuda:2')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for script in ('train', 'validate', 'benchmark'):
        with guarded_script(script), pytest.raises(TimmSpaError, match=r'finds 0 CUDA devices\. Try --device cpu'):
            parse(script, *(['DATA'] if script != 'benchmark' else []), '--device', 'cuda', '--device-modules', 'timm')


def test_checkpoints_of_a_run_are_not_overwritten(here):
    argv = ['DATA', '--output', 'runs', '--experiment', 'one']
    (here / 'runs' / 'one').mkdir(parents=True)
    for name in ('tmp.pth.tar', 'recovery-0-5.pth.tar', 'log.txt'):  # a run that was killed in its first epoch
        (here / 'runs' / 'one' / name).touch()
    with guarded_script('train'):
        parse('train', *argv)
    (here / 'runs' / 'one' / 'last.pth.tar').touch()
    (here / 'other').mkdir()
    (here / 'other' / 'last.pth.tar').touch()
    for more in ([], ['--resume', 'other/last.pth.tar']):
        with guarded_script('train'), pytest.raises(TimmSpaError, match=(
                r'runs/one has checkpoints of an earlier training \(last\.pth\.tar\), '
                r'.* --resume runs/one/last\.pth\.tar')):
            parse('train', *argv, *more, '--num-classes', 4)
    for more in (['--resume', here / 'runs' / 'one' / 'last.pth.tar'], ['--resume', 'auto']):
        with guarded_script('train'):
            parse('train', *argv, *more, '--num-classes', 4)
    with guarded_script('train'):
        parse('train', 'DATA', '--output', 'runs/one')  # a new folder in it


@pytest.mark.parametrize(('script', 'kwargs', 'message'), [
    ('train', dict(model_name='spa_resnet5'), "Unknown model 'spa_resnet5'. Did you mean spa_resnet50"),
    ('train', dict(model_name=MODEL, basee=1), "'spa_mobilenetv2_cifar' cannot be created: .*'basee'"),
    ('validate', dict(model_name=f'{MODEL}.nope'), r'Invalid pretrained tag \(nope\)'),
    ('train', dict(model_name='resnet18', pretrained=True, pretrained_cfg_overlay=dict(file='file')),
     'file cannot be read as weights'),
    ('inference', dict(model_name=MODEL, num_classes=3, checkpoint_path='{best}'), '4 classes .* has 3'),
    ('train', dict(model_name=MODEL, num_classes=3, checkpoint_path='{best}'),
     'Use --pretrained-path for weights of other classes'),
    ('inference', dict(model_name='resnet18', num_classes=4, checkpoint_path='{best}'), 'does not fit ResNet; tensors'),
    ('inference', dict(model_name=MODEL, num_classes=4, checkpoint_path='{cut}'), 'a truncated file of torch.save'),
])
def test_models_that_cannot_be_created(best, script, kwargs, message):
    cut = best.parent / 'cut.pth.tar'
    cut.write_bytes(best.read_bytes()[:50_000])
    kwargs = {k: v.format(best=best, cut=cut) if isinstance(v, str) else v for k, v in kwargs.items()}
    with guarded_script(script), pytest.raises(TimmSpaError, match=message):
        timm.models.create_model(kwargs.pop('model_name'), **kwargs)


def test_checkpoints_that_cannot_be_loaded(best):
    with guarded_script('validate'):
        model = timm.models.create_model(MODEL, num_classes=4)
        timm.models.load_checkpoint(model, str(best))
        with pytest.raises(TrainingError, match='has 4 classes .* but the model has 5'):
            timm.models.load_checkpoint(timm.models.create_model(MODEL, num_classes=5), str(best))
    with guarded_script('train'):
        task = timm.task.ClassificationTask(model, torch.nn.CrossEntropyLoss())
        assert timm.task.resume_task_checkpoint(task, str(best)) == 0
        optimizer = torch.optim.SGD(model.parameters(), lr=1)
        content = torch.load(best, weights_only=False)
        torch.save(dict(content, optimizer=dict(state={}, param_groups=[])), best.parent / 'x')
        with pytest.raises(TrainingError, match='x cannot be loaded: .*parameter group'):
            timm.task.resume_task_checkpoint(task, str(best.parent / 'x'), optimizer)
        task = timm.task.ClassificationTask(timm.create_model('resnet18'), torch.nn.CrossEntropyLoss())
        with pytest.raises(TrainingError, match='does not fit ResNet'):
            timm.task.resume_task_checkpoint(task, str(best))


def test_timm_is_left_unchanged():
    before = [argparse.ArgumentParser.parse_known_args, timm.data.create_dataset, timm.models.create_model,
              timm.models.load_checkpoint, timm.task.resume_task_checkpoint, timm.utils.AverageMeter]

    def now():
        return [argparse.ArgumentParser.parse_known_args, timm.data.create_dataset, timm.models.create_model,
                timm.models.load_checkpoint, timm.task.resume_task_checkpoint, timm.utils.AverageMeter]

    with guarded_script('train'):
        during = now()
    assert all(ours is not timms for ours, timms in zip(during, before, strict=True))
    assert now() == before
    with pytest.raises(KeyError), guarded_script('train'):
        raise KeyError
    assert now() == before
    with guarded_script('validate'):
        assert timm.utils.AverageMeter is before[-1], 'validate.py may report any loss'
