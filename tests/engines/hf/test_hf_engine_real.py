"""The in-process engine on the embedded model: exact on real prompts, also behind a rubric and with an adapter."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import SHARED
from srlm_cli import templates
from srlm_cli.engines import open_engine
from srlm_cli.engines.base import EngineSpec, Request, Sampling
from srlm_cli.engines.hf.engine import HfEngine
from srlm_cli.forward.packed import PackedModel
from srlm_cli.stages.judge import judge_prompt

pytestmark = [pytest.mark.model, pytest.mark.slow]

MODEL = "smollm2-135m-instruct"
PROMPTS = SHARED / "eval_prompts"
LENGTH = 24
# Two roundings of one sum may choose differently between logits that are as good as equal.
TIE = 1e-3


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """50 prompts: 20 of koala, some of them long, and 30 of vicuna_bench."""
    if not PROMPTS.is_dir():
        pytest.skip("no ../shared/data/eval_prompts")
    read = [
        json.loads(line)
        for name, chosen in (("koala", slice(20, 40)), ("vicuna_bench", slice(30)))
        for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()[chosen]
    ]
    return [row["turns"][0] if "turns" in row else row["prompt"] for row in read]


@pytest.fixture(scope="module")
def engine() -> HfEngine:
    return open_engine(EngineSpec(model=MODEL, dtype="float32", batch_size=32))


def expect_generate(engine: HfEngine, requests: list[Request]) -> None:
    """Compare with `generate`, one prompt at a time; rows may part where the two best logits are a tie."""
    assert isinstance(engine.reader, PackedModel)
    ties = 0
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        ids = torch.tensor([engine._tokens(engine.template.turn(request))])
        with torch.inference_mode():
            whole = engine.net.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False, pad_token_id=2
            )[0, ids.shape[1] :].tolist()
            text, reason, _, _ = engine.stops.finished(whole, request.sampling)
            if completion.texts != [text] * len(request.seeds):
                logits = engine.net(torch.cat([ids, torch.tensor([whole])], 1)).logits[0, ids.shape[1] - 1 : -1]
                best = logits.topk(2).values
                assert (best[:, 0] - best[:, 1]).min() < TIE, (text, completion.texts)
                ties += 1
                continue
        assert completion.finish_reasons == [reason] * len(request.seeds)
    assert ties <= len(requests) // 50


def ask(messages: list[dict[str, str]], seeds: tuple[int, ...]) -> Request:
    return Request(messages, Sampling(0.0, 1.0, LENGTH), seeds)


def test_greedy_is_generate_on_real_prompts(engine, prompts):
    expect_generate(engine, [ask([{"role": "user", "content": text}], (0, 1)[: 1 + len(text) % 2]) for text in prompts])


def test_greedy_is_generate_behind_a_shared_rubric(engine, prompts):
    rubric = templates.load("additive", fields={"prompt", "response"})
    expect_generate(
        engine,
        [
            ask(judge_prompt({"prompt": text[:400], "response": f"{text[:200]}?"}, rubric), (0,))
            for text in prompts[15:25]
        ],
    )


def test_greedy_is_generate_with_an_adapter(engine, prompts, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from srlm_cli.models.locate import locate

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(locate(MODEL), dtype=torch.float32)
    net = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02)
    net.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    adapted = open_engine(EngineSpec(model=str(tmp_path), dtype="float32", batch_size=32))
    requests = [ask([{"role": "user", "content": text}], (0,)) for text in prompts[20:30]]
    expect_generate(adapted, requests)
    plain = [completion.texts for completion in engine.generate(requests)]
    assert plain != [completion.texts for completion in adapted.generate(requests)]
