"""A small network of depthwise separable convolutions.

Howard et al. 2017, "MobileNets: efficient convolutional neural networks for mobile vision applications".
"""

from __future__ import annotations

from torch import nn


def mobilenet_small(num_classes: int = 10, in_channels: int = 3, width: int = 32) -> nn.Sequential:
    """Build a stem of `width` channels, five depthwise separable blocks that end at 8 `width`, and a classifier."""
    layers = _convolution(in_channels, width, 3, 1)
    channels = width
    for factor, stride in ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1)):
        layers += _convolution(channels, channels, 3, stride, groups=channels)
        layers += _convolution(channels, factor * width, 1, 1)
        channels = factor * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def _convolution(in_channels: int, channels: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
