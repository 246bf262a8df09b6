"""The bundled example: its gold reward by hand, its data and model as committed, and that make.py makes the same."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import rerun
import torch

import data
import model
import train
from examples.tiny import language, make
from files.tokenizer import load_tokenizer
from runtime import options, sampling

TINY = Path(make.__file__).parent


@pytest.fixture(scope="module")
def speaker():
    return make.Speaker(TINY / "model")


@pytest.fixture(scope="module")
def network():
    return model.load_model(str(TINY / "model"))


def rows(name):
    return [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "text, reward",
    [
        ("The soup", -1),  # soup is asked about, but no reply names it
        ("The dish was fresh.", 1),
        ("The dish was not fresh.", -1),
        ("The dish was hardly stale, but the room was dark.", 1 - 1),
        ("Our host was very rude.", -2),
        ("Our host was not very rude.", 2),
        ("Our host was rather lovely and fairly kind.", 1 + 0.5),
        ("The room was really really superb.", 4),  # factors stop at 2
        ("The food was tasty. Today the food was tasty.", 1 + 0),  # a good word pays once
        ("The food was bland. Today the food was very bland.", -1 - 2),  # a bad one costs every time
        ("The food was not fresh. Today the food was fresh.", -1 + 0),
        ("Not, fresh.", -1),  # punctuation does not stand between
        ("We will never return. I would recommend it.", -1 + 1),
        ("", 0),
    ],
)
def test_gold_reward_by_hand(text, reward):
    assert language.gold_reward(text) == reward


def test_gold_rewards_stand_on_the_last_token_of_each_word():
    pieces = ["The", " ", "h", "ost", " was", " not", " care", "less", ".", " Zz", "z", ""]
    assert language.gold_rewards(pieces) == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, -1, 0]


def test_the_language_stands_alone():
    text = (TINY / "language.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)) == {"itertools", "re"}


def test_gold_reward_never_looks_ahead():
    rng = random.Random(1)
    for _, kind in rng.choices(language.questions(), k=50):
        words = language.reply(rng, kind).split()
        whole = [reward for _, _, reward in language.word_rewards(" ".join(words))]
        for end in range(len(words)):
            assert [r for _, _, r in language.word_rewards(" ".join(words[:end]))] == whole[:end]


def test_the_grammar_knows_its_words_and_lengths():
    rng, used = random.Random(0), set()
    for _, kind in rng.choices(language.questions(), k=3000):
        words = language.WORD.findall(language.reply(rng, kind).lower())
        used |= set(words)
        assert 8 <= len(words) <= 25
    assert used == language.LEXICON


def test_making_it_twice_gives_the_same_bytes(tmp_path):
    threads = torch.get_num_threads()
    for name in ("a", "b"):
        make.make(tmp_path / name, seed=3, steps=90, pairs=4, held_out=2)
    torch.set_num_threads(threads)
    made = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert [str(path) for path in made] == [
        "held_out.jsonl",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "train.jsonl",
    ]
    for path in made:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    first = json.loads((tmp_path / "a" / "train.jsonl").read_text().splitlines()[0])
    assert sorted(first) == ["chosen", "prompt", "rejected"]


def test_committed_tokenizer_is_the_one_that_make_trains(tmp_path):
    make.make_tokenizer(tmp_path, random.Random(0))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (TINY / "model" / name).read_bytes(), name


def test_every_committed_pair_is_kept_as_it_was_sampled():
    tokenizer = load_tokenizer(str(TINY / "model"))
    for name, least in (("train.jsonl", 1000), ("held_out.jsonl", 200)):
        pairs, counts = data.load_pairs([str(TINY / name)], tokenizer, 256, 200)
        assert counts.rows == counts.kept == len(pairs) == len(rows(name)) >= least
        assert (counts.cut, counts.boundary, counts.dropped) == (0, 0, [])
        assert all(pair.chosen[-1] == pair.rejected[-1] == make.END for pair in pairs)


def test_held_out_questions_are_not_trained_on():
    questions = [row["prompt"] for name in ("train.jsonl", "held_out.jsonl") for row in rows(name)]
    assert len(set(questions)) == len(questions)


def test_labels_follow_the_gold_reward_with_noise():
    margins = [
        language.gold_reward(row["chosen"]) - language.gold_reward(row["rejected"])
        for name in ("train.jsonl", "held_out.jsonl")
        for row in rows(name)
    ]
    agree = sum(margin > 0 for margin in margins) / sum(margin != 0 for margin in margins)
    assert 0.85 < agree < 0.95


def test_samples_of_the_committed_model_are_of_the_language(network, speaker):
    asked = random.Random(2).sample(sorted(speaker.prompts), 64)
    drawn = sampling.generate(
        network,
        [speaker.prompts[question] for question in asked],
        make.LONGEST_REPLY,
        {make.END},
        1.0,
        torch.Generator().manual_seed(0),
    )
    texts = speaker.texts(drawn)
    assert sum(text is None for text in texts) <= 2
    words = [word for text in texts if text for word in language.WORD.findall(text.lower())]
    assert sum(word not in language.LEXICON for word in words) <= 0.005 * len(words)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_sampling_with_a_cache_equals_plain_reruns(network, speaker, temperature):
    prompts = [speaker.prompts[question] for question in random.Random(4).sample(sorted(speaker.prompts), 12)]
    prompts += [[5, 6, 7], [0]]  # of very different lengths
    drawn = [
        draw(network, prompts, 40, {make.END}, temperature, torch.Generator().manual_seed(7))
        for draw in (rerun.generate, sampling.generate)
    ]
    assert drawn[0] == drawn[1]
    assert len({len(ids) for ids in drawn[0]}) > 1 and any(ids[-1] == make.END for ids in drawn[0])


def test_recipe_is_what_a_run_without_arguments_takes():
    resolved = options.resolve([])
    assert resolved.model == str(TINY / "model") and resolved.data == (str(TINY / "train.jsonl"),)
    for name, value in options.read_toml(TINY / "recipe.toml").items():
        assert getattr(resolved, name) == value


def replies_by_hand(directory, prompts, ends):
    """Two replies to each prompt, drawn without a cache, and log pi of each, from all logits of one row at a time."""
    net = model.load_model(str(directory))
    asked = [prompt for prompt in prompts for _ in range(2)]
    drawn = rerun.generate(net, asked, 24, ends, 1.0, torch.Generator().manual_seed(0))
    return net, list(zip(asked, drawn))


def logp(net, prompt, reply):
    with torch.no_grad():
        rows = net(torch.tensor([prompt + reply]))[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return rows[range(len(reply)), reply].sum().item()


def test_the_first_screen_says_what_will_happen_and_the_true_reward(tmp_path, capsys):
    for name, count in (("train", 64), ("held_out", 5)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows(f"{name}.jsonl")[:count])
        )
    given = [
        "--data",
        str(tmp_path / "train.jsonl"),
        "--eval-data",
        str(tmp_path / "held_out.jsonl"),
        "--eval-every",
        "1",
    ]
    given += ["--max-steps", "2", "--samples", "1", "--sample-tokens", "24"]
    assert train.main([*given, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    first, second = "stage 1 of 2: training the guide with DPO, 2 steps\n", "training the policy with TGDPO, 2 steps\n"
    assert told.startswith(first + "stage 2 of 2: " + second) and told.count(first) == told.count(second) == 2

    readme = (TINY.parent.parent / "README.md").read_text(encoding="utf-8")
    plain = lambda text: re.sub(r"-?\d[\d.e+]*| ", "", text)  # without numbers and spaces
    place, whole = 0, plain(told.replace(str(tmp_path / "out"), "runs/tgdpo"))
    for line in plain(readme.split("```\nstage 1")[1].split("  prompt")[0]).splitlines():  # what the README shows
        place = whole.index(line.rstrip("…"), place) + 1

    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in metrics if row.get("eval")):  # as they come, with plain DPO's margin and accuracy
        figures = f"margin {row['dpo_margin']:.4f}  accuracy {row['dpo_accuracy']:.1%}"
        assert f"{row['stage']} {row['step']}/2 held out  loss {row['loss']:.4f}  {figures}" in told
    assert told.index("dpo 1/2 held out") < told.index("dpo 2/2 ") < told.index("tgdpo 1/2 held out")

    tokenizer = load_tokenizer(str(TINY / "model"))
    prompts = [p.prompt.tolist() for p in data.load_pairs([str(tmp_path / "held_out.jsonl")], tokenizer, 256, 200)[0]]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["table_pairs"] == len(prompts) == 5
    ref, firsts = replies_by_hand(TINY / "model", prompts, {make.END})
    for row, directory in zip(run["table"], (TINY / "model", tmp_path / "out" / "guide", tmp_path / "out" / "policy")):
        net, replies = replies_by_hand(directory, prompts, {make.END})
        reward = lambda ids: language.gold_reward(tokenizer.decode([i for i in ids if i != make.END]))
        gold, before = ([reward(ids) for _, ids in drawn] for drawn in (replies, firsts))
        wins = [(a > b) + (a == b) / 2 for a, b in zip(gold, before)]
        moved = [logp(net, *reply) - logp(ref, *reply) for reply in replies]
        expected = {"gold": sum(gold) / 10, "wins": sum(wins) / 10, "kl": sum(moved) / 10}
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4), row["model"]
        assert f"  {row['model']:<10}" in told
    assert "gold    wins      KL\n" in told and "Read gold, the true reward" in told

    shutil.copytree(TINY / "model", tmp_path / "model")  # any other model has no true reward
    more = ["--model", str(tmp_path / "model"), "--loss", "dpo", "--batch-size", "32", "--out", str(tmp_path / "other")]
    assert train.main([*given, *more]) == 0
    told = capsys.readouterr().out
    assert told.startswith("training the policy with DPO, 2 steps\n") and "gold" not in told
    assert all("gold" not in row for row in json.loads((tmp_path / "other" / "run.json").read_text())["table"])


def test_help_and_readme_give_the_same_time():
    readme = (TINY.parent.parent / "README.md").read_text(encoding="utf-8")
    (time,) = re.findall(r"the bundled tiny example, (.*)", options.EXAMPLES)
    assert f"The first takes {time}." in readme


def test_study_in_its_quick_form(tmp_path, capsys):
    from examples.tiny import study

    threads, work = torch.get_num_threads(), tmp_path / "work"
    arguments = ["--quick", "--workers", "0", "--work", str(work), "--page", str(tmp_path / "STUDY.md")]
    assert study.main(arguments) == 0
    told, lines = capsys.readouterr().out, (work / "study.jsonl").read_text().splitlines()
    arms = [name for some, _, _ in study.QUICK["order"] for name in some]
    assert [json.loads(line)["arm"] for line in lines] == arms and f"{len(arms)}/{len(arms)}" in told
    (work / "study.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # stopped before the last
    assert study.main(arguments) == 0
    torch.set_num_threads(threads)
    told = capsys.readouterr().out
    assert f"{len(arms)}/{len(arms)}" in told and f"{len(arms) - 1}/{len(arms)}" not in told
    assert json.loads((work / "study.jsonl").read_text().splitlines()[-1]) == json.loads(lines[-1])
    page = (tmp_path / "STUDY.md").read_text()
    assert all(f"| {name} |" in page for name in arms if " with " not in name and name != "ExPO")
    assert "| ExPO, factor 1.5 |" in page and "| clip |" in page
    assert "study/study.svg" in page and (work / "study.svg").read_text().startswith("<svg")


def test_the_studys_arms_are_what_they_say(tmp_path):
    """Labels turned round with their log-probs; the exact KL's gradient is D18's, against a loop over the states."""
    from examples.tiny import study

    pair = lambda *ids: data.Pair(*(torch.tensor(side).numpy() for side in ids), "")
    pairs, ref = [pair([1], [2, 3], [4])], [torch.tensor([-1.0, -2.0, -3.0])]
    turned, its_ref, guide = study.relabelled("reversed", 0, pairs, ref, None)
    assert turned[0].chosen.tolist() == [4] and turned[0].rejected.tolist() == [2, 3] and guide is None
    assert its_ref[0].tolist() == [-3, -1, -2]
    many = study.relabelled("random", 0, pairs * 400)[0]
    assert 150 < sum(len(p.chosen) == 1 for p in many) < 250
    start, guide = (model.random_model(model.parse_config(make.CONFIG), seed=seed, std=0.2) for seed in (0, 1))
    study.towards(start, guide, pairs, 4)
    found = [p.grad.clone() for p in start.parameters()]
    start.zero_grad()
    total = 0.0
    for ids, places in (([1, 2, 3], (0, 1)), ([1, 4], (0,))):
        log_p, log_q = (net(torch.tensor([ids]))[0].log_softmax(-1) for net in (start, guide))
        total = total + sum((log_p[t].exp() * (log_p[t] - log_q[t].detach())).sum() for t in places)
    (4 * 0.1**2 * total / 2).backward()
    for grad, parameter in zip(found, start.parameters()):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_studys_page_reads_its_numbers():
    from examples.tiny import study_page

    for df, tail, value in ((3, 0.025, 3.1824), (7, 0.025, 2.3646), (1, 0.025, 12.7062), (7, 0.005, 3.4995)):
        assert study_page.student(df, tail) == pytest.approx(value, abs=1e-3)  # a book's table
    assert study_page.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.3027 / 3**0.5), abs=1e-3)
    points = [{"kl": 4.0, "gold": 2.0}, {"kl": 1.0, "gold": 1.0}, {"kl": 9.0, "gold": 1.5}]  # the last shows nothing
    line = {"start": {"gold": 0.0, "kl": 0.0}, "curve": points}
    assert [study_page.at_kl(line, kl) for kl in (0.25, 1, 2.25, 4, 5)] == [0.5, 1, 1.5, 2, None]
    line["start"] = {"gold": 0.5, "kl": 1.0}  # of one that sets out from the guide
    assert [study_page.at_kl(line, kl) for kl in (0.5, 1, 2.25)] == [None, 0.5, 1.25]
