"""`timm-spa detect`: trains, evaluates and runs object detectors."""
import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

from timm_spa_cli._options import add_renamed_option, positive
from timm_spa_cli._table import distinct, print_table, printable

HELP = "detect objects: train RetinaNet or Cascade R-CNN on a dataset in COCO's format, evaluate, draw boxes"
EXAMPLES = (
    'timm-spa detect train --data DATA --detector retinanet --model spa_resnet50 --pretrained --output runs/first',
)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f'must be at least 0, got {number}')
    return number


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f'must be a number above 0, got {text}')
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='WHAT')

    def add(name: str, about: str) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, help=about, description=f'{about[0].upper()}{about[1:]}.')
        kind.set_defaults(error=kind.error)
        return kind

    train = add('train', 'train a detector; for several GPUs, start it with `accelerate launch --module timm_spa`')
    train.add_argument('--data', metavar='DIR', help='dataset: train2017, val2017 and annotations, or train and val')
    for split, images in (('train', 'training'), ('val', 'validation')):
        train.add_argument(f'--{split}-images', metavar='DIR', help=f'without --data: folder of the {images} images')
        add_renamed_option(
            train, f'--{split}-annotations', f'--{split}-json', metavar='FILE',
            help="without --data: their annotations, COCO's format")
    train.add_argument(
        '--detector', default='retinanet', choices=('retinanet', 'cascade_rcnn'), help='default: %(default)s')
    train.add_argument('--model', default='spa_resnet50', help='backbone, any CNN of timm (default: %(default)s)')
    train.add_argument('--model-kwargs', default='{}', metavar='JSON', help='arguments of the backbone: {"base": ...}')
    train.add_argument(
        '--detector-kwargs', default='{}', metavar='JSON',
        help='arguments of the detector, e.g. {"batch_size_per_image": 128}')
    start = train.add_mutually_exclusive_group()
    start.add_argument('--pretrained', action='store_true', help="start from the backbone's published weights")
    start.add_argument(
        '--pretrained-path', metavar='FILE', help='start from weights of the backbone or of its plain model')
    train.add_argument(
        '--trainable-layers', type=_count, default=3, help='number of trainable stages, from the end (default: 3)')
    train.add_argument('--epochs', type=positive, default=24, help='default: %(default)s')
    train.add_argument('--decay-epochs', type=_count, nargs='+', metavar='N', help='default: 18 22 of 24')
    train.add_argument('--batch-size', type=positive, default=2, help='images per step and process (default: 2)')
    train.add_argument('--lr', type=_above_zero, help="default: the paper's, scaled to the batch size")
    train.add_argument('--warmup-steps', type=_count, help='default: 500, at most one epoch')
    train.add_argument('--clip-grad', type=_above_zero, metavar='NORM', help='maximum norm of the gradient')
    train.add_argument('--mixed-precision', default='no', choices=('no', 'bf16', 'fp16'), help='default: %(default)s')
    train.add_argument(
        '--min-size', type=positive, default=800, help='length of the shorter side in pixels (default: 800)')
    train.add_argument(
        '--max-size', type=positive, default=1333, help='maximum length of the longer side (default: 1333)')
    train.add_argument('--output', required=True, metavar='DIR', help='folder of the run')
    train.add_argument('--resume', action='store_true', help='resume the run in --output, if it contains one')
    train.add_argument(
        '--overwrite', action='store_true', help='replace files in --output that are not from a run of a detector')
    train.add_argument('--seed', type=_count, default=42, help='default: %(default)s')
    evaluate = add('eval', "print COCO's twelve figures for a detector")
    evaluate.add_argument('checkpoint', help='folder of the checkpoint, or hf-hub:ORG/NAME')
    evaluate.add_argument('--images', required=True, metavar='DIR', help='folder of the images')
    add_renamed_option(evaluate, '--annotations', '--json', required=True, metavar='FILE', help="in COCO's format")
    add_renamed_option(
        evaluate, '--out', '--results', metavar='FILE', help="write the detections here, in COCO's results format")
    evaluate.add_argument('--overwrite', action='store_true', help='replace an existing file of --out')
    evaluate.add_argument('--batch-size', type=positive, default=8, help='images per batch (default: %(default)s)')
    predict = add('predict', 'draw the detections of one or more detectors side by side')
    predict.add_argument('images', nargs='+', metavar='IMAGE', help='image, or folder of images')
    predict.add_argument(
        '--checkpoint', nargs='+', required=True, metavar='DIR', help='folders of checkpoints, or hf-hub:ORG/NAME')
    predict.add_argument('--out', required=True, metavar='DIR', help="for images, and JSON in COCO's results format")
    predict.add_argument(
        '--overwrite', action='store_true', help='replace files in --out that an earlier call did not write')
    predict.add_argument('--score', type=float, default=0.3, help='lowest score to draw (default: %(default)s)')
    for kind in (train, evaluate):
        kind.add_argument(
            '--workers', type=_count, default=2, help='number of processes that read images (default: %(default)s)')
    for kind in (train, evaluate, predict):
        kind.add_argument(
            '--device', default='auto', choices=('auto', 'cpu', 'cuda'), help='default: a GPU if available')


def run(args: argparse.Namespace) -> int:
    """Runs the verb and returns the exit code."""
    try:
        import torchvision  # noqa: F401
    except ImportError as e:
        from timm_spa._errors import TimmSpaError

        raise TimmSpaError(f'Detection needs torchvision: pip install "timm_spa[detection]" ({e}).') from e
    return {'train': _train, 'eval': _eval, 'predict': _predict}[args.kind](args)


def _device(args: argparse.Namespace) -> str:
    import torch

    available = torch.cuda.is_available()
    if args.device == 'cuda' and not available:
        args.error('argument --device: torch does not find a GPU. Use cpu, or install torch with CUDA')
    return 'cuda' if available and args.device != 'cpu' else 'cpu'


def _mapping(args: argparse.Namespace, name: str) -> Dict[str, Any]:
    try:
        value = json.loads(getattr(args, name))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        args.error(f'argument --{name.replace("_", "-")}: must be a JSON object, e.g. {{"name": 1}}')
    return value


def _train(args: argparse.Namespace) -> int:
    import torch

    from timm_spa.detection.data import CocoDataset, find_dataset
    from timm_spa.detection.models import create_detector
    from timm_spa.detection.train import STATE, Settings, train

    paths = (args.train_images, args.train_annotations, args.val_images, args.val_annotations)
    if args.data and any(paths) or not args.data and not all(paths):
        args.error(
            'name a dataset by --data, or all of --train-images, --train-annotations, --val-images and '
            '--val-annotations')
    model_kwargs, detector_kwargs = _mapping(args, 'model_kwargs'), _mapping(args, 'detector_kwargs')
    resumes = args.resume and (Path(args.output) / STATE).exists()
    if not resumes and not args.overwrite:
        _refuse_output(Path(args.output))
    images, file, val_images, val_file = (
        [*find_dataset(args.data, 'train'), *find_dataset(args.data, 'val')] if args.data else paths)
    train_set = CocoDataset(images, file)
    val_set = CocoDataset(val_images, val_file, categories=train_set.categories)
    _report(train_set.describe(), val_set.describe())
    arguments: Dict[str, Any] = dict(
        detector=args.detector, backbone=args.model, num_classes=len(train_set.categories),
        pretrained_backbone=False if resumes else args.pretrained_path or args.pretrained,
        trainable_layers=args.trainable_layers, min_size=args.min_size, max_size=args.max_size,
        backbone_kwargs=model_kwargs)
    duplicate = sorted(arguments.keys() & detector_kwargs.keys())
    if duplicate:
        args.error(f'argument --detector-kwargs: {", ".join(duplicate)}: set by another option, or by the dataset')
    torch.manual_seed(args.seed % 2 ** 32)
    model = create_detector(**arguments, **detector_kwargs)
    settings = Settings(
        args.epochs, args.batch_size, args.lr, args.decay_epochs and tuple(args.decay_epochs), args.warmup_steps,
        clip_grad=args.clip_grad, mixed_precision=args.mixed_precision, seed=args.seed)
    interactive = sys.stderr.isatty()
    train(
        model, train_set, val_set, args.output, settings, args.resume, _device(args) == 'cpu', args.workers,
        log=lambda line: _report(f'\r\033[K{line}' if interactive else line),
        progress=(lambda line: print(f'\r\033[K{line}', end='', file=sys.stderr, flush=True)) if interactive else None)
    return 0


def _refuse_output(folder: Path) -> None:
    """Refuses to train into a folder with files that are not from a run of a detector."""
    from timm_spa.checkpoints.own_files import refuse_replacing
    from timm_spa.checkpoints.run_arguments import read_arguments
    from timm_spa.checkpoints.run_files import RunError
    from timm_spa.detection.checkpoint import CONFIG, WEIGHTS, is_own
    from timm_spa.detection.train import SUMMARY

    def is_from_run(path: Path) -> bool:
        try:
            return {'detector', 'settings'} <= read_arguments(folder).keys()
        except RunError:
            return False

    refuse_replacing((folder / name for name in ('args.yaml', SUMMARY)), is_own=is_from_run)
    for checkpoint in (folder / 'best', folder / 'last'):
        refuse_replacing((checkpoint / name for name in (WEIGHTS, CONFIG)), is_own(checkpoint))


def _eval(args: argparse.Namespace) -> int:
    from timm_spa.checkpoints.files import replacing
    from timm_spa.checkpoints.own_files import refuse_replacing
    from timm_spa.detection import load_detector
    from timm_spa.detection.data import CocoDataset
    from timm_spa.detection.evaluate import coco_figures, coco_results, detect

    if args.out:
        refuse_replacing([args.out], args.overwrite)
    model = load_detector(args.checkpoint, _device(args))
    dataset = CocoDataset(args.images, args.annotations, categories=model.categories)
    _report(dataset.describe())
    detections = detect(model, dataset, args.batch_size, args.workers)
    if args.out:
        category_ids = [category['id'] for category in dataset.categories]
        with replacing(args.out) as partial:
            results = coco_results(detections.values(), dataset.image_ids, category_ids)
            partial.write_text(json.dumps(results), encoding='utf-8')
    figures = coco_figures(dataset, detections)
    cells = [(name, '-' if math.isnan(value) else f'{value:.1f}') for name, value in figures.items()]
    print_table([('figure', '%'), *cells], right_aligned=(1,))
    if args.out:
        print(f'\nWrote {args.out}.')
    return 0


def _predict(args: argparse.Namespace) -> int:
    import torch

    from timm_spa.checkpoints.files import replacing
    from timm_spa.checkpoints.own_files import is_own_figure, png_mark, refuse_replacing
    from timm_spa.detection import DetectionError, load_detector
    from timm_spa.detection.data import read_image
    from timm_spa.detection.draw import draw_detections, side_by_side
    from timm_spa.detection.evaluate import coco_results
    from timm_spa.detection.models import check_image_size

    device, out = _device(args), Path(args.out)
    titles = _titles([Path(source) for source in args.checkpoint])
    models = {title: load_detector(source, device) for title, source in zip(titles, args.checkpoint, strict=True)}
    results: Dict[str, List[Dict[str, Any]]] = {title: [] for title in models}
    images = _images_to_read(args.images, out)
    targets = [out / f'{stem}-boxes.png' for stem in distinct([Path(path).stem for path in images])]
    written = {os.path.realpath(target) for target in targets}
    replaced = [path for path in images if os.path.realpath(path) in written]
    if replaced:
        raise DetectionError(f'{replaced[0]} would be replaced by an image with boxes. Name another folder by --out.')
    refuse_replacing(targets, args.overwrite, is_own_figure)
    refuse_replacing((out / f'{title}.json' for title in models), args.overwrite, _is_own_result)
    out.mkdir(parents=True, exist_ok=True)
    code, done = 0, []
    names = [Path(path).name for path in images]
    for path, name, target in zip(images, names, targets, strict=True):
        try:
            image = read_image(path)
            for model in models.values():
                check_image_size(model, image.shape[-1], image.shape[-2], path)
        except DetectionError as e:
            print(f'timm-spa: {e}', file=sys.stderr)
            code = 1
            continue
        panels = {}
        for title, model in models.items():
            with torch.inference_mode():
                detection = {key: value.cpu() for key, value in model([image.to(device).float() / 255])[0].items()}
            image_id = name if names.count(name) == 1 else path
            results[title] += coco_results([detection], [image_id], [c['id'] for c in model.categories])
            panels[title] = draw_detections(image, detection, [c['name'] for c in model.categories], args.score)
            count = int((detection['scores'] >= args.score).sum())
            print(f'{path}: {count} objects{f" by {title}" if len(models) > 1 else ""}')
        canvas = side_by_side(panels) if len(panels) > 1 else next(iter(panels.values()))
        with replacing(target) as partial:
            canvas.save(partial, format='png', pnginfo=png_mark())
        done.append(target.name)
    for title, detections in results.items():
        with replacing(out / f'{title}.json') as partial:
            partial.write_text(json.dumps(detections, indent=1), encoding='utf-8')
        done.append(f'{title}.json')
    print(printable(f'Wrote {out}: {", ".join(done)}.'))
    return code


def _titles(checkpoints: Sequence[Path]) -> List[str]:
    """Returns a different title for each checkpoint: its folder, with the run's folder for 'best' and 'last'."""
    return distinct([
        f'{path.resolve().parent.name}-{path.name}' if path.name in ('best', 'last') else path.resolve().name
        for path in checkpoints])


def _images_to_read(paths: Sequence[str], out: Path) -> List[str]:
    """Returns the images among files and folders. Results of an earlier call in a folder are left out."""
    from timm_spa.detection import DetectionError
    from timm_spa.predict import image_files

    def is_result(path: Path) -> bool:
        return path.name.endswith('-boxes.png') and path.parent.resolve() == out.resolve()

    images = [str(path) for path in image_files(paths) if str(path) in paths or not is_result(path)]
    if not images:
        raise DetectionError(f'{paths[0]} contains only images that this command wrote. Name another folder.')
    return images


def _is_own_result(path: Path) -> bool:
    """Returns whether a file starts like the JSON that `_predict` writes, where image ids are file names."""
    from timm_spa.checkpoints.own_files import starts_with

    return any(starts_with(path, text) for text in ('[]', '[\n {\n  "image_id": "'))


def _report(*lines: str) -> None:
    """Prints lines in the first of several processes."""
    if os.environ.get('RANK', '0') == '0':
        for line in lines:
            print(line, file=sys.stderr)
