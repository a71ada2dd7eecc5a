"""The rule `passes`, which runs the code of replies with tests: what passes, its limits, and that it is off."""

from __future__ import annotations

import json
import os
import resource
import time

import pytest

from srlm_cli.errors import OptionError
from srlm_cli.records import response_record
from srlm_cli.rules import RuleSet, check_reply, code, rules_of_row

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def row(reply: str, tests: object = TESTS, rule: str = "passes=tests") -> dict:
    return {"id": "a", "prompt": "Write add(a, b).", "response": reply, "tests": tests, "rules": [rule]}


def kept(reply: str, tests: object = TESTS, rule: str = "passes=tests") -> bool:
    record = response_record(row(reply, tests, rule))
    return check_reply(record, rules_of_row(record, run_code=True))[rule]


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (f"Here it is:\n```python\n{ADD}```\nDone.", True),
        (f"```\n{ADD}```", True),
        (ADD, True),
        (f"```py\n{ADD}", True),
        (f"```python\n{ADD}```\nUse it:\n```python\nadd(3, 4)\n```\n```sh\npython add.py\n```", True),
        (f"```\n$ python add.py\n```\n```python\n{ADD}```", True),
        (f"```python\n{ADD}if __name__ == '__main__':\n    print(add(int(input()), 1))\n```", True),
        ("```python\ndef add(a, b):\n    return a - b\n```", False),
        ("I do not know.", False),
        ("```python\nimport sys\nsys.exit(0)\n```", False),
        ("```python\nimport os\nos._exit(0)\n```", False),
        (f"```python\n{ADD}input()\n```", False),
        (f"```python\n{ADD}block = bytearray(3 << 30)\n```", False),
        (f"```python\n{ADD}open('large', 'wb').write(bytes(20 << 20))\n```", False),
    ],
)
def test_the_code_of_a_reply_has_to_run_to_the_end_of_its_tests(reply: str, right: bool) -> None:
    assert kept(reply) is right


def test_the_opposite_is_kept_by_code_that_fails() -> None:
    assert kept("add = max", rule="not-passes=tests") and not kept(ADD, rule="not-passes=tests")


def test_tests_are_a_text_or_a_list_of_texts() -> None:
    assert kept(ADD, "assert add(2, 2) == 4") and not kept(ADD, "assert add(2, 2) == 5")
    assert kept(ADD, None, "passes:assert add(2, 2) == 4")
    assert kept(ADD, ["assert add(2, 2) == 4"]) and not kept(ADD, ["assert add(2, 2) == 4", "assert False"])


def test_a_program_that_does_not_end_is_stopped(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(code, "CLOCK", 0.6)
    started = time.monotonic()
    ready = tmp_path / "ready"
    left = f"import subprocess, time\nsubprocess.Popen(['sleep', '60'])\nopen({str(ready)!r}, 'w').close()\n"
    assert not kept(f"```python\n{left}time.sleep(60)\n```")
    assert time.monotonic() - started < 50 and ready.exists()


def test_a_program_that_computes_without_end_is_stopped(monkeypatch) -> None:
    monkeypatch.setattr(code, "SECONDS", 1)
    monkeypatch.setattr(code, "CLOCK", 120)
    started, ended = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert not kept("```python\nwhile True:\n    pass\n```")
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - ended
    assert time.monotonic() - started < 100 and 0.5 < used < 5


def test_the_environment_is_not_shown_to_the_code(monkeypatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    assert kept("import os\nnames = set(os.environ)", "assert 'MY_TOKEN' not in names, names")
    assert kept("import os\nhere = os.listdir()", "assert here == ['reply.py'], here")
    assert os.environ["MY_TOKEN"] == "secret"


def test_no_code_runs_unless_it_is_allowed() -> None:
    record = response_record(row(f"```python\n{ADD}```"))
    assert len(rules_of_row(record, run_code=True)) == 1
    for spec in ("passes", "not-passes:assert True", "passes=tests"):
        with pytest.raises(OptionError, match="runs the code"):
            rules_of_row({**record, "rules": [spec]})
        with pytest.raises(OptionError, match="runs the code"):
            RuleSet().of({**record, "rules": {spec: True}})


@pytest.mark.parametrize(
    "command", ["judge --engine echo --model rules", "judge --engine echo --combine mean", "eval rules"]
)
def test_a_command_refuses_it_without_run_code(srlm, command: str) -> None:
    (srlm.folder / "in.jsonl").write_text(json.dumps(row(ADD)) + "\n")
    words = [*command.split(), "--in", "in.jsonl"]
    refused = srlm(*words)
    assert refused.code == 2 and "--run-code" in refused.err and "Traceback" not in refused.err
    done = srlm(*words, "--run-code")
    assert done.code == 0, done.err
    kept = [row["value"] if "eval" in command else row["rules"]["passes=tests"] for row in done.rows[:1]]
    assert kept == [True]


def test_run_code_without_rules_is_refused(srlm) -> None:
    (srlm.folder / "in.jsonl").write_text(json.dumps(row(ADD)) + "\n")
    refused = srlm("judge", "--engine", "echo", "--in", "in.jsonl", "--run-code")
    assert refused.code == 2 and "--run-code has no effect here" in refused.err
