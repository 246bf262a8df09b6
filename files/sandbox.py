"""Renders chat templates, which strangers wrote, in a process of its own with limits on memory and time.

template.py runs this file as a script and talks to it in JSON, one object a line. First {"template", "tokens"},
answered by {}; then {"prompt": messages, "replies": [text]}, answered by {"texts": [prompt with generation prompt, the
same with enable_thinking=False, then the conversation with each reply]}. Else {"row": why} where the template fails on
this row, {"template": why} where it must not be used at all. Taking too long ends the process by SIGPROF.
"""

import datetime
import importlib.metadata
import json
import os
import re
import resource
import signal
import sys

import jinja2.ext
import jinja2.sandbox

MEMORY = 1 << 30  # bytes of address space
SECONDS = 3  # of processor time a row, so that a busy machine stops no honest template
TODAY = datetime.datetime(2024, 7, 26)


class Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's text for trainers that mask by it; here it is a scope."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True))


class Namespace(jinja2.utils.Namespace):
    """namespace() without underscored names, which lead to Python's internals."""

    def __init__(*args, **attributes):  # not self, which may be the name of an attribute
        jinja2.utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **attributes).items():
            args[0][name] = value

    def __setitem__(self, name, value):
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is unsafe")
        super().__setitem__(name, value)


def new_dict(*args, **kwargs):
    """dict() without the class behind it, whose methods change what is not to be changed."""
    return dict(*args, **kwargs)


new_dict.fromkeys = dict.fromkeys


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compile_template(source):
    """The template in transformers' environment (utils/chat_template_utils.py), but with a fixed date."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=TODAY.strftime, dict=new_dict, namespace=Namespace
    )
    return environment.from_string(source)


def answer(job, template, tokens):
    """The answer to one job: {"texts"} or {"row"}; what condemns the template is raised."""
    prompt, texts = job["prompt"], []
    limit = 1_000_000 + 100 * sum(len(message["content"]) for message in prompt)  # characters
    try:
        for reply, switch in [(None, {}), (None, {"enable_thinking": False}), *((r, {}) for r in job["replies"])]:
            messages = prompt if reply is None else [*prompt, {"role": "assistant", "content": reply}]
            given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": reply is None}
            text = template.render(**given, **switch, **tokens)
            if len(text) > limit + 100 * len(reply or ""):
                raise MemoryError
            text.encode()
            texts.append(text)
    except (MemoryError, jinja2.exceptions.SecurityError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, jinja2.TemplateError) else type(error).__name__ + ": "
        return {"row": f"{kind}{error}"}
    return {"texts": texts}


def fault(error):
    """What condemns a template, in words."""
    if isinstance(error, MemoryError):
        return "writes too much text or needs more than 1 GiB of memory"
    if isinstance(error, jinja2.exceptions.SecurityError):
        return f"reaches for what a template may not: {error}"
    if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    return f"fails: {type(error).__name__}: {error}"


def memory():
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def watch_memory():
    """Limits memory where the address space cannot be, as on macOS: looks at it every 10 ms.

    Python looks between two steps of a template; what one step takes is limited by SECONDS alone.
    """
    most = memory() + MEMORY

    def look(*_):
        if memory() > most:
            signal.setitimer(signal.ITIMER_REAL, 0)  # once: the template is condemned
            raise MemoryError

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)


def main():
    version = importlib.metadata.version("jinja2")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 1, 6):
        sys.exit(f"jinja2 {version} has a leaky sandbox; pip install -U 'jinja2>=3.1.6'")
    os.set_blocking(2, False)  # a complaint longer than the pipe is cut: it is read when the process has ended
    # No file grows: whatever got out could write nothing.
    for limit, value in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, MEMORY)):
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):
            if limit == resource.RLIMIT_AS:
                watch_memory()
    template = tokens = None
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            job = json.loads(line)
            if template is None:
                template, tokens = compile_template(job["template"]), job["tokens"]
                reply = json.dumps({})
            else:
                reply = json.dumps(answer(job, template, tokens))
        except Exception as error:
            reply = json.dumps({"template": fault(error)})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
