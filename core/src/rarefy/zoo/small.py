"""The smallest networks, which train in a second or two."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def mlp(num_classes: int = 10, in_channels: int = 1, size: int = 8, width: int = 64, depth: int = 2) -> nn.Sequential:
    """Build a perceptron of `depth` hidden layers of `width` units for images `(in_channels, size, size)`."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = in_channels * size * size
    for _ in range(depth):
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, num_classes))


def digits_cnn(num_classes: int = 10, in_channels: int = 1, size: int = 8, width: int = 16) -> nn.Sequential:
    """Build a network of two convolutions and two linear layers for images `(in_channels, size, size)`."""
    side = size // 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, width, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(width, 2 * width, 3, padding=1),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(2 * width * side * side, 4 * width),
            relu3=nn.ReLU(),
            fc2=nn.Linear(4 * width, num_classes),
        )
    )
