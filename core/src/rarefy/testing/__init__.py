"""The conformance kit: what every technique, objective and exporter must keep to, first-party or not.

In a plugin's tests, run by pytest:

    class TestMine(TechniqueConformance):
        config = MyConfig(amount=0.5)

or anywhere, `check_technique(MyConfig(amount=0.5))`. A failure names the rule, what was found and how to mend it.
"""

from rarefy.testing.checks import check_exporter, check_objective, check_technique
from rarefy.testing.exporters import ExporterConformance
from rarefy.testing.objectives import ObjectiveConformance
from rarefy.testing.subjects import small_model, small_task
from rarefy.testing.techniques import TechniqueConformance

__all__ = [
    "ExporterConformance", "ObjectiveConformance", "TechniqueConformance", "check_exporter", "check_objective",
    "check_technique", "small_model", "small_task",
]  # fmt: skip
