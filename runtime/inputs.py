"""What a run is given: models, tokenizer and pairs, found, fetched, checked and read before anything is computed."""

import os
from typing import NamedTuple

import torch.distributed as dist

from files import config, hub, weights
from files.errors import BadInput
from files.tokenizer import ChatTokenizer, load_tokenizer, same_vocabulary
from runtime.process_group import on_all_ranks, on_rank_0
from runtime.progress import say
from runtime.signals import stderr_aside


class Inputs(NamedTuple):
    """What a run is given."""

    source: str  # the reference's directory
    guide: str | None  # a given guide's
    tokenizer: ChatTokenizer
    pairs: list  # of data.Pair
    eval_pairs: list
    counts: dict  # "train" and, with --eval-data, "eval": data.Counts


def found_model(name, check, whole=True):
    """The directory of a model's name or Hub id. Rank 0 fetches it and checks its configuration and its tensors' names
    and shapes (check: model.check), then the other ranks find it, or fetch it, on the machine that they are on. whole:
    False for a look at the plan, which needs no weights: of a Hub id they are not fetched, and a directory may lack
    them."""

    def look():
        directory = hub.model_directory(name, whole)
        local = os.path.isdir(name)
        if whole or local and any(file.endswith((".safetensors", ".bin")) for file in os.listdir(directory)):
            check(directory)
        else:
            vocabulary(directory)
            say(f"{name}: " + ("has no weights; the plan needs none" if local else "its weights are not fetched"))

    on_rank_0(look)
    return on_all_ranks(lambda: hub.model_directory(name, whole), patient=True)[dist.get_rank()]


def vocabulary(directory):
    """How many tokens the model of a directory has embeddings for. Raises BadInput for a config.json that is none of
    ours."""
    path = os.path.join(directory, "config.json")
    return config.read_fields(weights.read_json(path), path)["vocab_size"]


def read_inputs(options, check, load_pairs, held_back):
    """Models, tokenizer and pairs, found, checked and read by rank 0 for all. check: model.check; load_pairs and
    held_back: data's."""
    source, guide = (
        found_model(name, check, whole=not options.dry_run) if name else None for name in (options.model, options.guide)
    )
    tokenizer = on_all_ranks(lambda: load_tokenizer(source, options.chat_template), patient=True)[dist.get_rank()]

    def read():
        for directory in filter(None, (source, guide)):
            if tokenizer.vocab_size > (size := vocabulary(directory)):
                raise BadInput(
                    f"{directory}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but "
                    f"the model only {size} embeddings; take the tokenizer that belongs to it"
                )
        if guide:
            same_vocabulary(tokenizer, load_tokenizer(guide, options.chat_template))
            sizes = [vocabulary(directory) for directory in (source, guide)]
            if options.centre_guidance and sizes[0] != sizes[1]:
                raise BadInput(
                    f"--centre-guidance: {guide} has {sizes[1]} embeddings and {source} {sizes[0]}; a mean over all "
                    "tokens needs as many in both; leave --centre-guidance out"
                )
        pairs, counts = read_pairs(options.data, options, tokenizer, load_pairs, limit=options.limit)
        if options.eval_data:
            eval_pairs, eval_counts = read_pairs(options.eval_data, options, tokenizer, load_pairs, without=("weight",))
            return pairs, eval_pairs, {"train": counts, "eval": eval_counts}
        return *held_back(pairs, options.eval_fraction, options.seed), {"train": counts}

    return Inputs(source, guide, tokenizer, *on_rank_0(read))


def read_pairs(names, options, tokenizer, load_pairs, limit=0, without=()):
    """The pairs of files or Hub data sets, and their data.Counts. without: names of --columns that are not read."""
    columns = {name: column for name, _, column in (entry.partition("=") for entry in options.columns)}
    columns = {name: column for name, column in columns.items() if name not in without}
    paths = [path for name in names for path in hub.data_files(name)]
    lengths = options.max_length, options.max_prompt_length
    with stderr_aside():  # the tokenizers library panics there at some rows of strange tokenizers
        return load_pairs(paths, tokenizer, *lengths, options.skip_bad_rows, columns, limit)
