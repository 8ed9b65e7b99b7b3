"""What the networks of this package have in common: their children run in order, timm's interface on top."""

from __future__ import annotations

from torch import Tensor, nn

from framework.network.layers import GlobalAveragePool, initialize


class ConvNet(nn.Module):
    """Stem, ``layer1``, ``layer2`` ..., tail, then ``global_pool`` and ``fc``; names as in timm's ResNet.

    A subclass adds its children and then calls ``add_head``.
    """

    def add_head(self, num_features: int, num_classes: int) -> None:
        """Pooling and classifier; draws the weights of all convolutions."""
        self.num_features = self.head_hidden_size = num_features
        self.global_pool = GlobalAveragePool()
        self.reset_classifier(num_classes)
        initialize(self)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace ``fc`` by one with ``num_classes`` outputs, or by nothing for 0."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, num_features, h, w)."""
        for name, child in self.named_children():
            if name == "global_pool":
                break
            x = child(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features, h, w) -> (N, classes), or the pooled feature (N, num_features)."""
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, classes)."""
        return self.forward_head(self.forward_features(x))


def imagenet_config(side: int) -> dict[str, object]:
    """timm's description of an ImageNet classifier whose last map has ``side`` pixels."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (side, side),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1",
        "classifier": "fc",
    }
