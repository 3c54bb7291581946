"""Budgets of measured time: tables by layer and width, prediction, verification, correction."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rarefy.dependencies import find_dependencies
from rarefy.errors import StageError
from rarefy.measure import Latency, latency, parameters
from rarefy_pruning.channels import latency as budget
from rarefy_pruning.channels import timetable
from rarefy_pruning.channels.config import Target
from rarefy_pruning.channels.latency import LatencyLeft
from rarefy_pruning.channels.timetable import LayerTimes, TimeTable, nodes, table_for
from rarefy_pruning.channels.widths import resized
from torch import nn


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a layer take as long as it has weights; return the counts of the layers timed."""
    timed: list[int] = []

    def fastest(models: Sequence[Any], inputs: Any, rounds: int, threads: int | None) -> list[float]:
        timed.append(models[0].layer.weight.numel())
        for model in models:
            model()
        return [float(model.layer.weight.numel()) for model in models]

    monkeypatch.setattr(timetable, "fastest", fastest)
    monkeypatch.setattr(timetable, "_MEMORY", {})
    return timed


def table(layer: nn.Module, path: Path | None = None) -> TimeTable:
    return table_for(layer, None if path is None else str(path), 1)


class TestWidths:
    @pytest.mark.parametrize(
        ("layer", "x", "sizes"),
        [
            (nn.Linear(8, 6), torch.randn(2, 8), (3, 5)),
            (nn.Linear(8, 6, bias=False), torch.randn(2, 7, 8), (3, 5)),
            (nn.Conv2d(8, 6, 3, stride=2, padding=1, dilation=2), torch.randn(2, 8, 9, 9), (3, 5, 3, 3)),
            (nn.Conv2d(8, 8, 3, groups=8, padding="same"), torch.randn(2, 8, 9, 9), (3, 1, 3, 3)),
            (nn.Conv2d(4, 8, 3, groups=4), torch.randn(2, 4, 9, 9), (6, 1, 3, 3)),
            (nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), torch.randn(2, 8, 5, 5), (5, 3, 3, 3)),
            (nn.ConvTranspose1d(8, 8, 3, groups=8), torch.randn(2, 8, 5), (5, 1, 3)),
            (nn.Conv1d(8, 6, 3, padding_mode="circular", padding=1), torch.randn(2, 8, 9), (3, 5, 3)),
            (nn.BatchNorm2d(8), torch.randn(2, 8, 3, 3), (5,)),
            (nn.LayerNorm(8, bias=False), torch.randn(2, 3, 8), (5,)),
        ],
    )
    def test_layers_of_other_widths(self, layer: Any, x: torch.Tensor, sizes: tuple[int, ...]) -> None:
        state = torch.get_rng_state()
        made = resized(layer.half().to(torch.bfloat16), sizes)
        assert made is not None
        assert torch.equal(torch.get_rng_state(), state)
        assert tuple(made.layer.weight.shape) == sizes
        assert made.layer.weight.dtype == torch.bfloat16
        before = layer(x.bfloat16())
        after = made.layer(x.bfloat16().narrow(made.axis, 0, made.width))
        channel = 1 if isinstance(layer, (nn.modules.conv._ConvNd, nn.BatchNorm2d)) else -1
        shapes = [[size for i, size in enumerate(y.shape) if i != channel % y.dim()] for y in (before, after)]
        assert shapes[0] == shapes[1]
        full = resized(layer, tuple(layer.weight.shape))
        assert full is not None
        assert repr(full.layer) == repr(layer)

    def test_unknown_kinds_have_no_other_widths(self) -> None:
        class Own(nn.Linear):
            pass

        assert resized(Own(3, 3), (2, 2)) is None
        assert resized(nn.Conv2d(8, 8, 3, groups=2), (4, 4, 3, 3)) is None
        assert resized(nn.LayerNorm((3, 4)), (2, 4)) is None


class TestTable:
    @pytest.mark.parametrize("size", [1, 2, 7, 20, 32, 100, 128, 513, 4096])
    def test_nodes_are_few_and_end_at_the_full_width(self, size: int) -> None:
        found = nodes(size, 8)
        assert found[0] == 1
        assert found[-1] == size
        assert found == sorted(set(found))
        assert len(found) <= timetable.MOST_NODES + 2
        assert size < 32 or all(node % 8 == 0 for node in found[1:-1])

    def test_times_between_nodes_are_interpolated(self, clock: list[int]) -> None:
        layer = nn.Linear(96, 64)
        times = LayerTimes(layer, [torch.randn(2, 96)], table(layer), 8, 1)
        # where the time is the product of the widths, bilinear interpolation is exact
        for sizes in ((64, 96), (32, 48), (33, 50), (1, 1), (63, 3)):
            assert times.ratio(sizes) == pytest.approx(sizes[0] * sizes[1] / (64 * 96))

    def test_each_width_is_measured_once(self, clock: list[int]) -> None:
        layer = nn.Linear(64, 64)
        for _ in range(2):
            times = LayerTimes(layer, [torch.randn(2, 64)], table(layer), 8, 1)
            assert times.ratio((32, 64)) == 0.5
            assert times.ratio((32, 64)) == 0.5
        assert clock == [32 * 64]
        # other inputs are another matter
        LayerTimes(layer, [torch.randn(3, 64)], table(layer), 8, 1).ratio((32, 64))
        assert len(clock) == 2

    def test_a_file_serves_the_next_run_on_this_machine_only(
        self, clock: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer, file = nn.Linear(64, 64), tmp_path / "times.json"

        def measure() -> float:
            monkeypatch.setattr(timetable, "_MEMORY", {})
            kept = table(layer, file)
            found = LayerTimes(layer, [torch.randn(2, 64)], kept, 8, 1).ratio((32, 64))
            kept.save()
            return found

        assert (measure(), measure()) == (0.5, 0.5)
        assert len(clock) == 1
        assert "1 threads, torch" in next(iter(json.loads(file.read_text())))
        monkeypatch.setattr(timetable, "machine", lambda device, threads: "another")
        assert measure() == 0.5
        assert len(clock) == 2
        assert len(json.loads(file.read_text())) == 2

    @pytest.mark.parametrize("content", ["{", "[1]", '{"a": "b"}', '{"a": NaN}', '{"a": -1.0}', "\udcff"])
    def test_a_broken_file_is_told_and_written_anew(
        self, clock: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
    ) -> None:
        file = tmp_path / "times.json"
        file.write_bytes(content.encode(errors="surrogateescape"))
        with caplog.at_level(logging.WARNING, "rarefy"):
            kept = table(nn.Linear(2, 2), file)
        assert "measured anew" in caplog.text
        kept.ratio("a", lambda: 0.25)
        kept.save()
        assert list(json.loads(file.read_text()).values()) == [0.25]
        assert [path.name for path in tmp_path.iterdir()] == ["times.json"]

    def test_a_file_in_no_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StageError, match="create it first"):
            table(nn.Linear(2, 2), tmp_path / "none" / "times.json")


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
        nn.Linear(1024, 3),
    ).eval()  # fmt: skip


def pretend(monkeypatch: pytest.MonkeyPatch, time: Callable[[float], float]) -> list[float]:
    """Let a model with a share of the parameters take `time(share)`; return the shares that were measured."""
    seen: list[float] = []

    def fake(original: nn.Module, model: nn.Module, inputs: Any, **_: Any) -> Latency:
        seen.append(parameters(model) / parameters(original))
        ratio = time(seen[-1])
        return Latency(1 / ratio, 0.99 / ratio, 1.01 / ratio, (9 * ratio, 10 * ratio, 11 * ratio), 10.0)

    monkeypatch.setattr(budget, "latency", fake)
    return seen


class TestPrediction:
    def test_it_is_one_less_what_the_layers_save(self, clock: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(budget, "_shares", lambda *_: {"0": 0.1, "2": 0.4, "4": 0.4, "6": 0.05})
        model, x = wide(), (torch.randn(1, 64),)
        found = find_dependencies(model, x)
        left = LatencyLeft(model, found, Target(measure="latency", share=0.5, threads=1), x, 8)
        assert left({}) == 1
        assert left({"2": torch.arange(512)}) == pytest.approx(1 - 0.4 / 2 - 0.4 / 2)
        every = {name: torch.arange(512) for name in ("0", "2", "4")}
        assert left(every) == pytest.approx(1 - 0.1 / 2 - 0.8 * 3 / 4 - 0.05 / 2)

    def test_shares_add_up_to_less_than_one_and_follow_the_work(self) -> None:
        model = nn.Sequential(nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 2048))
        layers = {str(i): model[i] for i in (0, 2, 4)}
        shares = budget._shares(model.eval(), (torch.randn(256, 512),), layers, 1)
        assert max(shares, key=lambda name: shares[name]) == "4"
        assert shares["4"] > 0.5
        assert sum(shares.values()) < 1
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_a_shared_layer_is_timed_on_all_its_inputs(self, clock: list[int]) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.again, self.last = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                out: torch.Tensor = self.last(self.again(self.again(self.first(x))))
                return out

        model, x = Twice().eval(), (torch.randn(5, 4),)
        left = LatencyLeft(model, find_dependencies(model, x), Target(measure="latency", share=0.5), x, 8)
        assert [len(times.inputs) for times in left.times.values()] == [1, 2, 1]


class TestTarget:
    OPTIONS = {"amount": None, "target": {"measure": "latency", "share": 0.5, "threads": 1}}

    def test_the_measurement_corrects_the_prediction(
        self, clock: list[int], monkeypatch: pytest.MonkeyPatch, prune: Any, make_task: Any
    ) -> None:
        # the whole gains less than its layers
        seen = pretend(monkeypatch, lambda share: 1 - 0.6 * (1 - share))
        _, _, technique = prune(wide(), make_task(torch.randn(6, 64)), **self.OPTIONS)
        assert 1 < len(seen) <= 4
        assert 1 - 0.6 * (1 - seen[-1]) == pytest.approx(0.5, rel=0.02)
        (note,) = technique.notes
        assert "predicted from single layers" in note
        assert "correction" in note
        assert "10 ms to 5" in note or "10 ms to 4.9" in note

    def test_a_model_that_gains_more_is_cut_less(
        self, clock: list[int], monkeypatch: pytest.MonkeyPatch, prune: Any, make_task: Any
    ) -> None:
        seen = pretend(monkeypatch, lambda share: max(1 - 1.4 * (1 - share), 0.01))
        compact, _, _ = prune(wide(), make_task(torch.randn(6, 64)), **self.OPTIONS)
        assert seen[0] < 0.56 < parameters(compact) / parameters(wide()) < 0.68

    def test_a_target_out_of_reach_is_told(
        self, clock: list[int], monkeypatch: pytest.MonkeyPatch, prune: Any, make_task: Any
    ) -> None:
        seen = pretend(monkeypatch, lambda share: 0.9 + share / 10)
        _, _, technique = prune(wide(), make_task(torch.randn(6, 64)), **self.OPTIONS)
        assert len(seen) <= 4
        assert any("target of 50.0% of the latency is missed" in note for note in technique.notes)

    def test_a_slower_model_is_told_in_words(
        self, clock: list[int], monkeypatch: pytest.MonkeyPatch, prune: Any, make_task: Any
    ) -> None:
        pretend(monkeypatch, lambda share: 1.2)
        _, _, technique = prune(wide(), make_task(torch.randn(6, 64)), **self.OPTIONS)
        assert "Pruning made the model slower: it takes 1.20 times as long as before." in technique.notes

    def test_channels_that_save_no_time_stay(
        self, clock: list[int], monkeypatch: pytest.MonkeyPatch, prune: Any, make_task: Any
    ) -> None:
        monkeypatch.setattr(budget, "_shares", lambda *_: {"0": 0.0, "2": 0.0, "4": 0.0, "6": 0.9})
        pretend(monkeypatch, lambda share: 0.5)
        task, options = make_task(torch.randn(6, 64)), {**self.OPTIONS, "scope": "global", "least": 0}
        _, analysis, _ = prune(wide(), task, normalize="mean", **options)
        assert sorted(analysis.plan.removal) == ["0", "2", "4"]
        _, analysis, _ = prune(wide(), task, normalize="saving", **options)
        assert list(analysis.plan.removal) == ["4"]
        assert len(analysis.plan.removal["4"]) == pytest.approx(1024 * 0.5 / 0.9, abs=8)

    @pytest.mark.parametrize("scope", ["layer", "sensitivity"])
    def test_a_real_network_gets_faster(self, prune: Any, make_task: Any, scope: str, tmp_path: Path) -> None:
        model, task = wide(), make_task(torch.randn(32, 64))
        target = {"measure": "latency", "share": 0.5, "batch_size": 16, "threads": 1, "table": str(tmp_path / "t.json")}
        compact, _, technique = prune(model, task, target=target, scope=scope)
        assert latency(model, compact, task.example_inputs(16), threads=1).ratio < 0.8
        assert technique.notes[0].startswith("Latency at batch size 16: ")
        assert json.loads((tmp_path / "t.json").read_text())

    def test_the_pipeline_passes_the_notes_on_and_budgets_can_fail(
        self, digits_task: Any, trained_digits: nn.Module, tmp_path: Path
    ) -> None:
        from rarefy import compress

        step = {"technique": "pruning/channel-l1", "target": {"measure": "latency", "share": 0.9}}
        recipe = {"steps": [step], "evaluate": {"batch_sizes": [1], "rounds": 3}, "budgets": {"latency": 0.001}}
        result = compress(trained_digits, recipe, digits_task, directory=tmp_path / "run")
        assert any("Latency at batch size 1" in note for note in result.report.steps[0].notes)
        assert [(budget.name, budget.limit, budget.met) for budget in result.missed] == [("latency", 0.001, False)]
