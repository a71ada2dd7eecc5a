"""`make iterate` as a Make user expects it, in a folder that `srlm init` made.

Training runs a tiny model; what it then writes comes from the echo engine, to keep this quick. The
whole loop on the real model is `make iterate` in CI.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers import FORKED, clean_env
from tiny import tiny_model

pytestmark = pytest.mark.model
SRLM = " ".join(FORKED)

SETTINGS = """
[defaults]
engine = "echo"
[make-eft]
method = "hindsight"
reason = "none"
template = "score_only"
limit = 3
[sft]
lora-r = 2
max-steps = 1
train-batch-size = 2
[gen-prompts]
count = 6
[dpo]
max-steps = 1
train-batch-size = 2
[judge]
limit = 40
"""


@pytest.fixture(scope="module", autouse=True)
def m0(tmp_path_factory):
    """A tiny M0, which the Makefile takes from the environment."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("M0", str(tiny_model(tmp_path_factory.mktemp("m0") / "tiny")))
        yield


@pytest.fixture(scope="module")
def run_folder(m0, tmp_path_factory) -> Path:
    """A run that has been brought to M2."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    subprocess.run([*FORKED, "init", folder], check=True, capture_output=True)
    (folder / "srlm.toml").write_text(SETTINGS)
    done = make(folder, "iterate", "ITER=2")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def make(folder: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", f"SRLM={SRLM}", *args], cwd=folder, capture_output=True, text=True, env=clean_env())


def planned(folder: Path, *args: str) -> list[str]:
    """What `make -n` would run: the commands, by what they write."""
    done = make(folder, "-n", "iterate", *args)
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines() if " --out " in line]
    return [line[line.index("--out") + 1].removeprefix("runs/first/") for line in words]


def test_a_run_holds_every_file_of_the_loop(run_folder):
    run = run_folder / "runs" / "first"
    for name in ("prompts", "responses", "judged", "pairs", "eval"):
        assert (run / "M1" / f"{name}.jsonl").stat().st_size > 0
    assert len((run / "M1" / "prompts.jsonl").read_text().splitlines()) == 6
    provenance = json.loads((run / "M2" / "model" / "provenance.json").read_text())
    assert provenance["from"]["model"] == "runs/first/M1/model" and provenance["command"] == "dpo"
    assert {row["metric"] for row in map(json.loads, open(run / "M2" / "eval.jsonl"))} >= {"pairwise_accuracy", "win"}
    assert not list(run.rglob("*.part*"))


def test_a_second_run_has_nothing_to_do(run_folder):
    before = {file: file.stat().st_mtime_ns for file in (run_folder / "runs").rglob("*")}
    done = make(run_folder, "iterate", "ITER=2")
    assert done.returncode == 0 and SRLM not in done.stdout and "othing to be done" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in (run_folder / "runs").rglob("*")} == before


def test_the_next_iteration_goes_on_from_there(run_folder):
    plan = planned(run_folder, "ITER=3")
    assert "M3/model" in plan and "M2/pairs.jsonl" in plan
    assert not [file for file in plan if file.startswith("M1/") or file == "M2/model"]


def test_a_changed_setting_makes_again_what_depends_on_it(run_folder):
    settings = run_folder / "srlm.toml"
    settings.write_text(SETTINGS + '[make-pairs]\nmin-gap = 0.5\n["eval reward"]\nseed = 4\n')
    plan = planned(run_folder, "ITER=2")
    settings.write_text(SETTINGS)
    assert {"M1/pairs.jsonl", "M2/model", "M2/eval-responses.jsonl", "M1/eval-reward.jsonl"} <= set(plan)
    assert not {"M1/judged.jsonl", "M1/model", "M1/eval-responses.jsonl", "eft.jsonl"} & set(plan)


def test_asking_changes_nothing(run_folder):
    """A setting that was changed, looked at with `make -n` and set back leaves nothing to do."""
    settings = run_folder / "srlm.toml"
    settings.write_text(SETTINGS + "[make-pairs]\nmin-gap = 0.5\n")
    assert planned(run_folder, "ITER=2")
    settings.write_text(SETTINGS)
    assert planned(run_folder, "ITER=2") == []


def test_another_m0_makes_all_again(run_folder):
    assert {"eft.jsonl", "M1/model", "M2/model"} <= set(planned(run_folder, "ITER=2", "M0=other/model"))


def test_unusable_settings_stop_make(run_folder):
    settings = run_folder / "srlm.toml"
    settings.write_text(SETTINGS + "[sample]\nnn = 4\n")
    done = make(run_folder, "iterate", "ITER=2")
    settings.write_text(SETTINGS)
    assert done.returncode == 2 and "[sample] has no option `nn`" in done.stderr


def test_report_shows_the_rounds(run_folder):
    done = make(run_folder, "report")
    assert done.returncode == 0 and "The judge of each round" in done.stdout
    assert "M2" in done.stdout and "6" in done.stdout


@pytest.mark.slow
def test_a_file_over_a_limit_is_held_back(run_folder):
    """Exit 4 stops Make, and stops it again, until the limit is changed."""
    settings = run_folder / "srlm.toml"
    settings.write_text(SETTINGS.replace("count = 6", "count = 6\nmax-tries = 3"))
    prompts = run_folder / "runs" / "first" / "M1" / "prompts.jsonl"
    for _ in range(2):
        done = make(run_folder, "runs/first/M1/prompts.jsonl")
        assert done.returncode == 2 and "only 3 of 6 prompts" in done.stderr
        assert prompts.with_name("prompts.jsonl.part").exists()
    settings.write_text(SETTINGS)
    assert make(run_folder, "iterate", "ITER=2").returncode == 0, "the other tests find the run at M2"
    assert len(prompts.read_text().splitlines()) == 6


def test_a_guard_stops_the_loop_before_the_next_model(run_folder):
    """A judge that has gone bad ends `make iterate`, says why, and how to go on all the same."""
    settings = run_folder / "srlm.toml"
    model = run_folder / "runs" / "first" / "M2" / "model" / "provenance.json"
    assert make(run_folder, "iterate", "ITER=2").returncode == 0
    before = model.stat().st_mtime_ns
    settings.write_text(SETTINGS + '["eval health"]\nmax-one-score = 0.01\n')
    for _ in range(2):
        done = make(run_folder, "iterate", "ITER=2")
        assert done.returncode == 2 and "max-one-score" in done.stderr and "srlm.toml" in done.stderr
    settings.write_text(SETTINGS + '["eval health"]\nmax-one-score = 1.0\n')
    assert make(run_folder, "iterate", "ITER=2").returncode == 0
    assert model.stat().st_mtime_ns == before, "another limit is no reason to train again"
    settings.write_text(SETTINGS)
    assert make(run_folder, "iterate", "ITER=2").returncode == 0


@pytest.mark.slow
def test_the_config_can_ask_for_a_check_without_a_judge(run_folder):
    """Every model answers the prompts with rules; a fall ends the loop before the next model if the config says so."""
    settings, run = run_folder / "srlm.toml", run_folder / "runs" / "first"
    rules = [{"prompt": f"Ask {n}?", "rules": ["words:..14", "no-commas"]} for n in range(4)]
    (run_folder / "ruled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rules))
    check = '["eval rules"]\nprompts = "ruled.jsonl"\n'
    settings.write_text(SETTINGS + check)
    plan = [f"M{t}/eval-{name}.jsonl" for t in range(3) for name in ("rule-responses", "rules")]
    assert sorted(planned(run_folder, "ITER=2")) == sorted(plan)
    done = make(run_folder, "iterate", "ITER=2")
    assert done.returncode == 0, done.stderr
    assert planned(run_folder, "ITER=2") == []
    shown = make(run_folder, "report")
    assert "Rules kept on held-out prompts" in shown.stdout and "no-commas" in shown.stdout
    held = make(run_folder, "-n", "iterate", "ITER=3").stdout.splitlines()
    training = [line for line in held if line.startswith((f"{SRLM} dpo", f"{SRLM} gen-prompts"))]
    assert training and all("ruled.jsonl" in line for line in training)
    settings.write_text(SETTINGS + check + "max-fall = 0.1\n")
    better = (run / "M1" / "eval-rules.jsonl").read_text().replace('"value": 0.', '"value": 1.')
    assert make(run_folder, "iterate", "ITER=2").returncode == 0
    (run / "M1" / "eval-rules.jsonl").write_text(better)
    for _ in range(2):
        fell = make(run_folder, "iterate", "ITER=3")
        assert fell.returncode == 2 and "--max-fall 0.1" in fell.stderr and not (run / "M3").joinpath("model").exists()
    assert "a guard stopped the loop here" in make(run_folder, "report").stdout
    settings.write_text(SETTINGS)
    assert planned(run_folder, "ITER=2") == []


@pytest.mark.slow
def test_small_rounds_train_the_newest_model_against_the_round_s_first(run_folder):
    """Each part is answered by the model of the part before; a part without pairs hands its model on."""
    run, small = run_folder / "runs" / "first", "SMALL=7"
    done = make(run_folder, "iterate", "ITER=2", small)
    assert done.returncode == 0, done.stdout + done.stderr
    models = [run / "M1" / f"part-{k}" / "model" for k in range(1, 7)] + [run / "M2" / "model"]
    made = [json.loads((model / "provenance.json").read_text()) for model in models]
    before = [run / "M1" / "model", *models[:-1]]
    assert [about["from"]["model"] for about in made] == [str(model.relative_to(run_folder)) for model in before]
    lines = [len((run / "M1" / f"part-{k}" / "responses.jsonl").read_text().splitlines()) for k in range(1, 8)]
    assert sorted(lines) == [0] + 6 * [4], "6 prompts in 7 parts"
    for about, read in zip(made, lines, strict=True):
        assert bool(about["steps"]) == bool(about["data"]["rows"]) and (read or not about["steps"])
        assert not about["steps"] or about["reference"]["model"] == "runs/first/M1/model"
    assert planned(run_folder, "ITER=2", small) == []
    shown = make(run_folder, "report").stdout
    assert "7 parts" in shown and str(sum(about["data"]["rows"] for about in made)) in shown
    assert make(run_folder, "iterate", "ITER=2").returncode == 0
    assert planned(run_folder, "ITER=2") == []


@pytest.mark.slow
def test_kto_trains_on_the_judged_replies(run_folder):
    """The model and the report are those of kto."""
    settings, model = run_folder / "srlm.toml", run_folder / "runs" / "first" / "M2" / "model"
    kto = "[kto]\nmax-steps = 1\ntrain-batch-size = 2\ndesirable-score = 2.5\nundesirable-score = 2.4\n"
    settings.write_text(SETTINGS + kto)
    done = make(run_folder, "iterate", "ITER=2", "METHOD=kto")
    assert done.returncode == 0, done.stdout + done.stderr
    about = json.loads((model / "provenance.json").read_text())
    assert about["command"] == "kto" and about["steps"] == 1 and list(about["inputs"]) == ["runs/first/M1/judged.jsonl"]
    assert planned(run_folder, "ITER=2", "METHOD=kto") == []
    shown = make(run_folder, "report").stdout
    assert re.search(r"M2 +kto ", shown) and "kl" in json.loads((model / "metrics.jsonl").read_text())
    assert (model.parents[1] / "M1" / "pairs.jsonl").exists() and not re.search(r"M1 +pairs ", shown)
    settings.write_text(SETTINGS)


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    folder = tmp_path / "mine"
    subprocess.run([*FORKED, "init", folder], check=True, capture_output=True)
    (folder / "srlm.toml").write_text(SETTINGS)
    command = ["make", f"SRLM={SRLM}", "iterate", "ITER=1"]
    first = subprocess.Popen(command, cwd=folder, start_new_session=True, env=clean_env(), stdout=subprocess.DEVNULL)
    part = folder / "runs" / "first" / "M1" / "model.part"
    while not part.exists() and first.poll() is None:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() != 0 and not (folder / "runs" / "first" / "M1" / "model").exists()
    eft = (folder / "runs" / "first" / "eft.jsonl").stat().st_mtime_ns
    done = make(folder, "iterate", "ITER=1")
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "first" / "M1" / "model" / "provenance.json").exists() and not part.exists()
    assert (folder / "runs" / "first" / "eft.jsonl").stat().st_mtime_ns == eft


def test_help_lists_the_targets(run_folder):
    done = make(run_folder)
    assert done.returncode == 0 and "iterate" in done.stdout and "report" in done.stdout
