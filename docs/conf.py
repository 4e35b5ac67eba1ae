"""How Sphinx makes the site of these pages: `sphinx-build -W docs dist/site`."""

from __future__ import annotations

from pygments.lexers.special import TextLexer
from sphinx.highlighting import lexers

import snaporch

lexers["mermaid"] = TextLexer()  # the forges draw it; here it is text
project = "snaporch"
author = "The snaporch developers"
copyright = author  # noqa: A001 - Sphinx's name for it
release = snaporch.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"snaporch {release}"
html_static_path: list[str] = []
html_show_sphinx = False

myst_heading_anchors = 4  # headings are linked to as they are on the forges
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.xref_missing"]  # files of the project that are no pages; a test looks for each of them

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
python_display_short_literal_types = True
