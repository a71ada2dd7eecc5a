"""Every chat template of the TRL wheel: what is sampled, read and trained is the same text, its thought apart."""

from __future__ import annotations

import pytest

import chat_templates
from srlm_cli.engines.base import Request, Sampling
from srlm_cli.engines.chat_template import ChatTemplate
from srlm_cli.engines.hf.stopping import Stops
from srlm_cli.errors import BadRow, OptionError
from srlm_cli.train.render import CLOSED, THOUGHT, Renderer, Sequence

USER = [{"role": "user", "content": "Is 7 prime?"}]
# By the templates themselves: which open a thought in the generation prompt, which can turn thoughts on and off, which
# have marks of their own.
OPENS = {
    "deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super",
    "nemotron_3_ultra", "qwen3_5_think", "qwen3_6", "qwen3_8",
}  # fmt: skip
SWITCHED = {
    "diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "glm4moe", "qwen3",
    "qwen3_5_nothink", *OPENS,
} - {"deepseek_r1_distill", "deepseekv3"}  # fmt: skip
NO_THOUGHTS = {
    "cohere", "cohere2", "gemma", "gemma3", "idefics3", "lfm2", "lfm2_v2", "llama3", "llama3_1", "llama3_2",
    "llava_next", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl", "smolvlm",
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", chat_templates.NAMES)


@pytest.fixture(scope="module")
def template_of():
    """Return the template of a name with options, its tokenizer made once."""
    made = {}

    def of(name: str, **options) -> ChatTemplate:
        if name not in made:
            made[name] = chat_templates.tokenizer(name)
        return ChatTemplate(made[name], name=name, **options)

    return of


def row(template: ChatTemplate, thought: str | None, **more) -> Sequence:
    renderer = Renderer(template.tokenizer, template, **more)
    return renderer.rendered({"prompt": USER, "completion": "No.", "thought": thought}, ("completion",))[0]


def parts(template: ChatTemplate, made: Sequence) -> tuple[str, str]:
    return tuple(map(template.tokenizer.decode, (made.ids[: made.start], made.ids[made.start :])))


@EVERY
def test_a_thought_is_trained_as_it_is_sampled(template_of, name: str) -> None:
    """After the prompt of sampling, in the marks of the family, to one end of the turn; and it is divided again."""
    template = template_of(name)
    made = row(template, "Three.")
    head, target = parts(template, made)
    sampled = template.render(USER, template.thinking(USER))
    assert (
        head == sampled
        and made.notes == (THOUGHT,)
        and template.marks.opened(sampled) == (name in OPENS | {"qwen3_5_nothink"})
    )
    assert target.count("Three.") == target.count("No.") == 1 and target.index("Three.") < target.index("No.")
    end = chat_templates.end_of(name)
    assert target.endswith(end) and target.count(end) == 1
    written = Stops(None, template).finished(made.ids[made.start :], Sampling(), template.marks.opened(sampled))
    assert (written.text, written.reason, written.thought.text) == ("No.", "stop", "Three.")
    assert made.start < made.answer < len(made.ids)
    assert template.tokenizer.decode(made.ids[made.answer :]).strip().startswith("No.")


@EVERY
def test_an_answer_without_a_thought_is_trained_without_marks(template_of, name: str) -> None:
    template = template_of(name)
    made = row(template, None)
    head, target = parts(template, made)
    assert target.strip().startswith("No.") and target.endswith(chat_templates.end_of(name))
    assert not template.marks.pattern.search(target)
    assert not template.marks.opened(head) and not template.marks.closing(head[-200:])
    assert (CLOSED in made.notes) == (head != template.render(USER))
    assert row(template, "Three.", train_thoughts=False).ids == made.ids


@EVERY
def test_a_score_is_asked_for_after_a_closed_thought(template_of, name: str) -> None:
    template = template_of(name)
    chat = template.turn(Request(USER, Sampling(), (0,), prefix="Score: "))
    assert chat.endswith("Score: ") and "Is 7 prime?" in chat
    assert not template.marks.opened(chat.removesuffix("Score: "))
    opened = template.marks.opened(template.render(USER))
    begun = template.closing(template.render(USER), "Hm") if opened else ""
    after = template.turn(Request(USER, Sampling(), (0,), prefix="Score: ", thought="Hm" if opened else ""))
    assert after.endswith(f"Hm{begun}Score: ") if opened else after == chat


@EVERY
def test_the_switch_for_thoughts_is_used_or_refused(template_of, name: str) -> None:
    if name not in SWITCHED:
        with pytest.raises(OptionError, match=f"template of {name} has no switch for thoughts"):
            template_of(name, thinking="off")
        return
    on, off = (template_of(name, thinking=mode) for mode in ("on", "off"))
    assert on.kwargs == {"enable_thinking": True} and on.render(USER) != off.render(USER)
    assert not off.marks.opened(off.render(USER))
    assert on.render(USER, {"enable_thinking": False}) == off.render(USER)  # the options of a row come first


@EVERY
def test_what_a_template_knows_of_thoughts(template_of, name: str) -> None:
    assert (template_of(name).family is None) == (name in NO_THOUGHTS)


@EVERY
def test_an_option_that_a_template_does_not_use_is_refused(template_of, name: str) -> None:
    with pytest.raises(OptionError, match=f"the chat template of {name} does not use `depth`"):
        template_of(name, kwargs={"depth": 3})
    with pytest.raises(BadRow, match="does not use `depth`"):
        template_of(name).render(USER, {"depth": 3})


def test_a_pair_with_one_thought_is_refused_where_the_prompt_opens_one(template_of) -> None:
    template = template_of("qwen3_6")
    chosen = {"role": "assistant", "content": "No.", "reasoning_content": "Three."}
    pair = {"prompt": USER, "chosen": [chosen], "rejected": "Yes."}
    with pytest.raises(BadRow, match="one reply has a thought and the other has none"):
        Renderer(template.tokenizer, template).rendered(pair, ("chosen", "rejected"))
    one, other = Renderer(template_of("qwen3").tokenizer).rendered(pair, ("chosen", "rejected"))
    assert one.ids[: one.start] == other.ids[: other.start]
    assert template_of("qwen3").tokenizer.decode(other.ids[other.start :]) == "Yes.<|im_end|>"


@pytest.mark.parametrize(
    ("reply", "why"),
    [("<think>\nThree", "a thought without an end"), ("No.<|im_end|>", "contains <|im_end|>, which ends a turn")],
)
def test_a_reply_that_would_be_trained_wrong_is_a_bad_row(template_of, reply: str, why: str) -> None:
    template = template_of("qwen3")
    with pytest.raises(BadRow, match=why.replace("|", r"\|")):
        Renderer(template.tokenizer).rendered({"prompt": USER, "completion": reply}, ("completion",))


def test_special_tokens_are_no_text_beside_a_thought_either(template_of) -> None:
    template = template_of("qwen3_6")
    for said in ("Four", "<think>Hm</think>Four"):
        ids = template.tokenizer(f"{said}<|vision_end|>.", add_special_tokens=False)["input_ids"]
        assert template.text(ids) == f"{said}."


def test_markers_of_ones_own(template_of) -> None:
    from srlm_cli.thoughts import marks_of

    template = template_of("llama3", marks=marks_of(("<<", ">>")))
    assert template.marks.divide("<<Hm>> Four.")[0] == "Four."
    assert template.marks.divide("<<Hm")[1].closed is False


def test_the_table_in_the_docs_is_what_the_templates_do() -> None:
    import families_page

    page = families_page.PAGE.read_text(encoding="utf-8")
    assert page == families_page.render(), "make docs"
