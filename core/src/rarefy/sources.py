"""The schemes of references that core provides."""

from __future__ import annotations

from typing import ClassVar, Literal

from rarefy_schemas import SourceConfig


class Zoo(SourceConfig):
    """Small standard networks, without trained weights."""

    implementation: ClassVar[str] = "rarefy.zoo.source:ZooSource"
    scheme: Literal["zoo"] = "zoo"


class Data(SourceConfig):
    """Classification tasks over data sets that ship inside packages or lie in a folder."""

    implementation: ClassVar[str] = "rarefy.tasks.source:DataSource"
    scheme: Literal["data"] = "data"


SOURCES: list[type[SourceConfig]] = [Zoo, Data]
