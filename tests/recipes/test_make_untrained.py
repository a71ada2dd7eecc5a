"""`make iterate` where a training is only written down: both kinds of pairs with META=1, and an ITER that is none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from helpers import FORKED, clean_env, read_json, read_rows

SETTINGS = """
[defaults]
engine = "echo"
[make-eft]
method = "hindsight"
reason = "none"
template = "score_only"
limit = 3
[gen-prompts]
count = 6
[judge]
direct = true
["eval reward"]
limit = 3
"""

# srlm, but a training leaves its command line as the model
STAND_IN = f"""#!/bin/sh
case "$1" in
  sft|dpo|kto) argv="$*"; while [ "$1" != --out ]; do shift; done; mkdir -p "$2"; echo "$argv" > "$2/provenance.json" ;;
  *) exec {" ".join(FORKED)} "$@" ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder, and a program that trains in no time."""
    made = tmp_path / "mine"
    subprocess.run([*FORKED, "init", made], check=True, capture_output=True)
    (made / "srlm.toml").write_text(SETTINGS)
    for name in ("ift", "ranked_eval"):
        lines = (made / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (made / f"{name}.jsonl").write_text("".join(lines[:9]))
    program = made / "srlm"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    return made


def make(folder: Path, *args: str) -> str:
    """Run the loop to M2 and return what make printed."""
    command = ["make", "SRLM=./srlm", "iterate", "ITER=2", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean_env())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def planned(folder: Path, *args: str) -> set[str]:
    """Return the files that `make -n` would write."""
    words = [line.split() for line in make(folder, "-n", *args).splitlines() if " --out " in line]
    return {line[line.index("--out") + 1].removeprefix("runs/first/") for line in words}


def test_probes_come_before_the_next_model(folder: Path) -> None:
    plan = planned(folder, "PROBE=1")
    assert {"M1/eval-probe.jsonl", "M2/eval-probe.jsonl", "M2/model"} <= plan
    assert not {name for name in planned(folder) if "probe" in name}


@pytest.mark.slow
def test_a_judge_that_a_probe_exploits_ends_the_loop(folder: Path) -> None:
    with open(folder / "srlm.toml", "a") as file:
        file.write('["eval probe"]\nprobe = ["doubled"]\nlimit = 3\n')
    make(folder, "PROBE=1")
    probed = folder / "runs" / "first" / "M1" / "eval-probe.jsonl"
    assert [row["metric"] for row in read_rows(probed)][0] == "changed_wins"
    with open(folder / "srlm.toml", "a") as file:
        file.write("max-probe-wins = 0\nseed = 5\n")
    command = ["make", "SRLM=./srlm", "iterate", "ITER=2", "PROBE=1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean_env())
    assert done.returncode == 2 and "the judge prefers replies that got no better: doubled" in done.stderr


@pytest.mark.slow
def test_meta_mixes_pairs_for_the_judge_in(folder: Path) -> None:
    make(folder)
    run = folder / "runs" / "first"
    model, pairs = run / "M2" / "model" / "provenance.json", ["M1/meta.jsonl", "M1/judge-pairs.jsonl"]
    assert "judge-pairs" not in model.read_text() and not (run / pairs[0]).exists()
    plan = planned(folder, "META=1")
    assert {*pairs, "M2/model"} <= plan and not {"M1/judged.jsonl", "M1/pairs.jsonl", "M1/model"} & plan
    make(folder, "META=1")
    both = "--in runs/first/M1/pairs.jsonl --in runs/first/M1/judge-pairs.jsonl --model runs/first/M1/model"
    assert both in model.read_text()
    assert len(read_rows(run / pairs[0])) == 6 and read_rows(run / pairs[1])
    assert planned(folder, "META=1") == set()
    off = planned(folder)
    assert "M2/model" in off and not {*pairs, "M1/pairs.jsonl"} & off
    assert planned(folder, "META=0") == off


KTO = "[kto]\ndesirable-score = 3\nundesirable-score = 2\n"


@pytest.mark.slow
def test_kto_learns_from_judged_replies_without_pairs(folder: Path) -> None:
    make(folder)
    run = folder / "runs" / "first"
    model, of_dpo = run / "M2" / "model" / "provenance.json", planned(folder)
    with open(folder / "srlm.toml", "a") as file:
        file.write(KTO)
    assert of_dpo == planned(folder) == set(), "settings of a method that is not used change nothing"
    plan = planned(folder, "METHOD=kto")
    assert "M2/model" in plan and not {name for name in plan if name.startswith("M1/")}
    make(folder, "METHOD=kto")
    assert model.read_text().startswith("kto ") and "--in runs/first/M1/judged.jsonl --model" in model.read_text()
    assert planned(folder, "METHOD=kto") == set()
    (folder / "srlm.toml").write_text(SETTINGS + KTO.replace("3", "4"))
    assert "M2/model" in planned(folder, "METHOD=kto")
    make(folder)
    assert model.read_text().startswith("dpo ") and planned(folder) == set()


@pytest.mark.slow
def test_kto_makes_no_pairs_in_small_rounds(folder: Path) -> None:
    with open(folder / "srlm.toml", "a") as file:
        file.write(KTO + 'ref = "base"\n')
    plan = planned(folder, "METHOD=kto", "SMALL=2")
    assert {"M1/part-2/judged.jsonl", "M2/model"} <= plan and not {name for name in plan if "pairs" in name}
    printed = make(folder, "-n", "METHOD=kto", "SMALL=2")
    assert "./srlm kto" in printed and "--ref" not in printed, "the settings name the reference"


@pytest.mark.parametrize(
    ("argv", "settings", "words"),
    [
        (["METHOD=kto"], "", "METHOD=kto needs `desirable-score` and `undesirable-score` in [kto] of srlm.toml"),
        (["METHOD=kto"], "[kto]\ndesirable-score = 3\n", "METHOD=kto needs"),
        (["METHOD=kto", "META=1"], KTO, "METHOD=kto takes no pairs"),
        (["METHOD=ppo"], "", "METHOD=ppo is no method"),
        (["METHOD=dpo kto"], KTO, "METHOD=dpo kto is no method"),
        (["METHOD="], "", "METHOD= is no method"),
    ],
    ids=str,
)
def test_a_method_that_cannot_train_ends_before_the_round(argv, settings, words, folder: Path) -> None:
    with open(folder / "srlm.toml", "a") as file:
        file.write(settings)
    command = ["make", "SRLM=./srlm", "iterate", *argv]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean_env())
    assert done.returncode == 2 and words in done.stderr
    assert not (folder / "runs" / "first" / "eft.jsonl").exists()


@pytest.mark.parametrize(
    ("judge", "refused"),
    [
        ('template = "score_only"\nscore = "expected"', "gives no reasons"),
        ('template = "own.toml"\nscore = "expected"', "gives no reasons"),
        ("num-judgements = 1", "no other to be compared with"),
        ('engine = "reward"', "--engine reward writes no judgements"),
        ('by = "group"', "--by group judges several responses"),
        ('template = "score_only"\nnum-judgements = 11', ""),
        ('template = "own.toml"\nnum-judgements = "1:4"', ""),
        ('score = "expected"', ""),
    ],
    ids=str,
)
def test_meta_with_nothing_to_compare_ends_before_the_round(judge: str, refused: str, folder: Path) -> None:
    (folder / "srlm.toml").write_text(SETTINGS.replace("direct = true", judge))
    (folder / "own.toml").write_text('extends = "score_only"\n')
    command = ["make", "SRLM=./srlm", "META=1", "runs/first/eft.jsonl"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean_env())
    said = next((line for line in done.stderr.splitlines() if "META=1 compares the judgements" in line), "")
    assert (refused in said, bool(said), done.returncode) == (True, bool(refused), 2 if refused else 0), done.stderr
    assert (folder / "runs").exists() is not bool(refused)


@pytest.mark.parametrize("given", ["0", "x", "", "-1"])
def test_a_number_of_iterations_that_is_none(given: str, folder: Path) -> None:
    command = ["make", "SRLM=./srlm", "iterate", f"ITER={given}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean_env())
    assert done.returncode == 2 and f"ITER={given} is no number of iterations" in done.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("name", ["", "a b", "..", "../else", ".", "/tmp"])
@pytest.mark.parametrize("goal", ["clean-run", "iterate"])
def test_a_run_has_a_name(goal: str, name: str, folder: Path) -> None:
    done = subprocess.run(["make", "-n", goal, f"NAME={name}"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and "is no name of a run" in done.stderr and "rm " not in done.stdout


@pytest.mark.slow
def test_small_cuts_the_prompts_of_a_round_in_parts(folder: Path) -> None:
    """The newest model answers each part and learns from it; the model that the round began with is the reference."""
    run = folder / "runs" / "first"
    make(folder, "SMALL=2")
    prompts = [row["id"] for row in read_rows(run / "M1" / "prompts.jsonl")]
    answered = [[row["prompt_id"] for row in read_rows(run / f"M1/part-{k}/responses.jsonl")] for k in (1, 2)]
    assert len(prompts) == 6 and answered == [
        [p for p in prompts[:3] for _ in range(4)],
        [p for p in prompts[3:] for _ in range(4)],
    ]
    for name in ("responses", "judged", "pairs"):
        parts = [read_rows(run / f"M1/part-{k}/{name}.jsonl") for k in (1, 2)]
        assert read_rows(run / "M1" / f"{name}.jsonl") == sum(parts, []) and all(parts)
    first, last = ((run / name / "model" / "provenance.json").read_text() for name in ("M1/part-1", "M2"))
    assert "--in runs/first/M1/part-1/pairs.jsonl --model runs/first/M1/model" in first
    assert "--in runs/first/M1/part-2/pairs.jsonl --model runs/first/M1/part-1/model" in last
    assert all("--on-empty copy --ref runs/first/M1/model" in text for text in (first, last))
    sampled = read_json(run / "M1" / "part-2" / "responses.jsonl.meta.json")["argv"]
    assert sampled[sampled.index("--model") + 1] == "runs/first/M1/part-1/model"
    guards = list((run / "M1").glob("**/eval-health.jsonl"))
    assert len(guards) == 3, "one before each training, and one of the whole round"
    assert planned(folder, "SMALL=2") == set()


@pytest.mark.slow
def test_small_rounds_are_made_again_only_where_something_changed(folder: Path) -> None:
    run = folder / "runs" / "first"
    whole = planned(folder)
    assert planned(folder, "SMALL=1") == planned(folder, "SMALL=") == whole
    assert not {name for name in whole if "part-" in name}
    make(folder, "SMALL=2")
    plan = planned(folder)
    assert {"M1/responses.jsonl", "M1/pairs.jsonl", "M2/model"} <= plan and "M1/prompts.jsonl" not in plan
    plan = planned(folder, "SMALL=3")
    assert {f"M1/part-{k}/responses.jsonl" for k in (1, 2, 3)} | {"M2/model"} <= plan and "M1/prompts.jsonl" not in plan
    with open(folder / "srlm.toml", "a") as file:
        file.write('[dpo]\nref = "base"\n')
    assert planned(folder, "SMALL=2") >= {"M1/part-1/model", "M1/part-2/responses.jsonl", "M2/model"}
    assert "M1/part-1/responses.jsonl" not in planned(folder, "SMALL=2")
    assert "--ref" not in make(folder, "-n", "SMALL=2"), "the settings name the reference"
    (folder / "srlm.toml").write_text(SETTINGS)
    (run / "M1" / "part-2" / "judged.jsonl").unlink()
    plan = planned(folder, "SMALL=2")
    assert {"M1/part-2/judged.jsonl", "M1/part-2/pairs.jsonl", "M2/model"} <= plan
    assert not {name for name in plan if "part-1" in name or "responses" in name and name.startswith("M1/part")}
    make(folder)
    assert planned(folder) == set() and read_rows(run / "M1" / "pairs.jsonl")
    assert (run / "M1" / "pairs.jsonl.meta.json").exists()
    make(folder, "SMALL=2")
    assert planned(folder, "SMALL=2") == set() and not (run / "M1" / "pairs.jsonl.meta.json").exists()


def test_small_rounds_with_meta(folder: Path) -> None:
    both = "--in runs/first/M1/part-2/pairs.jsonl --in runs/first/M1/part-2/judge-pairs.jsonl"
    assert both in make(folder, "-n", "SMALL=2", "META=1")


@pytest.mark.parametrize("given", ["0", "x", "1.5", "-1", "2 3", "02"])
def test_a_number_of_parts_that_is_none(given: str, folder: Path) -> None:
    command = ["make", "SRLM=./srlm", "iterate", f"SMALL={given}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean_env())
    assert done.returncode == 2 and f"SMALL={given} is no number of parts" in done.stderr
    assert not (folder / "runs").exists()
