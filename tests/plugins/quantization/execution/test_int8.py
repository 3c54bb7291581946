"""ONNX files on 8-bit kernels: what is in them, what runs, what is refused and what is said."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rarefy import zoo
from rarefy.errors import RarefyError, RecipeError, StageError
from rarefy.measure import Latency
from rarefy.recipe import load_recipe
from rarefy.tasks import ClassificationTask
from rarefy_quantization.config import UniformConfig
from rarefy_quantization.execution import mixed, saturation
from rarefy_quantization.execution.comparison import in_words
from rarefy_quantization.execution.config import OnnxInt8Format
from torch import nn

from .conftest import Written, quantized, random_task, written

QUICK = OnnxInt8Format(rounds=3, batches=2, max_error=10)


class Residual(nn.Module):
    """Convolutions with batch norm, clamps, a sum, a concatenation, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.three = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6())
        self.pool, self.mean, self.head = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Linear(16, 4)
        with torch.no_grad():
            for _ in range(3):
                self(torch.randn(16, 2, 8, 8))
            self.two[1].weight.copy_(torch.randn(8))  # some are negative
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        x = torch.relu(self.two(x) + x)
        x = torch.cat([self.pool(x), self.pool(self.three(x))], 1)
        return self.head(self.mean(x).flatten(1))


@pytest.mark.skipif(saturation.saturates(), reason="8-bit kernels saturate on this processor")
def test_a_trained_network_keeps_its_score_and_gets_smaller(
    trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path
) -> None:
    file = written(trained_digits, digits_task, OnnxInt8Format(), tmp_path)
    assert file.path.name == "model.int8.onnx"
    assert abs(file.value("accuracy") - file.value("accuracy of the model")) <= 0.01
    assert file.value("accuracy of the model") == digits_task.score(trained_digits, "validation")
    assert file.value("output_error") < 0.05
    assert file.value("agreement") > 0.97
    assert 2 < file.value("float32_rate") < 4.5
    assert "accuracy on the validation split" in " ".join(file.report.notes)
    assert not {"Conv", "Gemm", "MatMul", "Relu"} & file.kernels()


def test_weights_of_seven_bits_are_exact_on_every_processor(
    trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path
) -> None:
    model = quantized(trained_digits, UniformConfig(bits=7))
    file = written(model, digits_task, OnnxInt8Format(), tmp_path)
    assert file.value("output_error") < 0.05
    assert abs(file.value("accuracy") - file.value("accuracy of the model")) <= 0.01


@pytest.mark.parametrize("cut_off", [True, False])
def test_kernels_that_saturate_are_told(cut_off: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saturation, "saturates", lambda: cut_off)
    file = written(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), random_task(1, 8, 8), QUICK, tmp_path)
    assert any("VNNI" in note and "bits: 7" in note for note in file.report.notes) == cut_off


def test_between_the_ends_everything_runs_on_integers(tmp_path: Path) -> None:
    file = written(Residual(), random_task(2, 8, 8), QUICK, tmp_path)
    integers = {"QLinearConv", "QLinearAdd", "QLinearConcat", "QLinearGlobalAveragePool", "QGemm", "NhwcMaxPool"}
    assert integers <= file.kernels()
    assert file.kernels() <= integers | {"QuantizeLinear", "Transpose", "Reshape", "Flatten"}
    assert not {"Relu", "Clip"} & set(file.operators())
    assert file.value("output_error") < 0.1


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_that_a_step_left_are_in_the_file_bit_for_bit(bits: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    model = quantized(model, UniformConfig(bits=bits))
    file = written(model, random_task(2, 8, 8), QUICK, tmp_path)
    found = list(file.weights().values())
    for layer, (codes, scales) in zip((model[0], model[3]), found, strict=True):
        weight = layer.weight.detach().numpy()
        assert (codes.astype(np.float32) * scales.reshape(-1, *[1] * (codes.ndim - 1)) == weight).all()
        assert len(np.unique(codes)) <= 2**bits
    assert "2 of 2 weights consisted of 8-bit codes" in file.report.notes[0]


def test_codes_survive_the_batch_norm_that_is_folded_in(tmp_path: Path) -> None:
    model = quantized(Residual(), UniformConfig(bits=7))
    file = written(model, random_task(2, 8, 8), QUICK, tmp_path)
    assert "4 of 4 weights" in file.report.notes[0]
    steps = np.abs(model.two[0].weight.detach().numpy())
    steps = np.array([np.min(row[row > 0]) for row in steps.reshape(8, -1)])
    codes, scales = list(file.weights().values())[1]
    sign = np.sign(model.two[1].weight.detach().numpy())[:, None, None, None]
    before = model.two[0].weight.detach().numpy()
    ratio = codes / np.where(before == 0, 1, before)
    for row, weight, its in zip(ratio, before, sign, strict=True):
        factors = row[weight != 0] * its.item()
        assert (factors > 0).all()
        assert factors == pytest.approx(factors[0])
    assert (codes[before == 0] == 0).all()
    assert (scales > 0).all()


def test_outputs_of_a_convolution_keep_their_name_and_their_clamp(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 8), nn.Hardtanh(-0.2, 0.3), nn.Conv2d(4, 4, 1), nn.Flatten())
    file = written(model, random_task(2, 8, 8), QUICK, tmp_path)
    assert file.report.max_difference < 0.1
    assert len(file.file.graph.output) == 1
    bare = written(model[:1], random_task(2, 8, 8), QUICK, tmp_path / "bare")
    assert bare.kernels() <= {"QuantizeLinear", "QLinearConv", "DequantizeLinear", "Transpose"}


def test_outputs_whose_weights_are_zero_give_their_bias(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 4))
    with torch.no_grad():
        model[1].weight[1:3] = 0
        model[1].bias.copy_(torch.tensor([1.0, 1234.567, -1e-3, 0.5]))
    file = written(model, random_task(2, 8, 8), QUICK, tmp_path)
    assert file.report.max_difference < 0.05
    scales = file.constants["linear/bs"]
    assert (file.constants["linear/b"] * scales)[1:3] == pytest.approx([1234.567, -1e-3], rel=1e-5)


def test_a_bias_too_large_for_the_scale_coarsens_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 2))
    with torch.no_grad():
        model[1].weight[0] *= 1e-9
        model[1].bias.fill_(100.0)
    file = written(model, random_task(2, 8, 8, outputs=2), QUICK, tmp_path)
    assert np.abs(file.constants["linear/b"]).max() <= 1.001 * 2**30
    assert file.report.max_difference < 0.05


def test_a_batch_norm_behind_a_clamp_runs_on_integers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model(torch.randn(64, 2, 8, 8))
        model[2].weight.copy_(torch.tensor([2.0, -1.0, 0.5, 3.0]))
        model[2].bias.copy_(torch.randn(4))
    file = written(nn.Sequential(*model, nn.Flatten()).eval(), random_task(2, 8, 8), QUICK, tmp_path)
    assert "BatchNormalization" not in file.kernels()
    assert len(file.weights()) == 3
    assert file.value("output_error") < 0.05


def test_excluded_layers_stay_in_float(tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"exclude": ("one.*", "head")})
    file = written(Residual(), random_task(2, 8, 8), config, tmp_path)
    assert {"Conv", "QLinearConv"} <= file.kernels()
    assert len(file.weights()) == 2
    with pytest.raises(StageError, match=r"exclude.*'nose\*'"):
        written(Residual(), random_task(2, 8, 8), QUICK.model_copy(update={"exclude": ("nose*",)}), tmp_path / "no")


def test_weights_of_excluded_layers_are_not_rounded_by_the_runtime(tmp_path: Path) -> None:
    """ONNX Runtime rounds them per tensor when what they read has one step, but not when it has one per channel."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 3),
    )  # fmt: skip
    with torch.no_grad():
        model[2].weight[0] *= 1000  # with a step for all of them, the others would be zero
        model[2].bias.zero_()
        model[4].weight[:, 0] /= 1000
        model[8].weight[0] *= 1000
        model[8].bias.zero_()
        model[10].weight[:, 0] /= 1000
    config = QUICK.model_copy(update={"exclude": ("2", "8"), "max_error": 0.1})
    file = written(model.eval(), random_task(2, 8, 8), config, tmp_path)
    assert {"Conv", "QLinearConv"} <= file.kernels()


def test_products_of_two_activations_stay_in_float_and_are_named(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.query(x) @ self.key(x).transpose(1, 2)).flatten(1)

    file = written(quantized(Attention(), UniformConfig(bits=7)), random_task(3, 8), QUICK, tmp_path)
    assert "none is constant" in " ".join(file.report.notes)
    assert len(file.weights()) == 2
    assert file.value("output_error") < 0.1


class Normed(nn.Module):
    """A residual sum behind a layer norm, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.one(x))
        return self.two(x) + x


def test_sums_of_floats_are_not_rounded(tmp_path: Path) -> None:
    file = written(Normed(), random_task(8, outputs=8), QUICK, tmp_path)
    (add,) = [node for node in file.file.graph.node if node.op_type == "Add"]
    (norm,) = [node for node in file.file.graph.node if node.op_type == "LayerNormalization"]
    assert norm.output[0] in add.input
    assert len(file.weights()) == 2


def test_outputs_that_layers_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Both(nn.Module):
        def __init__(self, *first: nn.Module) -> None:
            super().__init__()
            self.first, self.second = nn.Sequential(*first), nn.Linear(64, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.first(x)
            return self.second(x.flatten(1)), x

    task = random_task(2, 8, 8)
    monkeypatch.setattr(ClassificationTask, "score", lambda *_: float("nan"))
    for first in ((nn.Conv2d(2, 4, 5),), (nn.Conv2d(2, 4, 5), nn.Tanh())):
        file = written(quantized(Both(*first), UniformConfig(bits=7)), task, QUICK, tmp_path / str(len(first)))
        assert len(file.weights()) == 2
        assert file.value("output_error") < 0.1


class TestTarget:
    """Layers in float32 under a budget; the first of them loses most when it is rounded."""

    def model(self) -> nn.Module:
        layers = (nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4))
        model = nn.Sequential(nn.Flatten(), *(module for layer in layers for module in (layer, nn.ReLU()))).eval()
        with torch.no_grad():
            model[3].weight[:, 0] *= 500  # with it the other weights of a row round to zero
            model[1].weight[0] *= 1e-3
        return model

    def written(self, folder: Path, **target: Any) -> Written:
        task = random_task(1, 8, 8)
        return written(self.model(), task, OnnxInt8Format(rounds=3, batches=2, max_error=10, target=target), folder)

    def test_bytes_go_to_the_layer_that_suffers(self, tmp_path: Path) -> None:
        plain = written(self.model(), random_task(1, 8, 8), QUICK, tmp_path / "plain")
        file = self.written(tmp_path / "target", measure="bytes", most=0.7)
        assert "the most needed first: 3, 7; 2 run on integers" in " ".join(file.report.notes)
        assert len(file.weights()) == 2
        assert file.value("output_error") < plain.value("output_error") / 2
        assert 1 / file.value("float32_rate") <= 0.7

    def test_less_than_all_integers_take(self, tmp_path: Path) -> None:
        with pytest.raises(StageError, match=r"every layer on integers the file takes .* `target` allows 5%"):
            self.written(tmp_path, measure="bytes", most=0.05)
        assert list(tmp_path.iterdir()) == []

    def test_time_is_measured(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shares = iter([0.3, 0.5, 0.7])
        monkeypatch.setattr(
            mixed, "latency", lambda *_: Latency(1 / next(shares), 1, 1, (1, 1, 1), 1)
        )  # none, two of four, three of four
        file = self.written(tmp_path, most=0.6)
        words = " ".join(file.report.notes)
        assert "the file takes 50% of the float32 file's latency" in words
        assert len(file.weights()) == 2

    def test_values_that_make_no_sense(self) -> None:
        with pytest.raises(RecipeError, match="most"):
            load_recipe({"export": [{"format": "onnx-int8", "target": {"most": 1.5}}], "steps": []})
        with pytest.raises(RecipeError, match=r"'latency' or 'bytes'"):
            load_recipe({"export": [{"format": "onnx-int8", "target": {"measure": "flops", "most": 1}}], "steps": []})


@pytest.mark.parametrize("way", ["min-max", "percentile", "mse", "entropy"])
def test_ranges_are_calibrated_on_the_tasks_data(way: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 4))
    task = random_task(2, 8, 8)
    file = written(model, task, OnnxInt8Format(range=way, percentile=90, rounds=3, batches=2), tmp_path)
    (scale,) = {float(v) for v in file.constants.values() if v.shape == () and v.dtype == np.float32}
    seen = torch.cat([inputs[0] for inputs in task.calibration(None, 2)])
    whole = float(seen.max() - seen.min()) / 255
    assert scale == pytest.approx(whole, rel=1e-3) if way == "min-max" else scale <= whole * 1.001
    if way == "percentile":
        assert scale < whole / 1.5


class TestRefusals:
    def test_no_calibration_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ClassificationTask, "calibration", lambda *_: iter(()))
        with pytest.raises(StageError, match="gives no batches"):
            written(Residual(), random_task(2, 8, 8), QUICK, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_activations_that_are_not_numbers(self, tmp_path: Path) -> None:
        class Root(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(8, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(x.sqrt())

        with pytest.raises(StageError, match="NaN or infinite on the calibration data"):
            written(Root(), random_task(8), QUICK, tmp_path)

    def test_weights_that_are_not_numbers(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(8, 4))
        with torch.no_grad():
            model[0].weight[0, 0] = torch.nan
        with pytest.raises(StageError, match="'0' has weights that are NaN"):
            written(model, random_task(8), QUICK, tmp_path)

    def test_nothing_to_quantize(self, tmp_path: Path) -> None:
        with pytest.raises(StageError, match=r"nothing to quantize.*Relu"):
            written(nn.Sequential(nn.ReLU(), nn.Flatten()), random_task(2, 3), QUICK, tmp_path)

    def test_a_file_that_says_nothing_of_the_model(self, tmp_path: Path) -> None:
        with pytest.raises(StageError, match=r"of their spread.*`max_error` is 0%"):
            written(Residual(), random_task(2, 8, 8), QUICK.model_copy(update={"max_error": 1e-4}), tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("absent", ["onnx", "onnxruntime"])
    def test_a_missing_extra(self, absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from rarefy.exporters import onnx

        real = builtins.__import__

        def lacking(name: str, *rest: Any) -> Any:
            if name == absent:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return real(name, *rest)

        monkeypatch.setattr(onnx.importlib, "import_module", lacking)
        with pytest.raises(RarefyError, match=rf"{absent}; `pip install 'rarefy\[onnx\]'`"):
            written(Residual(), random_task(2, 8, 8), QUICK, tmp_path)


def test_a_slower_file_says_so() -> None:
    assert in_words(Latency(0.5, 0.4, 0.6, (1, 2, 3), 1)) == "2.00x SLOWER"
    assert in_words(Latency(2.0, 1.5, 2.5, (1, 2, 3), 4)) == "2.00x faster (1.50 to 2.50)"


def test_the_file_holds_no_traces_of_source_files(tmp_path: Path) -> None:
    file = written(Residual(), random_task(2, 8, 8), QUICK, tmp_path)
    assert b"stack_trace" not in file.path.read_bytes()
    assert str(Path(zoo.__file__).parent).encode() not in file.path.read_bytes()


def test_a_task_without_labels_has_an_error_and_no_score(tmp_path: Path) -> None:
    task = ClassificationTask.from_arrays(np.random.default_rng(0).normal(size=(96, 2, 8, 8)), None, batch_size=16)
    file = written(Residual(), task, QUICK, tmp_path)
    assert [m.name for m in file.report.measurements] == [
        "output_error", "agreement", "float32_rate", "speed_up_rate@1",
    ]  # fmt: skip


def test_recipes_name_the_format() -> None:
    recipe = load_recipe(
        {"steps": [{"technique": "quantization/uniform"}], "export": [{"format": "onnx-int8", "range": "mse"}]}
    )
    assert recipe.export == (OnnxInt8Format(range="mse"),)
