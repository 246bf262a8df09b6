"""The losses, one entry each: what the options, --help, the disk foresight, the results and the step must know of them.

A loss on paper becomes its function in tgdpo.py, an entry here and its tests. Nothing here needs torch.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """A loss as train.py calls it: function(*tensors, **options) -> tgdpo.Loss."""

    function: str  # its name in tgdpo.py
    tensors: tuple[str, ...]  # what it takes, in order: of policy, ref, guide (log-probs) and lengths
    options: tuple[str, ...]  # the options it reads, passed by these names
    beta: float  # --beta where it is not given

    def reads(self, option):
        """Whether the option has an effect; `guide` is read as a model, centring needs one, parts need a reference."""
        needs = {"guide": "guide", "centre_guidance": "guide", "with_": "ref"}.get(option)
        return option in self.options or needs in self.tensors


GUIDES_LOSS = "dpo"  # stage 1 trains the guide with it: that is the method
LOSSES = {
    "tgdpo": Entry("tgdpo_loss", ("policy", "ref", "guide"), ("beta", "alpha", "guide_beta"), beta=0.1),
    "dpo": Entry("dpo_loss", ("policy", "ref"), ("beta",), beta=0.1),
    "simpo": Entry("simpo_loss", ("policy", "lengths"), ("beta", "gamma"), beta=2.5),
}
