"""The model card of an export, README.md: metadata that the Hub validates, how the model came about, its figures."""

import os
import textwrap

from huggingface_hub import ModelCardData, metadata_load

from files.export import synced
from files.hub import CARD_LIMIT, DATA_ID, MODEL_ID

LOSSES = {"tgdpo": "TGDPO", "dpo": "DPO", "simpo": "SimPO"}
CITATION = """@inproceedings{zhu2025tgdpo,
  title     = {{TGDPO}: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization},
  author    = {Zhu, Mingkang and Chen, Xi and Wang, Zhongdao and Yu, Bei and Zhao, Hengshuang and Jia, Jiaya},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  series    = {Proceedings of Machine Learning Research},
  volume    = {267},
  pages     = {79727--79745},
  year      = {2025}
}"""
FIGURES = "\n## Figures\n"


def model_card(loss, model, data, source, command, settings=()):
    """The text of README.md. loss: what trained the model; model, data: the names of its base and of its pairs, of
    which only Hub ids are told; source: the base's directory, whose licence goes along; command: as it was typed;
    settings: what else changed the method, in words."""
    base = None if os.path.isdir(model) else MODEL_ID.fullmatch(model)
    base = base and base[1]
    datasets = [match[1] for name in data if not os.path.exists(name) and (match := DATA_ID.fullmatch(name))]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        datasets=datasets or None,
        tags=[loss, "preference-optimization"],
        **licence(source),
    )
    name = LOSSES.get(loss, loss)
    how = f" with {', '.join(settings)}" if settings else ""
    return f"""---
{metadata.to_yaml()}
---

# A model trained with {name}

{base or "A local model"} after {name}{how} on {" and ".join(datasets) or "local data"}, by an implementation of
[TGDPO](https://arxiv.org/abs/2506.14574).

## Command

{textwrap.indent(command, "    ", lambda line: True)}

## Citation

```bibtex
{CITATION}
```
"""


def licence(source):
    """What the card in the directory `source` says of its licence, as fields of ModelCardData; or {}."""
    path = os.path.join(source, "README.md")
    try:
        known = metadata_load(path) or {} if os.path.getsize(path) <= CARD_LIMIT else {}
    except Exception:  # no card, or whatever a stranger's YAML raises: the export does without
        return {}
    names = ["license", "license_name"]
    if str(known.get("license_link")).startswith("https://"):  # else it is a file beside that card
        names.append("license_link")
    return {name: known[name] for name in names if isinstance(known.get(name), str)}


def add_figures(directory, table):
    """Put a run's final table, a list of objects alike, at the end of the card of the model in `directory`, if any."""
    path = os.path.join(directory, "README.md")
    if not table or not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        text = file.read().partition(FIGURES)[0]
    lines = [table[0], ["---"] * len(table[0])]
    lines += [[x if isinstance(x, str) else f"{x:.3f}" for x in row.values()] for row in table]
    text += f"{FIGURES}\nMeans over the run's evaluation pairs, or over its training pairs where it had none.\n\n"
    text += "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    with synced(path + ".tmp") as file:
        file.write(text.encode())
    os.replace(path + ".tmp", path)
