"""What a run tells: lines, the bar, metrics.jsonl."""

import io
import json
import os
import sys

import numpy as np
import pytest

from runtime import progress
from runtime.metrics import Metrics
from runtime.progress import Progress, say


@pytest.fixture
def clock(monkeypatch):
    """progress.time.monotonic() as the test sets it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_say_is_rank_0s_and_shows_what_would_steer_the_terminal(capsys):
    say("grüße\tλ\nnext")
    say("clear \x1b[2J, turn \u202e, ring \x07, hide \u200b, back \r")
    say("not mine", rank=1)
    assert capsys.readouterr().out == (
        "grüße\tλ\nnext\nclear \\x1b[2J, turn \\u202e, ring \\x07, hide \\u200b, back \\r\n"
    )


def test_say_in_an_encoding_that_lacks_the_letters(monkeypatch):
    kept = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(kept, encoding="ascii"))
    say("grüße")
    assert kept.getvalue() == b"gr\\xfc\\xdfe\n"


def test_a_stdout_that_is_gone_silences_the_run(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    closed = io.StringIO()
    closed.close()
    full = [open("/dev/full", "w")] if sys.platform == "linux" else []
    for broken in (open(writer, "w"), *full, closed, None):
        monkeypatch.setattr(sys, "stdout", broken)
        say("lost")
        say("lost too")
        print("and this")
        if sys.stdout is not None:
            sys.stdout.flush()


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


def test_plain_lines_at_the_first_the_last_and_every_tenth(capsys, clock):
    bar = Progress(100, "tgdpo")
    for _ in range(100):
        clock[0] += 2
        bar.advance(loss=0.5, accuracy=0.75)
    bar.close()
    told = lines_of(capsys)
    assert [line.split()[1] for line in told] == [f"{n}/100" for n in (*range(1, 100, 10), 100)]
    assert told[1] == "tgdpo 11/100  loss 0.5000  accuracy 75.0%  0:02:58 left"
    assert told[-1] == "tgdpo 100/100  loss 0.5000  accuracy 75.0%"


def test_plain_lines_are_not_many_when_quick_and_not_few_when_slow(capsys, clock):
    bar = Progress(1000, "quick")
    for _ in range(1000):
        clock[0] += 0.001
        bar.advance()
    bar.close()
    assert lines_of(capsys) == ["quick 1/1000  0:00:01 left", "quick 1000/1000"]
    bar = Progress(1000, "slow")
    for _ in range(10):
        clock[0] += 30
        bar.advance(tokens_per_second=12345.6, mfu=0.4321)
    assert [line.split()[1] for line in lines_of(capsys)] == [f"{n}/1000" for n in (1, 3, 5, 7, 9)]
    assert progress.words(bar.figures) == "12,346 tok/s  mfu 43.2%"


def test_progress_that_resumes_overshoots_or_stops_early(capsys, clock):
    bar = Progress(10, "tgdpo", start=8)
    clock[0] += 5
    bar.advance()
    assert lines_of(capsys) == ["tgdpo 9/10  0:00:05 left"]
    bar.advance(5)
    bar.close()
    assert lines_of(capsys) == ["tgdpo 10/10"]
    bar = Progress(10, "pass")
    bar.advance()
    bar.advance()
    bar.close()
    assert lines_of(capsys)[-1].startswith("pass 2/10")
    bar = Progress(10, "other", rank=1)
    bar.advance()
    bar.close()
    assert lines_of(capsys) == []


class Terminal(io.StringIO):
    gone = False

    def isatty(self):
        return True

    def write(self, text):
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = Progress(4, "tgdpo", start=1)
    bar.advance(3, loss=0.25, tokens_per_second=1000)
    bar.close()
    shown = terminal.getvalue()
    assert "tgdpo 4/4" in shown and "loss 0.2500  1,000 tok/s" in shown and "left" in shown
    assert lines_of(capsys) == []
    bar = Progress(4, "tgdpo")
    terminal.gone = True
    for _ in range(4):
        bar.bar.last_print_t = 0  # as if it were long since the bar was drawn
        bar.advance()
    bar.close()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_json_whatever_the_figures(tmp_path):
    path = tmp_path / "metrics.jsonl"
    Metrics(path).write(
        {
            "stage": "dpo",
            "step": 1,
            "loss": np.float32(0.5),
            "margin": float("nan"),
            "r_hat_max": np.float32("inf"),
            "eval": True,
        }
    )
    Metrics(path, rank=1).write({"stage": "dpo", "step": 2})
    assert path.read_text().count("\n") == 1

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "stage": "dpo",
        "step": 1,
        "loss": 0.5,
        "margin": None,
        "r_hat_max": None,
        "eval": True,
    }


def test_metrics_of_a_resumed_run_are_those_of_one_never_stopped(tmp_path):
    def train(path, begin, end, evaluations=(2, 4)):
        """Rows as train.py writes them: the checkpoint of a step stands before its evaluation."""
        metrics = Metrics(path)
        metrics.keep_until("tgdpo", begin)
        for step in range(begin, end + 1):
            if step in evaluations:
                metrics.write({"stage": "tgdpo", "step": step, "loss": step / 10, "eval": True})
            if step < end:
                metrics.write({"stage": "tgdpo", "step": step + 1, "loss": step / 10})

    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    for path in (whole, stopped):
        path.write_text('{"stage": "dpo", "step": 1}\n{"stage": "dpo", "step": 9}\n')
    train(whole, 0, 5)
    assert [row["step"] for row in rows(whole)] == [1, 9, 1, 2, 2, 3, 4, 4, 5]
    train(stopped, 0, 3)
    killed = '{"stage": "tgdpo", "step": 4, "lo', '{"stage": "tgdpo", "step": 5}', "", ""
    for checkpoint, cut in zip((3, 5, 2, 0), killed):
        with open(stopped, "a") as file:
            file.write(cut)  # the middle of a line, or all but its end
        train(stopped, checkpoint, 5)
        assert stopped.read_bytes() == whole.read_bytes(), checkpoint
    assert sorted(os.listdir(tmp_path)) == ["stopped.jsonl", "whole.jsonl"]


def test_metrics_of_an_earlier_stage_that_starts_again_take_the_later_ones_along(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "dpo", "step": 1}\n{"stage": "dpo", "step": 2}\n{"stage": "tgdpo", "step": 1}\n')
    Metrics(path, rank=1).keep_until("dpo", 0)
    assert len(rows(path)) == 3
    Metrics(path).keep_until("dpo", 1)
    assert rows(path) == [{"stage": "dpo", "step": 1}]
    Metrics(tmp_path / "none.jsonl").keep_until("dpo", 0)
