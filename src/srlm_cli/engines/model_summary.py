"""The report of `srlm doctor --model`: thinking mode, chat template, stop tokens, sampling, engine and memory."""

from __future__ import annotations

from collections.abc import Iterator

from srlm_cli.engines.base import EngineSpec
from srlm_cli.engines.chat_template import HELLO, MARK, ChatTemplate, assistant, stop_ids, writes_date
from srlm_cli.errors import BadRow, SrlmError
from srlm_cli.models.hardware import pick_device, pick_dtype
from srlm_cli.models.load import end_of_turn_ids, load_config, load_tokenizer, quiet_libraries, sampling_of
from srlm_cli.models.locate import locate

GIGABYTE = 1e9
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINING_BYTES = 16  # of each trained weight: itself, its gradient and two moments of AdamW, in float32
LARGEST = 2e9  # weights of a model that is loaded to try how it is run


def model_summary(model: str) -> Iterator[tuple[str, str]]:
    """Yield pairs (name, text) that describe a model. Raises SrlmError if the folder is not a model."""
    quiet_libraries()
    folder = locate(model)
    config = load_config(model)
    count = parameters(config)
    yield "model", f"{folder}, {config.model_type}, {count / 1e6:.0f}M parameters" if count else folder
    template = ChatTemplate(load_tokenizer(model), name=model)
    yield "thinking", thinking(template)
    yield from about(template)
    ends = template.tokenizer.convert_ids_to_tokens(stop_ids(end_of_turn_ids(model), template.tokenizer))
    yield "stop tokens", ", ".join(ends) or "none: completions end at --max-new-tokens only"
    own = sampling_of(model)
    yield "sampling", ", ".join(f"{name} {value:g}" for name, value in own.items()) or "no settings of its own"
    device = pick_device("auto")
    dtype = pick_dtype("auto", device, float16=True)
    yield "engine hf", path_of(model, count, device)
    if count:
        yield (
            "memory",
            (
                f"{count * BYTES[dtype] / GIGABYTE:.1f} GB of weights to sample ({dtype}), "
                f"{count * TRAINING_BYTES / GIGABYTE:.1f} GB to train all weights, "
                f"{count * BYTES['float32'] / GIGABYTE:.1f} GB and the adapter with --lora-r; activations not counted"
            ),
        )


def parameters(config) -> int | None:
    """Return the number of weights of a model with this configuration, or None if it cannot be computed."""
    import torch

    from srlm_cli.models.light_transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config)
        return sum(weight.numel() for weight in net.parameters())
    except Exception:  # of the model's code
        return None


def thinking(template: ChatTemplate) -> str:
    """Return a text about the thinking mode of a chat template."""
    if not template.family:
        return "the chat template has no thinking mode"
    mark = template.family.opening.strip()
    opened = template.marks.opened(template.render(HELLO))
    how = f"the generation prompt opens a thought ({mark})" if opened else f"the model may begin a thought ({mark})"
    return f"{how}, {f'--thinking on|off sets {template.switch}' if template.switch else 'no switch'}"


def about(template: ChatTemplate) -> Iterator[tuple[str, str]]:
    """Yield pairs (name, text) about a chat template: replies, dates, message parts, system messages."""
    opened = template.render(HELLO)
    try:
        whole = template.render([*HELLO, assistant(MARK)], add_generation_prompt=False)
        same = whole.startswith(opened) and whole[len(opened) :].lstrip().startswith(MARK)
    except BadRow as refusal:
        yield "template", f"refuses a dialogue that ends with a reply: {refusal}"
        same = True
    kept = "its rendered replies follow the generation prompt"
    yield "template", kept if same else f"not {kept}: training rows are built from the generation prompt and the reply"
    if writes_date(template.tokenizer):
        yield "template", "writes the current date: --today DATE, else the date when a run began"
    if template.takes_parts:
        yield "template", "takes the content of a message in parts; texts are given as one part"
    try:
        shown = MARK in template.render([{"role": "system", "content": MARK}, {"role": "user", "content": "?"}])
        yield "system", "accepted" if shown else "left out: the template does not show a system message"
    except BadRow as refusal:
        yield "system", f"refused: {refusal}"


def path_of(model: str, count: int | None, device: str) -> str:
    """Return how the engine `hf` runs a model; a model with more than LARGEST weights is not loaded."""
    if count is None or count > LARGEST:
        return "not tried: the model is large"
    from srlm_cli.engines.hf.engine import HfEngine
    from srlm_cli.engines.hf.fallback import FallbackModel

    try:
        engine = HfEngine(EngineSpec(model=model, device=device))
    except SrlmError as error:
        return f"cannot load it: {error}"
    if isinstance(engine.reader, FallbackModel):
        return "plain: `generate` of transformers, since its layers keep more than keys and values of each token"
    return "packed: continuous batching with a paged cache"
