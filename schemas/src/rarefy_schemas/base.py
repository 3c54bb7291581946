"""The common parent of every schema."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict

Json = str | int | float | bool | None | list[Any] | dict[str, Any]


class Schema(BaseModel):
    """A frozen record that refuses unknown fields and non-finite numbers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        ser_json_inf_nan="strings",
        use_attribute_docstrings=True,
    )


class Noun(Schema):
    """The torch-free half of something a plugin registers: its name, its options, and where its code is.

    The `Literal` of the field called `noun` is the only place where the name is written. The code is imported from
    `implementation` (`"package.module:Class"`) when a run needs it, so that listing and validating never load torch.
    """

    noun: ClassVar[str] = ""
    implementation: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    @classmethod
    def registered_name(cls) -> str:
        """Return the name written in the `Literal` discriminator; raise `TypeError` when there is none."""
        field = cls.model_fields.get(cls.noun)
        if field is None or get_origin(field.annotation) is not Literal:
            raise TypeError(f'{cls.__name__} needs a field `{cls.noun}: Literal["its-name"]`')
        names = get_args(field.annotation)
        if len(names) != 1:
            raise TypeError(f"{cls.__name__}.{cls.noun} must be a Literal with exactly one name, not {names}")
        return str(names[0])

    @classmethod
    def summary(cls) -> str:
        """Return the first sentence of the docstring."""
        return (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").strip()
