"""A scorer, which writes no words: a reward model (`--engine reward`), or DPO's implicit reward (`--implicit`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from srlm_cli.commands.judge.asked import Asked
from srlm_cli.commands.judge.rows import judgeable
from srlm_cli.engines import LazyScorer
from srlm_cli.engines.base import EngineSpec, Scorer
from srlm_cli.errors import OptionError
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.runner.inputs import open_reader
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.stage import StageRun
from srlm_cli.stages.scorers import judge_by_scores
from srlm_cli.stages.seen import with_ids_checked


def run(asked: Asked) -> None:
    """Score the rows with the reward model, or with `--implicit` by a model and its reference."""
    spec, options = asked.engine.spec(), asked.scorer
    if not spec.model:
        raise OptionError("no model given: a scorer has to be named", "--model MODEL")
    about: dict[str, Any] = {"model": spec.model, "engine": "reward"}
    decides: dict[str, Any] = {"implicit": options.implicit}
    if options.implicit:
        from srlm_cli.train.implicit import BETA, PARENT, ImplicitReward, reference_of

        ref = reference_of(options.ref or PARENT, spec.model)
        beta = BETA if options.beta is None else options.beta
        make = partial(ImplicitReward, ref=ref, beta=beta)
        about = {"model": spec.model, "implicit": {"ref": ref, "beta": beta}}
        decides |= {"ref": ref, "ref_fingerprint": fingerprint(ref), "beta": beta}
    else:
        from srlm_cli.models.reward import check_reward_model

        make = reward_model
    scorer = LazyScorer(spec, make, "implicit" if options.implicit else "reward")
    if not options.implicit:
        check_reward_model(spec.model)
    rows = open_reader(asked.stream, with_ids_checked(judgeable), [asked.stream.in_], shard=asked.judging.shard)
    decides |= {"shard": rows.part, **model_identity(spec)}
    stage = StageRun("judge", asked.stream, rows, decides, engine=scorer)
    stage.run(lambda rows, _: judge_by_scores(rows, scorer, about), asked.limit())


def reward_model(spec: EngineSpec) -> Scorer:
    """Return the reward model of a spec."""
    from srlm_cli.engines.reward import RewardModel

    return RewardModel(spec)
