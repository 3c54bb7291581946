from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rarefy.errors import ArtifactError
from rarefy.modules import Base, build, describe, register_module
from rarefy.modules import kinds as kinds_module
from rarefy.modules.skeleton import skeleton
from rarefy.references import build_model
from rarefy.registry import Plugin
from rarefy_schemas import ModelReference, ModelSpec, ModuleSpec
from torch import nn
from torch.nn.utils import parametrize


class Attention(nn.Module):
    """A user's own class: nothing registers it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.sizes = [8, 8]
        self.window: int | None = None
        self.qkv = nn.Linear(8, 24)
        self.shortcut: nn.Module | None = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("positions", torch.arange(8).float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.shortcut is None else self.shortcut(x)
        return self.norm(self.qkv(x)[..., :8] + self.positions) / self.num_heads


def own() -> nn.Module:
    return nn.Sequential(Attention(), nn.ReLU(), Attention(), nn.Linear(8, 3))


def modules_of(model: nn.Module) -> list[tuple[str, type, str]]:
    return [(name, type(module), module.extra_repr()) for name, module in model.named_modules()]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(3, 4, bias=False),
    lambda: nn.Conv1d(4, 6, 3, stride=2, padding="valid", dilation=2, groups=2),
    lambda: nn.Conv2d(4, 8, (3, 1), stride=(2, 1), padding=(1, 0), groups=4, bias=False, padding_mode="reflect"),
    lambda: nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"),
    lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1, padding=1),
    lambda: nn.Conv3d(1, 2, (1, 2, 3)),
    lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=None, affine=False),
    lambda: nn.BatchNorm1d(4, track_running_stats=False),
    lambda: nn.LayerNorm((3, 4), elementwise_affine=False),
    lambda: nn.LayerNorm(4, bias=False),
    lambda: nn.GroupNorm(2, 4, eps=1e-7),
    lambda: nn.RMSNorm(4),
    lambda: nn.Embedding(7, 3, padding_idx=-1),
    lambda: nn.MultiheadAttention(8, 2, dropout=0.1, bias=False, batch_first=True, kdim=4, vdim=6),
    lambda: nn.MultiheadAttention(8, 4, add_bias_kv=True, add_zero_attn=True),
    lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True, proj_size=2),
    lambda: nn.GRU(3, 4, bias=False),
    lambda: nn.RNN(3, 4, nonlinearity="relu"),
    lambda: nn.LSTMCell(3, 4, bias=False),
    lambda: nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    lambda: nn.AdaptiveAvgPool2d((None, 2)),
    lambda: nn.AvgPool2d(2, count_include_pad=False),
    lambda: nn.PReLU(4),
    lambda: nn.GELU(approximate="tanh"),
    lambda: nn.LeakyReLU(0.3, inplace=True),
    lambda: nn.Hardtanh(-float("inf"), 6.0),
    lambda: nn.Dropout(0.25),
    lambda: nn.Flatten(2),
    lambda: nn.Unflatten(1, (2, 2)),
    lambda: nn.Upsample(scale_factor=2.0, mode="nearest"),
    lambda: nn.PixelShuffle(2),
    lambda: nn.Softmax(dim=-1),
    lambda: nn.ZeroPad2d((1, 2, 0, 0)),
    lambda: nn.Bilinear(2, 3, 4),
    lambda: nn.Identity(),
    lambda: nn.Sequential(nn.Sequential(), nn.ModuleDict({"a": nn.ReLU(), "b": nn.ModuleList([nn.Linear(1, 2)])})),
]


@pytest.mark.parametrize("make", LAYERS, ids=lambda make: type(make()).__name__)
def test_classes_of_torch_come_back_from_plain_data(make: Callable[[], nn.Module]) -> None:
    layer = make()
    spec = describe(layer, Base(make))
    built = build(ModelSpec.model_validate_json(spec.model_dump_json()))
    assert modules_of(built) == modules_of(layer)
    assert shapes_of(built) == shapes_of(layer)
    assert all(tensor.is_meta for tensor in built.state_dict().values())
    plain = {key: value for key, value in vars(layer).items() if isinstance(value, int | float | str | tuple)}
    assert {key: vars(built)[key] for key in plain} == plain


def test_an_unchanged_model_differs_in_nothing() -> None:
    spec = describe(own(), Base(own))
    assert spec == ModelSpec()


def test_replaced_layers_and_changed_attributes_are_the_difference() -> None:
    model = own()
    model[0].qkv = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 24))
    model[0].num_heads = 2
    model[2].norm = nn.Identity()
    model[2].sizes = [8, 4]
    model[2].window = 7
    model[3] = nn.Linear(8, 3, bias=False)
    spec = describe(model, Base(own))
    assert set(spec.modules) == {"0.qkv", "2.norm", "3"}
    assert spec.attributes == {"0": {"num_heads": 2}, "2": {"sizes": [8, 4], "window": 7}}
    built = build(spec, own)
    assert modules_of(built) == modules_of(model)
    assert built[2].sizes == [8, 4]


def test_a_part_set_to_none_is_gone_in_the_built_model_too() -> None:
    model = own()
    model[2].shortcut = None
    built = build(describe(model, Base(own)), own)
    assert built[2].shortcut is None
    assert shapes_of(built) == shapes_of(model)


def test_a_pruned_layer_is_described_by_its_attributes() -> None:
    model = own()
    model[0].qkv.weight = nn.Parameter(model[0].qkv.weight[:20])
    model[0].qkv.bias = nn.Parameter(model[0].qkv.bias[:20])
    with pytest.raises(ArtifactError, match=r"'0\.qkv'.*\(20, 8\).*\(24, 8\).*out_features"):
        describe(model, Base(own))
    model[0].qkv.out_features = 20
    assert describe(model, Base(own)).modules["0.qkv"].arguments == {"in_features": 8, "out_features": 20}


def test_layers_inside_composite_classes_of_torch_are_found() -> None:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    model = make()
    model.layers[1].linear1 = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 16))
    spec = describe(model, Base(make))
    assert list(spec.modules) == ["layers.1.linear1"]
    assert modules_of(build(spec, make)) == modules_of(model)


def test_ties_come_back() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    spec = describe(make(), Base(make))
    assert spec.ties == {"1.weight": "0.weight"}
    built = build(spec)
    assert built[1].weight is built[0].weight


def test_one_module_of_the_base_may_become_two() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(Attention(), nn.Linear(4, 4), nn.ReLU())
        model.append(model[1])
        return model

    model = make()
    model[3] = copy.deepcopy(model[1])
    built = build(describe(model, Base(make)), make)
    assert built[3] is not built[1]
    assert built[3].weight is not built[1].weight


def test_a_base_with_a_registered_source_stays_the_base() -> None:
    reference = ModelReference(source="zoo:digits_cnn")

    def make() -> nn.Module:
        return build_model(reference)

    spec = describe(make(), Base(make, reference))
    assert spec == ModelSpec(base=reference)


def test_a_network_of_registered_classes_needs_nobodys_code() -> None:
    reference = ModelReference(source="./mine.py:build")
    spec = describe(nn.Sequential(nn.Linear(2, 3)), Base(lambda: nn.Sequential(nn.Linear(2, 9)), reference))
    assert spec.base is None
    assert shapes_of(build(spec)) == {"0.weight": (3, 2), "0.bias": (3,)}


def test_a_difference_cannot_be_built_without_its_base() -> None:
    with pytest.raises(ArtifactError, match="`base`"):
        build(describe(own(), Base(own)))


def test_an_unregistered_replacement_is_refused_with_the_way_to_register_it() -> None:
    class Strange(nn.Linear):
        pass

    model = own()
    model[3] = Strange(8, 3)
    with pytest.raises(ArtifactError, match=r"'3'.*Strange is not registered.*register_module"):
        describe(model, Base(own))


def test_what_no_file_can_hold_is_refused() -> None:
    hooked = own()
    hooked[3].register_forward_hook(lambda *_: None)
    patched = own()
    patched[1].forward = lambda x: x
    masked = own()
    masked[3].register_buffer("mask", torch.ones(3, 8))
    halved = own()
    parametrize.register_parametrization(halved[3], "weight", nn.ReLU())
    lacking = own()
    del lacking[0].qkv
    for model, word in [(hooked, "hook"), (patched, "forward"), (masked, "mask"), (halved, "parametrizations")]:
        with pytest.raises(ArtifactError, match=word):
            describe(model, Base(own))
    assert describe(lacking, Base(own)).attributes == {"0": {"qkv": None}}


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(ArtifactError, match="run the model once"):
        skeleton(Base(lambda: nn.Sequential(nn.LazyLinear(3))))


def test_a_builder_that_cannot_run_on_meta_runs_on_the_cpu() -> None:
    def make() -> nn.Module:
        model = own()
        model.append(nn.Dropout(torch.linspace(0, 1, 3)[1].item()))
        return model

    assert skeleton(Base(make))[4].p == 0.5


def test_tensors_that_are_no_buffers_keep_their_values() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = [torch.tensor(3.0)]

    assert float(skeleton(Base(Scaled)).scales[0]) == 3.0


def test_the_skeleton_is_a_copy_and_leaves_the_generator_alone() -> None:
    model = own()
    before = torch.get_rng_state()
    made = skeleton(Base(lambda: model))
    skeleton(Base(own))
    assert torch.equal(before, torch.get_rng_state())
    assert made is not model
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_a_base_that_builds_no_module_is_refused() -> None:
    with pytest.raises(ArtifactError, match="dict"):
        skeleton(Base(dict))  # type: ignore[arg-type]


@pytest.fixture
def clean_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds_module, "_BY_CLASS", dict(kinds_module._BY_CLASS))
    monkeypatch.setattr(kinds_module, "_BY_NAME", dict(kinds_module._BY_NAME))
    kinds_module._distribution.cache_clear()


@pytest.mark.usefixtures("clean_kinds")
def test_a_registered_class_is_saved_by_its_arguments() -> None:
    @register_module
    class Scale(nn.Module):
        def __init__(self, features: int, bias: bool = True, power: float = 2.0) -> None:
            super().__init__()
            self.features, self.power = features, power
            self.weight = nn.Parameter(torch.ones(features))
            self.register_parameter("bias", nn.Parameter(torch.zeros(features)) if bias else None)

    spec = describe(nn.Sequential(Scale(3, bias=False)), Base(nn.Identity))
    assert spec.root is not None
    assert spec.root.children["0"].arguments == {"features": 3, "bias": False}
    assert shapes_of(build(spec)) == {"0.weight": (3,)}


@pytest.mark.usefixtures("clean_kinds")
def test_a_class_may_say_itself_how_it_becomes_data() -> None:
    class Table(nn.Module):
        def __init__(self, *rows: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(len(rows), max(rows)))
            self.rows = rows

    with pytest.raises(ArtifactError, match="Table"):
        describe(Table(1, 2), Base(nn.Identity))
    register_module(
        to_spec=lambda module: {"rows": module.rows}, from_spec=lambda arguments: Table(*arguments["rows"])
    )(Table)
    assert shapes_of(build(describe(Table(1, 5), Base(nn.Identity)))) == {"table": (2, 5)}


@pytest.mark.usefixtures("clean_kinds")
def test_a_class_that_does_not_come_back_is_refused_at_once() -> None:
    @register_module
    class Doubling(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = 2 * width

    with pytest.raises(ArtifactError, match="does not come back"):
        describe(nn.Sequential(Doubling(3)), Base(lambda: nn.Sequential(nn.ReLU())))


PLUGIN = """
import sys
from torch import nn
from rarefy.modules import register_module
sys.imported_by_test = True
@register_module
class Ring(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size
class Unregistered(nn.Module):
    pass
"""


@pytest.fixture
def ring_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_kinds: None) -> Any:
    """A package with a registered class, which an installed plugin may or may not own."""
    package = tmp_path / "ringpackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rings.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    plugin = Plugin("ring", "rarefy-ring", "1.2", "ringpackage", "loaded")
    monkeypatch.setattr(kinds_module, "discover", lambda: [plugin])
    yield lambda plugins: monkeypatch.setattr(kinds_module, "get", lambda: types.SimpleNamespace(plugins=plugins))
    for name in ("ringpackage", "ringpackage.rings"):
        sys.modules.pop(name, None)
    vars(sys).pop("imported_by_test", None)


RING = ModelSpec(root=ModuleSpec(kind="ringpackage.rings.Ring", arguments={"size": 3}, distribution="rarefy-ring==1.2"))


def test_a_class_of_an_installed_plugin_is_imported_and_named_with_its_distribution(ring_plugin: Any) -> None:
    ring_plugin([Plugin("ring", "rarefy-ring", "1.2", "ringpackage", "loaded")])
    built = build(RING)
    assert built.size == 3
    assert describe(built, Base(nn.Identity)) == RING


@pytest.mark.parametrize("state", [None, "blocked", "failed"])
def test_without_its_plugin_nothing_is_imported_and_the_package_to_install_is_named(
    ring_plugin: Any, state: Any
) -> None:
    ring_plugin([] if state is None else [Plugin("ring", "rarefy-ring", "1.2", "ringpackage", state)])
    with pytest.raises(ArtifactError, match=r"pip install rarefy-ring.*1\.2"):
        build(RING)
    assert "ringpackage.rings" not in sys.modules


@pytest.mark.parametrize(
    "kind",
    [
        "os.system",
        "builtins.eval",
        "torch.nn.Transformer",
        "torch.nn.functional.relu",
        "torch.hub.load",
        "ringpackage.__main__.Ring",
        "ringpackage.rings.Unregistered",
        "ringpackage.rings.sys",
        "ringpackage.nothing.Ring",
        "ringpackage",
        "Ring",
        "",
        "../x",
        "ringpackage/rings.Ring",
    ],
)
def test_only_registered_classes_are_ever_constructed(ring_plugin: Any, kind: str) -> None:
    ring_plugin([Plugin("ring", "rarefy-ring", "1.2", "ringpackage", "loaded")])
    with pytest.raises(ArtifactError):
        build(ModelSpec(root=ModuleSpec(kind=kind)))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("Linear", {"in_features": 10**6, "out_features": 10**6, "device": "cpu"}),
        ("Linear", {"in_features": 2, "out_features": 2, "dtype": "float64"}),
        ("Linear", {"in_features": 2**60, "out_features": 2**60}),
        ("Linear", {"in_features": -1, "out_features": 2}),
        ("Linear", {"in_features": {"float": "2"}, "out_features": 2}),
        ("Linear", {"in_features": {"x": 1}, "out_features": 2}),
        ("Linear", {"in_features": "many", "out_features": 2}),
        ("Linear", {"unknown": 1}),
        ("Embedding", {"num_embeddings": 2, "embedding_dim": 2, "_weight": [1]}),
        ("LSTM", {"input_size": 1, "hidden_size": 1, "num_layers": 10**9}),
        ("Sequential", {"0": 1, "device": "cpu"}),
    ],
)
def test_hostile_arguments_are_refused(kind: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        build(ModelSpec(root=ModuleSpec(kind=f"torch.nn.{kind}", arguments=arguments)))


LINEAR = ModuleSpec(kind="torch.nn.Linear", arguments={"in_features": 2, "out_features": 2})


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(modules={"nowhere.x": LINEAR}),
        ModelSpec(modules={"0.forward": LINEAR}),
        ModelSpec(modules={"0._parameters": LINEAR}),
        ModelSpec(modules={"0.a b": LINEAR}),
        ModelSpec(modules={"0.": LINEAR}),
        ModelSpec(attributes={"0": {"forward": 1}}),
        ModelSpec(attributes={"0": {"__class__": 1}}),
        ModelSpec(attributes={"0": {"_modules": 1}}),
        ModelSpec(attributes={"0": {"training": True}}),
        ModelSpec(attributes={"0": {"qkv": 3}}),
        ModelSpec(attributes={"nowhere": {"num_heads": 3}}),
        ModelSpec(attributes={"0": {"num_heads": {"evil": 1}}}),
        ModelSpec(ties={"3.weight": "3.nothing"}),
        ModelSpec(ties={"3.nothing": "3.weight"}),
        ModelSpec(ties={"3.weight": "0.positions"}),
        ModelSpec(root=ModuleSpec(kind="torch.nn.Linear", arguments=LINEAR.arguments, children={"a": LINEAR})),
        ModelSpec(root=ModuleSpec(kind="torch.nn.Sequential", children={"forward": LINEAR})),
        ModelSpec(root=ModuleSpec(kind="torch.nn.Sequential", children={"a.b": LINEAR})),
    ],
)
def test_a_hostile_spec_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(ArtifactError):
        build(spec, own)
