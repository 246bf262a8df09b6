"""Compares a checkpoint's logits with transformers' (eager attention, float32): python tests/check_model.py PATH ...

PATH is a directory with weights; a directory or a config.json without is read, and its parameters are counted or it is
refused by name, as train.py would."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import model
from files import weights
from files.errors import BadInput


def compared(directory):
    """The largest difference of the logits of forty random tokens, twice."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    ours = model.load_model(directory)
    tokens = torch.randint(0, ours.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (ours(tokens) - theirs(tokens).logits).abs().max().item()


def main(paths):
    for path in map(pathlib.Path, paths):
        try:
            if any(path.glob("*.safetensors")):
                print(f"{path}: logits differ by {compared(path):.1e} at most")
                continue
            file = path / "config.json" if path.is_dir() else path
            config = model.parse_config(weights.read_json(str(file)), str(file))
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in model.CausalLM(config).parameters())
            print(f"{file}: {count:,} parameters")
        except BadInput as refusal:
            print(refusal)


if __name__ == "__main__":
    main(sys.argv[1:])
