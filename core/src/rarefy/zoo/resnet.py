"""Residual networks in their CIFAR form, for images of any size.

He et al. 2016, "Deep residual learning for image recognition", section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

Shortcut = Literal["pad", "project"]


class PadShortcut(nn.Module):
    """Halve the resolution and add zero channels on both sides: the parameter-free shortcut (option A)."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = channels // 2, channels - channels // 2, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(n, before + c + after, h / stride, w / stride)`."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride, shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(n, channels, h / stride, w / stride)`."""
        y = self.relu(self.norm1(self.conv1(x)))
        out: torch.Tensor = self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))
        return out


def _shortcut(in_channels: int, channels: int, stride: int, kind: Shortcut) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(channels - in_channels, stride)
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class ResNet(nn.Module):
    """Three stages of `blocks` basic blocks, of `width`, 2 `width` and 4 `width` channels."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int, width: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stage1 = nn.Sequential(*_stage(blocks, width, width, 1, shortcut))
        self.stage2 = nn.Sequential(*_stage(blocks, width, 2 * width, 2, shortcut))
        self.stage3 = nn.Sequential(*_stage(blocks, 2 * width, 4 * width, 2, shortcut))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits `(n, num_classes)` of images `(n, in_channels, h, w)`."""
        x = self.relu(self.norm(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: torch.Tensor = self.fc(self.flatten(self.pool(x)))
        return logits


def _stage(blocks: int, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> Iterator[BasicBlock]:
    yield BasicBlock(in_channels, channels, stride, shortcut)
    for _ in range(blocks - 1):
        yield BasicBlock(channels, channels, 1, shortcut)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16, shortcut: Shortcut = "pad") -> ResNet:
    """Build ResNet-20."""
    return ResNet(3, num_classes, in_channels, width, shortcut)


def resnet32(num_classes: int = 10, in_channels: int = 3, width: int = 16, shortcut: Shortcut = "pad") -> ResNet:
    """Build ResNet-32."""
    return ResNet(5, num_classes, in_channels, width, shortcut)


def resnet56(num_classes: int = 10, in_channels: int = 3, width: int = 16, shortcut: Shortcut = "pad") -> ResNet:
    """Build ResNet-56."""
    return ResNet(9, num_classes, in_channels, width, shortcut)
