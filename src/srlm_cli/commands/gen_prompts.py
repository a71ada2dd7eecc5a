"""srlm gen-prompts."""

from dataclasses import replace
from typing import Annotated

from typer import Option

from srlm_cli import records, templates
from srlm_cli.engines import LazyEngine
from srlm_cli.errors import LimitExceeded, OptionError
from srlm_cli.options.common import EngineOptions, SamplingOptions, StreamOptions, identity, new_app
from srlm_cli.options.groups import Defaults, grouped
from srlm_cli.runner.inputs import all_rows, open_reader
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.stage import StageRun
from srlm_cli.runner.tally import Tally
from srlm_cli.stages import gen_prompts as stage
from srlm_cli.streams.reader import read_all
from srlm_cli.streams.writer import dumps

app = new_app()


@app.command()
@grouped
def gen_prompts(
    stream: StreamOptions,
    engine: EngineOptions,
    sampling: Annotated[SamplingOptions, Defaults(temperature=0.6, max_new_tokens=160)],
    count: Annotated[int, Option("--count", min=0, help="Number of prompts to keep.")] = 100,
    max_tries: Annotated[
        int | None, Option("--max-tries", min=1, show_default="10 x count", help="Stop after N tries.")
    ] = None,
    prompt_model: Annotated[
        str | None,
        Option("--prompt-model", metavar="MODEL", help="Model that writes the prompts, if not --model."),
    ] = None,
    from_seeds: Annotated[
        int, Option("--from-seeds", min=1, help="Demonstrations from the seed prompts (the paper: 6).")
    ] = 6,
    from_generated: Annotated[
        int, Option("--from-generated", min=0, help="Demonstrations from the new prompts (the paper: 2).")
    ] = 2,
    max_rouge_l: Annotated[
        float,
        Option(
            "--max-rouge-l",
            min=0.0,
            max=1.0,
            help="Drop prompts more similar than this to a seed or new prompt (ROUGE-L).",
        ),
    ] = stage.MAX_ROUGE_L,
    avoid: Annotated[
        list[str] | None,
        Option("--avoid", metavar="FILE", help="Prompts of earlier rounds to avoid (repeatable)."),
    ] = None,
    iteration: Annotated[
        int, Option("--iteration", min=1, help="Number of the round; each round draws different prompts.")
    ] = 1,
    prompt_batch_size: Annotated[
        int,
        Option(
            "--prompt-batch-size", min=1, help="Tries per batch; new prompts become demonstrations for the next batch."
        ),
    ] = 32,
    template: Annotated[
        str, Option("--template", help="Few-shot prompt: built-in template name or .toml file.")
    ] = "new_prompt",
    shard: Annotated[
        str | None,
        Option("--shard", metavar="K/N", help="Not supported: each new prompt is compared with all earlier ones."),
    ] = None,
) -> None:
    """Let a model write new prompts, 8-shot, filtered as in Self-Instruct.

    \b
    Examples:
      srlm gen-prompts --in ift.jsonl --model smollm2-135m-instruct --count 100 --out prompts.jsonl
      srlm gen-prompts --in ift.jsonl --prompt-model meta-llama/Llama-2-70b-chat-hf --count 20000 --out prompts.jsonl
      srlm gen-prompts --in ift.jsonl --model M1/model --count 50 | srlm sample --model M1/model

    Reads seed prompts, writes rows with `prompt`, `source`, `model` and `try`. --count is the number of
    prompts to keep. Near-duplicates and prompts that fail the filters are dropped, counted by reason and
    replaced, up to --max-tries (then exit 4). The defaults are the paper's: 6 demonstrations
    from the seeds and 2 from the new prompts, temperature 0.6, top-p 0.9, ROUGE-L at most 0.7, 4
    to 150 words. In the paper a fixed chat model writes the prompts of all rounds.

    Prompts may be in any language. In scripts without spaces between words (Chinese, Japanese,
    Thai) the length is measured by letters (1.5, 2.5 and 3 for a word) and ROUGE-L compares
    letters. The words that the filters refuse (`image`, `graph`, ...) are English.
    """
    if shard:
        raise OptionError(
            "--shard cannot divide gen-prompts: each new prompt is compared with all those before it",
            "one process keeps a server of many GPUs busy with a larger --prompt-batch-size",
        )
    rows = open_reader(stream, records.prompt_record, [stream.in_], beside=avoid or [])
    seeds = all_rows(rows)
    if not seeds and count:
        raise OptionError("no seed prompts in the input", "--in takes rows with a `prompt`, for instance ift.jsonl")
    form = templates.load(template, fields={"tasks"})
    if engine.thinking == "on":  # the beginning of an answer would leave no room for a thought
        form = replace(form, prefix="")
    old = [row for path in avoid or [] for row in read_all(path, records.prompt_record)]
    model = LazyEngine(engine.spec(prompt_model))
    tries = max_tries or 10 * count
    shots = {"from_seeds": from_seeds, "from_generated": from_generated, "prompt_batch_size": prompt_batch_size}
    shots |= {"max_rouge_l": max_rouge_l, "iteration": iteration}
    drawn = sampling.sampling(model.spec, form.stop)
    options = stage.GenPromptsOptions(count, tries, form, drawn, sampling.seed, **shots)
    prompts = {"seeds": hash_of_prompts(seeds), "avoid": hash_of_prompts(old)}
    decides = identity(sampling, **shots, template=form.hash, **prompts, shard=shard) | model_identity(model.spec)
    StageRun("gen-prompts", stream, None, decides, engine=model, source=rows, total=count).run(
        lambda _, done: stage.gen_prompts(seeds, model, options, avoid=old, kept=done.rows(), tried=done.read),
        limit=lambda tally: too_few(tally, count),
    )


def too_few(tally: Tally, count: int) -> LimitExceeded | None:
    """Return the error when the tries were spent before all prompts were made."""
    if tally.kept >= count:
        return None
    reasons = ", ".join(f"{n} {reason}" for reason, n in tally.dropped.most_common(3)) or "none"
    return LimitExceeded(
        f"only {tally.kept} of {count} prompts after {tally.read} tries (dropped: {reasons})",
        "raise --max-tries, --temperature or --max-rouge-l",
    )


def hash_of_prompts(rows: list[records.Record]) -> str:
    """Return a hash of the prompts."""
    return records.short_hash(dumps([[row["id"], row["prompt"]] for row in rows]))
