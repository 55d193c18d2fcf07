"""Images of every mode that Pillow reads, compared with values computed without Pillow."""
import colorsys
import io
import struct

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_spa.predict import image_reader, image_seen, labelled_batches, picture_reader, picture_seen, predict
from timm_spa.predict.image_files import ImageError, PictureError, image_files, in_eight_bits, read_image

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (255, 255, 255), (0, 0, 0), (119, 119, 119)]
GREY = [0, 1, 60, 127, 128, 254, 255]
GREY_LEVELS = [[value] * 3 for value in GREY]


def row(values, mode):
    """An image of one row, of raw values."""
    values = np.asarray(values, dtype=np.uint8)
    return Image.frombytes(mode, (len(values), 1), values.tobytes())


def lab(colour):
    """CIE L*a*b* with the white point D50, as 8 bits have it: L to 255, a and b as signed bytes."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    to_d50 = [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
    xyz = np.array(to_d50) @ linear / [0.9642, 1., 0.8251]
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return [round((116 * y - 16) * 2.55), round(500 * (x - y)) % 256, round(200 * (y - z)) % 256]


def palette(mode):
    image = row(range(len(COLOURS)), 'P')
    image.putpalette([value for colour in COLOURS for value in colour])
    return image if mode == 'P' else image.convert('PA')


def wide(values, byteorder, mode):
    return Image.frombytes(mode, (len(values), 1), np.asarray(values, dtype=f'{byteorder}u2').tobytes())


def ycbcr(r, g, b):
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return [round(v) for v in (y, min(128 + 0.5 / 0.886 * (b - y), 255), min(128 + 0.5 / 0.701 * (r - y), 255))]


MODES = {
    '1': (lambda: Image.frombytes('1', (8, 1), bytes([0b10110010])), [[255 * int(bit)] * 3 for bit in '10110010']),
    'L': (lambda: row(GREY, 'L'), GREY_LEVELS),
    'LA': (lambda: row([(v, 255) for v in GREY], 'LA'), GREY_LEVELS),
    'La': (lambda: row([(v, 255) for v in GREY], 'La'), GREY_LEVELS),
    'P': (lambda: palette('P'), COLOURS),
    'PA': (lambda: palette('PA'), COLOURS),
    'RGB': (lambda: row(COLOURS, 'RGB'), COLOURS),
    'RGBA': (lambda: row([(*c, 30) for c in COLOURS], 'RGBA'), COLOURS),
    'RGBa': (lambda: row([(*c, 255) for c in COLOURS], 'RGBa'), COLOURS),
    'RGBX': (lambda: row([(*c, 0) for c in COLOURS], 'RGBX'), COLOURS),
    'CMYK': (
        lambda: row([(0, 255, 255, 0), (0, 0, 0, 0), (0, 0, 0, 255), (55, 155, 205, 0), (0, 0, 0, 128)], 'CMYK'),
        [(255, 0, 0), (255, 255, 255), (0, 0, 0), (200, 100, 50), (127, 127, 127)]),
    'YCbCr': (lambda: row([ycbcr(*c) for c in COLOURS], 'YCbCr'), COLOURS),
    'LAB': (lambda: row([lab(c) for c in COLOURS[3:]], 'LAB'), COLOURS[3:]),
    'HSV': (
        lambda: row([[round(v * 255) for v in colorsys.rgb_to_hsv(*(c / 255 for c in colour))] for colour in COLOURS],
                    'HSV'), COLOURS),
    'I': (lambda: Image.fromarray(np.array([GREY], dtype=np.int32) * 257), GREY_LEVELS),
    'I;16': (lambda: wide(np.array(GREY) * 257, '<', 'I;16'), GREY_LEVELS),
    'I;16L': (lambda: wide(np.array(GREY) * 257, '<', 'I;16L'), GREY_LEVELS),
    'I;16B': (lambda: wide(np.array(GREY) * 257, '>', 'I;16B'), GREY_LEVELS),
    'I;16N': (lambda: wide(np.array(GREY) * 257, '=', 'I;16N'), GREY_LEVELS),
}
TOLERANCE = {'YCbCr': 2, 'HSV': 3, 'LAB': 2}  # modes that round colours


@pytest.mark.parametrize('mode', MODES)
def test_every_mode(mode):
    make, expected = MODES[mode]
    image = make()
    assert image.mode == mode
    values = np.asarray(in_eight_bits(image).convert('RGB'))[0].astype(int)
    assert np.abs(values - np.array(expected)).max() <= TOLERANCE.get(mode, 0)
    luma = np.array(expected) @ [0.299, 0.587, 0.114]
    assert np.abs(np.asarray(in_eight_bits(image).convert('L'))[0] - luma).max() <= TOLERANCE.get(mode, 0) + 1


@pytest.mark.parametrize(('values', 'message'), [
    ([0., 1.], 'floating-point numbers, and the file does not define which value is white. Save it with 8 or 16 bits'),
    ([0., float('nan')], 'floating-point'),
    ([float('inf'), 255.], 'floating-point'),
    ([0, 2 ** 31 - 1], 'integers of 32 bits from 0 to 2147483647, and the file does not define which value is white'),
    ([-1, 100], 'from -1 to 100'),
    ([0, 65536], 'from 0 to 65536'),
    ([0, 255], 'from 0 to 255'),
])
def test_values_without_a_white_level(values, message, tmp_path):
    """The image is refused instead of being read as white, black or clipped."""
    dtype = np.float32 if isinstance(values[0], float) else np.int32
    Image.fromarray(np.array([values], dtype=dtype)).save(tmp_path / 'wide.tiff')
    with pytest.raises(ImageError, match=message):
        read_image(tmp_path / 'wide.tiff', 'RGB')


def tiff(values, bits, photometric=1):
    """A TIFF file of one row of grey values, with a number of bits that Pillow does not write."""
    if bits == 16:
        data = np.array(values, dtype='<u2').tobytes()
    else:
        packed = ''.join(f'{value:0{bits}b}' for value in values)
        packed = packed.ljust(-(-len(packed) // 8) * 8, '0')
        data = int(packed, 2).to_bytes(len(packed) // 8, 'big')
    entries = {
        256: len(values), 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    offset = 8 + len(data)
    directory = b''.join(
        struct.pack('<HHII', tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b'II*\x00' + struct.pack('<I', offset) + data + struct.pack('<H', len(entries)) + directory + bytes(4)


@pytest.mark.parametrize(('content', 'expected'), [
    (tiff([0, 65535, 25700], 16), [0, 255, 100]),
    (tiff([0, 65535, 25700], 16, photometric=0), [255, 0, 155]),
    (tiff([0, 4095, 1606], 12), [0, 255, 100]),
    (b'P5 2 1 1023\n' + struct.pack('>HH', 1023, 401), [255, 100]),
    (b'P5 2 1 65535\n' + struct.pack('>HH', 200, 257), [1, 1]),
], ids=['16 bits', 'white is zero', '12 bits', '10 bits', 'dark'])
def test_files_of_more_than_8_bits(content, expected):
    assert np.asarray(read_image(io.BytesIO(content), 'L')).tolist() == [expected]


def test_an_image_of_16_bits_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257 * 40
    Image.fromarray(values).save(tmp_path / 'phone.png', exif=exif)
    assert np.asarray(read_image(tmp_path / 'phone.png', 'L')).tolist() == [[120, 0], [160, 40], [200, 80]]


def test_earlier_names_still_work():
    assert PictureError is ImageError
    assert picture_reader is image_reader
    assert picture_seen is image_seen


def test_a_single_path(tmp_path):
    Image.new('L', (4, 4)).save(tmp_path / 'a.png')
    for path in (tmp_path, str(tmp_path), [tmp_path]):
        assert list(image_files(path)) == [tmp_path / 'a.png']


def test_16_bits_in_an_image_folder(tmp_path):
    """Accuracy is measured on the images that `predict` sees. A broken image is named, and not replaced by another."""
    grey = np.tile(np.arange(0, 240, 6, dtype=np.uint16), (40, 1))
    for name, values in (('eight', grey.astype(np.uint8)), ('sixteen', grey * 257)):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / 'a.png')
    model = timm.create_model('mobilenetv2_cifar', num_classes=2).eval()
    (batch, target), = labelled_batches(model, tmp_path, 'test', 2)[0]
    assert target.tolist() == [0, 1]
    assert torch.equal(batch[0], batch[1])
    assert batch.std() > 0.5
    (tmp_path / 'sixteen' / 'b.png').write_bytes(b'')
    with pytest.raises(ImageError, match=r'sixteen/b\.png could not be read: .*Replace or remove it'):
        list(labelled_batches(model, tmp_path, 'test', 2)[0])


def test_probabilities_are_a_softmax(tmp_path):
    """The probabilities sum to one, and their ratios are the ratios of the exponentials."""
    Image.new('RGB', (32, 32), (200, 50, 90)).save(tmp_path / 'a.png')
    model = timm.create_model('mobilenetv2_cifar', num_classes=3).eval()
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0., 3., -2.])
    classes = next(predict(model, tmp_path / 'a.png')).classes
    weights = np.exp([3., 0., -2.])
    assert [c['index'] for c in classes] == [1, 0, 2]
    assert [c['probability'] for c in classes] == pytest.approx(weights / weights.sum(), abs=1e-6)
