"""A small plain convolutional network (after Simonyan and Zisserman 2015), with batch normalization."""

from __future__ import annotations

from torch import nn


def vgg_small(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> nn.Sequential:
    """Build six 3x3 convolutions in three stages of `width`, 2 `width` and 4 `width` channels, and a classifier."""
    layers: list[nn.Module] = []
    for channels in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers.append(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            in_channels = channels
        layers.append(nn.MaxPool2d(2))
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(in_channels, num_classes))
