"""Configuration of Sphinx: `make docs` builds the pages into build/docs."""
from importlib import metadata

project = 'timm_spa'
author = 'timm_spa maintainers'
copyright = 'timm_spa maintainers, Apache-2.0'
version = release = metadata.version('timm_spa')
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.mathjax']
myst_enable_extensions = ['deflist', 'dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 3
html_theme = 'furo'
html_title = f'timm_spa {version}'
exclude_patterns = ['*.ipynb', 'upstream']  # not pages of this project
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
napoleon_google_docstring = True
napoleon_numpy_docstring = False
nitpicky = False
autodoc_mock_imports = ['mmcv', 'mmdet']  # timm_spa.detection.mmdet cannot be imported without compiled operators
# pages show files of the project that are no pages
suppress_warnings = ['myst.xref_missing']
