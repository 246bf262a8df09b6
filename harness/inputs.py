"""What a run is given: models by directory or Hub id, a tokenizer, pairs, and what all of these are called together."""

import torch.distributed as dist

import data
import model
from harness import cache, hub, processes
from harness.options import BadOption


def found_model(name):
    """The directory of a model's name or Hub id. Rank 0 fetches it and checks its configuration and the names and shapes
    of its tensors, then the other ranks find it, or fetch it, on the machine that they are on."""
    processes.first(lambda: model.check(hub.model_directory(name)))
    return processes.everywhere(lambda: hub.model_directory(name), patient=True)[dist.get_rank()]


def load_data(options, source, guide_source):
    """-> tokenizer, pairs, evaluation pairs, {"train": Counts, "eval": Counts}. Rank 0 reads the pairs for all."""
    loaded = []

    def load():
        loaded.append(data.load_tokenizer(source, options.chat_template))

    def read():
        tokenizer, = loaded
        for directory in filter(None, (source, guide_source)):
            if tokenizer.vocab_size > (size := model.read_config(directory).vocab_size):
                raise model.BadCheckpoint(f"{directory}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but "
                                          f"the model only {size} embeddings; take the tokenizer that belongs to it")
        if guide_source:
            data.same_vocabulary(tokenizer, data.load_tokenizer(guide_source, options.chat_template))
        limits = options.max_length, options.max_prompt_length, options.skip_bad_rows
        pairs, counts = data.load_pairs(files(options.data), tokenizer, *limits)
        counts = {"train": counts}
        eval_pairs = []
        if options.eval_data:
            eval_pairs, counts["eval"] = data.load_pairs(files(options.eval_data), tokenizer, *limits)
        elif options.eval_fraction:
            if len(pairs) == 1:
                raise BadOption(f"--eval-fraction {options.eval_fraction}: there is only one pair, which is needed to "
                                "train on; leave it out, or give --eval-data")
            kept = min(max(1, round(len(pairs) * (1 - options.eval_fraction))), len(pairs) - 1)
            mixed = [pairs[i] for i in data.epoch_order(len(pairs), options.seed, 0)]
            pairs, eval_pairs = mixed[:kept], mixed[kept:]
        return pairs, eval_pairs, counts

    def files(names):
        return [path for name in names for path in hub.data_files(name)]

    processes.everywhere(load, patient=True)
    return *loaded, *processes.first(read)


def describe(options, source, guide_source, tokenizer, pairs, eval_pairs, dtype):
    """What makes a run this run and no other: a checkpoint of another is refused, naming what differs."""
    settings = ("loss", "beta", "alpha", "gamma", "guide_beta", "lr", "epochs", "batch_size", "warmup_ratio",
                "schedule", "weight_decay", "max_grad_norm", "seed")
    return {name: getattr(options, name) for name in settings} | {
        "data": data.fingerprint(pairs), "evaluation data": data.fingerprint(eval_pairs),
        "chat template": tokenizer.digest, "dtype": str(dtype),
        "model": cache.weights_digest(source), "guide": guide_source and cache.weights_digest(guide_source)}
