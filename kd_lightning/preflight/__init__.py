"""A look at a run before it starts: a few batches, and a verdict on each thing that goes wrong silently.

``facts.py`` measures, ``costs.py`` times the teacher, ``verdicts.py`` judges, ``report.py`` is what comes out.
"""

from kd_lightning.preflight.check import check
from kd_lightning.preflight.report import Line, Report, Verdict

__all__ = ["Line", "Report", "Verdict", "check"]
