"""Ready tasks."""

from rarefy.tasks.classification import ClassificationTask

__all__ = ["ClassificationTask"]
