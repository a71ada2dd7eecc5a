"""Run `srlm judge` with a scorer, which writes no words: a reward model, or DPO's implicit reward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from srlm_cli.engines import LazyScorer
from srlm_cli.engines.base import EngineSpec, Scorer
from srlm_cli.errors import LimitExceeded, OptionError
from srlm_cli.models.fingerprint import fingerprint
from srlm_cli.options.common import StreamOptions
from srlm_cli.options.judging import ScorerOptions
from srlm_cli.runner.inputs import Check, open_reader
from srlm_cli.runner.provenance import model_identity
from srlm_cli.runner.stage import StageRun
from srlm_cli.runner.tally import Tally
from srlm_cli.stages.scorers import judge_by_scores

if TYPE_CHECKING:
    from srlm_cli.streams.reader import Shard

Limit = Callable[[Tally], LimitExceeded | None]


def judge_with_scorer(
    stream: StreamOptions, spec: EngineSpec, options: ScorerOptions, check: Check, shard: Shard | None, limit: Limit
) -> None:
    """Score the rows with the reward model of a spec, or with `--implicit` by it and its reference."""
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
    rows = open_reader(stream, check, [stream.in_], shard=shard)
    decides |= {"shard": rows.part, **model_identity(spec)}
    run = StageRun("judge", stream, rows, decides, engine=scorer)
    run.run(lambda rows, _: judge_by_scores(rows, scorer, about), limit)


def reward_model(spec: EngineSpec) -> Scorer:
    """Return the reward model of a spec."""
    from srlm_cli.engines.reward import RewardModel

    return RewardModel(spec)
