"""Registry of models, and their initialization.

A model maps the inputs of a data set to outputs for the loss, such as images (B, 1, 28, 28) to
logits (B, num_classes); the cross-entropy contains the softmax. It serves as a function of its
parameters: risk.py evaluates it at the flat vectors of the workers. Users register their own
models, and `plugins` in the config imports them:

    @MODELS.register("mine")
    def mine(num_classes: int = 10, width: int = 64) -> nn.Module: ...
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from consensus.problem.streams import restored_generators, seed_all, stream_seed
from consensus.registry import Registry

MODELS: Registry[nn.Module] = Registry("model", nn.Module, "a torch.nn.Module")
"""The table of models. A factory takes `num_classes` and its own options."""

PIXELS = 28 * 28


@MODELS.register("lenet5")
class LeNet5(nn.Module):
    """LeNet-5 of section 6 of the paper: n = 33,580 parameters in L = 3 layers.

    A convolution with 20 5x5 filters, ReLU and 2x2 max-pooling; the same with 50 filters; one fully
    connected layer.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, kernel_size=5)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.fc = nn.Linear(50 * 4 * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 1, 28, 28)."""
        # The paper applies ReLU before pooling. ReLU is monotone, so the two commute, and ReLU
        # after pooling has a quarter of the work. The gradients agree too: ReLU changes neither a
        # positive maximum nor its position, and the gradient is 0 elsewhere in either order.
        # Channels last halves the time of convolution and pooling on a CPU. With one channel both
        # layouts share the memory, and the strides alone select this one.
        x = images.reshape(-1, 28, 28, 1).permute(0, 3, 1, 2)
        x = relu(max_pool2d(self.conv1(x), 2))  # (B, 20, 12, 12)
        x = relu(max_pool2d(self.conv2(x), 2))  # (B, 50, 4, 4)
        logits: Tensor = self.fc(x.flatten(1))
        return logits


@MODELS.register("mlp")
def mlp(num_classes: int = 10, hidden: Sequence[int] = (256, 128)) -> nn.Module:
    """A multilayer perceptron: layers of the given widths with ReLU, on flattened images.

    Raises:
        ValueError: If a width is not a positive integer.
    """
    if not all(isinstance(width, int) and width > 0 for width in hidden):
        raise ValueError(f"`model.hidden` is {list(hidden)}; allowed: positive integers")
    widths = [PIXELS, *hidden]
    modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i in range(1, len(widths)):
        modules[f"fc{i}"] = nn.Linear(widths[i - 1], widths[i])
        modules[f"relu{i}"] = nn.ReLU()
    modules[f"fc{len(widths)}"] = nn.Linear(widths[-1], num_classes)
    return nn.Sequential(modules)


@MODELS.register("logistic")
def logistic(num_classes: int = 10) -> nn.Module:
    """Multinomial logistic regression: one linear layer, so that the data loss is convex."""
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), fc=nn.Linear(PIXELS, num_classes)))


def _make(name: str, seed: int, options: Mapping[str, Any]) -> nn.Module:
    """The model `name` on the CPU, drawn from `seed`. The generators are restored."""
    device = torch.device("cuda") if torch.cuda.is_initialized() else None
    with restored_generators(device), torch.device("cpu"):
        seed_all(stream_seed(seed, "init"))
        return MODELS.make(name, **options)


def _values(model: nn.Module) -> Iterable[Tensor]:
    return model.state_dict().values()


def build_model(name: str, /, seed: int, dtype: torch.dtype, **options: Any) -> nn.Module:
    """The model `name` on the CPU, with torch's default initialization drawn from `seed`.

    The weights are drawn in float32 and then cast, so that runs in float32 and in float64 start at
    the same point. The global random state is restored. Parameters that require no gradient stay
    as they are. ValueError if the name or an option is wrong, no parameter requires a gradient, or
    the start depends on more than the seed.
    """
    model, again = (_make(name, seed, options) for _ in range(2))
    lazy = [key for key, x in model.named_parameters() if nn.parameter.is_lazy(x)]
    if lazy:
        raise ValueError(
            f"model `{name}` has the lazy parameter `{lazy[0]}`; give its module the sizes, as"
            " nn.Linear takes them"
        )
    for key, first, second in zip(model.state_dict(), *map(_values, (model, again)), strict=True):
        if isinstance(first, Tensor) and not torch.equal(first, second):
            raise ValueError(
                f"model `{name}` starts with another `{key}` each time: draw from the global "
                "generator of torch, NumPy or Python, which the run seeds, and not from one of its "
                "own without a seed"
            )
    del again
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model `{name}` has no parameters to train")
    return model.to(dtype=dtype)
