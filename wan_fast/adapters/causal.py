"""What the encoders of sound and of faces are made of: convolutions that look back, and what is between them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class CausalConv1d(nn.Module):
    """Over a frame and the two before it; the first is repeated before the beginning."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(into, out, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, C] -> [B, ceil(F / stride), C'] in the dtype of the weights."""
        x = x.to(self.conv.weight.dtype).transpose(1, 2)
        return self.conv(F.pad(x, (2, 0), mode="replicate")).transpose(1, 2)


def activated(x: Tensor) -> Tensor:
    """SiLU of the layer norm over the channels of [B, F, C], in fp32."""
    return F.silu(F.layer_norm(x.float(), x.shape[-1:], eps=1e-6))
