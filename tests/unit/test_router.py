import math

import pytest
import torch

from loragen_agents.generator.router import Router, gumbel_top_k, keep_top_k, load_loss


def test_router_follows_equation_3_with_the_statistics_of_the_batch():
    torch.manual_seed(0)
    router = Router(hidden=5, width=7, experts=4).train()
    with torch.no_grad():
        router.norm.weight.uniform_(0.5, 2)
        router.norm.bias.uniform_(-1, 1)
    states = torch.randn(3, 6, 5)
    inner = states @ router.f1.weight.T + router.f1.bias
    routed = (inner * torch.sigmoid(inner)) @ router.f2.weight.T + router.f2.bias
    mean, variance = routed.mean((0, 1)), routed.var((0, 1), correction=0)
    expected = (routed - mean) / torch.sqrt(variance + router.norm.eps) * router.norm.weight + router.norm.bias
    torch.testing.assert_close(router(states), expected)


def test_in_evaluation_a_registry_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    router = Router(hidden=5, width=7, experts=4).train()
    for _ in range(3):
        router(torch.randn(2, 6, 5) * 3 + 1)
    states = torch.randn(3, 6, 5)
    in_training = router(states)[:1]
    router.eval()
    torch.testing.assert_close(router(states)[:1], router(states[:1]))
    assert not torch.allclose(router(states)[:1], in_training, atol=0.05)


def test_routers_per_layer_are_routers_of_their_own():
    torch.manual_seed(0)
    router = Router(hidden=5, width=7, experts=4, layers=6).eval()
    states = torch.randn(2, 6, 5)
    out = router(states)
    for layer in range(6):
        inner = states[:, layer] @ router.f1.weight[layer].T + router.f1.bias[layer]
        routed = (inner * torch.sigmoid(inner)) @ router.f2.weight[layer].T + router.f2.bias[layer]
        torch.testing.assert_close(out[:, layer], routed / math.sqrt(1 + router.norm.eps))


def test_keep_top_k_on_numbers_worked_out_by_hand():
    # e^0 : e^ln2 : e^ln3 : e^ln4 = 1 : 2 : 3 : 4, the two largest kept: 3/7 and 4/7.
    logits = torch.log(torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 1.0, 2.0]]))
    expected = torch.tensor([[0, 0, 3 / 7, 4 / 7], [4 / 6, 0, 0, 2 / 6]])
    torch.testing.assert_close(keep_top_k(logits, 2), expected)
    torch.testing.assert_close(keep_top_k(logits, 4), logits.softmax(-1))
    torch.testing.assert_close(keep_top_k(logits, 1), torch.tensor([[0.0, 0, 0, 1], [1, 0, 0, 0]]))


def test_keep_top_k_keeps_exactly_k_of_equal_ones():
    gates = keep_top_k(torch.zeros(5, 8), 2)
    assert (gates > 0).sum(-1).tolist() == [2] * 5
    torch.testing.assert_close(gates.sum(-1), torch.ones(5))


def test_keep_top_k_gradient_reaches_the_kept_logits():
    logits = torch.tensor([0.3, -1.0, 0.9], requires_grad=True)
    keep_top_k(logits, 2)[2].backward()
    # With two kept, G is a sigmoid of their difference.
    g = 1 / (1 + math.exp(-0.6))
    torch.testing.assert_close(logits.grad, torch.tensor([-g * (1 - g), 0.0, g * (1 - g)]))


def test_gumbel_without_noise_is_keep_top_k():
    logits = torch.randn(3, 8)
    assert torch.equal(gumbel_top_k(logits, 2, noise=False), keep_top_k(logits, 2))


def test_gumbel_noise_draws_experts_by_their_softmax():
    # The largest of logits + Gumbel noise falls on j with the probability softmax(logits)_j (the Gumbel-max identity).
    torch.manual_seed(0)
    logits = torch.log(torch.tensor([0.1, 0.2, 0.7])).expand(20000, 3)
    share = gumbel_top_k(logits, 1, noise=True).mean(0)
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.7]), atol=0.015, rtol=0)


def test_load_loss_on_numbers_worked_out_by_hand():
    # Loads 3 and 1: mean 2, standard deviation 1, so (1 / 2)² = 0.25.
    gates = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5]]])
    assert load_loss(gates, 0.01).item() == pytest.approx(0.0025)
    assert load_loss(torch.full((2, 3, 4), 0.25), 0.01).item() == pytest.approx(0.0, abs=1e-9)
    # As four experts with the loads 2, 0, 1, 1: mean 1, variance 0.5.
    assert load_loss(gates, 0.01, pools_per_layer=True).item() == pytest.approx(0.005)


def test_load_loss_pulls_towards_balance():
    logits = torch.tensor([[[2.0, 0.5, 0.0, -1.0]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(load_loss(keep_top_k(logits, 2), 1.0), logits)
    # Between the two experts in use, the busier one has to lose.
    assert gradient[0, 0, 0] > 0 > gradient[0, 0, 1]
