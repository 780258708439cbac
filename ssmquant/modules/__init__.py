"""What the rewritten graph calls: quantizers of activations, and packed tensors in their place after convert."""

from ssmquant.modules.activation import ActivationQuantizer, FrozenRange
from ssmquant.modules.packed import PackedTensor

__all__ = ["ActivationQuantizer", "FrozenRange", "PackedTensor"]
