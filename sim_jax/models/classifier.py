"""A small convolutional classifier of grey digits, whose penultimate layer is their measuring stick.

In the spirit of LeCun et al. 1998 (https://doi.org/10.1109/5.726791): 3x3 convolutions with SiLU, stride two
until the map is at most 4x4, then one dense layer of `feature_dim` units and a linear head. No normalisation
layers, so a feature of one image depends on that image alone and there is no train/eval switch. The features
end in a leaky rectifier: positively homogeneous, so that their scale can be moved between the dense layer and
the head exactly, and never constant, so that no feature dies.
"""

from __future__ import annotations

import flax.linen as nn

from sim_jax.types import Array


class DigitsClassifier(nn.Module):
    """Logits and features of grey digits, of any size from 2x2.

    Attributes:
      feature_dim: F, the width of the penultimate layer.
      num_classes: K, the number of classes.
      channels: width of the first convolution; all others have twice as many.
    """

    feature_dim: int = 64
    num_classes: int = 10
    channels: int = 24

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Images [B,H,W,C] float32 in [-1, 1] -> (features [B,F] float32, logits [B,K] float32)."""
        x = nn.silu(nn.Conv(self.channels, (3, 3), name="conv_in")(images))
        width, depth = 2 * self.channels, 0
        while max(x.shape[1:3]) > 4:
            x = nn.silu(nn.Conv(width, (3, 3), strides=(2, 2), name=f"down{depth}")(x))
            depth += 1
        x = nn.silu(nn.Conv(width, (3, 3), name="conv_out")(x))
        x = nn.Dense(self.feature_dim, name="features")(x.reshape(x.shape[0], -1))
        features = nn.leaky_relu(x, 0.2)
        return features, nn.Dense(self.num_classes, name="logits")(features)
