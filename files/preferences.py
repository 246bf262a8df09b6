"""Preference records of every accepted form -> messages: how strangers name and nest prompt, system and replies.

`renamed` puts the columns of --columns under the names that are read here, `preference_of` makes of a row the prompt's
messages and two replies. Nothing that changes a prompt is passed over: what is not rendered, or said twice and not
alike, makes a row a BadRow.
"""

import math
import re

from files.errors import BadRow, brief

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
PROMPTS = ("prompt", "instruction", "conversations")
MORE = ("input", "query")  # stands behind a prompt that is text
EMPTY = (None, "", "[]", [], {})
REFUSED = ("tools", "functions", "images", "videos", "audios")  # they change the prompt, and are not rendered
UNSPOKEN = (*REFUSED, "tool_calls", "function_call", "reasoning_content", "thinking")  # likewise, of a message
READ = {*PROMPTS, *MORE, *REFUSED, *"system history chosen rejected chosen_messages rejected_messages".split()}
# What else a name of --columns stands for, which is not read beside the column that was named.
ALIASES = {"prompt": (*PROMPTS, *MORE), "chosen": ("chosen_messages",), "rejected": ("rejected_messages",)}
LIKE = {  # how others name them
    "prompt": "prompt|question|instruction|query|input",
    "chosen": "chosen|(?<!dis)prefer|accept|better|win|response_j|positive",
    "rejected": "reject|disprefer|worse|los|response_k|negative",
}
TURN = re.compile(r"\n\n(Human|Assistant):")  # of hh-rlhf's transcripts


def preference_of(row):
    """A row of any accepted form as (prompt messages, chosen text, rejected text). Raises BadRow."""
    for field in REFUSED:
        if row.get(field) not in EMPTY:
            raise BadRow(f"{field}: `{field}` would change the prompt, and is not rendered; leave such rows out")
    before = history_of(row)
    chosen, rejected = (under_system(row, before, dialogue) for dialogue in dialogues_of(row))
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("different prompts: chosen and rejected must answer the same messages")
    for field in MORE:
        if row.get(field) not in EMPTY and not stands_in(text_of(row[field], field), chosen[:-1]):
            raise BadRow(f"two prompts: `{field}` is not in the messages of the prompt; leave one of them out")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def stands_in(text, messages):
    """Whether a text is part of the messages, but for space around it."""
    return text.strip() in "\n".join(message["content"] for message in messages)


def fields_read(columns):
    """The names of columns that are read under their own names, where --columns gives {name: column}: neither those
    it gives, nor what else these stand for, nor the columns it takes."""
    hidden = {alias for name in columns for alias in (name, *ALIASES.get(name, ()))}
    return READ - hidden - set(columns.values())


def renamed(row, columns):
    """The row with the columns of --columns under the names that are read. columns: {name: column}. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"no object: the row is a {type(row).__name__}")
    for name, column in columns.items():
        if row.get(column) is None and name not in ("system", "history"):
            raise BadRow(f"missing field: `{column}`, which --columns reads as {name}; {has(row)}")
    hidden = READ - fields_read(columns)
    own = {field: value for field, value in row.items() if field not in hidden}
    return own | {name: row.get(column) for name, column in columns.items()}


def has(row):
    """The columns of a row in words, and the --columns that would read it, where one is near."""
    found, texts = {}, [field for field, value in row.items() if isinstance(value, (str, list, dict))]
    for name, like in LIKE.items():
        taken = [name] if name in texts else [field for field in texts if re.search(like, field)]
        found |= {name: taken[0]} if taken else {}
    near = " ".join(f"{name}={field}" for name, field in found.items() if name != field)
    offer = f"; try --columns {near}" if near and len(found) == 3 and len(set(found.values())) == 3 else ""
    return f"the row has: {', '.join(map(brief, row)) or 'no columns'}{offer}"


def weight_of(row):
    """The row's weight, a finite number above 0. Raises BadRow."""
    weight = row["weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise BadRow(f"no weight: the weight must be a number greater than 0, and is {brief(repr(weight))}")
    return float(weight)


def history_of(row):
    """LLaMA-Factory's `history`, a list of [user, assistant] pairs, as messages."""
    messages = []
    turns = [] if row.get("history") in EMPTY else row["history"]
    if not isinstance(turns, list):
        kind = type(turns).__name__
        raise BadRow(f"wrong type: `history` must be a list of [user, assistant] pairs, and is a {kind}; {has(row)}")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow(f"wrong type: `history[{number}]` must be a pair [user, assistant]")
        for role, text in zip(("user", "assistant"), turn):
            messages.append({"role": role, "content": text_of(text, f"history[{number}]")})
    return messages


def under_system(row, before, dialogue):
    """The dialogue behind the row's `system`, which a system message of its own must repeat, and behind the history."""
    own = dialogue[:1] if dialogue[0]["role"] == "system" else []
    given = [] if row.get("system") in EMPTY else [{"role": "system", "content": text_of(row["system"], "system")}]
    if own and given and own != given:
        raise BadRow("two systems: `system` and the system message of the dialogue say different things; leave one")
    return (own or given) + before + dialogue[len(own) :]


def dialogues_of(row):
    """The two dialogues of a row, messages that end with the reply. A new form of rows is one more case here."""
    if row.get("chosen_messages") is not None:  # LLaMA-Factory's v1 form
        return [dialogue_of(row, field, None) for field in ("chosen_messages", "rejected_messages")]
    prompt = prompt_of(row)
    return [dialogue_of(row, field, prompt) for field in ("chosen", "rejected")]


def prompt_of(row):
    """The messages of a row's own prompt, or None where it has none."""
    given = [field for field in PROMPTS if row.get(field) is not None]
    if not given:
        return None
    if any(row[field] != row[given[0]] for field in given):
        raise BadRow(f"two prompts: {' and '.join(given)} say different things; leave one")
    value = turns_of(row[given[0]])
    if isinstance(value, list):
        messages = messages_of(value, given[0])
        return messages[:-1] if value is not row[given[0]] and not messages[-1]["content"] else messages
    fields = [given[0]] + [field for field in MORE if row.get(field) not in (None, "")]
    return [{"role": "user", "content": "\n".join(text_of(row[field], field) for field in fields)}]


def turns_of(value):
    """The messages of a transcript of hh-rlhf; any other value as it is."""
    if not isinstance(value, str) or not TURN.match(value):
        return value
    _, *turns = TURN.split(value)
    return [{"role": who.lower(), "content": text.strip()} for who, text in zip(turns[::2], turns[1::2])]


def dialogue_of(row, field, prompt):
    """The messages in a field of a row, which hold the prompt's or follow them: roles in order, the reply last."""
    value = row.get(field)
    if value is None:
        raise BadRow(f"missing field: `{field}`; {has(row)}")
    if not isinstance(value, (str, list, dict)):
        raise BadRow(f"wrong type: `{field}` must be text or messages, and is a {type(value).__name__}")
    value = turns_of(value)
    dialogue = messages_of({"role": "assistant", "content": value} if isinstance(value, str) else value, field)
    if not dialogue or dialogue[0]["role"] == "assistant":
        if prompt is None:
            raise BadRow(f"missing field: {', '.join(PROMPTS)}, or the prompt's messages in `{field}`; {has(row)}")
        dialogue = prompt + dialogue
    elif any(isinstance(row.get(name), list) for name in PROMPTS) and dialogue[: len(prompt)] != prompt:
        raise BadRow(f"different prompts: `{field}` does not begin with the messages of the prompt")
    roles = [message["role"] for message in dialogue]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[-1:] != ["assistant"]:
        raise BadRow(f"no response: `{field}` must end with a message of the assistant")
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRow(
            f"roles out of order: {', '.join(roles[:8])} in `{field}`; after a system message, if any, "
            "user and assistant speak in turn"
        )
    if not all(stands_in(message["content"], dialogue[:-1]) for message in prompt or []):
        raise BadRow(f"two prompts: the row's own prompt is not in the messages of `{field}`; leave one of them out")
    return dialogue


def messages_of(value, field):
    """Messages in either spelling (role and content, from and value) as [{"role", "content"}]."""
    messages = []
    for number, message in enumerate(value if isinstance(value, list) else [value], 1):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise BadRow(f"no message: `{place}` must be an object with role and content")
        role = message.get("from") if message.get("role") is None else message["role"]
        content = message.get("value") if message.get("content") is None else message["content"]
        if silent := [name for name in UNSPOKEN if message.get(name) not in EMPTY]:
            raise BadRow(f"{silent[0]}: `{place}` has {silent[0]}, which is not rendered; leave such rows out")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"unknown role: {brief(role)!r} in `{place}`; known are {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": text_of(content, place)})
    return messages


def text_of(value, field):
    """A string, or the joined strings of a list of text parts."""
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and part.get("type", "text") == "text"]
        texts = [part.get("value") if part.get("text") is None else part["text"] for part in parts]
        if parts and len(parts) == len(value) and all(isinstance(text, str) for text in texts):
            value = "".join(texts)
    if not isinstance(value, str):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise BadRow(f"no text: `{field}` must be a string or a list of text parts, and is {found}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"lone surrogate: {value[error.start]!a} in `{field}` is no character") from None
    return value
