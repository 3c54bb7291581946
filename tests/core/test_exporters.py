from __future__ import annotations

import builtins
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from rarefy.errors import RarefyError, StageError
from rarefy.exporters.config import EXPORTERS, OnnxFormat, RarefyFormat, SafetensorsFormat, TorchExportFormat
from rarefy.exporting import export_one, float32_bytes
from rarefy.modules import Base
from rarefy_schemas import ExporterConfig
from torch import nn

ALL = [config() for config in EXPORTERS]
NAMES = [config.registered_name() for config in EXPORTERS]


class Images:
    """As much of a task as an export needs."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        self.shapes = shapes or ((1, 8, 8),)

    def example_inputs(self, batch_size: int = 1) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(batch_size, *shape, generator=generator) for shape in self.shapes)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def export(
    model: nn.Module,
    config: ExporterConfig,
    folder: Path,
    task: Any = None,
    base: Base | None = None,
    size: int = 10**6,
) -> Any:
    return export_one(model, base or Base(lambda: model), task or Images(), config, folder, size)


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_an_exported_file_gives_the_models_outputs_and_is_measured(
    config: ExporterConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = network().train()
    with caplog.at_level(logging.WARNING):
        report = export(model, config, tmp_path / "exports")
    (file,) = (tmp_path / "exports").iterdir()
    assert report.path == f"exports/{file.name}"
    assert report.bytes == file.stat().st_size
    assert report.rate == 10**6 / report.bytes
    assert report.max_difference < 1e-5
    assert report.notes == ()
    assert model.training
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_a_file_names_no_source_files(tmp_path: Path) -> None:
    export(network(), OnnxFormat(), tmp_path)
    (file,) = tmp_path.iterdir()
    assert b".py" not in file.read_bytes()


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_models_with_two_inputs_and_nested_outputs_are_exported(config: ExporterConfig, tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(5, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
            return {"sum": self.one(x) + self.two(y), "parts": (self.one(x), self.two(y))}

    report = export(Pair(), config, tmp_path, Images((3,), (5,)), Base(Pair))
    assert report.max_difference < 1e-5


def test_a_file_that_is_not_smaller_says_so(tmp_path: Path) -> None:
    report = export(network(), SafetensorsFormat(), tmp_path, size=100)
    assert report.rate < 1
    assert "not smaller" in report.notes[0]


def test_a_lossless_file_has_the_very_same_outputs(tmp_path: Path) -> None:
    assert export(network(), RarefyFormat(), tmp_path).max_difference == 0
    assert export(network(), SafetensorsFormat(), tmp_path).max_difference == 0


def test_the_file_has_the_name_that_was_asked_for(tmp_path: Path) -> None:
    reports = [export(network().eval(), config, tmp_path) for config in (RarefyFormat(), RarefyFormat(name="again"))]
    assert [Path(report.path).name for report in reports] == ["model.rarefy", "again.rarefy"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.rarefy", "model.rarefy"]


def test_safetensors_are_readable_by_others_and_hold_tied_weights_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    export(model, SafetensorsFormat(), tmp_path, Images((64,)))
    tensors = load_file(tmp_path / "model.safetensors")
    assert sorted(tensors) == ["0.bias", "0.weight", "1.bias"]
    assert torch.equal(tensors["0.weight"], model[0].weight)


class Hidden(nn.Module):
    """Its outputs depend on something that neither tensors nor attributes show."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.hidden = {"scale": torch.ones(1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.hidden["scale"]


@pytest.mark.parametrize("config", [RarefyFormat(), SafetensorsFormat()])
def test_a_file_with_other_outputs_is_removed(config: ExporterConfig, tmp_path: Path) -> None:
    model = Hidden()
    model.hidden["scale"] = torch.tensor([2.0])
    with pytest.raises(StageError, match="other outputs"):
        export(model, config, tmp_path, Images((4,)), Base(Hidden))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [OnnxFormat(), TorchExportFormat()])
def test_a_model_that_is_bound_to_its_batch_size_is_refused_with_advice(config: Any, tmp_path: Path) -> None:
    class Bound(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.shape[0] == 2 else x + 2

    with pytest.raises(StageError, match="dynamic_batch: false"):
        export(Bound(), config, tmp_path, Images((4,)))
    assert list(tmp_path.iterdir()) == []
    fixed = config.model_copy(update={"dynamic_batch": False})
    assert export(Bound(), fixed, tmp_path, Images((4,))).max_difference == 0


@pytest.mark.parametrize("config", [OnnxFormat(), TorchExportFormat()])
def test_a_model_that_cannot_be_traced_is_refused(config: Any, tmp_path: Path) -> None:
    class Untraceable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum().item().hex()[2])

    with pytest.raises(StageError, match="cannot be exported to"):
        export(Untraceable(), config, tmp_path, Images((4,)))
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_not_numbers_are_no_equal_outputs(tmp_path: Path) -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.abs().neg().sqrt()

    with pytest.raises(StageError, match="by up to nan"):
        export(Root(), RarefyFormat(), tmp_path, Images((4,)))


def test_a_failing_export_keeps_the_earlier_file(tmp_path: Path) -> None:
    model = Hidden()
    export(model, RarefyFormat(), tmp_path, Images((4,)), Base(Hidden))
    before = (tmp_path / "model.rarefy").read_bytes()
    model.hidden["scale"] = torch.tensor([2.0])
    with pytest.raises(StageError):
        export(model, RarefyFormat(), tmp_path, Images((4,)), Base(Hidden))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("absent", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named_with_its_command(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def lacking(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    from rarefy.exporters import onnx

    monkeypatch.setattr(onnx.importlib, "import_module", lacking)
    with pytest.raises(RarefyError, match=rf"{absent}; `pip install 'rarefy\[onnx\]'`"):
        export(network(), OnnxFormat(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_is_one_file_of_the_asked_opset_with_a_free_batch(tmp_path: Path) -> None:
    import onnx

    export(network(), OnnxFormat(opset=20), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    model = onnx.load(tmp_path / "model.onnx")
    assert model.opset_import[0].version == 20
    first = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param != "" for dim in first] == [True, False, False, False]


def test_the_size_of_a_base_counts_every_tensor_once_as_float32() -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)).half()
        model[1].weight = model[0].weight
        return model

    assert float32_bytes(Base(tied)) == 4 * (16 + 4 + 4 + 4 + 4 + 4 + 4) + 8
