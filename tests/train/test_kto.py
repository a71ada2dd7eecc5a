"""KTO: the paper's formula by hand, TRL's own trainer, and what becomes of rows without pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import Record, Srlm, as_lines, read_json, read_rows, slow, write_rows
from srlm_cli.errors import BadRow, DataError, OptionError, SrlmError
from srlm_cli.models.load import load_model, load_tokenizer
from srlm_cli.stages.labels import LabelOptions, labelled_record
from srlm_cli.train import session
from srlm_cli.train.data import kto_rows, sft_rows
from srlm_cli.train.kto import Kto, kto
from srlm_cli.train.losses import KTOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.render import Renderer
from tiny import ALONE, labelled, tiny_adapter

torch.set_num_threads(1)
QUIET = RunOptions(quiet=True)
ROWS = labelled(5)  # the longest first is the order of a step: 4, 3, 2, 1, 0


def one_step(model: Path, out: Path, **more: object) -> TrainSpec:
    """Return a step of plain gradient descent on all rows, so that the weights show the gradient."""
    settings = {"learning_rate": 1.0, "final_learning_rate": 1.0, "batch": 5, "dtype": "float32", "optim": "sgd"}
    return TrainSpec(str(model), out, **{**settings, "max_steps": 1, "device": "cpu", **more})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], within: float) -> None:
    assert one.keys() <= other.keys() or other.keys() <= one.keys()
    for name in one.keys() & other.keys():
        assert float((one[name] - other[name].detach()).abs().max()) <= within, name


def log_prob(model: torch.nn.Module, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """Return the log-probability of a reply from a model's plain logits."""
    ids = torch.tensor([prompt + reply])
    scores = model(ids).logits[0].log_softmax(-1)
    return sum(scores[at - 1, ids[0, at]] for at in range(len(prompt), ids.shape[1]))


def sums(folder: Path, rows: list[Record] = ROWS) -> list[float]:
    model, rendered = load_model(str(folder), "float32"), kto_rows(rows, Renderer(load_tokenizer(str(folder))), 512)[0]
    with torch.inference_mode():
        return [float(log_prob(model, row["prompt_ids"], row["completion_ids"])) for row in rendered]


def by_hand(base: Path, other: Path, config: KTOLossConfig) -> tuple[float, float, float, dict[str, torch.Tensor]]:
    """Return loss, KL estimate and norm of the gradient, and the weights after a step of `one_step`.

    Equation 7 of arXiv 2402.01306 with its estimate of z0: replies shifted by one, the mean, at least 0.
    """
    policy, reference = load_model(str(base), "float32"), load_model(str(other), "float32")
    rows = kto_rows(ROWS, Renderer(load_tokenizer(str(base))), 512)[0]

    def ratio(prompt: Record, reply: Record) -> torch.Tensor:
        with torch.no_grad():
            theirs = log_prob(reference, prompt["prompt_ids"], reply["completion_ids"])
        return log_prob(policy, prompt["prompt_ids"], reply["completion_ids"]) - theirs

    with torch.no_grad():
        shifted = [float(ratio(rows[n], rows[(n + 1) % 5])) for n in range(5)]
    z = max(0.0, sum(shifted) / 5) if config.loss == "kto" else 0.0
    total = 0.0
    for row in rows:
        h = config.beta * (ratio(row, row) - z)
        value = torch.sigmoid(h) if row["label"] else torch.sigmoid(-h)
        weight = config.desirable_weight if row["label"] else config.undesirable_weight
        total = total + weight * (1 - value) / 5
    total.backward()
    named = {name: weight for name, weight in policy.named_parameters() if weight.grad is not None}
    norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in named.values()))
    clip = min(1.0, 1.0 / (norm + 1e-6))  # as every trainer of transformers does
    after = {name: (weight - clip * weight.grad).detach() for name, weight in named.items()}
    return float(total.detach()), z, norm, after


CONFIGS = {
    "kto": KTOLossConfig(beta=0.5, desirable_weight=1.3, undesirable_weight=0.7),
    "apo": KTOLossConfig(beta=0.5, loss="apo-zero-unpaired", desirable_weight=0.6),
}


@pytest.mark.parametrize(("config", "swapped"), [("kto", False), slow("kto", True), ("apo", False)])
def test_a_step_has_the_loss_and_the_gradient_of_the_paper(config, swapped, base, other, tmp_path) -> None:
    """With another model as the reference; swapped, the mean of the log-ratios has the other sign, and z0 is 0."""
    policy, reference = (other, base) if swapped else (base, other)
    loss, z, norm, wanted = by_hand(policy, reference, CONFIGS[config])
    result = kto(ROWS, one_step(policy, tmp_path / "m"), CONFIGS[config], ref=str(reference), run=QUIET)
    [row] = read_rows(tmp_path / "m" / "metrics.jsonl")
    assert result["first_loss"] == pytest.approx(loss, rel=1e-4)
    assert row["kl"] == pytest.approx(z, rel=1e-3, abs=1e-5)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert_same(weights(tmp_path / "m"), wanted, 1e-5)


def test_one_direction_has_an_estimate_above_0_and_the_other_0(base: Path, other: Path) -> None:
    estimates = [by_hand(*both, CONFIGS["kto"])[1] for both in ((base, other), (other, base))]
    assert min(estimates) == 0 and max(estimates) > 0.1  # so that it shows in the loss


@pytest.mark.parametrize("config", ["kto", slow("apo")])
def test_a_step_is_that_of_trl(config: str, base: Path, other: Path, tmp_path: Path) -> None:
    """TRL's own KTOTrainer tokenizes the same texts, and shifts the replies of the batch itself."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    about, tokenizer = CONFIGS[config], load_tokenizer(str(base))
    rows = kto_rows(ROWS, Renderer(tokenizer), 512)[0][::-1]
    texts = [
        {
            "prompt": tokenizer.decode(row["prompt_ids"]),
            "completion": tokenizer.decode(row["completion_ids"]),
            "label": row["label"],
        }
        for row in rows
    ]
    trainer = KTOTrainer(
        model=load_model(str(base), "float32"),
        ref_model=load_model(str(other), "float32"),
        args=KTOConfig(
            output_dir=str(tmp_path / "trl"), beta=about.beta, loss_type=about.trl_name, learning_rate=1.0,
            desirable_weight=about.desirable_weight, undesirable_weight=about.undesirable_weight,
            train_sampling_strategy="sequential", lr_scheduler_type="constant", optim="sgd", max_steps=1,
            per_device_train_batch_size=5, logging_steps=1, bf16=False, gradient_checkpointing=False, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    [logged] = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = kto(ROWS, one_step(base, tmp_path / "m"), about, ref=str(other), run=QUIET)
    [row] = read_rows(tmp_path / "m" / "metrics.jsonl")
    assert result["first_loss"] == pytest.approx(logged["loss"], rel=1e-4)
    names = {
        "kl": "kl", "grad_norm": "grad_norm", "margin": "rewards/margins", "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected", "logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected",
    }  # fmt: skip
    for mine, theirs in names.items():
        assert row[mine] == pytest.approx(logged[theirs], rel=1e-3, abs=1e-5), mine
    assert_same(weights(tmp_path / "m"), dict(trainer.model.named_parameters()), 1e-5)


def test_desirable_replies_become_more_probable_and_others_less(base: Path, tmp_path: Path) -> None:
    rows = [{**row, "completion": "ba"[row["label"]] * (n + 3)} for n, row in enumerate(ROWS)]
    spec = one_step(base, tmp_path / "m", optim="adamw_torch_fused", max_steps=6, epochs=6)
    spec = replace(spec, learning_rate=2e-3, final_learning_rate=2e-3)
    result = kto(rows, spec, KTOLossConfig(), run=QUIET)
    change = [after - before for before, after in zip(sums(base, rows), sums(tmp_path / "m", rows), strict=True)]
    desirable = [up for up, row in zip(change, rows, strict=True) if row["label"]]
    others = [up for up, row in zip(change, rows, strict=True) if not row["label"]]
    assert min(desirable) > 0 > max(others), change
    assert result["last_loss"] < result["first_loss"] == pytest.approx(0.5, abs=1e-5)
    assert result["reward_chosen"] > 0 > result["reward_rejected"] and result["margin"] > 0


@pytest.mark.parametrize("more", [{}, {"lora_r": 2}, slow({"dtype": "bfloat16"})], ids=str)
def test_the_start_is_proven(more: dict, base: Path, tmp_path: Path) -> None:
    config = KTOLossConfig(desirable_weight=1.5)
    spec = one_step(base, tmp_path / "m", **more)
    result = kto(ROWS, spec, config, run=QUIET)
    start = result["start"]
    # The first rows are checked, at most four: 0 and 3 are desirable.
    assert start["loss"] == pytest.approx((1.5 + 1 + 1 + 1.5) / 8, abs=1e-5)
    assert abs(start["log_ratio"]) < 1e-4 and abs(start["log_ratio_of_others"]) < 1e-4
    assert result["reference"]["model"] == str(base)
    assert read_json(tmp_path / "m" / "provenance.json")["desirable_weight"] == 1.5


def test_an_adapter_is_its_own_reference(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "a", base)
    result = kto(ROWS, one_step(adapter, tmp_path / "m"), KTOLossConfig(), run=QUIET)
    assert abs(result["start"]["log_ratio"]) < 1e-4 and result["first_loss"] == pytest.approx(0.5, abs=1e-5)
    assert (tmp_path / "m" / "adapter_config.json").exists() and not (tmp_path / "m" / "ref").exists()


def test_a_policy_that_is_not_its_reference_is_refused(base: Path, tmp_path: Path, monkeypatch) -> None:
    from srlm_cli.train.unpaired_trainer import UnpairedTrainer

    check = UnpairedTrainer.check_scores

    def then_another_policy(trainer, model):
        scores = check(trainer, model)
        with torch.no_grad():
            for layer in trainer.model.parameters():
                layer.mul_(2.0)
        return scores

    monkeypatch.setattr(UnpairedTrainer, "check_scores", then_another_policy)
    monkeypatch.setattr(session, "run_training", lambda *_: pytest.fail("trained all the same"))
    with pytest.raises(SrlmError, match=r"differ before the first step: log-ratios -?\d.*, not 0, 0 and 0\.5000"):
        kto(ROWS, one_step(base, tmp_path / "m"), KTOLossConfig(), run=QUIET)


def test_stored_scores_that_are_not_of_the_reference_are_refused(base: Path, tmp_path: Path, monkeypatch) -> None:
    from srlm_cli.train.unpaired_trainer import UnpairedTrainer

    compute = UnpairedTrainer._reference_scores
    for side in (0, 1):
        wrong = lambda *args, side=side: [  # noqa: E731
            tuple(1.05 * score if at == side else score for at, score in enumerate(row)) for row in compute(*args)
        ]
        monkeypatch.setattr(UnpairedTrainer, "_reference_scores", wrong)
        with pytest.raises(SrlmError, match="the reference's stored log-probability is -.* by its own logits"):
            kto(ROWS, one_step(base, tmp_path / f"m{side}"), KTOLossConfig(), run=QUIET)


def test_a_step_is_the_same_one_row_or_all_at_a_time(base: Path, other: Path, tmp_path: Path) -> None:
    """The estimate, too, and the figures, although TRL finds them in a device batch."""
    for out, at_a_time in (("all", 0), ("one", 1)):
        spec = one_step(base, tmp_path / out, device_batch_size=at_a_time, max_steps=-1, epochs=2, learning_rate=1e-2)
        kto(labelled(8), replace(spec, final_learning_rate=1e-2), CONFIGS["kto"], ref=str(other), run=QUIET)
    assert_same(weights(tmp_path / "all"), weights(tmp_path / "one"), 1e-5)
    both = [read_rows(tmp_path / out / "metrics.jsonl") for out in ("all", "one")]
    for mine, theirs in zip(*both, strict=True):
        for name in mine.keys() - {"tokens_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_a_killed_training_goes_on_to_the_same_model(base: Path, tmp_path: Path, monkeypatch) -> None:
    from transformers import Trainer

    step, done = Trainer.training_step, []

    class Killed(BaseException):
        pass

    def mortal(self, *args, **named):
        done.append(1)
        if len(done) == 12:  # 9 rows in steps of 4: 9 micro-batches and 3 steps per epoch
            raise Killed
        return step(self, *args, **named)

    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-4, batch=4, device_batch_size=1, epochs=2, dtype="float32")
    run, held = RunOptions(quiet=True, save_steps=2), labelled(12)[9:]
    kto(labelled(9), replace(spec, out=tmp_path / "whole"), KTOLossConfig(), eval_rows=held, run=run)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", mortal)
        with pytest.raises(Killed):
            kto(labelled(9), spec, KTOLossConfig(), eval_rows=held, run=run)
    result = kto(labelled(9), spec, KTOLossConfig(), eval_rows=held, run=run)
    assert result["resumed_from"] == 2 and result["steps"] == 6 and len(result["evals"]) == 3
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "m"), 1e-6)


# --- which reply is whose other ----------------------------------------------------------------


def of_prompts(*prompts: int) -> list[Record]:
    return [{"prompt_ids": [prompt], "completion_ids": [100 + at]} for at, prompt in enumerate(prompts)]


def test_replies_are_shifted_within_their_step() -> None:
    from srlm_cli.train.unpaired_trainer import with_others

    made = with_others(of_prompts(0, 1, 2, 3, 4), [[3, 0, 1], [4, 2]])
    assert [row["KL_completion_ids"] for row in made] == [[103], [100], [104], [101], [102]]


def test_no_prompt_gets_a_reply_of_its_own_where_there_is_another() -> None:
    from srlm_cli.train.unpaired_trainer import with_others

    rows = of_prompts(0, 0, 1, 1, 0, 2)
    made = with_others(rows, [[0, 1, 2, 3], [4, 5]])
    assert [row["KL_completion_ids"][0] for row in made] == [102, 103, 100, 101, 105, 104]
    made = with_others(of_prompts(0, 0, 1, 0), [[0, 1, 2], [3]])
    assert made[3]["KL_completion_ids"] == [102]  # the only row of a step: the first reply to another prompt
    assert {row["KL_completion_ids"][0] for row in made[:3]} == {100, 101, 102}


# --- rows --------------------------------------------------------------------------------------

SCORES = LabelOptions(4.0, 2.0)
JUDGED = {"prompt": "Ask?", "response": "So.", "score": 5.0}


@pytest.mark.parametrize(
    ("change", "label", "reason"),
    [
        ({}, True, ""),
        ({"score": 4}, True, ""),
        ({"score": 2}, False, ""),
        ({"score": -1.5}, False, ""),
        ({"score": 3.9}, None, "with a score between"),
        ({"score": None}, None, "without a score"),
        ({"response": " \n"}, None, "without a reply"),
        ({"response": None, "finish_reason": "length", "thought": "Hm"}, None, "without a reply"),
        ({"response": "<think>Hm"}, None, "without a reply"),
        ({"finish_reason": "content_filter"}, None, "without a reply"),
        ({"finish_reason": "length"}, None, "cut off"),
        ({"finish_reason": "length", "score": 0}, None, "cut off"),
        ({"finish_reason": "stop"}, True, ""),
        ({"label": False}, False, ""),  # of people, over the score of the judge
        ({"label": "physics"}, True, ""),  # a field of the user's own
    ],
    ids=str,
)
def test_a_judged_row_has_the_label_of_its_score(change: Record, label: bool | None, reason: str) -> None:
    made = labelled_record({**JUDGED, **change}, SCORES)
    assert made["label"] is label and made.get("no_label", "").startswith(reason)
    assert "response" not in made and bool(reason) == ("no_label" in made)


def test_a_row_of_trl_has_its_own_label() -> None:
    row = {"prompt": [{"role": "user", "content": "Ask?"}], "completion": [{"role": "assistant", "content": "So."}]}
    made = labelled_record({**row, "label": False}, LabelOptions())
    assert made["completion"] == row["completion"] and made["label"] is False
    for wrong in (None, 1, "yes"):
        with pytest.raises(BadRow, match="expected `label`, true or false, or `response` and `score`"):
            labelled_record({**row, "label": wrong}, LabelOptions())
    with pytest.raises(BadRow, match="`completion`"):
        labelled_record({"prompt": "Ask?", "label": True}, LabelOptions())


def test_a_score_needs_both_borders() -> None:
    with pytest.raises(OptionError, match="need --desirable-score and --undesirable-score"):
        labelled_record(JUDGED, LabelOptions(desirable=4.0))
    with pytest.raises(OptionError, match="--undesirable-score 4 is not below --desirable-score 4"):
        LabelOptions(4.0, 4.0)


def test_every_row_is_trained_on_or_counted(base: Path) -> None:
    scores = (5, 5, None, 3, 0, 1)
    judged = [{**JUDGED, "prompt": f"Ask {n}?", "score": score} for n, score in enumerate(scores)]
    judged += [judged[0], {**judged[0], "score": 1}, {**judged[0], "response": ""}, {**judged[1], "prompt": "a" * 300}]
    rows = [labelled_record(row, SCORES) for row in judged]
    made, report = kto_rows(rows, Renderer(load_tokenizer(str(base))), 100)
    assert [row["label"] for row in made] == [True, True, False, False, False]
    assert (report.duplicates, report.left_out, report.no_label.total()) == (1, 1, 3)
    assert len(made) + report.duplicates + report.left_out + report.no_label.total() == len(judged)
    line = report.line("rows")
    assert "2 desirable" in line and "3 undesirable" in line and "1 left out, without a score" in line
    assert report.as_dict()["no_label"]["without a reply"] == 1


def test_the_tokens_are_those_of_sft(base: Path) -> None:
    """With a thought, too, and cut at the same length."""
    renderer = Renderer(load_tokenizer(str(base)))
    for limit in (200, 30):
        [made], _ = kto_rows([labelled_record({**JUDGED, "thought": "Hm"}, SCORES)], renderer, limit)
        [wanted], _ = sft_rows([{"prompt": "Ask?", "completion": "So.", "thought": "Hm"}], renderer, limit)
        assert made["prompt_ids"] + made["completion_ids"] == wanted["input_ids"]
        assert [-100] * len(made["prompt_ids"]) + made["completion_ids"] == wanted["labels"]


def test_one_prompt_has_no_estimate(base: Path, tmp_path: Path) -> None:
    rows = [{**row, "prompt": "Ask?"} for row in ROWS]
    with pytest.raises(DataError, match="all rows have the same prompt.*--loss apo-zero-unpaired"):
        kto(rows, one_step(base, tmp_path / "m"), KTOLossConfig(), run=QUIET)


@pytest.mark.parametrize(
    ("weights", "advice"),
    [
        ((1, 1), "are 0.67, not 1 to 1.33 as in the paper: --desirable-weight 1.5 or --undesirable-weight 0.67"),
        ((1.5, 1), ""), ((2, 1), ""), ((1, 0.5), ""), ((3, 1), "are 2.00"), ((0, 1), ""),
    ],
)  # fmt: skip
def test_weights_that_the_paper_does_not_advise_are_named(weights, advice: str, base: Path) -> None:
    report = kto_rows(ROWS, Renderer(load_tokenizer(str(base))), 200)[1]  # 2 desirable, 3 undesirable
    said = Kto(KTOLossConfig(desirable_weight=weights[0], undesirable_weight=weights[1])).advice(report)
    assert advice in said and bool(advice) == bool(said)


def test_rows_of_one_kind_are_named(base: Path) -> None:
    for label, kind in ((True, "desirable"), (False, "undesirable")):
        report = kto_rows([row for row in ROWS if row["label"] is label], Renderer(load_tokenizer(str(base))), 200)[1]
        assert Kto(KTOLossConfig()).advice(report) == f"all rows are {kind}: the model learns no difference"


def test_weights_that_train_nothing_are_refused() -> None:
    with pytest.raises(OptionError, match="are both 0: there is nothing to train"):
        KTOLossConfig(desirable_weight=0, undesirable_weight=0)


# --- the command -------------------------------------------------------------------------------


def judged(count: int) -> list[Record]:
    return [
        {"prompt": f"Ask {n // 2}?", "response": f"Reply {n}.", "k": n % 2, "score": float(n % 6)} for n in range(count)
    ]


def test_the_command_trains_on_judged_rows(srlm: Srlm, base: Path) -> None:
    write_rows(srlm.folder / "judged.jsonl", judged(12))
    argv = ["kto", "--in", "judged.jsonl", "--model", str(base), "--out", "m", "--desirable-score", "4"]
    argv += ["--dtype", "float32"]
    result = srlm(*argv, env=ALONE)
    assert result.code == 2 and "need --desirable-score and --undesirable-score" in result.err
    result = srlm(*argv, "--undesirable-score", "1", env=ALONE)
    assert result.code == 0, result.err
    [row] = result.rows
    assert row["command"] == "kto" and row["steps"] == 1 and row["start"]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert row["data"]["notes"] == {"desirable": 4, "undesirable": 4} and row["data"]["rows"] == 8
    assert sum(row["data"]["no_label"].values()) == 4 and "4 left out, with a score between" in result.err
    kept = read_json(srlm.folder / "m" / "provenance.json")
    assert kept["beta"] == 0.1 and kept["loss"] == "kto" and kept["from"]["model"] == str(base)
    [line] = read_rows(srlm.folder / "m" / "metrics.jsonl")
    assert line["kl"] == pytest.approx(0, abs=1e-4) and {"length_chosen", "logp_rejected", "margin"} <= line.keys()


def test_a_dry_run_writes_nothing(srlm: Srlm, base: Path) -> None:
    argv = ["kto", "--model", str(base), "--out", "m", "--dry-run"]
    result = srlm(*argv, stdin=as_lines(labelled(6)), env=ALONE)
    assert result.code == 0 and result.rows[0]["steps"] == 1, result.err
    assert "1.00 epochs for passes without a gradient" in result.err and not (srlm.folder / "m").exists()


def test_held_out_prompts_and_other_turns_are_refused(srlm: Srlm, base: Path) -> None:
    write_rows(srlm.folder / "eval.jsonl", [{"prompt": "ask 02?"}])
    argv = ["kto", "--model", str(base), "--out", "m"]
    result = srlm(*argv, "--held-out", "eval.jsonl", stdin=as_lines(labelled(4)), env=ALONE)
    assert result.code == 3 and "<stdin>:3: its prompt is in the evaluation file eval.jsonl" in result.err
    result = srlm(*argv, "--train-turns", "all", stdin=as_lines(labelled(4)), env=ALONE)
    assert result.code == 2 and "turns that no label is about" in result.err


def test_nothing_to_train_on_says_why_or_copies_the_model(srlm: Srlm, base: Path) -> None:
    rows = [{**row, "score": None} for row in judged(3)]
    argv = ["kto", "--model", str(base), "--out", "m", "--desirable-score", "4", "--undesirable-score", "1"]
    result = srlm(*argv, stdin=as_lines(rows), env=ALONE)
    assert result.code == 3 and "none of 3 rows can be trained on: 3 left out, without a score" in result.err
    assert "(`srlm judge --force-score`)" in result.err
    for row in rows:
        row |= {"score": 5, "finish_reason": "length"}
    result = srlm(*argv, stdin=as_lines([{**rows[0], "score": 2, "finish_reason": "stop"}, *rows[1:]]), env=ALONE)
    ways = "`srlm sample` with a higher --max-new-tokens; a lower --desirable-score or a higher --undesirable-score"
    assert result.code == 3 and "2 left out, cut off at the limit of tokens" in result.err and f"({ways})" in result.err
    result = srlm(*argv, "--on-empty", "copy", stdin=as_lines(rows), env=ALONE)
    assert result.code == 0 and result.rows[0]["steps"] == 0
    assert (srlm.folder / "m" / "model.safetensors").exists()
