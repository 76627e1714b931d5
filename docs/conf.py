"""Sphinx's settings: the guides are Markdown, the notebooks are pages, the reference is made of the docstrings."""

from importlib.metadata import version as version_of

project = "kd_lightning"
copyright = "the authors of kd_lightning"
release = version = version_of("kd_lightning")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = project
exclude_patterns = ["_build"]
nb_execution_mode = "off"  # the tests run the notebooks
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
