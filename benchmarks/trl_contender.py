"""TRL's DPOTrainer with the reference's log-probs precomputed. It knows no TGDPO: it is compared with our DPO."""

import logging
import os
import tempfile

os.environ["TQDM_DISABLE"] = "1"
import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

END = "</s>"


def train(
    policy_dir,
    guide_dir,
    pairs,
    batch,
    after_step,
    *,
    per_device=1,
    checkpointing=False,
    by_length=True,
    beta=0.1,
    lr=1e-4,
    device="cpu",
):
    """Trains with DPO on `pairs`, `batch` of them a step and `per_device` at a time; after_step(loss) after each step.

    after_step(None) comes once before the first, when the reference's log-probs are there. guide_dir is not used.
    by_length: the pairs of a step are put in order of length, which leaves the step's pairs and its loss what they are.
    """
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    model = LlamaForCausalLM.from_pretrained(policy_dir, dtype="float32", attn_implementation="sdpa")
    if by_length:
        pairs = [
            pair
            for start in range(0, len(pairs), batch)
            for pair in sorted(pairs[start : start + batch], key=lambda pair: -sum(map(len, pair[:3])))
        ]
    with tempfile.TemporaryDirectory() as directory:
        config = DPOConfig(
            output_dir=directory,
            use_cpu=device == "cpu",
            bf16=False,
            beta=beta,
            learning_rate=lr,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            num_train_epochs=1,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=batch // per_device,
            gradient_checkpointing=checkpointing,
            max_length=None,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        rows = datasets.Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), texts(pair))) for pair in pairs])
        trainer = Recorded(
            model=model, args=config, train_dataset=rows, processing_class=tokenizer(model.config.vocab_size)
        )
        trainer.losses = []
        trainer.add_callback(AfterStep(trainer, after_step))
        trainer.train()


def texts(pair):
    """Prompt, chosen and rejected as the words that `tokenizer` turns into the pair's ids again."""
    words = [[f"t{token}" for token in ids] for ids in pair[:3]]
    for response in words[1:]:
        response[-1] = END
    return " ".join(words[0]) + " ", " ".join(words[1]), " ".join(words[2])


def tokenizer(vocab):
    """A word a token: t0, END, t2, t3, …"""
    words = {f"t{token}": token for token in range(vocab) if token != 1} | {END: 1}
    words_to_ids = Tokenizer(models.WordLevel(words, unk_token="t0"))
    words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_to_ids, eos_token=END, pad_token="t0")


class Recorded(DPOTrainer):
    """A DPOTrainer that keeps each micro-batch's loss unrounded."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


class AfterStep(TrainerCallback):
    """Calls after_step at the start of training and after every optimiser step."""

    def __init__(self, trainer, after_step):
        self.trainer, self.after_step = trainer, after_step

    def on_train_begin(self, *args, **kwargs):
        self.after_step(None)

    def on_step_end(self, *args, **kwargs):
        self.after_step(sum(self.trainer.losses))
        self.trainer.losses.clear()
