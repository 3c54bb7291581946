"""Rules that every exporter keeps."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from rarefy_schemas import ExporterConfig
from torch.utils._pytree import tree_leaves

from rarefy.exporter import Exporter
from rarefy.modules import Base
from rarefy.nouns import implement
from rarefy.testing.nouns import NounConformance
from rarefy.testing.require import require
from rarefy.testing.subjects import differences, outputs


class ExporterConformance(NounConformance):
    """Rules for an exporter; subclass it with a `config`."""

    config: ExporterConfig
    parent = Exporter

    def test_the_file_stands_for_the_model(self) -> None:
        """Check that the re-opened file gives the same outputs, and that writing leaves the model as it is."""
        model, task, exporter = self.model(), self.task(), self._exporter()
        before, base = copy.deepcopy(model), Base(self.model)
        require(
            exporter.suffix.startswith("."),
            f"The suffix is {exporter.suffix!r}",
            "set `suffix` to the ending of the files, with its dot",
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model{exporter.suffix}"
            exporter.write(model, base, task, path)
            require(path.is_file(), "`write` leaves no file", "write to the path it is given")
            with torch.no_grad():
                found = tree_leaves(exporter.reopen(path, base)(*task.example_inputs(4)))
        changed = differences(before, model)
        require(not changed, f"`write` changes {', '.join(changed)}", "work on a copy of the model")
        for one, other in zip(outputs(model, task), found, strict=True):
            difference = float((one - torch.as_tensor(other)).abs().max() / one.abs().max().clamp(min=1e-12))
            require(
                difference <= exporter.tolerance,
                f"The file's outputs differ by {difference:.2g} of the largest output",
                f"mend the format, or set `tolerance` (now {exporter.tolerance:g}) to what it can keep",
            )

    def _exporter(self) -> Exporter[Any]:
        exporter: Exporter[Any] = implement(self._noun())
        return exporter
