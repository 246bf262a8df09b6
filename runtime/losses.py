from typing import NamedTuple


class Loss(NamedTuple):
    tensors: tuple


LOSSES = {
    "tgdpo": Loss(("policy", "ref", "guide")),
    "dpo": Loss(("policy", "ref")),
    "simpo": Loss(("policy", "lengths")),
}
