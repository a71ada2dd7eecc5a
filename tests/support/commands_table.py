"""The commands that the contract tests run, each with rows it takes and with what it needs beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

from helpers import Record

QUESTIONS = [
    "Why is the sky blue at noon?",
    "Name three rivers of Europe.",
    "How do I boil an egg — softly?",
    "Explain what a lighthouse is for.",
]
PROMPTS = [{"prompt": text} for text in QUESTIONS]
RESPONSES = [{"prompt": text, "response": f"Answer {k} to it.", "k": k} for text in QUESTIONS for k in range(2)]
JUDGED = [{**row, "score": float(at % 5)} for at, row in enumerate(RESPONSES)]
ADDITIVE = {"judge": {"model": "M1", "template": "additive"}}
META_JUDGED = [
    {
        **row,
        **ADDITIVE,
        "scores": [at % 4 + k for k in range(3)],
        "judgements": [f"So. Score: {at % 4 + k}" for k in range(3)],
    }
    for at, row in enumerate(JUDGED)
]
HUMAN = [{**row, "human": float(-row["k"])} for row in JUDGED]
RANKED = [
    {"prompt": text, "responses": [{"text": "A good reply.", "rank": 0}, {"text": "A bad one.", "rank": 1}]}
    for text in QUESTIONS
]
COMPLETIONS = [{"prompt": text, "completion": "Well."} for text in QUESTIONS]
PAIRS = [{"prompt": text, "chosen": "Well.", "rejected": "Bad."} for text in QUESTIONS]
LABELLED = [{"prompt": text, "completion": "Well.", "label": at % 2 == 0} for at, text in enumerate(QUESTIONS)]
RULED = [{**row, "rules": ["no-commas", "words:..3"]} for row in RESPONSES]
ECHO = ("--engine", "echo")
# Options that are a part of a command's name in the tests.
NAMING = (
    "accept", "hindsight", "--meta", "--evidence", "judgements", "rules", "--combine", "pairwise", "group", "--settle",
)  # fmt: skip
AGAINST = "against.jsonl"


@dataclass(frozen=True, eq=False)
class Command:
    """One command of the contract: its good rows, its options, and how it treats its input.

    `field` is what a row cannot be without. A command that is not `lazy` reads all its input before
    it writes, and one that makes a folder (`trains`) writes no rows at all.
    """

    name: str
    rows: list[Record] = field(repr=False)
    options: tuple[str, ...] = ECHO
    field: str = "prompt"
    lazy: bool = True
    trains: bool = False

    def argv(self, *more: str) -> list[str]:
        """Return the arguments of a run."""
        return [*self.name.split(), *self.options, *more]

    def __str__(self) -> str:
        words = [
            word
            for word in self.options
            if word
            in (
                "accept",
                "hindsight",
                "--meta",
                "--evidence",
                "judgements",
                "rules",
                "--combine",
                "pairwise",
                "group",
                "criteria",
            )
        ]
        return "-".join([*self.name.split(), *(word.strip("-") for word in words)])


SAMPLE = Command("sample", PROMPTS)
JUDGE = Command("judge", RESPONSES, field="response")
RULES = Command("judge", RULED, options=(*ECHO, "--model", "rules"), field="response")
BOTH = Command("judge", RULED, options=(*ECHO, "--combine", "mean"), field="response")
CORPUS = "corpus.db"
EVIDENCE = Command(
    "judge", RESPONSES, options=(*ECHO, "--template", "evidence", "--evidence", CORPUS), field="response"
)
PAIRWISE = Command("judge", RESPONSES, options=(*ECHO, "--by", "pairwise", "--direct"), field="response")
SETTLE = Command("judge", RESPONSES, options=(*ECHO, "--num-judgements", "2:6", "--settle", "0.8"), field="response")
GROUP = Command("judge", RESPONSES, options=(*ECHO, "--by", "group"), field="response")
CRITERIA = Command("judge", RESPONSES, options=(*ECHO, "--template", "criteria"), field="response")
META = Command("judge", META_JUDGED, options=(*ECHO, "--meta", "--direct"), field="judgements")
MAKE_PAIRS = Command("make-pairs", JUDGED, options=(), field="score")
JURY = Command("jury", JUDGED, options=(), field="score")
GEN_PROMPTS = Command("gen-prompts", PROMPTS, options=(*ECHO, "--count", "5"), lazy=False)
ACCEPT = Command("make-eft", RANKED, options=(*ECHO, "--method", "accept", "--num-judgements", "8"), field="responses")
HINDSIGHT = Command("make-eft", RANKED, options=(*ECHO, "--method", "hindsight", "--reason", "none"), field="responses")
OWN = Command(
    "make-eft", RULED, options=(*ECHO, "--own", "rules", "--method", "hindsight", "--reason", "none"), field="response"
)
REWARD = Command("eval reward", HUMAN, options=(), field="score", lazy=False)
HEAD_TO_HEAD = Command(
    "eval head-to-head", RESPONSES, options=(*ECHO, "--direct", "--against", AGAINST), field="response", lazy=False
)
COMPARISONS = [
    {"model": "M2", "index": n, "len_baseline": 100 + n, "len_model": 120 - 3 * n, "preference": 1.0 + n % 3 / 2}
    for n in range(12)
]
PROBE = Command("eval probe", RESPONSES, field="response", lazy=False)
JUDGES = Command(
    "eval judges",
    RANKED,
    options=(*ECHO, "--kinds", "text,expected,pairwise-direct,group"),
    field="responses",
    lazy=False,
)
LENGTH_CONTROL = Command("eval length-control", COMPARISONS, options=(), field="preference", lazy=False)
KEPT = Command("eval rules", RULED, options=(), field="response", lazy=False)
HEALTH = Command("eval health", JUDGED, options=(), field="score", lazy=False)
SFT = Command(
    "sft", COMPLETIONS, options=("--model", "./nowhere", "--out", "model"), field="completion", lazy=False, trains=True
)
DPO = Command("dpo", PAIRS, options=("--model", "./nowhere", "--out", "model"), field="chosen", lazy=False, trains=True)
KTO = Command(
    "kto", LABELLED, options=("--model", "./nowhere", "--out", "model"), field="label", lazy=False, trains=True
)

STAGES = [
    SAMPLE,
    JUDGE,
    RULES,
    BOTH,
    PAIRWISE,
    GROUP,
    SETTLE,
    CRITERIA,
    META,
    JURY,
    MAKE_PAIRS,
    ACCEPT,
    HINDSIGHT,
    OWN,
]  # rows in, rows out, lazily
ROW_COMMANDS = [*STAGES, GEN_PROMPTS, REWARD, HEAD_TO_HEAD, HEALTH, PROBE, JUDGES, KEPT, LENGTH_CONTROL]
COMMANDS = [*ROW_COMMANDS, SFT, DPO, KTO]
PAGES = [
    "init", "doctor", "make-eft", "sft", "gen-prompts", "sample", "make-rubric", "judge", "jury", "make-pairs", "dpo",
    "kto",
    "eval reward", "eval head-to-head", "eval health", "eval probe", "eval judges", "eval length-control", "eval rules",
    "index", "report", "settings",
]  # fmt: skip
