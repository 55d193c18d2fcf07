"""Sphinx configuration. `make docs` builds the pages in build/docs."""
import os
from importlib import metadata
from pathlib import Path

from sphinx import addnodes
from sphinx.transforms import SphinxTransform

project = 'timm_spa'
author = 'timm_spa maintainers'
copyright = 'timm_spa maintainers, Apache-2.0'
version = release = metadata.version('timm_spa')
extensions = [
    'myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.mathjax', 'sphinx_design',
    'sphinx-mathjax-offline']  # the last copies MathJax into the pages, so that formulas need no network
myst_enable_extensions = ['deflist', 'dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 3
html_theme = 'furo'
html_title = f'timm_spa {version}'
exclude_patterns = ['*.ipynb', 'upstream']  # the notebook, and texts for timm
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
napoleon_google_docstring = True
napoleon_numpy_docstring = False
nitpicky = False
autodoc_mock_imports = ['mmcv', 'mmdet']  # timm_spa.detection.mmdet requires compiled operators

DOCS = Path(__file__).resolve().parent
# files outside of this folder, and the pages that include them
PAGES = {
    'CHANGELOG.md': 'changelog', 'CODE_OF_CONDUCT.md': 'code_of_conduct', 'CONTRIBUTING.md': 'contributing',
    'SECURITY.md': 'security', 'findings/README.md': 'findings', 'tests/benchmarks/speed.md': 'speed',
    'train_scripts/README.md': 'training', 'train_scripts/results/README.md': 'results'}


class LinksToFiles(SphinxTransform):
    """Resolves links to repository files: to the page that includes the file, or to a copy of it."""

    default_priority = 5

    def apply(self, **kwargs):
        """Replaces the links of a page."""
        for node in list(self.document.findall(addnodes.pending_xref)):
            path = Path(node.source or self.document['source']).parent / node['reftarget']
            path = next((file for file in (path, path.with_name(f'{path.name}.md')) if file.is_file()), None)
            if node.get('reftype') != 'myst' or path is None or DOCS in path.resolve().parents:
                continue
            page = PAGES.get(path.resolve().relative_to(DOCS.parent).as_posix())
            if page:
                node.attributes.update(refdomain='doc', reftarget=page, reftargetid=None)
            else:
                target = os.path.relpath(path, Path(self.env.doc2path(self.env.docname)).parent)
                node.replace_self(addnodes.download_reference('', '', *node.children, reftarget=target))


def setup(app):
    """Registers the transform with Sphinx."""
    app.add_transform(LinksToFiles)
