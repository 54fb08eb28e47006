"""The paper's numbers that ours are set beside, and nothing that we do not have from it.

The paper is SASG, arXiv 2112.04088. Of its tables these are the cells that we have at hand; the
report says of all others that they are not, and invents none.
"""

NAME = "arXiv 2112.04088"
URL = "https://arxiv.org/abs/2112.04088"

MNIST_SETTING = {
    "dataset": "mnist",
    "model": "mlp",
    "width": 512,
    "num_workers": 10,
    "batch_size": 10,
    "target_accuracy": 0.98,
    "partition": "iid",
}
"""Fields of a :class:`experiments.configs.Config` with which our uploads can be compared."""

DENSITY = 0.01  # of the sparse methods in tables II and III
MNIST_PARAMETERS = 407_050
MNIST_KEPT = 4_071  # k: the entries that a sparse method sends of them

MNIST_UPLOADS = {"sgd": 60_400, "sparse": 67_400, "lasg": 33_853, "sasg": 22_823}
"""Table II: uploads of all workers until the test accuracy is 98 %."""

AUTHORS_UPLOADS = {
    "sgd": (61_000, 5_550),
    "sparse": (62_200, 7_730),
    "lasg": (34_269, 2_667),
    "sasg": (23_775, 1_910),
}
"""The same in the logs of five seeds that the authors released: mean and standard deviation."""

COMMUNICATION_SECONDS = {"sgd": 327.45, "sparse": 15.94, "lasg": 286.72, "sasg": 13.09}
"""Table III."""

SERVER_MEGABYTES = {"lasg": 426.0, "sasg": 4.26}
"""The last messages that the server keeps: values only, for ResNet18 and ten workers."""

UPLOADS_TOLERANCE = 0.12
"""How far our mean uploads may be from the paper's before we speak of a deviation."""

LARGEST_SHARE = 0.42
"""SASG's uploads as a part of SGD's: 0.38 in the paper, with some room for the seeds."""


def mnist_bits(method: str) -> int:
    """Table II: 32 bits for each value uploaded; no indices, and no way down."""
    values = MNIST_KEPT if method in ("sparse", "sasg") else MNIST_PARAMETERS
    return MNIST_UPLOADS[method] * 32 * values
