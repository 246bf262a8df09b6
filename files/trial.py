"""Tries a tokenizer.json, which strangers made, in a process of its own with limits on memory and time.

tokenizer.py runs this file as a script, with the bytes of the tokenizer.json on its standard input. It ends with status
0 where the tokenizers library makes tokens of a few lines of text and text of them and of each token, or raises what
the caller will raise as well. Where the library panics, it prints why; taking too much ends the process by a signal.
"""

import os
import resource
import signal
import sys

MEMORY = 4 << 30  # bytes of address space
SECONDS = 20  # of processor time: the largest vocabularies take some seconds to load
TEXTS = [
    "",
    "Hello there.\r\n\r\nIt's 3 o'clock,\t  isn't it? x = [1.5, -2e-7]; //*",
    "".join(map(chr, range(32, 1024))),
    "日本語 中文 한국어 العربية हिन्दी e\u0301 \ufb01 \U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "x" * 64,
    " \n" * 32,
]


def main():
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}  # threads and backtraces take memory
    signal.alarm(6 * SECONDS)  # on the clock: without memory it may wait for ever
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS)):
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # as for memory on macOS, or a lower limit holds already
            pass
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_buffer(sys.stdin.buffer.read())
        for encoding in backend.encode_batch_fast(TEXTS, add_special_tokens=False):
            backend.decode(encoding.ids, skip_special_tokens=False)
        backend.decode_batch([[i] for i in backend.get_vocab().values()], skip_special_tokens=False)
    except Exception:
        pass
    except BaseException as panic:
        sys.stdout.write(str(panic)[:1000])


if __name__ == "__main__":
    main()
