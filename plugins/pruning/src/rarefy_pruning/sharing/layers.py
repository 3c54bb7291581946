"""Layers that store few values and look their weights up by a hash."""

from __future__ import annotations

import math

import torch
from rarefy.errors import StageError
from rarefy.modules import register_module
from rarefy.modules.derived import DerivedConvolution, DerivedLinear, DerivedWeight
from torch import nn

from rarefy_pruning.sharing.hashing import signed_buckets

_MOST_BUCKETS = 2**30 - 1


class HashedLayer(DerivedWeight):
    """What hashed layers share: V_n = xi(n) * w_h(n) (Chen et al. 2015, section 4), n over the flattened weight.

    `values`, `(buckets,)`, and the bias are all that is stored. Buckets and signs follow from the seed and are worked
    out at the first use; they are no buffer, since a file holds those.
    """

    shape: tuple[int, ...]
    """Shape of the weight that the values stand for."""

    def __init__(
        self,
        shape: tuple[int, ...],
        buckets: int,
        seed: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if not 1 <= buckets <= _MOST_BUCKETS:
            raise StageError(f"a hashed layer stores from 1 to {_MOST_BUCKETS} values, not {buckets}")
        self.shape, self.buckets, self.seed = shape, buckets, seed
        self._lookup: torch.Tensor | None = None
        self.values = nn.Parameter(torch.empty(buckets, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values and bias as those of the full layer would be: by the fan-in of the weight, not of the values."""
        bound = 1 / math.sqrt(max(1, math.prod(self.shape[1:])))
        self.values.uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound, generator=generator)

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight that the values stand for; value k has the gradient sum of xi(n) dV_n, h(n) = k."""
        # indexing with [] does the same, with a backward pass 50 times slower on CPUs
        return torch.cat((self.values, -self.values)).index_select(0, self.lookup()).view(self.shape)

    def lookup(self) -> torch.Tensor:
        """Return for each weight its place in the values followed by the negated values, int32."""
        device = self.values.device
        if device.type == "meta":
            return torch.empty(math.prod(self.shape), dtype=torch.int32, device=device)
        if self._lookup is not None and self._lookup.device == device:
            return self._lookup
        lookup = torch.from_numpy(signed_buckets(math.prod(self.shape), self.buckets, self.seed)).to(device)
        if type(lookup) is torch.Tensor:  # while a model is exported it is a stand-in that must not stay
            self._lookup = lookup
        return lookup

    @torch.no_grad()
    def project_(self, weight: torch.Tensor) -> float:
        """Set the values nearest to `weight` by least squares, the signed mean of each bucket.

        Returns the relative error of the weight they stand for; a bucket that no weight uses becomes 0.
        """
        lookup, flat = self.lookup().long(), weight.detach().double().flatten()
        bucket, sign = lookup % self.buckets, torch.where(lookup < self.buckets, 1.0, -1.0).double()
        sums = flat.new_zeros(self.buckets).index_add_(0, bucket, sign * flat)
        self.values.copy_(sums / torch.bincount(bucket, minlength=self.buckets).clamp(min=1))
        lost = torch.linalg.vector_norm(self.weight.double().flatten() - flat)
        return float(lost / torch.linalg.vector_norm(flat).clamp(min=1e-300))

    def extra_repr(self) -> str:
        """Return what the printed model says of the layer."""
        return f"{'x'.join(map(str, self.shape))} weights from {self.buckets} values, seed={self.seed}"


@register_module
class HashedLinear(DerivedLinear, HashedLayer):
    """A linear layer of `buckets` values."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        buckets: int,
        seed: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), buckets, seed, bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features


@register_module
class HashedConv2d(DerivedConvolution, HashedLayer):
    """A convolution of `buckets` values; arguments as of `torch.nn.Conv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        buckets: int,
        seed: int,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_channels, in_channels // groups, *kernel_size), buckets, seed, bias, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.padding_mode = groups, padding_mode
