"""The page of `timm-spa app`: its computations, its requests, and its display in a browser."""
import contextlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

from timm_spa.explain import ExplainError, app, scale_weights
from timm_spa.predict import ImageError, load_model, sample_image

pytest.importorskip('torchcam', reason='torchcam needs Python 3.11')

ROOT = Path(__file__).parent.parent
SPACE = ROOT / 'hub_cards' / 'space'
COFFEE = sample_image('coffee')


@pytest.mark.parametrize('name', app.SHIPPED)
def test_results_for_an_image(name):
    results = app.look(load_model(name), COFFEE)
    assert len(results.classes) == 5
    assert list(results.classes.values()) == sorted(results.classes.values(), reverse=True)
    assert next(iter(results.classes)).split('-')[0] in results.activation_text
    assert len(results.gates) == 2 * app.BLOCKS
    for image in (results.activation, *(image for image, _ in results.gates)):
        assert len(image.getcolors(1 << 24)) > 20
    blocks = len(scale_weights(load_model(name)))
    assert results.pyramid.count('<tr>') == 1 + blocks
    assert results.pyramid.count('background') == 3 * blocks
    lowest, highest = map(float, re.search(r'from ([\d.]+) .* to ([\d.]+) ', results.gates_text).groups())
    assert lowest < 0.5 < highest


def test_colours_show_the_distance_from_the_limits():
    """The middle of the limits is the middle of the colour map, and cells keep their place."""
    cells = torch.tensor([[0.4, 0.5], [0.5, 0.6]])
    drawn = app._overlay(Image.new('RGB', (32, 32)), cells, 'PuOr', (0.4, 0.6))
    assert drawn.size == (app.SIDE, app.SIDE)
    corners = [drawn.getpixel(xy) for xy in ((0, 0), (app.SIDE - 1, 0), (0, app.SIDE - 1), (app.SIDE - 1,) * 2)]
    assert corners[1] == corners[2]
    assert max(corners[1]) - min(corners[1]) < 5, 'grey: neither orange nor violet'
    assert corners[0][0] > corners[0][2], 'orange'
    assert corners[3][2] > corners[3][1], 'violet'


def test_a_plain_model_without_gates():
    results = app.look(timm.create_model('resnet18').eval(), COFFEE)
    assert results.activation is not None
    assert results.gates == []
    assert results.gates_text in results.pyramid
    assert 'no SPA gates' in results.gates_text


def test_classes_with_the_same_name():
    """ImageNet's cranes, a bird and a machine."""
    model = timm.create_model('mobilenetv2_cifar', num_classes=1000).eval()
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    with torch.no_grad():
        model.classifier.bias[134], model.classifier.bias[517] = 20, 19
    classes = app.look(model, COFFEE).classes
    assert len(classes) == 5
    assert list(classes)[:2] == ['crane (class 134)', 'crane (class 517)']
    assert classes['crane (class 134)'] > classes['crane (class 517)'] > 0.2


def test_requests(tmp_path):
    """Only the offered models are loaded, whatever name a browser sends."""
    show = next(f.fn for f in app.build().fns.values() if f.name == 'show')
    first, second = app.SHIPPED
    tabs = len(app.TABS)
    half = len(app.Results._fields) + tabs
    *cells, column = show({'path': str(COFFEE)}, first, app.NOTHING)
    assert cells[0]
    assert cells[half - 1].replace('\\', '') == f'### {first}'
    assert cells[half:2 * half] == [None] * half
    assert column['visible'] is False
    *cells, column = show({'path': str(COFFEE)}, second, first)
    assert cells[half]
    assert column['visible'] is True
    assert show(None, first, second)[:-tabs] == [None] * 2 * half
    assert show({'path': str(COFFEE)}, 'local-dir:/', 'resnet18')[:-tabs] == [None] * 2 * half
    broken = tmp_path / 'x.jpg'
    broken.write_text('not an image')
    with pytest.raises(Exception, match='holiday.jpg cannot be read as an image') as e:
        show({'path': str(broken), 'orig_name': 'holiday.jpg'}, first, second)
    assert isinstance(e.value.__cause__, ImageError)


def test_invalid_names_and_ports():
    for models in ((), []):
        with pytest.raises(ExplainError, match='at least one name'):
            app.build(models)
    for port in (0, -1, 65536):
        with pytest.raises(ExplainError, match='number from 1 to 65535'):
            app.serve(port=port)


def test_the_space():
    """Files that the Hub reads to build the Space."""
    import gradio

    front = yaml.safe_load((SPACE / 'README.md').read_text().split('---')[1])
    assert front['sdk'] == 'gradio'
    assert front['sdk_version'].split('.')[0] == gradio.__version__.split('.')[0]
    assert len(front['short_description']) <= 60
    assert (SPACE / front['app_file']).exists()
    assert (SPACE / 'requirements.txt').read_text().split() == ['timm_spa[app]']
    assert runpy.run_path(str(SPACE / 'app.py'))['app'] is app


@pytest.fixture
def page(tmp_path):
    """The page in a browser, served by a separate process."""
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if chromium is None:
        pytest.skip('needs chromium: apt-get install chromium')
    from playwright.sync_api import sync_playwright

    temporary = tmp_path / 'tmp'
    temporary.mkdir()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(
            [sys.executable, '-u', '-m', 'timm_spa', 'app', '--port', '7899'], stdout=subprocess.PIPE, text=True,
            env=dict(os.environ, TMPDIR=str(temporary), HF_HUB_OFFLINE='1')))
        stack.callback(server.kill)
        url = re.search(r'http://127.0.0.1:\d+', server.stdout.readline())[0]
        for _ in range(100):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url)
                break
            time.sleep(0.1)
        browser = stack.enter_context(sync_playwright()).chromium.launch(
            executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1280, height=900))
        requested = []
        page.on('request', lambda request: requested.append(request.url))
        page.goto(url)
        page.wait_for_selector('#input_image')
        yield page
        hosts = {address.split('/')[2] for address in requested if address.startswith('http')}
        assert hosts == {url.removeprefix('http://')}, 'no fonts or scripts from other servers'
        browser.close()
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        assert not list(temporary.glob('timm_spa_app*')), 'uploads are removed'


def upload(page, file):
    with page.expect_file_chooser() as chooser:
        page.get_by_label('Drop an image file').click()
    chooser.value.set_files(file)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_in_a_browser(page, tmp_path):
    page.locator('.gallery-item').first.click()
    page.wait_for_selector('#activation1 img')
    assert 'God-Morgon-Red-Grapefruit-Juice' in page.locator('#classes1').inner_text()
    assert not page.locator('#classes2').is_visible()
    box = page.locator('#activation1').bounding_box()
    assert box['y'] + box['height'] < 900, 'the results are visible without scrolling'
    page.get_by_role('tab', name='Pyramid weights').click()
    page.wait_for_selector('#pyramid1 table')
    assert '7x7' in page.locator('#pyramid1').inner_text()
    page.get_by_role('tab', name='Gates').click()
    page.wait_for_selector('#gates1 img')
    assert ', mean' in page.locator('#gates1').inner_text(), 'captions are text'
    page.locator('#second input').click()
    page.get_by_role('option', name=app.SHIPPED[1]).click()
    page.wait_for_selector('#gates2 img')
    page.get_by_role('tab', name='Classes').click()
    page.wait_for_selector('#activation2 img')
    page.get_by_label('Remove Image').click()
    upload(page, str(COFFEE))
    page.wait_for_function("document.querySelector('#classes1').innerText.includes('Beef-Tomato')")
    page.set_viewport_size(dict(width=390, height=844))
    assert page.evaluate('document.documentElement.scrollWidth') <= 390, 'the page fits the width of a phone'
    page.get_by_label('Remove Image').click()
    broken = tmp_path / 'broken.jpg'
    broken.write_text('not an image')
    upload(page, str(broken))
    page.get_by_text('broken.jpg cannot be read as an image.').wait_for()
    page.reload()
    page.wait_for_selector('#input_image')
    huge = tmp_path / 'huge.jpg'
    huge.write_bytes(COFFEE.read_bytes() + bytes(21_000_000))
    upload(page, str(huge))
    page.get_by_text('exceed the maximum allowed size of 20').wait_for()
