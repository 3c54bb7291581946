"""Whether steps may follow each other is decided by traits, so an outsider's technique composes with ours."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
from rarefy.errors import RecipeError
from rarefy.order import check_order, conflict
from rarefy_schemas import Finetune, TechniqueConfig, Traits


class Prune(TechniqueConfig):
    """Leaves zeros."""

    traits: ClassVar[Traits] = Traits(makes_zeros=True, needs_dense_floats=True)
    technique: Literal["a/prune"] = "a/prune"


class Share(TechniqueConfig):
    """Leaves codes and keeps zeros."""

    traits: ClassVar[Traits] = Traits(leaves_codes=True, needs_dense_floats=True)
    technique: Literal["b/share"] = "b/share"


class Factorize(TechniqueConfig):
    """Fills zeros."""

    traits: ClassVar[Traits] = Traits(changes_shapes=True, keeps_zeros=False, needs_dense_floats=True)
    technique: Literal["c/factorize"] = "c/factorize"


class Student(TechniqueConfig):
    """Starts anew."""

    traits: ClassVar[Traits] = Traits(new_architecture=True, keeps_zeros=False)
    technique: Literal["d/student"] = "d/student"


class Freeze(TechniqueConfig):
    """Ends training."""

    traits: ClassVar[Traits] = Traits(ends_training=True)
    technique: Literal["e/freeze"] = "e/freeze"


class Plain(TechniqueConfig):
    """Harmless by itself."""

    technique: Literal["f/plain"] = "f/plain"


def test_prune_share_is_the_classic_order() -> None:
    check_order([Prune(), Share()])
    check_order([Student(), Factorize(), Prune(), Share(), Freeze()])


@pytest.mark.parametrize(
    ("steps", "reason", "order"),
    [
        ([Share(), Prune()], "few values", "a/prune, b/share"),
        ([Prune(), Factorize()], "would fill them again", "c/factorize, a/prune"),
        ([Plain(), Student()], "thrown away", "d/student, f/plain"),
        ([Share(), Plain(finetune=Finetune())], "move them apart", "f/plain, b/share"),
        ([Freeze(), Plain(finetune=Finetune())], "nothing can be fine-tuned", "f/plain, e/freeze"),
    ],
)
def test_an_impossible_order_is_refused_with_the_reason_and_one_that_works(
    steps: list[TechniqueConfig], reason: str, order: str
) -> None:
    with pytest.raises(RecipeError, match=reason) as error:
        check_order(steps)
    assert f"An order that works: {order}." in str(error.value)
    assert str(error.value).startswith("steps.1: ")


def test_steps_that_exclude_each_other_in_any_order_say_so() -> None:
    with pytest.raises(RecipeError, match="No order of these steps works"):
        check_order([Student(), Student()])


def test_fine_tuning_that_keeps_codes_is_legal_after_codes() -> None:
    class Tune(Share):
        """Fine-tunes codebooks."""

        traits: ClassVar[Traits] = Traits(leaves_codes=True)
        technique: Literal["g/tune"] = "g/tune"

    assert conflict(Share(), Tune(finetune=Finetune())) is None
