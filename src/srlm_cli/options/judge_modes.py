"""Which options of `srlm judge` each of its modes has no use for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from operator import itemgetter
from typing import Any

from srlm_cli.options.judging import EvidenceOptions, ScorerOptions, passages_need
from srlm_cli.options.kinds import Draws, KindOptions
from srlm_cli.options.rules import RulesOfJudge
from srlm_cli.options.unused import STRONGEST, Strength, command_with


def names_of(group: type) -> set[str]:
    """Return the parameter names of an option group."""
    return {field.name for field in fields(group)}


PASSAGES, KIND, RULES, SCORER = map(names_of, (EvidenceOptions, KindOptions, RulesOfJudge, ScorerOptions))
STORED = {"meta", "rescore"}
READING = {"score", "min_score_mass", "force_score"}
ASKING = READING | {"num_judgements", "system", "conversation", "show"}
OF_META = {"meta_template", "meta_replies", "direct"}
BESIDE_RULES = PASSAGES | KIND | ASKING | OF_META | SCORER | STORED | {"combine"}
WORDS = PASSAGES | KIND | RULES | STORED | ASKING | OF_META | {"template"}  # of a judge that writes


def unused(values: dict[str, Any], strength: Strength) -> tuple[str, int, Collection[str]]:
    """Return the mode that the strongest option asks for, its strength, and the parameters that it has no use for."""
    modes = {
        "--engine reward": ("engine", values["engine"] == "reward", WORDS | SCORER),
        "--implicit": ("implicit", values["implicit"], WORDS),
        "--meta": ("meta", values["meta"], PASSAGES | KIND | RULES | ASKING | SCORER | {"rescore"}),
        "--rescore": ("rescore", values["rescore"], PASSAGES | KIND | ASKING | OF_META | SCORER | {"meta"}),
        "--model rules": ("model", (values["engine"], values["model"]) == ("echo", "rules"), BESIDE_RULES),
        f"--by {values['by']}": ("by", values["by"] != "pointwise", unused_together(values)),
    }
    found = [(mode, strength(option), names) for mode, (option, on, names) in modes.items() if on]
    if found:
        return max(found, key=itemgetter(1))  # the first one of those that are equally strong
    ranged = isinstance(values["num_judgements"], Draws)
    return "this judge", STRONGEST, {"comparisons", "ref", "beta", *(() if ranged else ("settle",))}


def unused_together(values: dict[str, Any]) -> set[str]:
    """Return what `--by` has no use for; a template that is set elsewhere is for one response."""
    names = PASSAGES | READING | SCORER | STORED | {"settle", "template"}
    names |= {"comparisons", "direct"} if values["by"] == "group" else set()
    return names | ({"num_judgements"} if isinstance(values["num_judgements"], Draws) else set())


def needs(values: dict[str, Any]) -> dict[str, str]:
    """Return the parameters that have no effect without another option, with that option."""
    if values["implicit"] or values["engine"] == "reward":  # which has no use for any of them, and says so
        return {}
    lacking = {} if values["meta"] else dict.fromkeys(("meta_template", "meta_replies"), "--meta")
    if not (values["meta"] or values["by"] != "pointwise"):
        lacking["direct"] = "--meta or --by pairwise"
    if values["score"] != "expected":
        lacking["min_score_mass"] = "--score expected"
    alone = (values["engine"], values["model"]) == ("echo", "rules")
    if not (alone or values["rule"] or values["rule_file"] or values["combine"]):
        lacking["run_code"] = "--rule, --rule-file or --combine"
    return lacking | passages_need(values)


JudgeCommand = command_with(unused, needs)
