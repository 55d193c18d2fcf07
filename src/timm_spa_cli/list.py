"""`timm-spa list`: the models, their size and cost, and their weights."""
import argparse

from timm_spa_cli._table import print_table

HELP = 'models, their size and cost, and their weights'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument('filter', nargs='?', default='*', help='wildcard, e.g. "spa_b_*" (default: all)')
    parser.add_argument('--tags', action='store_true', help='every tag of weights, and where they are, instead')
    parser.add_argument('--tables', action='store_true', help="the size and cost columns of the paper's tables instead")


def run(args: argparse.Namespace) -> int:
    """Runs the verb, and returns the exit code."""
    import timm

    import timm_spa
    from timm_spa._errors import TimmSpaError
    from timm_spa.profile import count_cost

    if args.tables:
        return _tables()
    names = timm_spa.list_models(args.filter)
    if not names:
        raise TimmSpaError(f'no model of this package is called {args.filter!r}.')
    if args.tags:
        tagged_rows = [('name for create_model', 'weights')]
        for tagged in (tagged for name in names for tagged in timm.list_pretrained(f'{name}.*')):
            source = timm.get_pretrained_cfg(tagged)
            tagged_rows.append((tagged, 'with the package' if source.file else f'Hub: {source.hf_hub_id}'))
        print_table(tagged_rows)
        return 0
    rows = [('model', 'parameters (M)', 'GMACs', 'input', 'weights')]
    for name in names:
        cost, cfg = count_cost(name), timm.get_pretrained_cfg(name, allow_unregistered=False)
        more = len(timm.list_pretrained(f'{name}.*')) - 1
        rows.append((
            name, f'{cost.parameters / 1e6:.3f}', f'{cost.macs / 1e9:.3f}', 'x'.join(map(str, cfg.input_size[1:])),
            '-' if more < 0 else cfg.tag if more == 0 else f'{cfg.tag}, {more} more'))
    print_table(rows, right_aligned=(1, 2))
    print('\nGMACs: multiply-adds of convolutions and linear layers, 1e9, for one image of the input size.')
    return 0


def _tables() -> int:
    from timm_spa.tables import NOTE, TABLES, table_rows

    for table in TABLES:
        print_table(table_rows(table), right_aligned=range(2, 11))
        print()
    print(NOTE)
    return 0
