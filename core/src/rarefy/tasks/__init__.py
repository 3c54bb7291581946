"""Ready tasks."""

from rarefy.tasks.classification import ClassificationTask
from rarefy.tasks.inputs import InputsTask

__all__ = ["ClassificationTask", "InputsTask"]
