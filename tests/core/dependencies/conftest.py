"""The oracle: what has to hold for the dependencies of any model, whatever they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from rarefy.dependencies import Dependencies, Group, cut, find_dependencies, mask
from rarefy.dependencies.groups import tensors
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

Oracle = Callable[..., Dependencies]
Place = tuple[str, int, int]
Coarser = Callable[[nn.Module], bool]


@pytest.fixture(autouse=True)
def no_rule_fails(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail when the rule of an operator failed, which users see as a warning and a pinned group."""
    yield
    if request.node.name == "test_a_rule_that_fails_pins":
        return
    assert not [r for r in caplog.get_records("call") if r.getMessage().startswith("the rule for the operator")]


@pytest.fixture
def summary() -> Callable[[Dependencies], tuple[list[str], dict[str, str]]]:
    """Return a function that gives what is free and what is pinned other than by the model's inputs and outputs."""
    return summarise


def summarise(deps: Dependencies) -> tuple[list[str], dict[str, str]]:
    free = []
    for group in deps.groups:
        words = [f"{stem(group)}:{group.units}"]
        words += [] if group.kind == "channel" else [group.kind]
        words += ["statistics"] if group.changes_statistics else []
        free.append(" ".join(words))
    pinned: dict[str, str] = {}
    for group in deps.pinned:
        if not str(group.pinned).endswith(("model's output", "model's inputs or a constant")):
            pinned[stem(group)] = f"{pinned.get(stem(group), '')}{group.pinned}\n"
    return sorted(free), pinned


def stem(group: Group) -> str:
    """Return the name of a group without its number among those of one tensor."""
    return group.name.partition("~")[0]


@pytest.fixture
def oracle() -> Oracle:
    """Return a function that checks every cut of a model and returns its dependencies."""
    return check


def check(
    model: nn.Module,
    *inputs: Any,
    seed: int = 0,
    stir: bool = True,
    statistics: bool = True,
    coarser: Coarser = lambda compact: False,
) -> Dependencies:
    """Find the dependencies of `model` in double precision and try random halves of all groups.

    `stir` replaces all values at random; `statistics` compares outputs of groups that change statistics too, with
    statistics taken over what is not zero; `coarser` says of a smaller model that it may couple its channels
    otherwise, since its sizes happen to be equal or to divide each other.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    inputs = tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs)
    if stir:
        randomise_(model, generator)
    before = state(model, inputs)
    deps = find_dependencies(model, inputs)
    for chosen in rounds(deps, generator):
        for names in ([n for n in chosen if not deps[n].changes_statistics], chosen):
            removal = {name: some_units(deps[name], generator) for name in names}
            if removal:
                live = names is chosen
                verify(model, inputs, deps, removal, live=live, equal=statistics or not live, coarser=coarser)
    assert_same_state(before, state(model, inputs))
    return deps


def randomise_(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and every statistic values that make each channel count."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise / (parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 2))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        for module in model.modules():
            norm = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | nn.modules.batchnorm._BatchNorm)
            if norm and module.weight is not None:
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)


def some_units(group: Group, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(group.units, generator=generator)[: max(1, group.units // 2)]


def rounds(deps: Dependencies, generator: torch.Generator) -> Iterator[list[str]]:
    """Yield sets of group names without two that cut the same positions of a tensor, until each was in one."""
    waiting = [deps.groups[i].name for i in torch.randperm(len(deps.groups), generator=generator).tolist()]
    while waiting:
        taken: set[Place] = set()
        now = []
        for name in waiting:
            places = {(m.tensor, m.dim, i) for m in deps[name].members for i in m.indices.flatten().tolist()}
            if not places & taken:
                now.append(name)
                taken |= places
        waiting = [name for name in waiting if name not in now]
        yield now


def verify(
    model: nn.Module,
    inputs: tuple[Any, ...],
    deps: Dependencies,
    removal: dict[str, torch.Tensor],
    *,
    live: bool = False,
    equal: bool = True,
    coarser: Coarser = lambda compact: False,
) -> nn.Module:
    """Check one cut and return it; with `live` statistics are taken over what is not zero."""
    compact = cut(model, deps, removal)
    masked = mask(model, deps, removal)
    assert {n: t.shape for n, t in tensors(masked).items()} == {n: t.shape for n, t in tensors(model).items()}
    gone = removed_places(deps, removal)
    for name, tensor in tensors(compact).items():
        old = tensors(model)[name]
        for dim in range(old.dim()):
            lost = len({place for place in gone if place[:2] == (name, dim)})
            assert tensor.shape[dim] == old.shape[dim] - lost, (name, dim)
        assert tensor.requires_grad == old.requires_grad
        assert type(tensor) is type(old)
    run(compact, inputs, live=False)
    if equal:
        # zeros that have other causes, such as a ReLU, are in both
        given, wanted = run(compact, inputs, live=live), run(masked, inputs, live=live)
        if not all(leaf.isfinite().all() for leaf in tree_leaves(wanted) if isinstance(leaf, torch.Tensor)):
            # a weight of norm zero has no direction, one of norm almost zero has
            wanted = run(mask(model, deps, removal, 1e-12), inputs, live=live)
        assert_equal(given, wanted)
    check_attributes(compact)
    exact = all(deps[name].units - len(units) > 1 for name, units in removal.items()) and not coarser(compact)
    check_again(compact, inputs, deps, gone, exact=exact)
    return compact


def assert_equal(given: Any, wanted: Any) -> None:
    for one, other in zip(tree_leaves(given), tree_leaves(wanted), strict=True):
        if isinstance(one, torch.Tensor):
            scale = float(other.abs().max()) + 1 if other.numel() else 1
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8 * scale)
        else:
            assert one == other


def removed_places(deps: Dependencies, removal: dict[str, torch.Tensor]) -> set[Place]:
    return {
        (m.tensor, m.dim, i)
        for name, units in removal.items()
        for m in deps[name].members
        for i in m.indices[units].flatten().tolist()
    }


def check_again(
    compact: nn.Module, inputs: tuple[Any, ...], deps: Dependencies, gone: set[Place], *, exact: bool
) -> None:
    """Check that the compact model can be read again and, if `exact`, couples what is left as the whole model did."""
    found = find_dependencies(compact, inputs)
    shapes = {name: t.shape for name, t in tensors(compact).items()}
    for group in (*found.groups, *found.pinned):
        for member in group.members:
            assert member.indices.min() >= 0
            assert member.indices.max() < shapes[member.tensor][member.dim]
    numbers: dict[tuple[str, int], dict[int, int]] = {}
    for name, dim in {place[:2] for place in gone}:
        length = shapes[name][dim] + len({p for p in gone if p[:2] == (name, dim)})
        kept = [i for i in range(length) if (name, dim, i) not in gone]
        numbers[name, dim] = {old: new for new, old in enumerate(kept)}
    new, old = units_of(found, shapes, {}), units_of(deps, shapes, numbers)
    if exact:
        assert new == old, f"appeared: {[sorted(unit) for unit in new - old]}, lost: {[sorted(u) for u in old - new]}"


def units_of(
    deps: Dependencies, shapes: dict[str, torch.Size], numbers: dict[tuple[str, int], dict[int, int]]
) -> set[frozenset[Place]]:
    """Return the units as sets of places by their new numbers, without axes that are left with one place."""
    units = set()
    for group in (*deps.groups, *deps.pinned):
        for unit in range(group.units):
            places = set()
            for m in group.members:
                new = numbers.get((m.tensor, m.dim))
                if shapes[m.tensor][m.dim] > 1:
                    places |= {
                        (m.tensor, m.dim, i if new is None else new[i])
                        for i in m.indices[unit].tolist()
                        if new is None or i in new
                    }
            units.add(frozenset(places))
    return units - {frozenset()}


def check_attributes(model: nn.Module) -> None:
    """Check that what torch's layers say of themselves is true of their tensors."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.modules.conv._ConvNd):
            given, taken = module.out_channels, module.in_channels
            shape = (taken, given // module.groups) if module.transposed else (given, taken // module.groups)
            assert tuple(module.weight.shape[:2]) == shape
            assert given % module.groups == taken % module.groups == 0
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            vector = module.weight if module.weight is not None else module.running_mean
            assert vector is None or module.num_features == len(vector)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
            assert tuple(module.normalized_shape) == tuple(module.weight.shape)
        elif isinstance(module, nn.GroupNorm) and module.weight is not None:
            assert module.num_channels == len(module.weight)
            assert module.num_channels % module.num_groups == 0
        elif isinstance(module, nn.Embedding):
            assert tuple(module.weight.shape) == (module.num_embeddings, module.embedding_dim)
        elif isinstance(module, nn.PReLU):
            assert module.num_parameters == len(module.weight)
        elif isinstance(module, nn.RNNBase):
            assert module.hidden_size == module.weight_hh_l0.shape[0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
            assert module.input_size == module.weight_ih_l0.shape[1]
        elif isinstance(module, nn.RNNCellBase):
            assert module.weight_ih.shape[1] == module.input_size
            assert module.weight_hh.shape[1] == module.hidden_size


def run(model: nn.Module, inputs: tuple[Any, ...], *, live: bool) -> Any:
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.no_grad())
        torch.manual_seed(0)
        if live:
            fast = torch.backends.mha.get_fastpath_enabled()
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
            torch.backends.mha.set_fastpath_enabled(False)
            stack.enter_context(_Live())
        return model.eval()(*copy.deepcopy(inputs))


def state(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Return everything that an analysis could change."""
    plain = int | float | str | bool | tuple | list | type(None)
    return {
        "tensors": {
            n: (id(t), t.detach().clone(), t._version, t.requires_grad, t.grad) for n, t in tensors(model).items()
        },
        "modules": {n: id(m) for n, m in model.named_modules(remove_duplicate=False)},
        "attributes": {
            n: {k: copy.copy(v) for k, v in vars(m).items() if isinstance(v, plain)} for n, m in model.named_modules()
        },
        "hooks": {
            n: [len(v) for k, v in vars(m).items() if "hooks" in k and hasattr(v, "__len__")]
            for n, m in model.named_modules()
        },
        "random": torch.random.get_rng_state(),
        "inputs": [leaf.clone() for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)],
        "backends": (
            torch.backends.mha.get_fastpath_enabled(),
            torch._C._get_mkldnn_enabled(),
            torch.is_grad_enabled(),
        ),
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    old, new = before.pop("tensors"), after.pop("tensors")
    assert old.keys() == new.keys()
    for name, (identity, value, *rest) in old.items():
        other, now, *others = new[name]
        assert identity == other
        assert torch.equal(value, now)
        assert rest == others
    assert torch.equal(before.pop("random"), after.pop("random"))
    assert all(map(torch.equal, before.pop("inputs"), after.pop("inputs")))
    assert before == after


class _Live(TorchFunctionMode):
    """Take statistics over the channels that are not zero everywhere, as in a model that does not have them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _LIVE.get(func)
        return (rule or func)(*args, **(kwargs or {}))


def _alive(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Return which places along `dims` are not zero for all others, broadcast to `x`."""
    others = [d for d in range(x.dim()) if d not in dims]
    alive = (x != 0).any(dim=others[0], keepdim=True) if others else x != 0
    for d in others[1:]:
        alive = alive.any(dim=d, keepdim=True)
    return alive.expand(x.shape)


def _dims(x: torch.Tensor, dim: Any) -> tuple[int, ...]:
    given = range(x.dim()) if dim is None else dim if isinstance(dim, tuple | list) else (dim,)
    return tuple(d % x.dim() for d in given)


def _mean(x: torch.Tensor, dim: Any = None, keepdim: bool = False, **rest: Any) -> torch.Tensor:
    dims = _dims(x, dim)
    alive = _alive(x, dims)
    return (x * alive).sum(dims, keepdim=keepdim) / alive.sum(dims, keepdim=keepdim).clamp_min(1)


def _normalised(x: torch.Tensor, dims: tuple[int, ...], eps: float, centre: bool = True) -> torch.Tensor:
    alive = _alive(x, dims)
    count = alive.sum(dims, keepdim=True).clamp_min(1)
    mean = x.sum(dims, keepdim=True) / count if centre else 0
    centred = (x - mean) * alive
    return centred / ((centred**2).sum(dims, keepdim=True) / count + eps).sqrt()


def _layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> torch.Tensor:
    out = _normalised(x, tuple(range(x.dim() - len(shape), x.dim())), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _rms_norm(x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> torch.Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    out = _normalised(x, tuple(range(x.dim() - len(shape), x.dim())), eps, centre=False)
    return out if weight is None else out * weight


def _group_norm(x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> torch.Tensor:
    split = x.reshape(len(x), groups, x.shape[1] // groups, -1)
    alive = (split != 0).any(0).any(-1)[None, :, :, None].expand(split.shape)
    count = alive.sum((2, 3), keepdim=True).clamp_min(1)
    centred = (split - split.sum((2, 3), keepdim=True) / count) * alive
    out = (centred / ((centred**2).sum((2, 3), keepdim=True) / count + eps).sqrt()).reshape(x.shape)
    shape = [1, -1] + [1] * (x.dim() - 2)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


def _softmax(x: torch.Tensor, dim: int, *rest: Any, **more: Any) -> torch.Tensor:
    return torch.ops.aten._softmax(x.masked_fill(~_alive(x, _dims(x, dim)), -torch.inf), dim, False)


def _extreme(x: torch.Tensor, dim: Any = None, keepdim: bool = False) -> torch.Tensor:
    return torch.ops.aten.amax(x.masked_fill(~_alive(x, _dims(x, dim)), -torch.inf), _dims(x, dim), keepdim)


def _attention(q: Any, k: Any, v: Any, *rest: Any, scale: Any = None, **more: Any) -> torch.Tensor:
    if scale is None:
        scale = int(_alive(q, (q.dim() - 1,))[..., :1, :].flatten(0, -2)[0].sum()) ** -0.5
    return _PLAIN_ATTENTION(q, k, v, *rest, scale=scale, **more)


_PLAIN_ATTENTION = F.scaled_dot_product_attention
_LIVE: dict[Any, Any] = {
    torch.mean: _mean,
    torch.Tensor.mean: _mean,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.softmax: _softmax,
    F.softmax: _softmax,
    torch.Tensor.softmax: _softmax,
    torch.amax: _extreme,
    torch.Tensor.amax: _extreme,
    F.scaled_dot_product_attention: _attention,
}
