"""Sphinx's settings: the guides are Markdown, the notebooks are pages, the reference is made of the docstrings."""

import shutil
import sys
from importlib.metadata import version as version_of
from pathlib import Path

# Sphinx reads pages below its own folder only, and resolves links
shutil.copytree(Path(__file__).parents[1] / "notebooks", Path(__file__).parent / "notebooks", dirs_exist_ok=True)

sys.path.insert(0, str(Path(__file__).parent))
import cards  # noqa: E402

cards.write(Path(__file__).parent / "policy")

project = "kd_lightning"
copyright = "the authors of kd_lightning"
release = version = version_of("kd_lightning")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
html_theme = "furo"
html_title = project
exclude_patterns = ["_build"]
nb_execution_mode = "auto"  # notebooks are committed without outputs; `.ci/run` leaves this out, its tests run them
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress bars of a terminal; tests run the notebooks with warnings as errors
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
