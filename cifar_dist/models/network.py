"""The network of Inception modules, driven by a table of rows."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor, nn

from cifar_dist.models import auxiliary as heads
from cifar_dist.models.auxiliary import AuxiliaryHead, Logits
from cifar_dist.models.inception import Inception, Rows, ThirdBranch
from cifar_dist.models.layers import DEFAULT, Dialect, halving_pool, initialize, initialize_classifier
from cifar_dist.models.stems import Stem


class Options(TypedDict, total=False):
    """What the builders of both networks hand through; see `InceptionNetwork`."""

    stem: str
    width: float
    dropout: float
    num_classes: int
    auxiliary: bool
    merge_1x1: bool
    dialect: Dialect


class InceptionNetwork(nn.Module):
    """Stem, Inception modules and pools, global average pool, dropout, linear.

    Args:
        rows: the network's table.
        third: the convolutions of every module's third branch.
        stem: cifar, pooled, strided, whiten or imagenet.
        width: multiplies all channel counts.
        dropout: probability of zeroing a feature before the classifier.
        num_classes: length of a row of logits.
        auxiliary: have classifiers on 4a and 4d as well.
        merge_1x1: in training, run the 1x1 convolutions on one input as one.
        dialect: which of the published implementations to be.

    Shapes: images (N, 3, 32, 32), normalised (224x224 with the imagenet stem), to logits (N, num_classes); in training
    mode with auxiliary classifiers to `Logits`.
    """

    def __init__(
        self,
        rows: Rows,
        third: ThirdBranch,
        *,
        stem: str = "cifar",
        width: float = 1.0,
        dropout: float = 0.0,
        num_classes: int = 10,
        auxiliary: bool = False,
        merge_1x1: bool = False,
        dialect: Dialect = DEFAULT,
    ) -> None:
        super().__init__()
        self.dialect = dialect
        self.stem = Stem(stem, width, dialect)
        self.blocks = nn.ModuleDict()
        channels, outputs = self.stem.out_channels, {}
        pools = [name for name, row in rows.items() if row is None]
        for name, row in rows.items():
            if row is None:
                self.blocks[name] = halving_pool(dialect, dialect.last_pool_size if name == pools[-1] else 3)
            else:
                self.blocks[name] = module = Inception(channels, row.at_width(width), third, merge_1x1, dialect)
                channels = outputs[name] = module.out_channels
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        initialize(self.stem, dialect)
        initialize(self.blocks, dialect)
        initialize_classifier(self.classifier, dialect)
        # Built after all else has drawn its weights, which are then the same with and without them.
        self.auxiliary = nn.ModuleDict()
        for name in heads.AFTER if auxiliary else ():
            self.auxiliary[name] = AuxiliaryHead(outputs[name], self.stem.grid // 2, num_classes, width, dialect)

    def forward(self, images: Tensor) -> Tensor | Logits:
        x = self.stem(images)
        auxiliary = []
        for name, block in self.blocks.items():
            x = block(x)
            if self.training and name in self.auxiliary:
                auxiliary.append(self.auxiliary[name](x))
        # Over the pixels of a channels-last tensor: the gradient of mean(dim=(2, 3)) would come back in planes.
        features = x.permute(0, 2, 3, 1).mean(dim=(1, 2))
        logits: Tensor = self.classifier(self.dropout(features))
        return Logits(logits, tuple(auxiliary)) if auxiliary else logits
