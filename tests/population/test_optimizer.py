from collections.abc import Callable

import pytest
import torch

from lightning_bsl.population import PopulationAdam

LRS = [0.1, 0.1, 0.03, 0.1]  # the last is no neighbour of its like


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.0, 0.99)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_each_replica_moves_as_by_adam_alone(betas: tuple[float, float], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    shapes, eps = [(3, 2), (5,)], 1e-3
    stacked = [torch.nn.Parameter(torch.randn(len(LRS), *shape, dtype=dtype)) for shape in shapes]
    optimizer = PopulationAdam(stacked, torch.tensor(LRS, dtype=torch.float64), betas, eps)
    alone = [[torch.nn.Parameter(each[i].detach().clone()) for each in stacked] for i in range(len(LRS))]
    adams = [torch.optim.Adam(parameters, lr, betas, eps) for parameters, lr in zip(alone, LRS)]
    left = list(range(len(LRS)))
    for step in range(12):
        if step == 5:  # the second leaves
            rows = torch.tensor([0, 2, 3])
            left = rows.tolist()
            for each in stacked:
                each.data = each.data[rows]
            optimizer.keep(rows)
        for each in stacked:
            each.grad = torch.randn_like(each)
        for row, i in enumerate(left):
            for parameter, each in zip(alone[i], stacked):
                assert each.grad is not None
                parameter.grad = each.grad[row].clone()
            adams[i].step()
        optimizer.step()
        for row, i in enumerate(left):
            for parameter, each in zip(alone[i], stacked):
                torch.testing.assert_close(each[row], parameter, rtol=tolerance, atol=tolerance)


def test_one_replica_after_the_other_moves_the_same() -> None:
    torch.manual_seed(0)
    optimizers, weights = [], []
    for _ in range(2):
        weights.append([torch.nn.Parameter(torch.ones(len(LRS), *shape)) for shape in ((3, 2), (5,))])
        optimizers.append(PopulationAdam(weights[-1], torch.tensor(LRS)))
    for _ in range(3):
        gradients = [torch.randn_like(each) for each in weights[0]]
        for each, gradient in zip(weights[0], gradients):
            each.grad = gradient
        for row, update in enumerate(optimizers[1].updates()):
            update([gradient[row] for gradient in gradients])
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(*weights):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert optimizers[1].param_groups[0]["step"] == 3


@pytest.mark.parametrize("by_replica", [False, True])
def test_a_parameter_without_gradient_stays(by_replica: bool) -> None:
    used, unused = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer = PopulationAdam([used, unused], torch.tensor([0.1, 0.2]))
    if by_replica:
        for update in optimizer.updates():
            update([torch.ones(3), None])
    else:
        used.grad = torch.ones(2, 3)
    optimizer.step()
    assert bool((unused == 1).all()) and bool((used < 1).all())


def test_a_closure_is_called() -> None:
    stacked = torch.nn.Parameter(torch.ones(1, 2))
    optimizer = PopulationAdam([stacked], torch.tensor([0.1]))

    def closure() -> torch.Tensor:
        loss = stacked.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    assert optimizer.step(closure) == 2


@pytest.mark.parametrize("lr, betas, message", [
    (torch.tensor(0.1), (0.9, 0.999), "give a vector"),
    (torch.tensor([0.1]), (0.9, 1.0), "below 1"),
    (torch.tensor([0.1]), (-0.1, 0.9), "at least 0"),
])  # fmt: skip
def test_refusals(lr: torch.Tensor, betas: tuple[float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PopulationAdam([torch.nn.Parameter(torch.ones(1, 2))], lr, betas)


@pytest.mark.parametrize("layout", [lambda g: g, lambda g: g.t().contiguous().t(), lambda g: g[:1].expand(3, 2)])
def test_gradients_may_lie_in_memory_in_any_way(layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(1)
    weights = torch.nn.Parameter(torch.ones(2, 3, 2))
    optimizer = PopulationAdam([weights], torch.tensor([0.1, 0.2]))
    for _ in range(2):
        gradient = torch.randn(3, 2)
        for update in optimizer.updates():
            update([layout(gradient)])
        optimizer.step()
    for row, lr in enumerate((0.1, 0.2)):
        torch.manual_seed(1)
        one = torch.nn.Parameter(torch.ones(3, 2))
        adam = torch.optim.Adam([one], lr=lr)
        for _ in range(2):
            one.grad = layout(torch.randn(3, 2)).clone(memory_format=torch.contiguous_format)
            adam.step()
        torch.testing.assert_close(weights[row], one, rtol=1e-6, atol=1e-6)
