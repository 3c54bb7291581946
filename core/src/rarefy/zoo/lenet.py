"""LeNet-300-100 and LeNet-5, the networks of the pruning and quantization literature.

LeCun et al. 1998, "Gradient-based learning applied to document recognition"; LeNet-5 in the form of Caffe's example.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from rarefy.errors import RecipeError


def lenet300(num_classes: int = 10, in_channels: int = 1, size: int = 28, width: int = 300) -> nn.Sequential:
    """Build LeNet-300-100 for images `(in_channels, size, size)`; `width` is that of the first hidden layer."""
    second = max(1, width // 3)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(in_channels * size * size, width),
            relu1=nn.ReLU(),
            fc2=nn.Linear(width, second),
            relu2=nn.ReLU(),
            fc3=nn.Linear(second, num_classes),
        )
    )


def lenet5(num_classes: int = 10, in_channels: int = 1, size: int = 28, width: int = 20) -> nn.Sequential:
    """Build LeNet-5 (20-50-500) for images `(in_channels, size, size)`; `width` is that of the first convolution."""
    if size < 16:
        raise RecipeError(f"LeNet-5 needs images of at least 16x16 for its two 5x5 convolutions, not {size}x{size}")
    second, hidden = width * 5 // 2, width * 25
    side = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, width, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(width, second, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(second * side * side, hidden),
            relu=nn.ReLU(),
            fc2=nn.Linear(hidden, num_classes),
        )
    )
