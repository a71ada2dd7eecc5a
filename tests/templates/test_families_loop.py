"""Every chat template of the TRL wheel on a tiny model through the loop: sample, judge, make-pairs, sft and dpo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import chat_templates
from helpers import ListEngine
from srlm_cli import records, templates
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.engines.chat_template import ChatTemplate
from srlm_cli.records import Record
from srlm_cli.stages.judge import JudgeOptions, judge
from srlm_cli.stages.make_pairs import PairOptions, make_pairs, scored_record
from srlm_cli.stages.sample import SampleOptions, sample
from srlm_cli.thoughts import UNFINISHED
from srlm_cli.train.dpo import dpo
from srlm_cli.train.losses import DPOLossConfig
from srlm_cli.train.options import RunOptions, TrainSpec
from srlm_cli.train.sft import sft

torch.set_num_threads(1)
SCORE_ONLY = templates.load("score_only", fields={"prompt", "response"})
FEW = ("qwen3_6",)  # a thought that the prompt opens
USER = [{"role": "user", "content": "Is 7 prime?"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of a tiny model with a template, made once."""
    folder = tmp_path_factory.mktemp("models")

    def of(name: str) -> Path:
        if not (folder / name).exists():
            from transformers import LlamaConfig, LlamaForCausalLM

            tokenizer = chat_templates.tokenizer(name)
            tokenizer.save_pretrained(folder / name)
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            ends = {
                "eos_token_id": tokenizer.eos_token_id,
                "bos_token_id": None,
                "pad_token_id": tokenizer.pad_token_id,
            }
            net = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **ends))
            net.save_pretrained(folder / name)
        return folder / name

    return of


def written(template: ChatTemplate, thought: str, answer: str) -> str:
    """Return what a model of this family writes after its generation prompt."""
    before, between = template.around(USER, template.thinking(USER))
    return before + thought + between + answer


def script(template: ChatTemplate) -> list[Record]:
    """Return the pair of a prompt whose replies a scripted model writes, thinks of and judges."""
    opened = template.marks.opened(template.render(USER, template.thinking(USER)))
    mark = template.marks.named_in(template.render(USER)[-200:]) or template.family or template.marks.families[0]
    begun = mark.opening if opened else ""  # a list has no prompt that could have opened it
    texts = [begun + written(template, f"T{n}", f"Reply {n}.") for n in range(3)]
    cut = begun + written(template, "T3", "").removesuffix(template.around(USER, template.thinking(USER))[1])
    prompts = [records.prompt_record({"prompt": "Is 7 prime?"})]
    options = SampleOptions(4, Sampling(), 0, template.thinking(USER))
    [sampled] = sample(prompts, ListEngine([[*texts, cut]]), options)
    assert [row["thought"] for row in sampled.rows] == ["T0", "T1", "T2", "T3"]
    assert [row["response"] for row in sampled.rows] == ["Reply 0.", "Reply 1.", "Reply 2.", None]
    assert sampled.rows[3]["finish_reason"] == UNFINISHED
    engine = ListEngine([[begun + written(template, "Score: 5?", f"Score: {n}")] for n in range(3)])
    judged = [outcome.rows[0] for outcome in judge(sampled.rows, engine, JudgeOptions(SCORE_ONLY, 1, Sampling(), 0))]
    assert not any(f"T{n}" in request.messages[-1]["content"] for request in engine.asked for n in range(4))
    assert [row["scores"] for row in judged] == [[0], [1], [2], []]
    return [row for outcome in make_pairs(map(scored_record, judged), PairOptions()) for row in outcome.rows]


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in chat_templates.NAMES]
)
def test_the_loop_holds_for_a_template(made, name: str, tmp_path: Path) -> None:
    folder = made(name)
    template = ChatTemplate(chat_templates.tokenizer(name), name=name)
    [pair] = pairs = script(template)
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("Reply 2.", "Reply 0.")
    assert (pair["chosen"][0]["reasoning_content"], pair["rejected"][0]["reasoning_content"]) == ("T2", "T0")
    for thoughts in (True, False):
        spec = TrainSpec(
            model=str(folder), out=tmp_path / f"dpo-{thoughts}", learning_rate=1e-3, final_learning_rate=1e-3, batch=1,
            max_length=2048, device="cpu", dtype="float32", train_thoughts=thoughts,
        )  # fmt: skip
        result = dpo(pairs, spec, DPOLossConfig(), run=RunOptions(quiet=True))
        assert result["steps"] == 1 and result["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    rows = [
        {"prompt": "Is 7 prime?", "completion": "No.", "thought": "Three."},
        {"prompt": "Up?", "completion": "Yes."},
    ]
    spec = TrainSpec(
        model=str(folder), out=tmp_path / "sft", learning_rate=1e-3, final_learning_rate=1e-3, batch=2, max_length=2048,
        device="cpu", dtype="float32",
    )  # fmt: skip
    assert sft(rows, spec, run=RunOptions(quiet=True))["steps"] == 1
    modes = ["auto", *(["on", "off"] if template.switch else [])]
    for mode in modes:
        engine = open_engine(EngineSpec(model=str(tmp_path / "sft"), device="cpu", dtype="float32", thinking=mode))
        opened = engine.template.marks.opened(engine.template.render(USER))
        sampling = Sampling(0.0, 1.0, 8)
        done, limited, scored = engine.generate(
            [
                Request(USER, sampling, (0,)),
                Request(USER, Sampling(0.0, 1.0, 60, max_thinking_tokens=4), (0,)),
                Request(USER, sampling, (0,), prefix="Score: ", choices=("1", "2")),
            ]
        )
        assert done.finish_reasons[0] == UNFINISHED if opened else done.finish_reasons[0] in ("stop", "length")
        assert (limited.thoughts[0].at_limit and limited.finish_reasons[0] != UNFINISHED) if opened else True
        assert sum(scored.probabilities) == pytest.approx(1.0)
