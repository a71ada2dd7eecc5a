"""A training row: the tokens that sampling shows the model, then the reply, whatever the chat template makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers import Srlm, as_lines, read_json, read_rows, write_rows
from srlm_cli.engines.chat_template import ChatTemplate, rendered, token_ids
from srlm_cli.errors import BadRow, DataError
from srlm_cli.records import Record
from srlm_cli.thoughts import marks_of
from srlm_cli.train import session
from srlm_cli.train.data import dpo_rows, sft_rows
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.render import ADDED, CLOSED, KEPT, SPLIT, THOUGHT, Renderer
from srlm_cli.train.sft import sft
from tiny import ALONE, DATE, NO_SYSTEM, TEMPLATE, completions, sequence, tiny_model, with_template

torch.set_num_threads(1)

# As the R1 distills have it: a thought is opened in the generation prompt, and cut out of the assistant's turns.
R1 = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
)
# As Qwen3 has it: an empty thought before an answer without one.
QWEN3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CUTS_THOUGHTS = TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1].strip()")
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture
def tokenizer(base: Path):
    return AutoTokenizer.from_pretrained(base)


def shown(tokenizer, row: Record, field: str = "completion") -> tuple[str, str, tuple[str, ...]]:
    """Return the text before the target of a row, the target, and what is told of it."""
    made = sequence(tokenizer, row["prompt"], row[field])
    return (
        tokenizer.decode(made.ids[: made.start]),
        tokenizer.decode(made.ids[made.start :]),
        made.notes,
    )


# --- what is trained -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reply", "target", "note"),
    [
        (TEMPLATE, "No.", "No.<|end|>", None),
        (TEMPLATE, " No.\n", " No.\n<|end|>", None),
        (TEMPLATE.replace("m['content']", "m['content'] | trim"), " No.\n", "No.<|end|>", None),
        (TEMPLATE.replace("m['content']", "m['content'] | replace('No', 'Ja')"), "No.", "No.<|end|>", KEPT),
        (R1, "Three.\n</think>\n\nNo.", "Three.\n</think>\n\nNo.<|end|>", THOUGHT),
        (R1, "<think>\nThree.\n</think>\n\nNo.", "Three.\n</think>\n\nNo.<|end|>", THOUGHT),
        (R1, "<think>Three.</think>No.", "Three.\n</think>\n\nNo.<|end|>", THOUGHT),
        (R1, "It goes on and", "It goes on and<|end|>", CLOSED),
        (QWEN3, "No.", "No.<|end|>", CLOSED),
        (QWEN3, "<think>\nThree.\n</think>\n\nNo.", "<think>\nThree.\n</think>\n\nNo.<|end|>", THOUGHT),
        (CUTS_THOUGHTS, "<think>\nThree.\n</think>\n\nNo.", "<think>\nThree.\n</think>\n\nNo.<|end|>", THOUGHT),
    ],
)
def test_the_target_follows_what_sampling_shows(
    tokenizer, template: str, reply: str, target: str, note: str | None
) -> None:
    tokenizer.chat_template = template
    prompt = [{"role": "user", "content": "Prime?"}]
    before, learned, notes = shown(tokenizer, {"prompt": prompt, "completion": reply})
    empty = "<think>\n\n</think>\n\n" if note == CLOSED else ""
    assert before == rendered(tokenizer, prompt, today=None).removesuffix("<think>\n" if empty else "") + empty
    assert (learned, notes) == (target, (note,) if note else ())


def test_a_thought_between_marks_of_ones_own_is_found(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATE
    renderer = Renderer(tokenizer, ChatTemplate(tokenizer, marks=marks_of(("<<", ">>"))))
    [made] = renderer.rendered({"prompt": "Prime?", "completion": "<<Three.>>No."}, ("completion",))
    assert tokenizer.decode(made.ids[made.start :]) == "<<Three.>>No.<|end|>" and made.notes == (THOUGHT,)
    assert tokenizer.decode(made.ids[made.answer :]) == "No.<|end|>"


def test_a_template_without_a_generation_prompt_has_the_header_in_the_target(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATE.partition("{% if add")[0]
    assert shown(tokenizer, {"prompt": "Why?", "completion": "So."}) == (
        "<|user|>\nWhy?<|end|>\n", "<|assistant|>\nSo.<|end|>", (ADDED,),
    )  # fmt: skip


def test_pairs_that_differ_in_their_thoughts_are_told_apart(tokenizer) -> None:
    tokenizer.chat_template = R1
    row = {"prompt": "Prime?", "chosen": "Three.\n</think>\n\nNo.", "rejected": "Odd.\n</think>\n\nNo."}
    [made], report = dpo_rows([row], Renderer(tokenizer), 200)
    assert made["chosen_ids"] != made["rejected_ids"] and report.identical == 0
    assert "1 with a thought, which is trained on" in report.line("pairs")


def test_a_pair_with_sides_of_the_same_tokens_is_dropped_and_counted(tokenizer) -> None:
    same = {"prompt": "Up?", "chosen": "Yes.", "rejected": [{"role": "assistant", "content": "Yes."}]}
    cut = {"prompt": "Up?", "chosen": "y" * 50 + "a", "rejected": "y" * 50 + "b"}
    made, report = dpo_rows([same, cut, {**cut, "rejected": "n"}], Renderer(tokenizer), 40)
    assert (len(made), report.identical, report.truncated) == (1, 2, 1)
    assert "2 dropped: chosen and rejected are the same tokens" in report.line("pairs")


def test_a_training_without_a_pair_left_says_why(srlm: Srlm, base: Path) -> None:
    rows = [{"prompt": f"Ask {n}?", "chosen": "Yes.", "rejected": "Yes."} for n in range(3)]
    result = srlm("dpo", "--model", str(base), "--out", "m", stdin=as_lines(rows), env=ALONE)
    assert result.code == 3
    assert "none of 3 pairs can be trained on: 3 dropped: chosen and rejected are the same tokens" in result.err


def joining(merges: list[tuple[str, str]], metaspace: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer that joins pairs of signs, as byte-level BPE or as SentencePiece does."""
    signs = ["▁", *"abcdefghijklmnopqrstuvwxyzABC.:?"] if metaspace else sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: at for at, sign in enumerate([*signs, *(one + other for one, other in merges)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    one, other = (
        (pre_tokenizers.Metaspace(prepend_scheme="always", split=False), decoders.Metaspace(prepend_scheme="always"))
        if metaspace
        else (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel())
    )
    made.pre_tokenizer, made.decoder = one, other
    made.add_special_tokens(["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    return tokenizer


def test_line_breaks_that_a_tokenizer_joins_are_parted() -> None:
    """Qwen2.5 has a token for two line breaks: joined, the prompt would end otherwise than in sampling."""
    tokenizer = joining([("Ċ", "Ċ")], metaspace=False)
    head = token_ids(tokenizer, "user:\nWhy?<|end|>assistant:\n")
    assert len(token_ids(tokenizer, "assistant:\n\nSo.")) == len(token_ids(tokenizer, "assistant:\nSo."))
    made = sequence(tokenizer, "Why?", "\nSo.")
    assert made.ids[: made.start] == head and tokenizer.decode(made.ids[made.start :]) == "\nSo.<|end|>"
    assert made.notes == (SPLIT,) and sequence(tokenizer, "Why?", "So.").notes == ()
    made, report = sft_rows([{"prompt": "Why?", "completion": "\n\nSo."}], Renderer(tokenizer), 99)
    assert made[0]["input_ids"][: len(head)] == head and report.notes == {SPLIT: 1}


def test_an_end_of_turn_that_is_no_special_token_is_text(tokenizer) -> None:
    """As where a configuration has the default number of Llama's vocabulary, which is a letter here."""
    letter = token_ids(tokenizer, "o")
    [made], _ = sft_rows([{"prompt": "Why?", "completion": "So so"}], Renderer(tokenizer, stops=letter), 99)
    assert tokenizer.decode(made["input_ids"]).endswith("So so<|end|>") and len(letter) == 1
    special = tokenizer.convert_tokens_to_ids("<|pad|>")
    with pytest.raises(BadRow, match="ends a turn"):
        Renderer(tokenizer, stops=[special]).rendered({"prompt": "Why?", "completion": "So <|pad|>"}, ("completion",))


def test_what_a_tokenizer_joins_and_cannot_be_parted_is_a_bad_row() -> None:
    """A tokenizer that puts a space before each text makes another text of two halves."""
    tokenizer = joining([("a", "b")], metaspace=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}a{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:a{% endif %}"
    )
    with pytest.raises(BadRow, match="merges the end of the prompt"):
        sequence(tokenizer, "c", "b.")
    assert sequence(tokenizer, "c", "c.").notes == ()


# --- templates that refuse -------------------------------------------------------------------


def test_a_refused_row_of_a_training_is_named_or_passed(tokenizer) -> None:
    tokenizer.chat_template = NO_SYSTEM + TEMPLATE
    rows = [{"id": "7", "prompt": SYSTEM, "completion": "So."}, *completions(2)]
    with pytest.raises(DataError, match="row 7: the chat template refuses it: no system role"):
        sft_rows(rows, Renderer(tokenizer), 99)
    refused = []
    made, report = sft_rows(
        rows, Renderer(tokenizer), 99, refuse=lambda row, reason: refused.append((row["id"], reason))
    )
    assert refused == [("7", "the chat template refuses it: no system role")]
    assert (len(made), report.refused) == (2, 1) and "1 bad rows" in report.line("rows")


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_training_passes_a_row_that_its_template_refuses(srlm: Srlm, base: Path, command: str) -> None:
    model = with_template(base, srlm.folder / "model", NO_SYSTEM + TEMPLATE)
    reply = {"completion": "So."} if command == "sft" else {"chosen": "So.", "rejected": "No."}
    rows = [{"prompt": f"Ask {n}?", **reply} for n in range(3)]
    write_rows(srlm.folder / "in.jsonl", [*rows[:2], {"prompt": SYSTEM, **reply}, rows[2]])
    argv = [command, "--in", "in.jsonl", "--model", str(model), "--out", "m", "--dry-run"]
    stopped = srlm(*argv, env=ALONE)
    assert stopped.code == 3 and "in.jsonl:3: the chat template refuses it: no system role" in stopped.err
    passed = srlm(*argv, "--on-error", "skip", "--rejects", "bad.jsonl", env=ALONE)
    assert passed.code == 0, passed.err
    [result] = passed.rows
    assert (result["skipped"], result["data"]["rows"], result["data"]["refused"]) == (1, 3, 1)
    [kept] = read_rows(srlm.folder / "bad.jsonl")
    assert kept["at"] == "in.jsonl:3" and json.loads(kept["line"])["prompt"] == SYSTEM


# --- templates that write the date -----------------------------------------------------------

MOMENT = "2026-02-03T04:05:06"


def test_a_training_has_the_date_of_its_unfinished_run(tokenizer, base: Path, tmp_path: Path) -> None:
    spec = TrainSpec(str(base), tmp_path / "m", 1e-3, 1e-4, device="cpu")
    assert session.dated("sft", replace(spec, today=MOMENT), tokenizer, RunOptions()).today == ""
    tokenizer.chat_template = DATE + TEMPLATE
    assert session.dated("sft", replace(spec, today=MOMENT), tokenizer, RunOptions()).today == MOMENT
    (tmp_path / "m.part").mkdir()
    left = {**session.settings_of("sft", spec), "rows": "x", "today": MOMENT, "dtype": "float32"}
    (tmp_path / "m.part" / "state.json").write_text(json.dumps({"fingerprint": left}))
    assert session.dated("sft", spec, tokenizer, RunOptions()).today == MOMENT
    assert session.dated("sft", replace(spec, today="2026-01-01"), tokenizer, RunOptions()).today == "2026-01-01"
    for other in (
        session.dated("dpo", spec, tokenizer, RunOptions()),
        session.dated("sft", spec, tokenizer, RunOptions(restart=True)),
        session.dated("sft", replace(spec, seed=1), tokenizer, RunOptions()),
    ):
        assert other.today > MOMENT


def test_a_training_goes_on_the_next_day(base: Path, tmp_path: Path, monkeypatch) -> None:
    from transformers import Trainer

    model = with_template(base, tmp_path / "base", DATE + TEMPLATE)
    spec = TrainSpec(
        str(model), tmp_path / "m", 1e-3, 1e-4, batch=2, max_steps=4, device="cpu", dtype="float32", device_batch_size=1
    )
    run = RunOptions(quiet=True, save_steps=1)
    step, done = Trainer.training_step, []

    def mortal(self, *args, **named):
        done.append(1)
        if len(done) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **named)

    monkeypatch.setattr(session, "now", lambda: "2026-02-03T23:59:59")
    monkeypatch.setattr(Trainer, "training_step", mortal)
    with pytest.raises(KeyboardInterrupt):
        sft(completions(9), spec, run=run)
    monkeypatch.setattr(session, "now", lambda: "2026-02-04T00:00:01")
    assert sft(completions(9), spec, run=run)["resumed_from"] > 0
    assert read_json(tmp_path / "m" / "provenance.json")["settings"]["today"] == "2026-02-03T23:59:59"
