"""Several processes train what one would: launched by us, by accelerate, by torchrun; on CPUs, by gloo."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from alike import assert_same_weights, near
from helpers import HERE, PROGRAM, Record, Srlm, clean_env, read_json, read_rows, write_rows
from several_trainings import train
from srlm_cli import distributed
from srlm_cli.cli import run
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.train.launch import code_of, first_first, launch_options, profile
from srlm_cli.train.setup import on_one_gpu
from srlm_cli.train.step_trainer import StepSampler
from tiny import ALONE, completions, pairs, tiny_adapter, tiny_model

TWO_CPUS = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
mixed_precision: bf16
num_machines: 1
num_processes: 2
use_cpu: true
"""
SHARDED = (
    TWO_CPUS.replace("MULTI_CPU", "FSDP")
    + """
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
"""
)
SETTINGS = {
    "learning_rate": 1e-3,
    "final_learning_rate": 1e-4,
    "batch": 4,
    "epochs": 2,
    "device": "cpu",
    "dtype": "float32",
}
ARGV = "--train-batch-size 4 --epochs 2 --learning-rate 1e-3 --final-learning-rate 1e-4 --device cpu".split()
ARGV += ["--dtype", "float32"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture
def two_cpus(srlm: Srlm) -> str:
    (srlm.folder / "two.yaml").write_text(TWO_CPUS)
    return "two.yaml"


def assert_alike(one: Path, other: Path, start: Path, dtype: str = "float32") -> None:
    """Assert that two trainings from a model took the same steps to the same weights, in float32 within 1e-4."""
    assert_same_weights(one, other, start, dtype, 1e-4)
    for mine, theirs in zip(read_rows(one / "metrics.jsonl"), read_rows(other / "metrics.jsonl"), strict=True):
        assert mine.keys() == theirs.keys()
        exact = mine.keys() - {"tokens_per_second"}
        for name in exact if dtype == "float32" else {"step", "loss"}:
            assert mine[name] == near(theirs[name], dtype), (name, mine["step"])


@pytest.mark.slow
def test_two_processes_train_as_one(srlm: Srlm, base: Path, two_cpus: str) -> None:
    """19 pairs: the last step of an epoch has 3, so that one process has a pair that does not count."""
    write_rows(srlm.folder / "pairs.jsonl", pairs(19))
    argv = ["dpo", "--in", "pairs.jsonl", "--model", str(base), *ARGV]
    two = srlm(*argv, "--out", "two", "--accelerate-config", two_cpus, env=ALONE)
    assert two.code == 0 and len(two.rows) == 1, two.err
    assert [line for line in two.err.splitlines() if line and "steps/s" not in line] == [  # a slow machine has progress
        "srlm dpo: 19 pairs, 975 tokens, 501 of them trained on, the longest sequence has 38"
    ]
    train("dpo", 19, {**SETTINGS, "model": str(base), "out": srlm.folder / "one"})
    assert_alike(srlm.folder / "one", srlm.folder / "two", base)
    assert not (srlm.folder / "two.part").exists()


# What is trained by one process and by two, beside the settings above.
JOBS = {
    "sft": {"kind": "sft", "rows": 19, "held": 5},
    "sft-adapter": {"kind": "sft", "rows": 18, "spec": {"lora_r": 2}},
    "dpo-two-at-a-time": {"kind": "dpo", "rows": 19, "held": 5, "spec": {"device_batch_size": 2}},
    "dpo-fewer-than-processes": {"kind": "dpo", "rows": 1},
    "dpo-nll": {"kind": "dpo", "rows": 11, "about": {"nll_alpha": 1.0}, "spec": {"device_batch_size": 2}},
    "dpo-smoothed": {"kind": "dpo", "rows": 11, "about": {"label_smoothing": 0.1}},
    "dpo-adapter-goes-on": {"kind": "dpo", "rows": 19, "adapter": True},
    "dpo-moving": {"kind": "dpo", "rows": 19, "held": 5, "sync": [2, 0.5]},
    "kto": {"kind": "kto", "rows": 11, "held": 5, "spec": {"device_batch_size": 2}},
    "sft-bfloat16": {"kind": "sft", "rows": 19, "held": 5, "spec": {"dtype": "bfloat16"}},
    "dpo-bfloat16": {"kind": "dpo", "rows": 19, "held": 5, "spec": {"dtype": "bfloat16"}},
}


@pytest.fixture(scope="module")
def in_two(base: Path, tmp_path_factory) -> Callable[[str, list[Record]], Srlm]:
    """Return what runs jobs in two processes, started once for all of them, and gives the folder of the models."""

    def run(launcher: list[str], jobs: list[Record]) -> Srlm:
        srlm = Srlm(tmp_path_factory.mktemp("two"))
        (srlm.folder / "jobs.json").write_text(json.dumps(jobs))
        for name, text in (("two.yaml", TWO_CPUS), ("sharded.yaml", SHARDED)):
            (srlm.folder / name).write_text(text)
        done = srlm.run([*launcher, str(HERE / "several_trainings.py"), "jobs.json"], env=ALONE)
        assert done.code == 0, done.err
        (srlm.folder / "said").write_text(done.out)
        return srlm

    return run


def job_of(name: str, model: Path, out: str | Path, **more: object) -> Record:
    job = {**JOBS[name], **more}
    job.pop("adapter", None)
    return {**job, "spec": {**SETTINGS, "model": str(model), "out": str(out), **job.get("spec", {})}}


@pytest.fixture(scope="module")
def trained_by_two(in_two, base: Path, tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    adapter = tiny_adapter(tmp_path_factory.mktemp("adapter") / "a", base)
    models = {name: adapter if job.get("adapter") else base for name, job in JOBS.items()}
    jobs = [job_of(name, models[name], name) for name in JOBS]
    killed = [
        job_of(f"{kind}", models[kind], f"{kind}-killed", dies=dies) for kind, dies in (("sft", 8), ("dpo-nll", 5))
    ]
    again = [{**job, "dies": 0} for job in killed]
    uneven = job_of("sft", base, "uneven", spec={"batch": 3})
    return in_two(TORCHRUN, [*jobs, *killed, *again, uneven]).folder, models


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_each_kind_of_training_is_the_same_in_two_processes(name: str, trained_by_two, tmp_path: Path) -> None:
    folder, models = trained_by_two
    train(**job_of(name, models[name], tmp_path / name))
    dtype = JOBS[name].get("spec", {}).get("dtype", "float32")
    assert_alike(tmp_path / name, folder / name, models[name], dtype)
    one, two = (read_json(path / "provenance.json") for path in (tmp_path / name, folder / name))
    for mine, theirs in zip(one.get("evals", []), two.get("evals", []), strict=True):
        assert mine == near(theirs, dtype)
    assert one.get("chosen_step") == two.get("chosen_step")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo-nll"])
def test_two_killed_processes_go_on(name: str, trained_by_two, base: Path) -> None:
    """`sft` dies in its eighth micro-batch, in the second epoch for neither; `dpo` in the second one."""
    folder, _ = trained_by_two
    assert read_json(folder / f"{name}-killed" / "provenance.json")["resumed_from"] >= 2
    assert_alike(folder / name, folder / f"{name}-killed", base)


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_once(trained_by_two) -> None:
    assert (trained_by_two[0] / "said").read_text().splitlines() == [
        "--train-batch-size 3 is not a multiple of --device-batch-size 1 x 2 processes"
    ]


@pytest.mark.slow
def test_sharded_weights_are_those_of_one_process(in_two, trained_by_two, tmp_path: Path) -> None:
    """FSDP2 in two processes, made to run on CPUs: steps, checkpoints, the best of them, a kill, the model written."""
    folder, models = trained_by_two
    names = ("sft", "sft-adapter", "dpo-two-at-a-time", "dpo-nll", "dpo-adapter-goes-on", "dpo-bfloat16")
    jobs = [job_of(name, models[name], name, seen="FSDP") for name in names]
    killed = job_of("dpo-nll", models["dpo-nll"], "killed", seen="FSDP", dies=4)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "sharded.yaml"]
    sharded = in_two(launcher, [*jobs, killed, {**killed, "dies": 0}]).folder
    for name in names:
        dtype = JOBS[name].get("spec", {}).get("dtype", "float32")
        assert_alike(folder / name, sharded / name, models[name], dtype)
    assert_alike(folder / "dpo-nll", sharded / "killed", models["dpo-nll"])
    assert read_json(sharded / "killed" / "provenance.json")["resumed_from"] >= 2


@pytest.mark.slow
def test_a_bad_row_ends_all_processes_once(srlm: Srlm, base: Path, two_cpus: str) -> None:
    write_rows(srlm.folder / "rows.jsonl", [*completions(3), {"prompt": "?"}])
    argv = ["sft", "--in", "rows.jsonl", "--model", str(base), *ARGV, "--out", "m"]
    failed = srlm(*argv, "--accelerate-config", two_cpus, env=ALONE)
    assert failed.code == 3 and not failed.out
    [line] = failed.err.splitlines()
    assert line.startswith("srlm sft: error: rows.jsonl:4: ")


@pytest.mark.slow
def test_rows_on_stdin_are_refused_in_several_processes(srlm: Srlm, base: Path, two_cpus: str) -> None:
    argv = ["sft", "--model", str(base), *ARGV, "--out", "m"]
    failed = srlm(*argv, "--accelerate-config", two_cpus, stdin='{"prompt": "?", "completion": "!"}\n', env=ALONE)
    assert failed.code == 2
    assert failed.err.splitlines() == ["srlm sft: error: 2 processes cannot share stdin (--in FILE)"]


@pytest.mark.slow
def test_torchrun_and_kill_9_and_the_same_command_again(srlm: Srlm, base: Path, two_cpus: str) -> None:
    """By torchrun, as users of it start a training; both processes kill themselves behind the checkpoint of step 2."""
    write_rows(srlm.folder / "rows.jsonl", completions(18))
    argv = ["sft", "--in", "rows.jsonl", "--model", str(base), *ARGV, "--save-steps", "2", "--out", "m"]
    launcher = [*TORCHRUN, str(HERE / "mortal_training.py"), "5"]
    killed = srlm.run([*launcher, *argv], env=ALONE)
    assert killed.code == 1 and not (srlm.folder / "m").exists()
    again = srlm.run([*TORCHRUN, "-m", "srlm_cli", *argv], env=ALONE)
    assert again.code == 0 and again.rows[0]["resumed_from"] == 2, again.err
    train("sft", 18, {**SETTINGS, "model": str(base), "out": srlm.folder / "one"})
    assert_alike(srlm.folder / "one", srlm.folder / "m", base)


# --- without processes -----------------------------------------------------------------------


def test_a_profile_is_a_file_or_one_of_trl(tmp_path: Path) -> None:
    assert profile("fsdp2").endswith("trl/accelerate_configs/fsdp2.yaml")
    (tmp_path / "mine.yaml").write_text(TWO_CPUS)
    assert profile(str(tmp_path / "mine.yaml")) == str(tmp_path / "mine.yaml")
    with pytest.raises(OptionError, match="not a TRL profile .*zero3"):
        profile("zero4")


def test_cpus_are_launched_without_mpi_and_trainings_have_ports_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(TWO_CPUS)
    assert launch_options(str(path)) == ["--multi_gpu", "--main_process_port", "0"]
    path.write_text("distributed_type: FSDP\nnum_machines: 2\nmain_process_port: 3")
    assert launch_options(str(path)) == []
    for bad in ("a: [", "only words"):
        path.write_text(bad)
        with pytest.raises(OptionError):
            launch_options(str(path))


def failed(code: int, at: int) -> SimpleNamespace:
    return SimpleNamespace(exitcode=code, timestamp=at)


def test_the_exit_code_is_that_of_the_process_that_failed_of_itself() -> None:
    assert code_of(first_first({0: failed(3, 5), 1: failed(3, 4)})) == 3
    assert code_of(first_first({0: failed(-signal.SIGTERM, 4), 1: failed(1, 4)})) == 1
    assert list(first_first({0: failed(1, 5), 1: failed(2, 4)})) == [1, 0]
    with pytest.raises(SrlmError, match="process 1 was killed by SIGKILL"):
        code_of(first_first({1: failed(-signal.SIGKILL, 4), 0: failed(-signal.SIGTERM, 5)}))


@pytest.mark.parametrize("whole", [1, 2, 4])
def test_the_processes_share_the_rows_of_each_step(whole: int) -> None:
    lengths = [7, 3, 9, 1, 5, 5, 2, 8, 4, 6]
    order = list(StepSampler(lengths, 4, seed=1, whole=whole))
    alone = list(StepSampler(lengths, 4, seed=1))
    assert len(order) == len(StepSampler(lengths, 4, seed=1, whole=whole)) and len(order) % whole == 0
    assert [row for row in order if row < 10] == alone and sorted(alone) == list(range(10))
    assert order[10:] == [10] * (len(order) - 10)


def test_the_options_of_a_launch(srlm: Srlm, base: Path) -> None:
    write_rows(srlm.folder / "rows.jsonl", completions(2))
    argv = ["sft", "--in", "rows.jsonl", "--model", str(base), "--out", "m"]
    for more, said in ((["--num-processes", "2"], "goes with"), (["--accelerate_config", "none"], "not a TRL profile")):
        result = srlm(*argv, *more)
        assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1
    assert srlm(*argv, "--accelerate-config", "fsdp2", "--dry-run").rows[0]["dry_run"]
    assert PROGRAM[1:] == ["-m", "srlm_cli"]


def test_one_process_trains_on_one_gpu_of_several(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert on_one_gpu(arguments).n_gpu == arguments.n_gpu <= 1
    arguments._n_gpu = 2  # what two visible GPUs make it
    assert on_one_gpu(arguments).n_gpu == 1


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [distributed.GRACE])])
def test_what_all_processes_meet_is_left_to_the_main_one(
    rank: str, waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait to be ended by the launcher; who is not, tells it after all."""
    slept: list[float] = []
    monkeypatch.setattr(distributed.time, "sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("RANK", rank)
    assert run(["make-pairs", "--rho", "0.3", "--length-penalty", "auto", "--in", "none.jsonl"]) == 2
    assert slept == waits
    name = "srlm make-pairs" if rank == "0" else "srlm make-pairs (process 1)"
    assert capsys.readouterr().err.startswith(f"{name}: error: ")


@pytest.mark.parametrize(
    ("launched", "said"), [({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}, ""), ({}, "late")]
)
def test_a_process_of_a_training_ends_at_once(launched: dict[str, str], said: str) -> None:
    """Threads that still run at Python's end abort the process: seen in one of some thirty runs."""
    code = "import atexit, sys; from srlm_cli import cli; atexit.register(print, 'late', file=sys.stderr); "
    code += "sys.argv = ['srlm', 'sample', '--no-such']; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env() | launched)
    assert done.returncode == 2 and ("late" in done.stderr) is bool(said) and "--no-such" in done.stderr
