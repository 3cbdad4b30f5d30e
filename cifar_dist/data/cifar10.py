"""Facts about CIFAR-10: its statistics, and the two .beton files that hold it.

See Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
"""

from dataclasses import dataclass

from cifar_dist.config import NUM_TEST, NUM_TRAIN


@dataclass(frozen=True)
class BetonFile:
    """What a prepared file must be."""

    num_samples: int
    num_bytes: int
    sha256: str


CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # by label
FFCV_VERSION = "1.0.2"
TRAIN, TEST = "train.beton", "test.beton"
# What FFCV writes from the official images, in their order, with one worker: always the same bytes.
BETON_FILES = {
    TRAIN: BetonFile(NUM_TRAIN, 158_486_400, "d8ff422c5b4e2d19ce6e823e414e38ddddbb79e3a99b863cf00339bdb7e6903c"),
    TEST: BetonFile(NUM_TEST, 33_794_432, "bdd4c762aa97c8530ced54965a33e1891fc1d93be7f67994fd22039c5eb3b3b2"),
}

# Per channel, over all 50,000 x 1,024 training pixels, scaled to 0..1. The standard deviations 0.2023 0.1994 0.2010 in
# other projects are means of the deviations of single images.
MEAN = (0.49139967861519607, 0.48215840839460783, 0.44653091444546567)
STD = (0.24703223246328201, 0.24348512800005553, 0.2615878417279645)
