"""What a run leaves for other programs: policy/ and guide/ as transformers, vLLM and llama.cpp read them."""

import json
import os
import pathlib
import shlex

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_world import CONTROL, LLAMA3, TEMPLATE, make_checkpoint, make_pairs

import model
import train
from files.card import add_figures, licence, model_card
from files.export import as_used, save_model
from files.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")

BASE_EOS, END = 256, 259
OTHER = TEMPLATE.replace("<|head|>", "<|begin|>")


def change(path, **fields):
    """Set fields of a JSON file, made where there is none; None takes one away."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (old | fields).items() if v is not None}))


def read(path):
    return json.loads(path.read_text())


def base_model(directory):
    """A base model: it ends texts with a token of its own, and has no chat template. Its template is in a file."""
    make_checkpoint(directory, eos_token_id=BASE_EOS)
    change(directory / "tokenizer_config.json", eos_token=CONTROL[0], chat_template=None)
    change(directory / "special_tokens_map.json", eos_token={"content": CONTROL[0], "lstrip": False}, bos_token="kept")
    (directory.parent / "template.jinja").write_text(TEMPLATE)
    return "--model", directory, "--chat-template", directory.parent / "template.jinja"


@pytest.fixture
def trained(tmp_path):
    """Run train.main with the given words on a few pairs; -> OUT."""
    pairs = make_pairs(tmp_path / "pairs.jsonl", 4)

    def run(*words, status=0, loss="dpo"):
        words = [*words, "--data", pairs, "--out", tmp_path / "out", "--loss", loss, "--max-length", 128]
        assert train.main([*map(str, words), "--samples", "1", "--sample-tokens", "2"]) == status
        return tmp_path / "out"

    return run


def load(directory):
    net = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return net, transformers.AutoTokenizer.from_pretrained(directory)


# ------------------------------------------------------------------------------------------ the end of a turn


@pytest.mark.parametrize("generation", ["came", "none"])
def test_a_base_model_given_a_template_stops_at_its_end(generation, trained, tmp_path):
    words = base_model(tmp_path / "base")
    change(tmp_path / "base/generation_config.json", top_k=7)
    if generation == "none":
        (tmp_path / "base/generation_config.json").unlink()
    out = trained(*words, loss="tgdpo")
    for directory in (out / "policy", out / "guide"):
        settings = read(directory / "generation_config.json")
        assert settings["eos_token_id"] == [END, BASE_EOS] and settings["bos_token_id"] == 256
        assert settings.get("top_k") == (7 if generation == "came" else None)
        assert read(directory / "config.json")["eos_token_id"] == [END, BASE_EOS]
        assert read(directory / "tokenizer_config.json")["eos_token"] == CONTROL[3]
        older = read(directory / "special_tokens_map.json")
        assert older == {"eos_token": CONTROL[3], "pad_token": CONTROL[3], "bos_token": "kept"}
        net, tokenizer = load(directory)
        assert net.generation_config.eos_token_id == [END, BASE_EOS] and tokenizer.eos_token_id == END


def test_what_ends_the_turn_already_keeps_its_files(trained, tmp_path):
    """Several stop tokens with the end of turn among them, and a pad token: all as it came, byte for byte."""
    source = pathlib.Path(make_checkpoint(tmp_path / "start", eos_token_id=[257, END], pad_token_id=258))
    change(
        source / "generation_config.json", eos_token_id=[257, END], pad_token_id=258, temperature=0.6, do_sample=True
    )
    change(source / "tokenizer_config.json", pad_token=CONTROL[2])
    change(source / "special_tokens_map.json", eos_token=CONTROL[3], pad_token={"content": CONTROL[2], "lstrip": False})
    policy = trained("--model", source) / "policy"
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        assert (policy / name).read_bytes() == (source / name).read_bytes(), name
    assert read(policy / "config.json")["eos_token_id"] == [257, END]


def test_what_cannot_be_exported_is_told_before_training(trained, tmp_path, capfd):
    source = pathlib.Path(make_checkpoint(tmp_path / "start"))
    (source / "generation_config.json").write_text("{")
    capfd.readouterr()
    out = trained("--model", source, status=2)
    error = capfd.readouterr().err
    assert "generation_config.json: not JSON" in error and error.count("\n") == 1
    assert not (out / "metrics.jsonl").exists()


# --------------------------------------------------------------------------------------- one template, one pad


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "both", "by name"])
def test_one_template_for_every_reader(where, trained, tmp_path):
    """transformers prefers chat_template.jinja, llama.cpp's converter tokenizer_config.json."""
    source = pathlib.Path(make_checkpoint(tmp_path / "start"))
    named = [{"name": "default", "template": OTHER}, {"name": "tools", "template": OTHER}]
    if where != "tokenizer_config.json":
        change(source / "tokenizer_config.json", chat_template={"both": OTHER, "by name": named}.get(where))
    if where in ("chat_template.jinja", "both"):
        (source / "chat_template.jinja").write_text(OTHER)
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    policy = trained("--model", source, "--chat-template", tmp_path / "mine.jinja") / "policy"
    assert load(policy)[1].chat_template == TEMPLATE
    assert read(policy / "tokenizer_config.json")["chat_template"] == TEMPLATE
    assert not list(policy.glob("*.jinja"))


def test_the_models_own_template_is_where_every_reader_looks(trained, tmp_path):
    source = pathlib.Path(make_checkpoint(tmp_path / "start"))
    change(source / "tokenizer_config.json", chat_template=None)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    policy = trained("--model", source) / "policy"
    assert load(policy)[1].chat_template == read(policy / "tokenizer_config.json")["chat_template"] == TEMPLATE


def test_transformers_generates_for_a_batch(trained, tmp_path):
    """Without a pad token it raises; with it, a padded prompt gets the answer it gets alone."""
    policy = trained(*base_model(tmp_path / "base")) / "policy"
    net, tokenizer = load(policy)
    assert tokenizer.pad_token == CONTROL[3] and net.config.pad_token_id == net.generation_config.pad_token_id == END
    prompts = ["hello", "a longer prompt"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    assert (batch["attention_mask"] == 0).any()
    together = net.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for prompt, answer in zip(prompts, together):
        alone = net.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)[0]
        new = alone[len(tokenizer(prompt)["input_ids"]) :].tolist()
        assert answer.tolist() == new + [END] * (len(answer) - len(new))


def test_a_pad_token_that_the_vocabulary_lacks_is_none(trained, tmp_path):
    """Loaded as it came, it would get an id beyond the embeddings."""
    source = pathlib.Path(make_checkpoint(tmp_path / "start"))
    change(source / "tokenizer_config.json", pad_token="[PAD]")
    change(source / "generation_config.json", pad_token_id=-1)
    net, tokenizer = load(trained("--model", source) / "policy")
    assert tokenizer.pad_token_id == net.generation_config.pad_token_id == END and len(tokenizer) == 260


# --------------------------------------------------------------------------------------------- both spellings

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}
ROPES = {"default": {"rope_type": "default", "rope_theta": 900.0}, "linear": LINEAR, "llama3": LLAMA3}


def spelled(config, version):
    """The object of config.json with RoPE as transformers 4 or 5 spells it, alone."""
    rope = config["rope_parameters"]
    bare = {k: v for k, v in config.items() if not k.startswith("rope_")}
    if version == 5:
        return bare | {"rope_parameters": rope}
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    scaling = None if rope["rope_type"] == "default" else scaling
    return bare | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("rope", ROPES)
def test_either_spelling_of_rope_gives_the_numbers(rope, version, tmp_path):
    source = pathlib.Path(make_checkpoint(tmp_path / "start", rope_parameters=ROPES[rope]))
    change(source / "config.json", rope_scaling=None)
    config = spelled(read(source / "config.json") | {"rope_parameters": ROPES[rope]}, version)
    (source / "config.json").write_text(json.dumps(config))
    net = model.load_model(source)
    config, _ = as_used(source, load_tokenizer(source))
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    save_model(str(tmp_path / "out"), config, shapes, net.named_parameters(), torch.float32)
    exported = read(tmp_path / "out/config.json")
    assert exported["rope_parameters"] == ROPES[rope] and exported["rope_theta"] == ROPES[rope]["rope_theta"]
    assert exported["dtype"] == exported["torch_dtype"] == "float32"
    tokens = torch.randint(0, 260, (2, 100))
    for alone in (exported, spelled(exported, 4), spelled(exported, 5)):
        if alone is not exported:  # each by itself is what was written
            assert {k: exported[k] for k in alone} == alone
        (tmp_path / "out/config.json").write_text(json.dumps(alone))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        with torch.no_grad():
            assert (theirs(tokens).logits - net(tokens)).abs().max() < 1e-4


def test_a_source_without_theta_gets_the_one_that_was_computed_with(tmp_path):
    """Llama 2's config.json has no rope_theta, an old one says `type`."""
    source = pathlib.Path(make_checkpoint(tmp_path / "start"))
    config = {k: v for k, v in read(source / "config.json").items() if not k.startswith(("rope", "architectures"))}
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    (source / "config.json").write_text(json.dumps(config))
    exported, _ = as_used(source, load_tokenizer(source))
    assert exported["architectures"] == ["LlamaForCausalLM"]  # which vLLM wants
    assert exported["rope_theta"] == exported["rope_parameters"]["rope_theta"] == 10000.0
    assert exported["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert exported["rope_parameters"] == {
        "type": "linear",
        "rope_type": "linear",
        "factor": 4.0,
        "rope_theta": 10000.0,
    }
    assert model.parse_config(exported).rope_scaling == {"rope_type": "linear", "factor": 4.0}


# ------------------------------------------------------------------------------------------------ model card


def test_policy_and_guide_have_cards_with_the_final_figures(trained, tmp_path, monkeypatch):
    source = pathlib.Path(make_checkpoint(tmp_path / "start"))
    (source / "README.md").write_text("---\nlicense: llama3\nlicense_link: LICENSE\n---\n# A model\n")
    typed = ["train.py", "--model", "a directory/*", "--loss", "tgdpo"]
    monkeypatch.setattr("sys.argv", typed)
    more, merged = (
        ("--centre-guidance", "--lora-rank", 2),
        "merged adapters (LoRA) of rank 2 and alpha 32 on local data",
    )
    out = trained("--model", source, "--with", "ld=0", "ipo", "length", *more, loss="tgdpo")
    table = read(out / "run.json")["table"]
    for name, loss, how in (
        ("policy", "tgdpo", f"TGDPO with the parts ld=0 ipo length=0.01, centred guidance, {merged}, by"),
        ("guide", "dpo", f"A local model after DPO with {merged}, by"),
    ):
        card = ModelCard.load(out / name / "README.md")
        assert how in card.text
        assert card.data.to_dict() == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "license": "llama3",
            "tags": [loss, "preference-optimization"],
        }
        assert f"\n    {shlex.join(['python', *typed])}\n" in card.text
        assert str(tmp_path) not in card.text and "@inproceedings{zhu2025tgdpo," in card.text
        for row in table:
            assert f"| {row['model']} | {row['accuracy']:.3f} | {row['margin']:.3f} |" in card.text
        assert not list(out.glob(f"{name}/*.tmp"))
    before = (out / "policy/README.md").read_text()
    add_figures(out / "policy", table)
    add_figures(out / "policy", [])  # of a run that reports no pairs
    add_figures(out / "a guide of an earlier version", table)
    assert (out / "policy/README.md").read_text() == before


def test_a_card_names_hub_ids_and_nothing_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("here/model")
    pathlib.Path("here/pairs").touch()
    data = ["org/pairs:train_prefs", "org/more@v1", "here/pairs", str(tmp_path / "pairs.jsonl")]
    card = ModelCard(model_card("simpo", "org/base@v2", data, "here/model", "python train.py"))
    assert card.data.base_model == "org/base" and card.data.datasets == ["org/pairs", "org/more"]
    assert "org/base after SimPO on org/pairs and org/more" in card.text
    card = ModelCard(model_card("dpo", "here/model", ["here/pairs"], "here/model", "python train.py\n```\n---"))
    assert {"base_model", "datasets"}.isdisjoint(card.data.to_dict()) and "here" not in card.text
    assert "\n    ```\n    ---\n" in card.text


@pytest.mark.parametrize(
    "front, expected",
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: 'x: [y]'\nlicense_link: https://e.org/l",
            {"license": "other", "license_name": "x: [y]", "license_link": "https://e.org/l"},
        ),
        ("license: [mit, gpl]\nlicense_name: 3", {}),
        ("license: !!python/object/apply:os.system [exit]", {}),
        ("- a list", {}),
        ("license: {", {}),
        ("x: 1", {}),
    ],
)
def test_the_licence_of_the_base(front, expected, tmp_path):
    assert licence(tmp_path) == {}
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\ntext")
    assert licence(tmp_path) == expected
    data = ModelCard(model_card("dpo", str(tmp_path), [], tmp_path, "python train.py")).data.to_dict()
    assert {k: v for k, v in data.items() if k.startswith("license")} == expected
    (tmp_path / "README.md").write_text("no front matter")
    assert licence(tmp_path) == {}


# ------------------------------------------------------------------------------------------ whole or not at all


def test_every_file_is_on_the_disk_before_the_directory_has_its_name(tmp_path, monkeypatch):
    source = pathlib.Path(make_checkpoint(tmp_path / "start"))
    net, out, log = model.load_model(source), tmp_path / "out", []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append("rename"), rename(a, b)))
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    files = [(source / "tokenizer.json", "tokenizer.json")]
    tensors = net.named_parameters()
    save_model(str(out), str(source), shapes, tensors, torch.float32, files, {"README.md": "card"}, shard_bytes=9000)
    named = log.index("rename")
    assert len(list(out.iterdir())) > 5
    for path in [*out.iterdir(), out]:
        assert path.stat().st_ino in log[:named], path
    assert tmp_path.stat().st_ino in log[named:]
