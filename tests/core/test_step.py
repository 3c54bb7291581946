"""Single steps on a model in memory, with core's training, with a loop of one's own, or with none."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rarefy
import torch
from rarefy.errors import RecipeError, StageError
from rarefy.tasks import ClassificationTask, InputsTask
from torch import nn
from torch.nn import functional as F

SAMPLES = 48
STEPS = 6
TRAINED_BY_RULES = [
    {"technique": "pruning/magnitude", "amount": 0.7},
    {"technique": "pruning/magnitude", "amount": 0.7, "schedule": "cubic", "ramp": 1.0},
    {"technique": "pruning/movement", "amount": 0.5},
    {"technique": "pruning/biased-weight-decay", "amount": 0.5},
    {"technique": "pruning/group-lasso", "strength": 0.1},
    {"technique": "quantization/uniform", "bits": 4},
    {"technique": "quantization/kmeans", "bits": 3},
    {"technique": "quantization/binary"},
    {"technique": "quantization/ternary"},
    {"technique": "quantization/fixed-point"},
    {"technique": "quantization/soft-weight-sharing", "strength": 0.01},
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    ).eval()


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.randn(SAMPLES, 1, 8, 8, generator=draw), torch.randint(4, (SAMPLES,), generator=draw)
    data = (images, labels)
    return ClassificationTask.from_arrays(*data, validation=data, test=data, batch_size=SAMPLES)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module, **tolerance: float) -> bool:
    a, b = state(one), state(other)
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], **tolerance) for name in a)


@pytest.mark.parametrize("finetune", [None, {"epochs": 2}])
def test_a_step_is_what_a_run_of_one_step_does(task: ClassificationTask, finetune: Any, tmp_path: Path) -> None:
    model, step = network(), {"technique": "pruning/magnitude", "amount": 0.5, "finetune": finetune}
    alone = rarefy.transform(model, step, task, seed=5)
    recipe = {"seed": 5, "steps": [step], "evaluate": {"batch_sizes": []}}
    assert same(alone, rarefy.compress(model, recipe, task, directory=tmp_path / "run").model)
    assert not alone.training


@pytest.mark.parametrize("technique", TRAINED_BY_RULES, ids=lambda options: str(list(options.values())[::2]))
def test_a_loop_of_ones_own_does_what_core_s_does(task: ClassificationTask, technique: dict[str, Any]) -> None:
    training = {"epochs": STEPS, "optimizer": "sgd", "momentum": 0.5, "lr": 0.02, "schedule": "constant"}
    options = {**technique, "finetune": training}
    expected = rarefy.transform(network(), options, task)
    step = rarefy.begin(network(), options, task)
    assert step.model.training
    optimizer = torch.optim.SGD(step.model.parameters(), lr=0.02, momentum=0.5)
    images, labels = next(iter(task.loader("train")))
    for done in range(1, STEPS + 1):
        loss = F.cross_entropy(step.model(images), labels) + step.penalty()
        optimizer.zero_grad()
        loss.backward()
        step.before_step()
        optimizer.step()
        step.after_step(done / STEPS, lr=0.02)
    finished = step.finish()
    assert not finished.training
    assert same(finished, expected, rtol=1e-3, atol=1e-4)
    assert not same(finished, rarefy.transform(network(), {**technique, "finetune": training | {"epochs": 1}}, task))


def test_the_model_its_mode_and_the_random_generators_stay(task: ClassificationTask) -> None:
    model = network().train()
    before = state(model)
    draws = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    rarefy.transform(model, {"technique": "pruning/channel-random", "amount": 0.5}, task)
    rarefy.begin(model, {"technique": "pruning/magnitude", "amount": 0.5}, task)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    assert random.getstate() == draws[0]
    assert np.random.get_state()[1].tolist() == draws[1]
    assert torch.equal(torch.get_rng_state(), draws[2])


def test_the_seed_decides(task: ClassificationTask) -> None:
    step = {"technique": "pruning/channel-random", "amount": 0.5}
    one, again, other = (rarefy.transform(network(), step, task, seed=seed) for seed in (1, 1, 2))
    assert same(one, again)
    assert not same(one, other)


def test_zeros_of_an_earlier_step_stay(task: ClassificationTask) -> None:
    sparse = rarefy.transform(network(), {"technique": "pruning/magnitude", "amount": 0.5}, task)
    zeros = {name: weight == 0 for name, weight in sparse.named_parameters()}
    small = rarefy.transform(sparse, {"technique": "quantization/kmeans", "bits": 3, "finetune": {}}, task)
    assert all((weight[zeros[name]] == 0).all() for name, weight in small.named_parameters())


def test_rounds_are_done_one_after_the_other(task: ClassificationTask) -> None:
    options = {"technique": "pruning/channel-l1", "amount": 0.75, "round_to": 1, "rounds": 2, "finetune": {}}
    small = rarefy.transform(network(), options, task)
    assert small.get_submodule("0").weight.shape[0] == 2
    with pytest.raises(RecipeError, match=r"rounds.*one after the other"):
        rarefy.begin(network(), options, task)


def test_inputs_alone_are_enough_where_no_labels_are_needed() -> None:
    images, teacher = torch.randn(20, 1, 8, 8), {"objective": "distillation/logits", "alpha": 1}
    for technique in (
        {"technique": "pruning/channel-l1", "amount": 0.5, "reconstruct": True},
        {"technique": "quantization/gptq", "bits": 4},
        {"technique": "pruning/wanda", "amount": 0.5},
        {"technique": "pruning/magnitude", "amount": 0.5, "finetune": {"objective": teacher}},
    ):
        small = rarefy.transform(network(), technique, images)
        assert small(images).shape == (20, 4)
    assert rarefy.analyze(network(), {"technique": "pruning/channel-l1", "amount": 0.5}, images).layers


def test_inputs_of_several_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.out = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.out((self.left(left) + self.right(right)).relu())

    inputs = (torch.randn(5, 4), torch.randn(5, 3))
    small = rarefy.transform(Two(), {"technique": "pruning/channel-l2", "amount": 0.5, "round_to": 1}, inputs)
    assert (small.left.weight.shape, small.right.weight.shape) == ((4, 4), (4, 3))
    task = InputsTask.of(*inputs, batch_size=2)
    assert [len(batch[0]) for batch in task.loader("test")] == [2, 2, 1]
    assert [x.shape for x in task.example_inputs(7)] == [(7, 4), (7, 3)]
    assert task.score(small, "validation") != task.score(small, "validation")
    with pytest.raises(RecipeError, match="no labels"):
        task.loss(small(*inputs), list(inputs))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("images", "not str"),
        ((), "at least one tensor"),
        ((torch.zeros(2, 1), 3), "input 1 has to be a tensor .* not int"),
        (torch.tensor(1.0), r"not shape \(\)"),
        (torch.zeros(0, 1, 8, 8), "not shape"),
        ((torch.zeros(2, 1), torch.zeros(3, 1)), "input 1 has 3 samples, and the first input 2"),
        (torch.full((1, 1, 8, 8), float("nan")), "NaN"),
    ],
)
def test_data_that_are_none_are_refused(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rarefy.transform(network(), {"technique": "pruning/channel-l1", "amount": 0.5}, data)


@pytest.mark.parametrize("treat", [rarefy.transform, rarefy.begin])
@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (None, {"technique": "pruning/channel-l1", "amount": 2}, RecipeError, "amount"),
        (None, {"technique": "pruning/nothing"}, RecipeError, "not installed"),
        (None, {"technique": "pruning/channel-taylor", "amount": 0.5}, RecipeError, "needs labels"),
        (None, {"technique": "quantization/gptq", "targets": {"include": ["x"]}}, StageError, "no layer matches"),
        (lambda m: m[0].weight.data.fill_(float("nan")), {"technique": "quantization/gptq"}, StageError, "NaN"),
        (lambda m: m.pop(0), {"technique": "quantization/gptq"}, StageError, "does not run on the inputs"),
    ],
)
def test_what_cannot_be_done_is_refused(
    treat: Callable[..., Any], change: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = network()
    if change is not None:
        change(model)
    with pytest.raises(error, match=message):
        treat(model, options, torch.randn(4, 1, 8, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: torch.compile(model), "OptimizedModule .* torch.compile"),
        (lambda model: nn.DataParallel(model), r"DataParallel .* `\.module`"),
        (lambda model: torch.jit.trace(model, torch.randn(1, 1, 8, 8)), "traced from"),
        (lambda model: type(model), "not a type; call the function"),
        (lambda model: model.state_dict(), "not a OrderedDict; .* load a state dict into the network"),
    ],
)
def test_what_is_no_network_is_refused(wrap: Callable[[nn.Module], Any], message: str, tmp_path: Path) -> None:
    model, images, step = wrap(network()), torch.randn(4, 1, 8, 8), "quantization/uniform"
    recipe = {"steps": [{"technique": step}]}
    calls: list[Callable[[], Any]] = [
        lambda: rarefy.transform(model, step, images),
        lambda: rarefy.begin(model, step, images),
        lambda: rarefy.analyze(model, step, images),
        lambda: rarefy.gain(model, images, original=network()),
        lambda: rarefy.export(model, tmp_path / "model.rarefy", images, original=network()),
        lambda: rarefy.compress(model, recipe, InputsTask.of(images), directory=tmp_path / "run"),
    ]
    for call in calls:
        with pytest.raises(StageError, match=message):
            call()


def test_training_by_labels_needs_labels_in_core_s_loop_alone() -> None:
    images, options = torch.randn(4, 1, 8, 8), {"technique": "pruning/magnitude", "amount": 0.5, "finetune": {}}
    with pytest.raises(RecipeError, match=r"^finetune: the objective 'task' needs labels"):
        rarefy.transform(network(), options, images)
    weights = [p for p in rarefy.begin(network(), options, images).finish().parameters() if p.dim() > 1]
    assert sum(int(weight.count_nonzero()) for weight in weights) == sum(weight.numel() for weight in weights) // 2


def test_a_technique_by_name_or_as_an_object(task: ClassificationTask) -> None:
    named = rarefy.transform(network(), "quantization/uniform", task)
    config = rarefy.load_recipe({"steps": [{"technique": "quantization/uniform"}]}).steps[0]
    assert same(named, rarefy.transform(network(), config, task))
    for options in ("quantization/uniform", {"technique": "quantization/uniform", "finetune": None}, config):
        assert len(list(rarefy.begin(network(), options, task).model.modules())) > len(list(network().modules()))


def test_progress_is_a_share() -> None:
    step = rarefy.begin(network(), {"technique": "pruning/magnitude", "amount": 0.5}, torch.randn(4, 1, 8, 8))
    with pytest.raises(StageError, match="from 0 to 1, not 17"):
        step.after_step(17)


def test_an_exported_file_is_opened_and_compared(tmp_path: Path) -> None:
    images, model = torch.randn(4, 1, 8, 8), network()
    small = rarefy.transform(model, {"technique": "quantization/kmeans", "bits": 3}, images)
    report = rarefy.export(small, tmp_path / "small.rarefy", images, original=model)
    assert report.bytes == (tmp_path / "small.rarefy").stat().st_size
    assert report.rate > 3
    assert same(rarefy.load(tmp_path / "small.rarefy", base=network), small)
    rarefy.export(small, tmp_path / "small.onnx", images, original=network, format={"format": "onnx", "opset": 18})
    assert (tmp_path / "small.onnx").exists()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    images, model = torch.randn(4, 1, 8, 8), network()
    with pytest.raises(RecipeError, match=r"end in '\.rarefy', not '\.onnx'"):
        rarefy.export(model, tmp_path / "model.onnx", images, original=model)
    with pytest.raises(RecipeError, match="Allowed: "):
        rarefy.export(model, tmp_path / "model.onnx", images, original=model, format="onx")
    with pytest.raises(StageError, match="does not run on the inputs"):
        rarefy.export(model, tmp_path / "model.rarefy", torch.randn(4, 3, 8, 8), original=model)
    assert not list(tmp_path.iterdir())


def test_an_analysis_prints_as_a_table() -> None:
    lines = str(rarefy.analyze(network(), "quantization/binary", torch.randn(2, 1, 8, 8))).splitlines()
    assert lines[0].split() == ["layer", "type", "what", "would", "happen", "figures", "or", "reason"]
    assert {line.split()[0] for line in lines[2:]} == {"0", "2", "5"}
    assert "left alone" in lines[-1]


def test_what_a_step_found_can_be_read(task: ClassificationTask) -> None:
    step = rarefy.begin(copy.deepcopy(network()), {"technique": "quantization/binary"}, task)
    assert {layer.name for layer in step.analysis.layers} == {"2"}
    assert {layer.name for layer in step.analysis.skipped} == {"0", "5"}
    step.finish()
    assert isinstance(step.notes, tuple)
    with pytest.raises(StageError, match="this step is finished"):
        step.finish()


class TestGain:
    def test_it_is_one_sentence_with_figures_behind_it(self, task: ClassificationTask) -> None:
        model = network()
        small = rarefy.transform(
            model, {"technique": "pruning/channel-l1", "per_layer": {"0": 0.5}, "round_to": 1}, task
        )
        found = rarefy.gain(small, task, original=model, batch_sizes=(1, 2), rounds=3)
        assert found.value("parameters") == 80 - 40 + 584 - 288 + 516
        assert found.value("compression_rate") == 1180 / 852
        assert {m.name for m in found.measurements} >= {
            "flops_rate",
            "peak_memory",
            "speed_up_rate@1",
            "speed_up_rate@2",
        }
        text = str(found).replace("\N{NO-BREAK SPACE}", " ")
        assert text.startswith("1.38\N{MULTIPLICATION SIGN} fewer parameters (1.18 K to 852), ")
        assert " at batch size 2, accuracy " in text
        assert text.endswith(" % on the validation split")
        assert f"{100 * task.score(model, 'validation'):.2f} % to {100 * task.score(small, 'validation'):.2f} %" in text

    def test_zeros_are_told_and_are_no_speed(self) -> None:
        model, images = network().train(), torch.randn(4, 1, 8, 8)
        sparse = rarefy.transform(model, {"technique": "pruning/magnitude", "amount": 0.5}, images)
        text = str(rarefy.gain(sparse, images, original=model, batch_sizes=()))
        assert text.replace("\N{NO-BREAK SPACE}", " ") == (
            "as many parameters (1.18 K), 49.2 % of them zero, as many FLOPs (24.6 K)"
        )
        assert model.training

    def test_more_of_something_is_told(self) -> None:
        model, images = network(), torch.randn(4, 1, 8, 8)
        text = str(rarefy.gain(model, images, original=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), batch_sizes=()))
        assert "4.54\N{MULTIPLICATION SIGN} more parameters (260 to 1.18" in text

    @pytest.mark.parametrize(
        ("options", "data", "error", "message"),
        [
            ({"rounds": 0}, torch.randn(4, 1, 8, 8), RecipeError, "rounds"),
            ({"batch_sizes": (0,)}, torch.randn(4, 1, 8, 8), RecipeError, "batch_sizes"),
            ({}, torch.randn(4, 3, 8, 8), StageError, "does not run on the inputs"),
        ],
    )
    def test_bad_input(self, options: Any, data: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            rarefy.gain(network(), data, original=network(), **options)
