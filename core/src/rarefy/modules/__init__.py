"""Architectures as plain data: which classes there are, how a model differs from its base, and the way back."""

from rarefy.modules.construction import build
from rarefy.modules.difference import describe
from rarefy.modules.kinds import register_module
from rarefy.modules.skeleton import Base, as_base

__all__ = ["Base", "as_base", "build", "describe", "register_module"]
