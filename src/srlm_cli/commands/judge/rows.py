"""The rows of `srlm judge`, and the model that judges them if no other one is named: the one that wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import itemgetter

from srlm_cli import records
from srlm_cli.commands.judge.asked import Asked
from srlm_cli.engines import LOCAL
from srlm_cli.engines.base import EngineSpec
from srlm_cli.errors import BadRow, OptionError
from srlm_cli.options.judging import refuse_without_choices
from srlm_cli.options.rules import with_rules_checked
from srlm_cli.records import Record
from srlm_cli.runner.inputs import open_reader
from srlm_cli.stages import judge as stage
from srlm_cli.stages.rules import RuleOptions
from srlm_cli.stages.seen import with_ids_checked
from srlm_cli.streams.reader import Reader
from srlm_cli.templates import Template


def judgeable(row: Record) -> Record | list[Record]:
    """Return a response row, or the responses of a ranked row."""
    if "responses" in row and "response" not in row:
        return records.responses_of(records.ranked_record(row))
    return records.response_record(row)


def open_judgeable(asked: Asked, form: Template, rules: RuleOptions | None) -> Reader:
    """Open the rows of a judge that is shown responses by a template."""
    judging = asked.judging
    refuse_without_choices(form, judging.template, judging.score, judging.force_score)
    check = with_rules_checked(judgeable, rules and rules.rules)
    if not asked.kind.together:
        asked.search.check(form, "--template additive")
        check = with_ids_checked(stage.with_fields_of(form, check))
    of_prompt = itemgetter("prompt_id") if asked.by_prompt else None
    return open_reader(asked.stream, check, [asked.stream.in_], shard=judging.shard, group_of=of_prompt)


def judge_of(asked: Asked, rows: Reader) -> EngineSpec:
    """Return the model that judges: `--model`, or the writer of the first row."""
    if rows.peek() is None and rows.error:
        raise rows.error  # before there is a FILE.part: it would be one without a model
    return asked.engine.spec(writer_of(rows) if judges_itself(asked, rows) else None)


def judges_itself(asked: Asked, rows: Reader) -> bool:
    """Return whether the judge is the model that wrote the rows."""
    engine = asked.engine
    return engine.model is None and (engine.engine in LOCAL or (engine.engine == "openai" and has_writer(rows)))


def has_writer(rows: Reader) -> bool:
    """Return whether the first row names the model that wrote it; if none does, a server's only model may judge."""
    first = rows.peek()
    return first is not None and named_in(first) is not None


def named_in(row: Record) -> str | None:
    """Return the model that a row says wrote it."""
    model = row.get("model")
    return model if isinstance(model, str) and model else None


def writer_of(rows: Reader) -> str | None:
    """Return the model that wrote the first row; raise OptionError when it names none."""
    first = rows.peek()
    if first is None:
        return None
    model = named_in(first)
    if model is None:
        raise OptionError(f"{rows.at}: the row does not name its `model`", "--model MODEL sets the judge")
    if model.split(":")[0] == "echo":
        raise OptionError(f"{rows.at}: the row was written by the echo engine", "--engine echo, or --model MODEL")
    return model


def of_one_writer(rows: Iterable[Record], model: str | None) -> Iterator[Record]:
    """Yield the rows; a row of another model is a bad row, because without --model its judge is unknown."""
    for row in rows:
        if row.get("model") != model:
            other = row.get("model") or "no named model"
            raise BadRow(f"written by {other}, rows before it by {model}: --model MODEL sets the judge")
        yield row
