import pytest
import torch
from torch import nn

from loragen_agents.errors import ModelLoadError
from loragen_agents.generator.experts import DirectProjection, ExpertPool, FFNShape
from tests.tiny_models import SIZES, tiny_model

SHAPE = FFNShape(layers=3, hidden=5, intermediate=7)
SIDES = {"gate_proj": (5, 7), "up_proj": (5, 7), "down_proj": (7, 5)}


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
def test_shape_is_read_off_the_model(family):
    expected = FFNShape(SIZES["num_hidden_layers"], SIZES["hidden_size"], SIZES["intermediate_size"])
    assert FFNShape.of(tiny_model(family)) == expected


def test_layers_of_different_width_are_refused():
    model = tiny_model()
    model.model.layers[1].mlp.gate_proj = nn.Linear(SIZES["hidden_size"], 48)
    with pytest.raises(ModelLoadError, match="differ in shape"):
        FFNShape.of(model)


@pytest.mark.parametrize("per_layer", [False, True])
def test_pool_follows_equation_8(per_layer):
    torch.manual_seed(0)
    pool = ExpertPool(SHAPE, experts=4, rank=2, per_layer=per_layer)
    randomise(pool)
    gates = torch.rand(2, 3, 4)
    matrices = pool(gates)
    for projection, (size_in, size_out) in SIDES.items():
        a, b = matrices[projection]
        assert a.shape == (2, 3, 2, size_in) and b.shape == (2, 3, size_out, 2)
        for registry in range(2):
            for layer in range(3):
                experts_a, experts_b = pool.a[projection], pool.b[projection]
                if per_layer:
                    experts_a, experts_b = experts_a[layer], experts_b[layer]
                g = gates[registry, layer]
                torch.testing.assert_close(a[registry, layer], sum(g[j] * experts_a[j] for j in range(4)))
                torch.testing.assert_close(b[registry, layer], sum(g[j] * experts_b[j] for j in range(4)))


@pytest.mark.parametrize("per_layer", [False, True])
def test_pool_starts_with_updates_of_zero_and_experts_that_differ(per_layer):
    pool = ExpertPool(SHAPE, experts=4, rank=2, per_layer=per_layer)
    assert all(not b.any() for b in pool.b.values())
    a = pool.a["up_proj"].flatten(0, -3)
    assert len(a) == (12 if per_layer else 4) and len(a.flatten(1).unique(dim=0)) == len(a)


def test_direct_projection_follows_its_formula():
    torch.manual_seed(0)
    direct = DirectProjection(hidden=6, width=4, shape=SHAPE, rank=2)
    randomise(direct)
    states = torch.randn(2, 3, 6)
    matrices = direct(states)
    inner = states[1, 2] @ direct.inner.weight.T + direct.inner.bias
    inner = inner * torch.sigmoid(inner)
    for projection, (size_in, size_out) in SIDES.items():
        a, b = matrices[projection]
        for given, side, shape in ((a, "a", (2, size_in)), (b, "b", (size_out, 2))):
            weight, bias = (direct.get_parameter(f"{side}.{projection}.{part}") for part in ("weight", "bias"))
            torch.testing.assert_close(given[1, 2], (weight @ inner + bias).view(shape))


def test_direct_projection_starts_with_updates_of_zero():
    a, b = DirectProjection(hidden=6, width=4, shape=SHAPE, rank=2)(torch.randn(1, 3, 6))["down_proj"]
    assert a.abs().max() > 0.05 and not b.any()
