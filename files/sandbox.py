"""Renders chat templates, which strangers wrote, in a process of its own with limits on memory and time.

renderer.py runs this file as a script and talks to it in JSON, one object a line. First {"template", "tokens"},
answered by {}; then {"prompt": messages, "replies": [text]}, answered by {"texts": [prompt with generation
prompt, then the conversation with each reply]}. Else {"row": why} where the template fails on this row,
{"template": why} where it must not be used at all. Taking too long ends the process by SIGPROF.
"""

import datetime
import importlib.metadata
import json
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
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller):
        return caller()


class Namespace(jinja2.utils.Namespace):
    """namespace() without underscored names, which lead to Python's internals."""

    def __init__(*args, **attributes):
        self, *args = args
        attributes = dict(*args, **attributes)
        jinja2.utils.Namespace.__init__(self)
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name, value):
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is unsafe")
        super().__setitem__(name, value)


class Dict:
    """dict() and dict.fromkeys() without the class behind them."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


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
        raise_exception=raise_exception, strftime_now=TODAY.strftime, dict=Dict(), namespace=Namespace
    )
    return environment.from_string(source)


def answer(job, template, tokens):
    """The answer to one job: {"texts"} or {"row"}; what condemns the template is raised."""
    prompt, limit = job["prompt"], 1_000_000 + 100 * sum(len(m["content"]) for m in job["prompt"])
    texts = []
    try:
        for reply in [None, *job["replies"]]:
            messages = prompt if reply is None else [*prompt, {"role": "assistant", "content": reply}]
            texts.append(
                template.render(
                    messages=messages, tools=None, documents=None, add_generation_prompt=reply is None, **tokens
                )
            )
            if len(texts[-1]) > limit + 100 * len(reply or ""):
                raise MemoryError
            texts[-1].encode()
    except (MemoryError, jinja2.exceptions.SecurityError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, jinja2.TemplateError) else type(error).__name__ + ": "
        return {"row": f"{kind}{error}"}
    return {"texts": texts}


def main():
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))  # no file grows: whatever got out could write nothing
    template = tokens = None
    for line in sys.stdin.buffer:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            if template is None:
                template, tokens, reply = compile_template(job["template"]), job["tokens"], {}
            else:
                reply = answer(job, template, tokens)
            reply = json.dumps(reply).encode()
        except jinja2.exceptions.SecurityError as error:
            reply = json.dumps({"template": f"reaches for what a template may not: {error}"}).encode()
        except jinja2.exceptions.TemplateSyntaxError as error:
            reply = json.dumps({"template": f"line {error.lineno}: {error.message}"}).encode()
        except MemoryError:
            reply = b'{"template": "writes too much text or needs more than 1 GiB of memory"}'
        except Exception as error:
            reply = json.dumps({"template": f"fails: {type(error).__name__}: {error}"}).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    version = importlib.metadata.version("jinja2")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 1, 6):
        print(json.dumps({"template": f"jinja2 {version} has a leaky sandbox; pip install -U jinja2"}))
    else:
        main()
