import re

import pytest

from jaxseq.training.progress import Progress


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_terminal_shows_metrics_speed_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, any output is then a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress = Progress("characters", 4096)
    with progress.bar(10, 40):
        for step in (15, 20):
            progress.update(step, {"loss": 1.5, "bits_per_character": 2.164})
        progress.say("[bold]markup[/bold] stays as it is")
    shown = plain(capsys.readouterr().out)
    assert "20/40" in shown and "loss 1.500" in shown and "bits per character 2.164" in shown
    assert re.search(r"[\d,]+ characters/s", shown) and re.search(r"\d:\d\d:\d\d", shown)
    assert "[bold]markup[/bold] stays as it is" in shown


def test_elsewhere_only_what_is_said_is_written(capsys: pytest.CaptureFixture[str], monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    progress = Progress()
    with progress.bar(0, 2):
        progress.update(1, {"loss": 1.5})
        progress.say("half way " + "and a long line " * 20)
    assert capsys.readouterr().out.strip() == ("half way " + "and a long line " * 20).strip()
