"""Rules for the model that a technique leaves."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from rarefy import artifact
from rarefy.errors import RarefyError
from rarefy.testing.compressing import Compressing
from rarefy.testing.require import require
from rarefy.testing.subjects import differences, outputs, parameter_count


class ResultRules(Compressing):
    """The result stands in for the original, is no larger, can be stored, and comes out the same again."""

    def test_output_shapes_are_kept(self) -> None:
        """Check that the compressed model can stand in for the original."""
        task = self.task()
        before, after = outputs(self.model(), task), outputs(self._outcome().model, task)
        sizes = [tuple(t.shape) for t in before], [tuple(t.shape) for t in after]
        require(
            sizes[0] == sizes[1],
            f"The outputs have the shapes {sizes[1]}, not {sizes[0]}",
            "give new layers the stride, padding, dilation and groups of those they replace",
        )
        require(
            all(bool(torch.isfinite(t).all()) for t in after),
            "The outputs are not finite",
            "look for divisions by zero and overflow in `transform`",
        )

    def test_parameters_do_not_grow(self) -> None:
        """Check that compression does not enlarge."""
        before, after = parameter_count(self.model()), parameter_count(self._outcome().model)
        require(
            after <= before or self.config.traits.may_grow,
            f"The model has {after} parameters, {before} before",
            "return `Skip(reason)` for layers that would grow, or declare Traits(may_grow=True)",
        )

    def test_the_result_survives_the_file(self) -> None:
        """Check that the model can be written and loaded."""
        outcome, task = self._outcome(), self.task()
        mend = (
            "keep state in parameters, buffers and plain attributes, and register your own module classes with "
            "rarefy.modules.register_module"
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.rarefy"
            try:
                artifact.write(outcome.model, outcome.base, path)
                loaded = artifact.load(path, base=outcome.base.build)
            except RarefyError as error:
                raise AssertionError(
                    f"The model cannot be written and loaded: {error}\n  To mend it: {mend}."
                ) from error
        pairs = zip(outputs(outcome.model, task), outputs(loaded, task), strict=True)
        lost = differences(outcome.model, loaded)
        require(
            # equal weights in another memory layout may differ in the last bit of the outputs
            not lost and all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs),
            f"The model loaded from its file is not the one written: {', '.join(lost) or 'its outputs differ'}",
            mend,
        )

    def test_the_same_seed_gives_the_same_result(self) -> None:
        """Check that nothing random escapes the seed."""
        first = self._outcome().model
        with torch.random.fork_rng(devices=[]):
            torch.seed()  # any state but that of the first run
            second = self._compress(self.model()).model
        differ = differences(first, second)
        require(
            not differ,
            f"Two runs with one seed differ in {', '.join(differ)}",
            "draw from `torch.Generator().manual_seed(self.seed)`, never from the global generator",
        )
