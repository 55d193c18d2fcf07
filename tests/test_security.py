"""No verb of `timm-spa` runs a pickle: every place where a verb reads weights is tried."""
import json
import pickle
import shutil

import pytest
import torch
from coco_files import write_rectangles
from published import CARDS

import timm_spa_cli
from timm_spa.detection import retinanet, save_detector
from timm_spa.predict import sample_image

MODEL = 'spa_mobilenetv2_050'
WITHOUT_WEIGHTS = {'list', 'demo', 'recipes', 'with'}  # verbs that read only the shipped weights, or none


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, 'w')


def zipped(payload, path):
    torch.save(dict(state_dict=payload), path)


def legacy(payload, path):
    torch.save(dict(state_dict=payload), path, _use_new_zipfile_serialization=False)


def bare(payload, path):
    path.write_bytes(pickle.dumps(payload))


KINDS = (zipped, legacy, bare)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def plant(request, tmp_path):
    """Writes a pickle that creates the file `plant.marker` if it runs."""
    def write(path):
        path.parent.mkdir(exist_ok=True, parents=True)
        request.param(Payload(tmp_path / 'marker'), path)
        return path

    write.marker = tmp_path / 'marker'
    return write


def checkpoint(*arguments):
    """Returns a function for the arguments of a verb with --model and --checkpoint."""
    def build(plant, folder):
        return [*arguments, '--model', MODEL, '--checkpoint', plant(folder / 'best.pth.tar')]

    return build


def local_dir(verb, *arguments):
    """Returns a function for the arguments of a verb that loads a model from a folder."""
    def build(plant, folder):
        plant(folder / 'pytorch_model.bin')
        (folder / 'config.json').write_text(json.dumps(dict(
            architecture=MODEL, num_classes=1000, pretrained_cfg=dict(input_size=[3, 224, 224]))))
        return [verb, *arguments, f'local-dir:{folder}']

    return build


def convert(plant, folder):
    return ['convert', plant(folder / 'best.pth'), folder / 'out.safetensors', '--model', MODEL]


def convert_by_another_name(plant, folder):
    return ['convert', plant(folder / 'best.safetensors'), folder / 'out.safetensors', '--model', MODEL]


def publish(plant, folder):
    return ['publish', plant(folder / 'best.pth'), '--model', f'{MODEL}.mine', '--dry-run', folder / 'repository']


def repository(folder, plant, name):
    shutil.copytree(CARDS, folder, dirs_exist_ok=True)
    (folder / 'card.yaml').write_text(
        'license: apache-2.0\ndataset: {name: Things}\n'
        f'widget: [{{src: "https://example.org/a.jpg", picture: "{PHOTOGRAPH}"}}]\n')
    plant(folder / name)
    return folder


def verify(plant, folder):
    return ['verify', repository(folder, plant, 'model.safetensors')]


def verify_next_to_weights(plant, folder):
    return ['verify', repository(folder, plant, 'pytorch_model.bin')]


def card(plant, folder):
    return ['card', repository(folder, plant, 'model.safetensors')]


def detector(plant, folder):
    save_detector(
        retinanet(MODEL, num_classes=2, pretrained_backbone=False), folder / 'detector',
        [dict(id=1, name='a'), dict(id=2, name='b')])
    plant(folder / 'detector' / 'model.safetensors')
    return folder / 'detector'


def detect_eval(plant, folder):
    data = write_rectangles(folder / 'data', count=2, size=64)
    return ['detect', 'eval', detector(plant, folder), '--images', data / 'val', '--annotations', data / 'val.json']


def detect_predict(plant, folder):
    return ['detect', 'predict', PHOTOGRAPH, '--checkpoint', detector(plant, folder), '--out', folder / 'out']


def train(folder, *arguments):
    data = write_rectangles(folder / 'data', count=2, size=64)
    return [
        'detect', 'train', '--data', data, '--model', MODEL, '--device', 'cpu', '--output', folder / 'run', *arguments]


def detect_train(plant, folder):
    return train(folder, '--pretrained-path', plant(folder / 'best.pth'))


def detect_resume(plant, folder):
    plant(folder / 'run' / 'training_state.safetensors')
    return train(folder, '--resume')


def bench(plant, folder):
    return ['bench', f'{MODEL} checkpoint_path={plant(folder / "best.pth")}', '--rounds', '2', '--img-size', '32']


PHOTOGRAPH = str(sample_image('chelsea'))
CASES = {
    'convert': convert,
    'convert-by-another-name': convert_by_another_name,
    'publish': publish,
    'verify': verify,
    'verify-next-to-weights': verify_next_to_weights,
    'card': card,
    'predict': checkpoint('predict', PHOTOGRAPH),
    'predict-folder': local_dir('predict', PHOTOGRAPH, '--model'),
    'explain-cam': checkpoint('explain', 'cam', PHOTOGRAPH),
    'explain-gates': checkpoint('explain', 'gates', PHOTOGRAPH),
    'explain-scales': checkpoint('explain', 'scales'),
    'explain-ablate': checkpoint('explain', 'ablate', '--images', str(CARDS)),
    'export': lambda plant, folder: [
        'export', MODEL, folder / 'out.onnx', '--to', 'onnx', '--checkpoint', plant(folder / 'best.pth')],
    'export-folder': lambda plant, folder: [
        *local_dir('export')(plant, folder), folder / 'out.onnx', '--to', 'onnx'],
    'detect-eval': detect_eval,
    'detect-predict': detect_predict,
    'detect-train': detect_train,
    'detect-resume': detect_resume,
    'app': local_dir('app', '--model'),
}


@pytest.mark.quick(20)
@pytest.mark.parametrize('case', CASES)
def test_a_planted_pickle_never_runs(case, plant, tmp_path, capsys):
    arguments = CASES[case](plant, tmp_path / 'planted')
    assert timm_spa_cli.main(list(map(str, arguments))) == 1
    output = capsys.readouterr()
    assert not plant.marker.exists(), 'the pickle was run'
    assert 'bug' not in output.err
    text = output.out + output.err
    assert 'weights' in text or 'pickle' in text or 'state' in output.err


@pytest.mark.slow
def test_bench_runs_no_pickle(plant, tmp_path, capsys):
    """timm reads the file in the process that measures."""
    assert timm_spa_cli.main(list(map(str, bench(plant, tmp_path)))) == 1
    assert not plant.marker.exists()
    assert 'weights_only' in capsys.readouterr().err


def test_the_pickles_would_run(plant, tmp_path):
    """Without protection, so that the tests above can fail."""
    path = plant(tmp_path / 'planted.pth')
    if b'state_dict' in path.read_bytes():
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert plant.marker.exists()


def test_every_verb_is_tried():
    assert {case.partition('-')[0] for case in CASES} | WITHOUT_WEIGHTS | {'bench'} == set(timm_spa_cli.VERBS)

