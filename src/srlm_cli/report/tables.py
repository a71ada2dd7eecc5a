"""The tables of a report, for the terminal and the page."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from srlm_cli.records import Record
from srlm_cli.report.collect import Game, Metrics, Round, Run
from srlm_cli.report.learned import lines
from srlm_cli.report.words import (
    HEALTH,
    LENGTH,
    MATCHES,
    NONE,
    NUMBER,
    PROBES,
    RATING,
    REWARD,
    RULES,
    SHARE,
    Known,
    beyond_a_fifth,
    clock,
    interval,
    known,
    number,
    share,
    signed,
    value,
)

LEFT = {"", "stage", "dropped, and more", "made by", "against", "command", "from"}  # columns of words
# Counts of a command that are equal to its number of rows.
PLAIN_COUNTS = ("replies", "responses", "prompts", "judgements")


@dataclass(frozen=True)
class Cell:
    """A text with its 95% interval and n if it is a measured figure, and an explanation."""

    text: str
    interval: str = ""
    n: int | None = None
    note: str = ""


@dataclass
class Table:
    """A title, an explanation, and rows; the first column has names, the others figures."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)


@dataclass
class Stage:
    """The row counts of one command in one round; `scale` is the largest count of the round, for a bar."""

    round: str
    name: str
    read: int
    kept: int
    dropped: dict[str, int]
    more: list[str]
    seconds: float | None
    scale: int = 0

    @property
    def lost(self) -> int:
        """The number of dropped rows."""
        return sum(self.dropped.values())

    @property
    def drops(self) -> list[str]:
        """The number of dropped rows for each reason, as texts."""
        return [f"{count} {reason}" for reason, count in self.dropped.items()]


# --- what each round did ---------------------------------------------------------------------


def stages(run: Run) -> list[Stage]:
    """Return the stages of a run in the order of the loop: the training of each model, then its data."""
    made = []
    for found in run.rounds:
        if found.training:
            made.append(training_stage(found))
        of_round = [stage_of(found, name, counts) for name, counts in found.stages.items()]
        most = max((stage.kept + stage.lost for stage in of_round), default=0)
        for stage in of_round:
            stage.scale = most
        made += of_round
    return made


def stage_of(found: Round, name: str, counts: dict[str, Any]) -> Stage:
    """Return one stage from the counts of its file."""
    more = [f"{count} {what}" for what, count in counts["counts"].items() if what not in PLAIN_COUNTS]
    return Stage(found.name, name, counts["read"], counts["kept"], counts["dropped"], more, counts["seconds"])


def training_stage(found: Round) -> Stage:
    """Return the training of a model as a stage, from its provenance."""
    made = found.training
    data = made.get("data", {})
    rows, left_out = data.get("rows", 0), data.get("left_out", 0)
    more = [f"{made['steps']} steps"] if "steps" in made else []
    more += [f"{made['parts']} parts"] if "parts" in made else []
    if made.get("first_loss") is not None:
        more.append(f"loss {loss_of(made)}")
    more += [f"margin {made['margin']:.3f}"] if "margin" in made else []
    more += [f"{data['truncated']} truncated"] if data.get("truncated") else []
    dropped = {"too long": left_out} if left_out else {}
    return Stage(found.name, made.get("command", "?"), rows + left_out, rows, dropped, more, made.get("seconds"))


def loss_of(made: dict[str, Any]) -> str:
    """Return the first and the last loss of a training as text."""
    return f"{number(made['first_loss'], 3)} to {number(made['last_loss'], 3)}"


def stage_table(run: Run) -> Table:
    """Return the stages as a table."""
    table = Table("What each round did", "", ["", "stage", "in", "out", "dropped, and more", "time"])
    for stage in stages(run):
        texts = [stage.round, stage.name, str(stage.read), str(stage.kept), ", ".join(stage.drops + stage.more)]
        table.rows.append([Cell(text) for text in [*texts, clock(stage.seconds)]])
    return table


# --- metrics by round ------------------------------------------------------------------------


def overview(run: Run) -> Table:
    """Return one row per model: how it was trained, how it judges, its matches, the length of its replies."""
    rows = []
    for found in run.rounds:
        outcome = [value(found.matches.row(name), SHARE) for name in ("win", "tie", "loss")]
        rows.append(
            {
                "": Cell(found.name),
                "made by": Cell(found.training.get("command", NONE)),
                "agrees with people": figure(found.reward, "pairwise_accuracy", SHARE),
                "longest wins": figure(found.reward, "longest_wins", SHARE),
                "rules kept": figure(found.rules, "rules_kept", SHARE),
                "against": Cell(run.model(found.games[0].baseline) if found.games else NONE),
                "win / tie / loss": Cell(" / ".join(outcome) if found.games else NONE),
                "win rate": figure(found.matches, "win_rate", SHARE),
                "reply length": length_cell(run, found),
                "pairs made": Cell(str(found.pairs.get("count", NONE))),
            }
        )
    note = (
        "Agreement: pairs of held-out replies that the judge orders as people did (a tie is a miss), and the same for "
        "“the longest reply wins”. Rules kept: by replies to held-out prompts. Win rate: a tie is half a win. "
        "Reply length: × is the factor from the model before, with ! beyond a fifth. In brackets: 95% intervals."
    )
    return of_rows("The models", note, rows)


def health_table(run: Run) -> Table:
    """Return the table of health metrics, a column per round."""
    note = "Scores of each model on the responses that it wrote and judged itself."
    table = metric_table("The judge of each round", note, HEALTH, [(found.name, found.health) for found in run.rounds])
    if any(found.reward.totals for found in run.rounds):  # the reward table shows the accuracy, with its rows
        table.rows = [row for row in table.rows if row[0].text != HEALTH["accuracy"].label]
    return table


def reward_table(run: Run) -> Table:
    """Return the table of the judge's agreement with people, a column per round."""
    note = "The same held-out replies, ranked by people, judged by each model."
    return metric_table("The judge against people", note, REWARD, [(found.name, found.reward) for found in run.rounds])


def rules_table(run: Run) -> Table:
    """Return the table of the rules that each model's replies to held-out prompts keep."""
    note = "Each model's own replies to the same held-out prompts, checked by a program: no judge has a part in it."
    columns = [(found.name, found.rules) for found in run.rounds]
    table = metric_table("Rules kept on held-out prompts", note, RULES, columns)
    table.rows += part_table("", "", {"rules_kept": RULES["rules_kept"]}, "rule", columns).rows
    return table


def learned_table(run: Run, control: Run | None) -> Table:
    """Return the lines of what was learned, a column per round."""
    note = (
        "On held-out prompts: the rules that replies keep, also after training on pairs with chosen and rejected dealt "
        "at random (control); and the pairs of replies that the judge, the longer or the shorter one orders correctly."
    )
    table = Table("What was learned", note, ["", *(found.name for found in run.rounds)])
    made = lines(run, control)
    table.rows = [[Cell(name), *(replace(cell(row, SHARE), n=None) for row in rows)] for name, rows in made.items()]
    if made:
        lengths = [replace(cell(run.reply_length(found), LENGTH), n=None) for found in run.rounds]
        table.rows.append([Cell("reply length, characters"), *lengths])
    return table


def probe_table(run: Run) -> Table:
    """Return how often the judge of each round prefers replies that were changed and got no better."""
    note = "Replies that were changed and got no better: how often the judge scores them above the reply as it was."
    names = {"changed_wins": PROBES["changed_wins"]}
    return part_table("Probes of the judge", note, names, "probe", [(found.name, found.probes) for found in run.rounds])


def match_table(run: Run) -> Table:
    """Return the table of matches between models."""
    note = "Replies to the same held-out prompts, judged in both orders; a disagreement is a tie."
    return metric_table("Matches", note, MATCHES, played(run))


def game_name(run: Run, found: Round, game: Game) -> str:
    """Return the names of both models, and of the judge if it is not the first model."""
    names = f"{run.model(game.model)} vs {run.model(game.baseline)}"
    return names if run.model(game.model) == found.name else f"{names}, by {found.name}"


def metric_table(title: str, note: str, names: dict[str, Known], columns: list[tuple[str, Metrics]]) -> Table:
    """Return one row per metric, known metrics first, and one column per set of metrics that is not empty."""
    columns = [(name, metrics) for name, metrics in columns if metrics.totals]
    table = Table(title, note, ["", *(name for name, _ in columns)])
    there = dict.fromkeys(name for _, metrics in columns for name in metrics.totals)
    for name in [*(name for name in names if name in there), *(name for name in there if name not in names)]:
        metric = known(names, name)
        cells = [figure(metrics, name, metric.kind) for _, metrics in columns]
        if any(cell.text != NONE for cell in cells):
            table.rows.append(with_n(Cell(metric.label, note=metric.note), cells))
    return table


def part_table(title: str, note: str, names: dict[str, Known], part: str, columns: list[tuple[str, Metrics]]) -> Table:
    """Return metrics of parts: one row per part and metric, one column per set of metrics."""
    columns = [(name, metrics) for name, metrics in columns if metrics.parts.get(part)]
    table = Table(title, note, ["", *(name for name, _ in columns)])
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for column, metrics in columns:
        for row in metrics.parts[part]:
            if row["metric"] in names:
                found.setdefault((str(row[part]), row["metric"]), {})[column] = row
    for (place, name), rows in found.items():
        label = f"{place}: {names[name].label}" if len(names) > 1 else place
        cells = [cell(rows.get(column), names[name].kind) for column, _ in columns]
        table.rows.append(with_n(Cell(label), cells))
    return table


def reply_count_table(run: Run) -> Table:
    """Return the agreement with people by the number of ranked replies per prompt."""
    names = {name: REWARD[name] for name in ("pairwise_accuracy", "exact_match")}
    columns = [(found.name, found.reward) for found in run.rounds]
    table = part_table("By number of replies to a prompt", "", names, "replies", columns)
    for row in table.rows:
        row[0] = replace(row[0], text=row[0].text.replace(":", " replies:", 1))
    return table


def criterion_table(run: Run) -> Table:
    """Return the agreement with people of each criterion of the judge."""
    names = {"pairwise_accuracy": REWARD["pairwise_accuracy"]}
    columns = [(found.name, found.reward) for found in run.rounds]
    return part_table("By criterion of the judge", "", names, "criterion", columns)


def calibration_table(run: Run) -> Table:
    """Return what people thought of the replies in each bin of the judge's score."""
    kind, what = (SHARE, "other replies that people rank lower") if by_places(run) else (NUMBER, "people's mean score")
    note = f"Replies in bins of the judge's score, about as many in each: the judge's mean score, then {what}."
    columns = [(found.name, found.reward) for found in run.rounds]
    table = part_table("Calibration of the judge", note, {"calibration": Known("bin", kind)}, "bin", columns)
    for row in table.rows:
        row[0] = replace(row[0], text=f"bin {row[0].text}")
    if table.rows:
        table.rows[0][0] = replace(table.rows[0][0], note=f"the judge's mean score: {what}")
    return table


def by_places(run: Run) -> bool:
    """Return whether people ranked the replies of the calibration, and gave no scores."""
    return any(row.get("people") == "place" for found in run.rounds for row in found.reward.parts.get("bin", []))


def category_table(run: Run) -> Table:
    """Return the win rates by category of prompt."""
    names = {"win_rate": MATCHES["win_rate"]}
    return part_table("Win rate by category", "A tie is half a win.", names, "category", played(run))


def rating_table(run: Run) -> Table:
    """Return one rating per model over all matches, from the last round with ratings."""
    table = Table("Ratings", "Bradley-Terry: 400 points are odds of 10 to 1, the mean is 0.", ["", "rating"])
    rows = next((found.ratings for found in reversed(run.rounds) if found.ratings), [])
    table.rows = [with_n(Cell(run.model(row.get("model"))), [cell(row, RATING)]) for row in rows]
    return table


def length_table(run: Run) -> Table:
    """Return the lengths of replies, in characters, and the score gap of the pairs."""
    rows = []
    for found in run.rounds:
        chosen, rejected = found.pairs.get("chosen"), found.pairs.get("rejected")
        rows.append(
            {
                "": Cell(found.name),
                "replies, held-out": cell(run.reply_length(found), LENGTH),
                "own responses": figure(found.health, "length", LENGTH),
                "chosen": Cell(number(chosen, 0)),
                "rejected": Cell(number(rejected, 0)),
                "chosen less rejected": Cell(NONE if chosen is None else signed(chosen - rejected)),
                "score gap of pairs": Cell(number(found.pairs.get("gap"))),
            }
        )
    note = (
        "Means in characters. The next model learns from chosen replies: if they are longer, its replies become longer."
    )
    return of_rows("Lengths and pairs", note, rows)


def training_table(run: Run) -> Table:
    """Return the table of trainings, one row per model."""
    rows = []
    for found in run.rounds:
        made = found.training
        data, settings = made.get("data", {}), made.get("settings", {})
        rates = [settings[name] for name in ("learning_rate", "final_learning_rate") if name in settings]
        texts = {
            "": found.name,
            "command": made.get("command", NONE),
            "from": run.model(made.get("from", {}).get("model")) if made else NONE,
            "rows": str(data.get("rows", NONE)),
            "truncated": str(data.get("truncated", NONE)),
            "steps": str(made.get("steps", NONE)),
            "batch": str(settings.get("batch", NONE)),
            "learning rate": " to ".join(f"{rate:g}" for rate in rates) or NONE,
            "loss": NONE if made.get("first_loss") is None else loss_of(made),
            "margin": number(made.get("margin"), 3),
            "accuracy": share(made.get("accuracy")),
            "tokens/s": number(made.get("tokens_per_second"), 0),
            "time": clock(made.get("seconds")),
        }
        rows.append({name: Cell(text) for name, text in texts.items()})
    note = (
        "The usual loss of DPO starts at ln 2 = 0.693, where policy and reference are equal. Margin and accuracy are "
        "those of the last step."
    )
    return of_rows("How each model was trained", note, rows)


# --- pieces ----------------------------------------------------------------------------------


def figure(metrics: Metrics, name: str, kind: str) -> Cell:
    """Return a metric as a cell."""
    return cell(metrics.row(name), kind)


def cell(row: Record | None, kind: str) -> Cell:
    """Return a metric row as a cell; the text starts with the score if the metric is about one score."""
    text = value(row, kind)
    if row and row.get("score") is not None:
        text = f"{row['score']:.3g}: {text}"
    return Cell(text, interval(row, kind), row.get("n") if row else None)


def with_n(label: Cell, cells: list[Cell]) -> list[Cell]:
    """Return a row of a table; if all figures have the same n, it is written at the label."""
    counts = {cell.n for cell in cells if cell.text != NONE}
    if len(counts) != 1 or counts == {None}:
        return [label, *cells]
    return [replace(label, n=counts.pop()), *(replace(cell, n=None) for cell in cells)]


def of_rows(title: str, note: str, rows: list[dict[str, Cell]]) -> Table:
    """Return a table of named cells, without empty columns and rows."""
    rows = [{name: replace(cell, n=None) for name, cell in row.items()} for row in rows]
    rows = [row for row in rows if any(cell.text != NONE for name, cell in row.items() if name)]
    columns = [name for name in (rows[0] if rows else {}) if any(row[name].text != NONE for row in rows)]
    return Table(title, note, columns, [[row[name] for name in columns] for row in rows])


def played(run: Run) -> list[tuple[str, Metrics]]:
    """Return the matches of a run with the names of both models."""
    return [(game_name(run, found, game), game.metrics) for found in run.rounds for game in found.games]


def length_cell(run: Run, found: Round) -> Cell:
    """Return the length of a model's replies and its change since the model before, with ! if more than a fifth."""
    length, ratio = cell(run.reply_length(found), LENGTH), run.length_change(found, run.before(found))
    if ratio is None:
        return length
    return replace(length, text=f"{length.text} (×{ratio:.2f}{' !' if beyond_a_fifth(ratio) else ''})")


def score_shares(found: Round) -> dict[int, float]:
    """Return the share of each score in all judgements of a round."""
    return {row["score"]: row["value"] for row in found.health.parts.get("score", []) if row["value"] is not None}
