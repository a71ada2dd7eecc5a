"""What commands declare that show replies to a judge: its template, and the passages that it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from typer import Option

from srlm_cli import templates
from srlm_cli.errors import OptionError, SrlmError
from srlm_cli.stages.evidence import EvidenceOptions as Evidence
from srlm_cli.streams.console import say
from srlm_cli.templates import Template

T = TypeVar("T")
Query = Literal["prompt", "response", "both", "model"]
FIELD = "evidence"


@dataclass(frozen=True)
class EvidenceOptions:
    """Where the passages of `$evidence` come from."""

    evidence: Annotated[
        str | None,
        Option("--evidence", metavar="FILE", help="Index of `srlm index`: the judge is shown passages of it."),
    ] = None
    evidence_cmd: Annotated[
        str | None,
        Option(
            "--evidence-cmd",
            metavar="COMMAND",
            help="Program that finds the passages: reads queries as JSONL, writes passages as JSONL.",
        ),
    ] = None
    evidence_passages: Annotated[int, Option("--evidence-passages", min=1, help="Passages per response.")] = 3
    evidence_query: Annotated[
        Query, Option("--evidence-query", help="What to search for; model: the judge writes the query.")
    ] = "prompt"

    @property
    def given(self) -> bool:
        """Whether passages are looked for."""
        return self.evidence is not None or self.evidence_cmd is not None

    @property
    def asks_model(self) -> bool:
        """Whether the judge writes the queries."""
        return self.given and self.evidence_query == "model"

    def check(self, template: Template, instead: str) -> None:
        """Raise OptionError if the template shows passages and none are looked for, or the reverse."""
        if self.evidence is not None and self.evidence_cmd is not None:
            raise OptionError("--evidence and --evidence-cmd are two sources of passages", "use one of the two")
        if self.given and not template.uses(FIELD):
            raise OptionError(
                f"template {template.name} has no $evidence, so the judge would not see the passages",
                "--template evidence, evidence_score_only, or your own",
            )
        if template.uses(FIELD) and not self.given:
            raise OptionError(
                f"template {template.name} has $evidence, and no passages are looked for",
                f"--evidence INDEX, --evidence-cmd COMMAND, or {instead}",
            )

    def open(self) -> Evidence | None:
        """Open the source of the passages; None without one."""
        if not self.given:
            return None
        if self.evidence is not None:
            from srlm_cli.evidence.search import Corpus

            source = Corpus(self.evidence)
            about = {"index": self.evidence, "fingerprint": source.fingerprint}
        else:
            from srlm_cli.evidence.program import Program

            source = Program(self.evidence_cmd)
            about = {"command": source.name}
        about |= {"passages": self.evidence_passages, "query": self.evidence_query}
        form = templates.load("query", fields=set(templates.JUDGED)) if self.asks_model else None
        return Evidence(source, about, self.evidence_passages, self.evidence_query, form)

    def identity(self, found: Evidence | None) -> dict[str, Any]:
        """Return what of these options decides the rows: the content of an index, not its name."""
        used = self if found else replace(self, evidence_passages=None, evidence_query=None)
        return {
            "evidence": found and found.about.get("fingerprint"),
            "evidence_cmd": self.evidence_cmd,
            "evidence_passages": used.evidence_passages,
            "evidence_query": used.evidence_query,
        }


def passages_need(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters about passages if no passages are looked for, with the option that they lack."""
    if values["evidence"] is not None or values["evidence_cmd"] is not None:
        return {}
    return dict.fromkeys(("evidence_passages", "evidence_query"), "--evidence or --evidence-cmd")


@dataclass(frozen=True)
class ScorerOptions:
    """The judge that is DPO's implicit reward."""

    implicit: Annotated[
        bool,
        Option("--implicit", help="Score by DPO's implicit reward: how much more probable than by --ref a reply is."),
    ] = False
    ref: Annotated[
        str | None,
        Option(
            "--ref",
            metavar="MODEL",
            show_default="parent",
            help="With --implicit: parent (the model that --model was trained from), base (M0), or another model.",
        ),
    ] = None
    beta: Annotated[
        float | None,
        Option("--beta", min=0.0, show_default="0.1", help="With --implicit: the beta of the reward."),
    ] = None

    def asked(self, engine: str, words: Iterable[str]) -> bool:
        """Return whether the judge is a scorer; raise OptionError for an option that does not fit.

        `words` are the options given that only a judge that writes has a use for.
        """
        if not self.implicit and (self.ref is not None or self.beta is not None):
            raise OptionError(f"{'--beta' if self.ref is None else '--ref'} is for DPO's implicit reward", "--implicit")
        if not (self.implicit or engine == "reward"):
            return False
        if self.implicit and engine != "hf":
            raise OptionError("--implicit reads probabilities of a model here", "--engine hf")
        for name in words:
            how = "--implicit" if self.implicit else "--engine reward"
            raise OptionError(f"{how} scores the whole dialogue, without words: not with {name}", f"leave out {name}")
        return True


def closing(made: Iterable[T], found: Evidence | None) -> Iterator[T]:
    """Yield what a stage yields, and close its source of passages at the end; report a program that then failed."""
    try:
        yield from made
    except BaseException:
        if found:
            with suppress(SrlmError):  # the first failure is the one to report
                found.retriever.close()
        raise
    if found and (end := found.retriever.close()):
        say(f"srlm: warning: {end}, after its last answer")


def judge_template(name: str, system: str | None) -> Template:
    """Return a judge template; raise OptionError if it and `--system` both give a system message."""
    form = templates.load_judge(name)
    refuse_two_systems(form, name, system)
    return form


def refuse_two_systems(form: Template, name: str, system: str | None) -> None:
    """Raise OptionError if a template and `--system` both give a system message."""
    if form.system and system is not None:
        raise OptionError(f"template {name} has a `system` message, and --system gives another", "use one of the two")


def refuse_without_choices(form: Template, name: str, score: str, force_score: bool) -> None:
    """Raise OptionError if scores are read by probability and a template does not say which ones and where."""
    if (force_score or score == "expected") and not (form.criteria or (form.choices and form.finish)):
        needs = "--score expected" if score == "expected" else "--force-score"
        raise OptionError(f"template {name} has no `finish` and `choices`", f"{needs} needs them")
