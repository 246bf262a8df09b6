"""A real tokenizer and real pairs against transformers.   python tests/check_tokenizer.py MODEL_DIR pairs.json ...

For every pair that is kept: the prompt's ids must be transformers' apply_chat_template(…, add_generation_prompt=True,
enable_thinking=False), without the last where a reply begins with <think>,
and the scored tokens must decode to the response and one end token. Not part of the suite, which has small golden cases
of each kind. Exit status 1 where any pair differs.
"""

import collections
import pathlib
import sys

import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import data
from files.preferences import preference_of
from files.tokenizer import load_tokenizer

TODAY = "26 Jul 2024"  # what the sandbox tells a template that asks for the date


def main(directory, *files):
    ours, theirs = load_tokenizer(directory), transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    pairs, counts = data.load_pairs(files, ours, 10**6, 10**6, skip_bad_rows=True)
    rows = {f"{path}:{row}": value for path in map(pathlib.Path, files) for row, value in data.read_rows(path)}
    prompts = responses = 0
    for pair in pairs:
        messages, *texts = preference_of(rows[pair.source])
        given = {"add_generation_prompt": True, "return_dict": False, "date_string": TODAY}
        if not any(text.startswith("<think>") for text in texts):
            given["enable_thinking"] = False  # which Qwen3's template reads
        ids = theirs.apply_chat_template(messages, **given)
        prompts += ids == pair.prompt.tolist()
        responses += sum(
            ours.decode(side[:-1]).strip() == text.strip() and side[-1] in ours.end_ids
            for text, side in zip(texts, (pair.chosen, pair.rejected))
        )
    print(f"prompts equal: {prompts} of {len(pairs)}; responses and their end tokens: {responses} of {2 * len(pairs)}")
    for reason, count in collections.Counter(drop["reason"].split(":")[0] for drop in counts.dropped).items():
        print(f"not compared, dropped: {count} {reason}")
    return int(prompts < len(pairs) or responses < 2 * len(pairs))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
