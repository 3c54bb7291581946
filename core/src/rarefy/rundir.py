"""The folder of a run: what it holds, who may write there, and what is finished."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from rarefy_schemas import Recipe, Report, Schema, StageReport

from rarefy import yaml
from rarefy.errors import RecipeError, StageError
from rarefy.files import atomic_write, make_folder
from rarefy.recipe import dump_recipe

log = logging.getLogger("rarefy")
SchemaT = TypeVar("SchemaT", bound=Schema)


class RunDir:
    """`recipe.yaml`, `report.json`, `report.html`, `checkpoints/`, `exports/`, `run.log`; all written atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.exports = path / "exports"

    def open(self, recipe: Recipe, *, resume: bool) -> None:
        """Create the folder, or check that the run in it is this recipe's; raise `RecipeError` otherwise."""
        known = self.path / "recipe.yaml"
        if known.exists():
            if not resume:
                raise RecipeError(
                    f"{self.path} already holds a run; go on with `rarefy run --resume {self.path}`, or name another "
                    "folder with --output"
                )
            if yaml.read(known).data != dump_recipe(recipe):
                raise RecipeError(f"the recipe differs from {known}; resume without changes, or use another folder")
            return
        if resume:
            raise RecipeError(f"{self.path} holds no run to resume: there is no {known.name} in it")
        make_folder(self.path)
        make_folder(self.checkpoints)
        make_folder(self.exports)
        self.write("recipe.yaml", yaml.dump(dump_recipe(recipe)))

    def write(self, name: str, text: str) -> Path:
        """Write a text file of this folder."""
        with atomic_write(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return self.path / name

    def stage(self, index: int) -> StageReport | None:
        """Return the report of a finished stage, or None; the baseline is stage -1."""
        file = self._stage_file(index)
        if not file.exists() or not self.checkpoint(index).exists():
            return None
        return _read(file, StageReport)

    def finish_stage(self, report: StageReport) -> None:
        """Record that a stage is finished; its checkpoint has to be written before."""
        self.write(str(self._stage_file(report.index).relative_to(self.path)), report.model_dump_json(indent=2))

    def checkpoint(self, index: int) -> Path:
        """Return the path of the model after a stage."""
        return self.checkpoints / f"{index + 1:02d}.rarefy"

    def _stage_file(self, index: int) -> Path:
        return self.checkpoints / f"{index + 1:02d}.json"

    def report(self) -> Report | None:
        """Return the report of a finished run, or None."""
        file = self.path / "report.json"
        return _read(file, Report) if file.exists() else None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of this folder; the lock dies with the process."""
        import fcntl

        make_folder(self.path)
        try:
            handle = open(self.path / ".lock", "a")  # noqa: SIM115 - held open for as long as the run goes
        except OSError as error:
            raise StageError(
                f"cannot write in {self.path}: {error.strerror}; choose a folder you may write to"
            ) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StageError(
                    f"another process is running in {self.path}; wait for it, or name another folder with --output"
                ) from None
            yield

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Copy rarefy's log messages to `run.log`."""
        handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level = log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            handler.close()


def load_report(path: Path) -> Report:
    """Return the report of a run folder or of a `report.json`; raise `RecipeError` when there is none."""
    file = path / "report.json" if path.is_dir() else path
    if not file.exists():
        raise RecipeError(f"there is no report at {file}; name the folder of a finished run")
    return _read(file, Report)


def _read(file: Path, schema: type[SchemaT]) -> SchemaT:
    try:
        return schema.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (ValidationError, ValueError, OSError) as error:
        raise StageError(f"{file} is damaged ({error}); delete it to have that part done again") from error
