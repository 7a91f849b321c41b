# SPDX-License-Identifier: Apache-2.0
"""The site: ``sphinx-build -W --keep-going -b html docs site`` with the extra ``docs``."""

import warnings
from html import escape
from importlib.metadata import version as installed_version

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = "anomalib-fractalad"
author = "The anomalib-fractalad authors"
project_copyright = "The anomalib-fractalad authors, Apache-2.0"
version = release = installed_version("anomalib-fractalad")

warnings.filterwarnings("ignore", category=FutureWarning, module=r"(anomalib|timm)\.")  # not this site's doing

warnings.filterwarnings("ignore", category=FutureWarning, module=r"(anomalib|timm)\.")  # not this site's doing

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["drawings"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # the same names as on GitHub, so that links hold in both places

toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(_mathml(node.astext()))
    raise nodes.SkipNode


def _block(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="equation">{_mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def _mathml(tex: str, *, as_block: bool = False) -> str:
    """Browsers draw MathML by themselves: pages need no script from elsewhere."""
    return str(tex2mathml(tex, as_block=as_block)).replace("<math", f'<math aria-label="{escape(tex)}"', 1)


def setup(app: Sphinx) -> None:
    """Have docutils write the equations."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
