"""Thoughts in the engine of this process: apart from answers, unfinished, and closed at a limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny_models
from srlm_cli.engines import LazyEngine, open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.engines.chat_template import ChatTemplate
from srlm_cli.engines.model_summary import model_summary
from srlm_cli.errors import OptionError
from srlm_cli.models.load import load_tokenizer
from srlm_cli.records import prompt_record
from srlm_cli.stages.sample import SampleOptions, sample
from srlm_cli.thoughts import UNFINISHED, Thought

CHAT = "{% for m in messages %}<start>{{ m.role }}:{{ m.content }}<end>{% endfor %}"
# Two kinds of models: the prompt opens a thought, or the model would.
OPENS = CHAT + "{% if add_generation_prompt %}<start>assistant:<think>\n{% endif %}"
SWITCH = CHAT + (
    "{% if add_generation_prompt %}<start>assistant:"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}"
)
LIMIT = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a model of a kind with a template, made once."""
    made = tmp_path_factory.mktemp("models")

    def of(kind: str, template: str) -> Path:
        path = made / f"{kind}-{len(template)}"
        if not path.exists():
            tiny_models.save(path, kind)
            (path / "chat_template.jinja").write_text(template)
        return path

    return of


def spec(path: Path, **more) -> EngineSpec:
    return EngineSpec(model=str(path), device="cpu", dtype="float32", **more)


def ask(sampling: Sampling, text: str = "Why?", **more) -> Request:
    return Request([{"role": "user", "content": text}], sampling, (1, 2, 3), **more)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_a_thought_is_closed_at_its_limit_and_the_answer_goes_on(folder, kind: str, temperature: float) -> None:
    engine = open_engine(spec(folder(kind, OPENS)))
    free, limited = (Sampling(temperature, 1.0, 30, max_thinking_tokens=limit) for limit in (None, LIMIT))
    [whole] = engine.generate([ask(free)])
    assert whole.finish_reasons == [UNFINISHED] * 3 and whole.texts == [""] * 3  # random weights close nothing
    [closed] = engine.generate([ask(limited)])
    for thought, before, reason in zip(closed.thoughts, whole.thoughts, closed.finish_reasons, strict=True):
        assert thought.closed and thought.at_limit and reason in ("length", "stop")
        written, _, after = thought.raw.partition("</think>")
        assert before.raw.startswith(written[:-1]) and not after.strip() and after.startswith("\n\n")
    assert closed.tokens_out <= 90
    [again] = engine.generate([ask(limited)])
    assert (again.texts, again.thoughts) == (closed.texts, closed.thoughts)


def test_each_completion_of_a_batch_is_as_alone(folder) -> None:
    engine = open_engine(spec(folder("llama", OPENS)))
    requests = [
        ask(Sampling(1.0, 1.0, 20, max_thinking_tokens=limit), f"Ask {n}") for n in range(4) for limit in (3, 9)
    ]
    together = list(engine.generate(requests))
    alone = [next(engine.generate([request])) for request in requests]
    assert [(one.texts, one.thoughts) for one in together] == [(one.texts, one.thoughts) for one in alone]


def test_a_limit_is_no_limit_without_a_thought(folder) -> None:
    engine = open_engine(spec(folder("llama", CHAT + "{% if add_generation_prompt %}<start>assistant:{% endif %}")))
    requests = [ask(Sampling(1.0, 1.0, 20, max_thinking_tokens=limit)) for limit in (None, 4)]
    free, limited = engine.generate(requests)
    assert free.texts == limited.texts and limited.thoughts == ()


@dataclass(frozen=True)
class After:
    """What is asked about a text: a choice after its thought and itself."""

    sampling: Sampling

    def __call__(self, k: int, text: str, thought: Thought | None) -> Request:
        return ask(self.sampling, thought=thought.raw, prefix=text + "S: ", choices=("1", "2"))


def test_a_score_is_read_after_the_thought_that_was_written(folder) -> None:
    """As a follow-up in the cache, and as a request of its own: also where the thought had no end."""
    engine = open_engine(spec(folder("llama", OPENS)))
    sampling = Sampling(1.0, 1.0, 8)
    about = After(sampling)
    [done] = engine.generate([ask(sampling, follow_up=about)])
    for text, thought, answer in zip(done.texts, done.thoughts, done.follow_ups or [None] * 3, strict=True):
        assert not thought.closed
        chat = engine.template.turn(about(0, text, thought))
        assert chat.endswith(f"{thought.raw}\n</think>\n\nS: ") and chat.count("<think>") >= 1
        [apart] = engine.generate([about(0, text, thought)])
        assert answer is None or answer.probabilities == pytest.approx(apart.probabilities, abs=1e-5)


def test_thinking_is_turned_off_by_the_run_or_by_the_row(folder) -> None:
    path = folder("llama", SWITCH)
    sampling = Sampling(0.0, 1.0, 6)
    [off] = open_engine(spec(path, thinking="off")).generate([ask(sampling)])
    engine = open_engine(spec(path))
    on, row = engine.generate([ask(sampling), ask(sampling, template_kwargs={"enable_thinking": False})])
    assert on.finish_reasons == [UNFINISHED] * 3 and off.thoughts == () and off.texts == row.texts


def test_an_option_that_the_template_ignores_is_refused_before_the_weights_are_read(folder, tmp_path) -> None:
    path = folder("llama", OPENS)
    for more, why in (({"thinking": "off"}, "always opens"), ({"template_kwargs": '{"depth": 1}'}, "use `depth`")):
        with pytest.raises(OptionError, match=why):
            open_engine(spec(path, **more))


def test_rows_of_unfinished_thoughts_have_no_response(folder) -> None:
    engine = LazyEngine(spec(folder("llama", OPENS)))
    [outcome] = sample([prompt_record({"prompt": "Why?"})], engine, SampleOptions(2, Sampling(1.0, 1.0, 6), 0))
    assert outcome.bad == "" and outcome.counts["unfinished thought"] == 2
    for row in outcome.rows:
        assert row["response"] is None and row["thought"] and row["finish_reason"] == UNFINISHED


@pytest.mark.parametrize(
    ("kind", "template", "wanted"),
    [
        ("llama", SWITCH, ["the generation prompt opens a thought (<think>), --thinking on|off sets enable_thinking",
                           "engine hf    packed", "system       accepted", "stop tokens  <end>"]),
        ("mamba", CHAT, ["thinking     the chat template has no thinking mode", "engine hf    plain"]),
    ],
)  # fmt: skip
def test_doctor_shows_what_there_is_to_know_of_a_model(folder, kind: str, template: str, wanted: list[str]) -> None:
    shown = "\n".join(f"{name:<12} {text}" for name, text in model_summary(str(folder(kind, template))))
    assert all(line in shown for line in wanted) and "GB of weights to sample" in shown


@pytest.mark.parametrize(
    ("template", "thinking", "expected"),
    [
        (CHAT, "auto", False),
        (OPENS, "auto", True),
        (SWITCH, "auto", True),
        (SWITCH, "on", True),
        (SWITCH, "off", False),
    ],
)
def test_an_answer_can_begin_with_a_thought(folder, template: str, thinking: str, expected: bool) -> None:
    spec = EngineSpec(model=str(folder("llama", template)), thinking=thinking)
    assert ChatTemplate.of(load_tokenizer(spec.model), spec).may_think() is expected
