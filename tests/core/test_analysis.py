"""`rarefy analyze`: groups, what cutting them saves, sensitivity, plots; and how a change of the loss is measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rarefy.dependencies import cut, find_dependencies, mask
from rarefy.dependencies.overview import GroupRow, group_rows
from rarefy.errors import StageError
from rarefy.measure import flops
from rarefy.recipe import load_recipe
from rarefy.report.group_plot import draw_groups
from rarefy.sensitivity import Increase, layer_effects
from rarefy.tasks import ClassificationTask
from rarefy.zoo import digits_cnn, resnet20
from rarefy_schemas import TechniqueConfig
from torch import nn
from torch.nn import functional as F


class TestIncrease:
    def test_it_is_the_difference_of_the_mean_losses(self) -> None:
        torch.manual_seed(0)
        x, y = torch.randn(25, 4), torch.arange(25) % 3
        task = ClassificationTask.from_arrays(x, y, validation=(x, y), test=(x, y), batch_size=10)
        model, other = nn.Linear(4, 3), nn.Linear(4, 3)
        losses = [float(F.cross_entropy(m(x), y).detach()) for m in (model, other)]
        increase = Increase(model, task)
        assert increase(other) == pytest.approx(losses[1] - losses[0], rel=1e-5)
        assert increase(model) == 0

    def test_without_labels_it_is_how_far_the_outputs_move(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(30, 4)
        task = ClassificationTask.from_arrays(x, None, validation=(x, None), test=(x, None), batch_size=10)
        model = nn.Linear(4, 3, bias=False)
        half = copy.deepcopy(model)
        half.weight.data /= 2
        increase = Increase(model, task)
        assert increase(half) == pytest.approx(0.25)
        assert increase(model) == 0

    def test_modes_are_restored(self, digits_task: ClassificationTask) -> None:
        model = digits_cnn().train()
        Increase(model, digits_task)(model)
        assert model.training


class TestGroups:
    def test_rows_say_what_the_groups_hold_and_save(self, digits_task: ClassificationTask) -> None:
        model = digits_cnn()
        rows = {row.name: row for row in group_rows(model, digits_task)}
        # conv1 has 16 filters of 9 weights with biases, and conv2 reads each by 32 x 9 weights
        assert rows["conv1"].parameters == 16 * (9 + 1) + 16 * 32 * 9
        assert rows["conv1"].members == ("conv1.weight[0]", "conv1.bias[0]", "conv2.weight[1]")
        x = digits_task.example_inputs(1)
        halved = cut(model, find_dependencies(model, x), {"conv1": torch.arange(8)})
        assert rows["conv1"].flops_saved == pytest.approx(1 - flops(halved, x) / flops(model, x))
        assert rows["fc2"].pinned is not None
        assert "output" in rows["fc2"].pinned
        assert rows["fc2"].flops_saved is None
        assert all(row.increases == () for row in rows.values())

    def test_a_tensor_cut_along_two_dimensions_counts_once(self, digits_task: ClassificationTask) -> None:
        class Stream(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.middle, self.last = nn.Linear(64, 6), nn.Linear(6, 6), nn.Linear(6, 10)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                h = self.first(x.flatten(1))
                out: torch.Tensor = self.last(h + torch.relu(self.middle(h)))
                return out

        rows = {row.name: row for row in group_rows(Stream(), digits_task)}
        assert rows["first"].parameters == 6 * 65 + (6 * 6 + 6) + 10 * 6

    def test_sensitivity_masks_the_units_with_the_smallest_norm(
        self, digits_task: ClassificationTask, trained_digits: nn.Module
    ) -> None:
        rows = {row.name: row for row in group_rows(trained_digits, digits_task, sensitivity=True)}
        found = find_dependencies(trained_digits, digits_task.example_inputs(1))
        out, into = trained_digits.conv1.weight, trained_digits.conv2.weight
        order = (out.square().sum((1, 2, 3)) + into.square().sum((0, 2, 3))).argsort()
        increase = Increase(trained_digits, digits_task)
        expected = [increase(mask(trained_digits, found, {"conv1": order[:count]})) for count in (4, 8, 12)]
        assert rows["conv1"].increases == pytest.approx(expected)
        assert rows["conv1"].increases[2] > 0.05
        assert rows["fc2"].increases == ()

    @pytest.mark.parametrize("ending", ["svg", "png", "html"])
    def test_plots(self, tmp_path: Path, ending: str) -> None:
        row = GroupRow("conv<1>", "channel", 8, ("conv1.weight[0]",), 100, 0.25, False, None, (0.1, 0.2, 0.5))
        pinned = GroupRow("fc", "channel", 3, ("fc.weight[0]",), 10, None, False, "it is part of the output")
        path = tmp_path / f"groups.{ending}"
        draw_groups([row, pinned], path, "Groups of a < b")
        data = path.read_bytes()
        if ending == "png":
            assert data.startswith(b"\x89PNG")
        else:
            text = data.decode()
            assert text.startswith("<!doctype html>" if ending == "html" else "<?xml")
            assert "conv&lt;1&gt; (8)" in text
            assert "pinned: it is part of the output" in text
            assert "50% masked" in text

    def test_other_endings_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StageError, match=r"\.svg, \.png, \.html"):
            draw_groups([], tmp_path / "groups.gif", "none")


class TestLayerEffects:
    def test_one_layer_at_a_time_by_hand(self, trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
        increase = Increase(trained_digits, digits_task)
        rows = {row.name: row for row in layer_effects(trained_digits, config("magnitude"), digits_task, increase)}
        assert list(rows) == ["conv1", "conv2", "fc1", "fc2"]
        changed = copy.deepcopy(trained_digits)
        weight = changed.fc1.weight.data
        kept = weight.abs() >= weight.abs().flatten().sort().values[round(0.5 * weight.numel())]
        noise = weight[~kept].square().sum()
        weight *= kept
        assert rows["fc1"].increase == pytest.approx(increase(changed))
        whole = trained_digits.fc1.weight.detach().square().sum()
        assert rows["fc1"].signal_to_noise == pytest.approx(float(10 * torch.log10(whole / noise)), rel=1e-4)

    def test_other_shapes_have_no_noise(self, trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
        rows = layer_effects(trained_digits, config("channel-l1"), digits_task)
        assert {row.signal_to_noise for row in rows} == {None}
        assert max(row.increase for row in rows) > 0.01

    def test_what_cannot_be_treated_alone_says_why(self, digits_task: ClassificationTask) -> None:
        torch.manual_seed(0)
        rows = layer_effects(resnet20(in_channels=1), config("channel-l1"), digits_task)
        assert any("is no target" in row.remark for row in rows)
        assert any(row.increase is not None for row in rows)

    def test_nothing_to_treat_is_an_error(self, digits_task: ClassificationTask) -> None:
        with pytest.raises(StageError, match="change no layer"):
            layer_effects(digits_cnn(), config("channel-l1", amount=0.001), digits_task)


def config(name: str, **options: Any) -> TechniqueConfig:
    step = {"technique": f"pruning/{name}", "amount": 0.5, **options}
    return load_recipe({"steps": [step]}).steps[0]


class TestCommand:
    def test_it_prints_the_groups_as_table_json_and_plot(self, rarefy: Any) -> None:
        arguments = ("analyze", "zoo:digits_cnn", "--task", "data:digits", "--groups")
        code, out, err = rarefy(*arguments, "--plot", "groups.svg")
        assert code == 0, err
        assert "pinned: it is part of the model's output" in out
        assert "conv2" in out
        assert Path("groups.svg").read_text().startswith("<?xml")
        code, out, _ = rarefy(*arguments, "--sensitivity", "--json")
        rows = {row["name"]: row for row in json.loads(out)}
        assert code == 0
        assert rows["conv1"]["units"] == 16
        assert len(rows["conv1"]["increases"]) == 3
        code, out, _ = rarefy(*arguments, "--sensitivity")
        assert "loss, 75% masked" in out

    def test_a_technique_can_tell_more_of_each_layer(self, rarefy: Any) -> None:
        code, out, err = rarefy(
            "analyze", "zoo:digits_cnn", "--task", "data:digits", "--technique", "pruning/channel-l1",
            "--set", "amount=0.5", "--set", "scope=sensitivity", "--json",
        )  # fmt: skip
        assert code == 0, err
        assert any("increase_at_16_units" in layer["scores"] for layer in json.loads(out)["layers"])

    def test_layers_are_treated_one_at_a_time(self, rarefy: Any) -> None:
        arguments = (
            "analyze", "zoo:digits_cnn", "--task", "data:digits", "--technique", "quantization/uniform",
            "--sensitivity", "--vary", "bits=8,2",
        )  # fmt: skip
        code, out, err = rarefy(*arguments)
        assert code == 0, err
        assert out.splitlines()[0].split()[:2] == ["layer", "type"]
        assert "dB bits=2" in out
        code, out, _ = rarefy(*arguments, "--json")
        rows = json.loads(out)
        assert [(row["setting"], row["name"]) for row in rows] == [
            (f"bits={bits}", name) for bits in (8, 2) for name in ("conv1", "conv2", "fc1", "fc2")
        ]

    def test_random_inputs_do_without_a_task(self, rarefy: Any) -> None:
        code, out, err = rarefy("analyze", "zoo:digits_cnn", "--input", "2x1x8x8", "--groups", "--json")
        assert code == 0, err
        assert {"conv1", "conv2", "fc1"} <= {row["name"] for row in json.loads(out)}
        code, out, err = rarefy("analyze", "zoo:gpt_tiny", "--input", "2x16:20", "--json")
        assert code == 0, err
        assert json.loads(out)[0]["flops"] > 0

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (("--groups",), "which task?"),
            (("--plot", "a.svg"), "belongs to --groups"),
            (("--sensitivity",), "add one of them"),
            (("--technique", "quantization/uniform", "--vary", "bits=8,4"), "--vary belongs to"),
            (("--technique", "pruning/magnitude", "--task", "data:digits", "--sensitivity", "--vary", "8,4"), "V1,V2"),
            (("--groups", "--technique", "pruning/magnitude"), "leave out --technique"),
            (("--groups", "--task", "data:digits", "--plot", "a.gif"), ".svg, .png, .html"),
            (("--groups", "--task", "data:digits", "--input", "1x1x8x8"), "leave out --input"),
            (("--groups", "--input", "1x1x8x"), "write a shape such as"),
            (("--groups", "--input", "0x1"), "write a shape such as"),
            (("--groups", "--input", "1x1x8x8:0"), "write a shape such as"),
            (("--groups", "--input", "4x3x8x8"), "does not run on the example inputs"),
            (("--groups", "--input", "999999x999999x999999"), "no room for so many numbers"),
        ],
    )
    def test_bad_input(self, rarefy: Any, options: tuple[str, ...], told: str) -> None:
        code, _, err = rarefy("analyze", "zoo:digits_cnn", *options)
        assert code != 0
        assert told in err
        assert "Traceback" not in err
