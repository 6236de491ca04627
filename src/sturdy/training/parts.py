"""Whether an optimizer and an average that see parts of a parameter give the bits of the whole.

AdamW and others like it treat each number by itself, so that it should not matter how a parameter
is cut. But a kernel may round the last few numbers of a tensor otherwise than the others, as the
fused AdamW of a CPU does; and an optimizer may look at a whole matrix, as Muon does. No list would
stay complete, so this is tried out.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ROWS, COLUMNS = 64, 7  # whole vectors of any CPU together, but not in parts of two rows
PARTS = 32
STEPS = 10


def steps_equally_in_parts(make: Callable[..., Optimizer], device: torch.device) -> bool:
    """Return whether steps give equal bits on a matrix and on its parts of a few rows.

    Args:
        make: returns the optimizer of a list of parameters.
        device: where the training runs.
    """
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(STEPS, ROWS, COLUMNS, generator=generator)
    initial = torch.randn(ROWS, COLUMNS, generator=generator)
    try:
        whole = _train(make, initial.to(device), gradients.to(device), 1)
        in_parts = _train(make, initial.to(device), gradients.to(device), PARTS)
        return all(torch.equal(a, b) for a, b in zip(whole, in_parts, strict=True))
    except Exception:  # it may want other shapes; then nothing is known
        return False


def _train(
    make: Callable[..., Optimizer], initial: Tensor, gradients: Tensor, parts: int
) -> list[Tensor]:
    """Return weights, averages and the optimizer's state, in which most roundings are seen."""
    parameters = [nn.Parameter(part.clone()) for part in initial.chunk(parts)]
    averages = [part.clone() for part in initial.chunk(parts)]
    optimizer = make(parameters)
    for gradient in gradients:
        for parameter, part in zip(parameters, gradient.chunk(parts), strict=True):
            parameter.grad = part.clone()
        optimizer.step()
        weights = [parameter.detach() for parameter in parameters]
        torch._foreach_lerp_(averages, weights, 0.1)
    states = [optimizer.state[parameter] for parameter in parameters]
    keys = [
        k for k, v in states[0].items() if isinstance(v, Tensor) and v.shape == weights[0].shape
    ]
    columns = [weights, averages, *([state[key] for state in states] for key in keys)]
    return [torch.cat(column) for column in columns]
