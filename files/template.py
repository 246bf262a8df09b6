"""A chat template at work in a process of its own: the trainer's end of files/sandbox.py."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

from files.errors import BadInput, BadRow, brief

SANDBOX = Path(__file__).with_name("sandbox.py")
THINK = "<think>"  # a reply that begins so shows its reasoning


class ChatTemplate:
    """A tokenizer's chat template, used in a `with` statement, within which its process lives."""

    def __init__(self, tokenizer):
        if tokenizer.template is None:
            raise BadInput(f"{tokenizer.directory}: has no chat template; --chat-template FILE gives one")
        self.name = tokenizer.template_name
        self.header = {"template": tokenizer.template, "tokens": tokenizer.tokens}
        self.lock = threading.Lock()  # one job at a time

    def __enter__(self):
        pipe = subprocess.PIPE
        command = [sys.executable, "-P", "-W", "ignore", str(SANDBOX)]  # in its own session: Ctrl-C is for the trainer
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        try:
            self.ask(self.header)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def ask(self, job):
        """Sends one object and returns the answer; BadInput where the template or its process fails."""
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if line.endswith(b"\n"):
            answer = json.loads(line)
        elif (status := self.process.wait()) == -signal.SIGPROF:
            answer = {"template": "takes too long for one row"}
        else:
            said = self.process.stderr.read().decode(errors="replace").strip() or "memory may be short"
            raise BadInput(
                f"{self.name}: the process that renders the chat template ended with status {status}: "
                + brief(said.splitlines()[-1])
            )
        if "template" in answer:
            raise BadInput(
                f"{self.name}: the chat template cannot be used: {brief(answer['template'])}; "
                "--chat-template gives another"
            )
        return answer

    def render(self, prompt, replies=()):
        """The text of the prompt with the generation prompt, then of the conversation with each reply.

        What the template writes before replies without reasoning (Qwen3's empty <think> block) ends the prompt, where
        inference with enable_thinking=False feeds it."""
        with self.lock:
            answer = self.ask({"prompt": prompt, "replies": replies})
        if "row" in answer:
            mend = "; put the system message into the first user message" if "system" in answer["row"].lower() else ""
            raise BadRow(f"refused by the chat template: {brief(answer['row'])} ({self.name}){mend}")
        plain, quiet, *dialogues = answer["texts"]
        answers = replies and not any(reply.lstrip().startswith(THINK) for reply in replies)
        if answers and quiet.startswith(plain) and all(dialogue.startswith(quiet) for dialogue in dialogues):
            return [quiet, *dialogues]
        return [plain, *dialogues]
