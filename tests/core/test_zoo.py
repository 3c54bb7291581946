"""The zoo's networks have their published sizes and run."""

from __future__ import annotations

import pytest
import torch
from rarefy.errors import RecipeError
from rarefy.references import build_model
from rarefy.zoo import NAMES, ZOO
from rarefy_schemas import ModelReference


def parameters(name: str, **options: int) -> int:
    return sum(p.numel() for p in ZOO[name](**options).parameters())


def test_published_sizes() -> None:
    assert parameters("lenet300") == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    assert parameters("lenet5") == 431_080
    # He et al. 2016, table 6: 0.27 M, 0.46 M and 0.85 M for colour images
    assert [round(parameters(f"resnet{n}", in_channels=3) / 1e6, 2) for n in (20, 32, 56)] == [0.27, 0.46, 0.85]


@pytest.mark.parametrize("name", NAMES)
def test_every_network_runs_and_can_be_built_without_values(name: str) -> None:
    model = build_model(ModelReference(source=f"zoo:{name}")).eval()
    shapes = {"digits_cnn": (1, 8, 8), "mlp": (1, 8, 8), "lenet5": (1, 28, 28), "lenet300": (1, 28, 28)}
    images = torch.rand(2, *shapes.get(name, (3, 32, 32)))
    inputs = torch.randint(0, 50, (2, 12)) if name == "gpt_tiny" else images
    with torch.no_grad():
        out = model(inputs)
    assert out.shape == ((2, 12, out.shape[-1]) if name == "gpt_tiny" else (2, 10))
    assert torch.isfinite(out).all()
    with torch.device("meta"):
        empty = ZOO[name]()
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_a_causal_network_does_not_see_the_future() -> None:
    model = build_model(ModelReference(source="zoo:gpt_tiny")).eval()
    tokens = torch.randint(0, 50, (1, 10))
    changed = tokens.clone()
    changed[0, 7:] = 1
    with torch.no_grad():
        one, other = model(tokens), model(changed)
    assert torch.allclose(one[:, :7], other[:, :7], atol=1e-6)
    assert not torch.allclose(one[:, 7:], other[:, 7:])


def test_an_option_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match="has no option 'classes'"):
        build_model(ModelReference(source="zoo:lenet5", options={"classes": 3}))


def test_images_too_small_for_the_network() -> None:
    with pytest.raises(RecipeError, match="at least 16x16"):
        build_model(ModelReference(source="zoo:lenet5", options={"size": 12}))
    assert ZOO["lenet5"](size=16)(torch.rand(1, 1, 16, 16)).shape == (1, 10)
