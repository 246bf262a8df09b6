"""A chat template at work in a process of its own: the trainer's end of files/sandbox.py."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from files.errors import BadInput, BadRow, brief

SANDBOX = Path(__file__).with_name("sandbox.py")


class Renderer:
    """Renders with a tokenizer's chat template, in a `with` statement, within which its process lives."""

    def __init__(self, tokenizer):
        if tokenizer.template is None:
            raise BadInput(f"{tokenizer.directory}: has no chat template; --chat-template FILE gives one")
        self.name = tokenizer.template_name
        self.header = {"template": tokenizer.template, "tokens": tokenizer.tokens}

    def __enter__(self):
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        command = [sys.executable, "-P", str(SANDBOX)]  # in its own session: Ctrl-C is for the trainer
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, start_new_session=True)
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
        """Sends one object and returns the answer; BadInput where the template must not be used."""
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or "null")
        except BrokenPipeError:
            answer = None
        if answer is None:
            status = self.process.wait()
            answer = {
                "template": "takes too long for one row"
                if status == -signal.SIGPROF
                else f"needs too much memory, or broke its process in another way (status {status})"
            }
        if "template" in answer:
            raise BadInput(
                f"{self.name}: the chat template cannot be used: {brief(answer['template'])}; "
                "--chat-template gives another"
            )
        return answer

    def render(self, prompt, replies=()):
        """The text of the prompt with the generation prompt, then of the conversation with each reply."""
        answer = self.ask({"prompt": prompt, "replies": replies})
        if "row" in answer:
            raise BadRow(f"refused by the chat template: {brief(answer['row'])} ({self.name})")
        return answer["texts"]
