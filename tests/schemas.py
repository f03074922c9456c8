"""A few made-up rows in the columns of every dataset that conf/dataset names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _letters(texts: list[str]) -> dict[str, list[str]]:
    return {"text": texts, "label": list("ABCDE")[: len(texts)]}


THINGS = ["a red apple", "the moon", "an old shoe", "seven pens", "rain"]
SCHEMAS: dict[str, list[Row]] = {
    "sst2": [
        {"sentence": f"{word} film number {n}", "label": n % 2} for n, word in enumerate(["a dull", "a fine"] * 6)
    ],
    "boolq": [
        {"passage": f"Tom has {n} pens.", "question": f"does tom have {m} pens", "answer": n == m}
        for n in range(4)
        for m in range(3)
    ],
    "piqa": [
        {"goal": f"eat {thing}", "sol1": f"bite {thing}", "sol2": f"paint {thing} blue twice", "label": n % 2}
        for n, thing in enumerate(THINGS * 3)
    ],
    "social_i_qa": [
        {
            "context": f"Mia gave Sam {thing} on day {n}.",
            "question": "How does Sam feel?",
            "answerA": "glad",
            "answerB": f"like {thing}",
            "answerC": "cold and wet",
            "label": str(n % 3 + 1),
        }
        for n, thing in enumerate(THINGS * 3)
    ],
    "hellaswag": [
        {
            "activity_label": "Buying pens",
            "ctx_a": f"[header] How to buy {thing} [title] Go out [step] number {n}.",
            "ctx_b": "the man",
            "endings": ["sells it.", f"buys {thing} [substeps] now.", "  runs  away", "sings"],
            "label": str(n % 4),
        }
        for n, thing in enumerate(THINGS * 3)
    ],
    "winogrande": [
        {
            "sentence": f"Tom gave {thing} to Ben on day {n} because _ had no use for it.",
            "option1": "Tom",
            "option2": "Ben",
            "answer": str(n % 2 + 1),
        }
        for n, thing in enumerate(THINGS * 3)
    ],
    "arc_easy": [
        {
            "id": str(n),
            "question": f"What is {thing}, on day {n}?",
            "choices": _letters(THINGS[:4]),
            "answerKey": "ABCD"[n % 4],
        }
        for n, thing in enumerate(THINGS * 3)
    ],
    "openbookqa": [
        {
            "id": str(n),
            "question_stem": f"On day {n} {thing} is",
            "choices": _letters(THINGS[:4]),
            "answerKey": "ABCD"[n % 4],
        }
        for n, thing in enumerate(THINGS * 3)
    ],
    "commonsense_qa": [
        {
            "id": str(n),
            "question": f"Where is {thing} on day {n}?",
            "question_concept": thing,
            "choices": _letters(THINGS),
            "answerKey": "ABCDE"[n % 5],
        }
        for n, thing in enumerate(THINGS * 3)
    ],
    "alpaca": [
        {"instruction": f"Count to {n}.", "input": "aloud" if n % 2 else "", "output": "one " * (n + 1)}
        for n in range(12)
    ],
    "dolly": [
        {"instruction": f"Count to {n}.", "context": "aloud" if n % 2 else "", "response": "one " * (n + 1)}
        for n in range(12)
    ],
    "metamath": [
        {"type": "GSM_SV", "query": f"What is {n}+1?", "response": f"It is {n + 1}. The answer is: {n + 1}"}
        for n in range(12)
    ],
    "gsm8k": [{"question": f"What is {n}+1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(12)],
    "commonsense_170k": [
        {
            "instruction": f"Please choose the correct answer to the question: What is {thing} on day {n}?\n\n"
            "Answer1: a thing Answer2: no: nothing Answer3: rain\n\nAnswer format: answer1/answer2/answer3",
            "input": "",
            "output": f"the correct answer is answer{n % 3 + 1}",
            "answer": f"answer{n % 3 + 1}",
        }
        for n, thing in enumerate(THINGS * 3)
    ],
    "chat": [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": str(n)}]}
        for n in range(12)
    ],
    "sharegpt": [
        {"id": f"s{n}_0", "conversations": [{"from": "human", "value": f"Say {n}."}, {"from": "gpt", "value": str(n)}]}
        for n in range(12)
    ],
    "wizard_evol": [
        {"idx": f"w{n}", "conversations": [{"from": "human", "value": f"Say {n}."}, {"from": "gpt", "value": str(n)}]}
        for n in range(12)
    ],
    "tulu_sft": [
        {
            "id": f"t{n}",
            "messages": [{"content": f"Say {n}.", "role": "user"}, {"content": str(n), "role": "assistant"}],
            "source": "ai2-adapt-dev/oasst1_converted",
        }
        for n in range(12)
    ],
    "oasst1": [
        {
            "message_id": f"{n}-{role}-{rank}",
            "parent_id": None if role == "prompter" else f"{n}-prompter-None",
            "user_id": "u",
            "created_date": "2023-02-05T14:23:50.983374+00:00",
            "text": f"Say {n}." if role == "prompter" else f"{n}" * (1 + (rank or 0)),
            "role": role,
            "lang": "en",
            "review_count": 3,
            "review_result": True,
            "deleted": False,
            "rank": rank,
            "synthetic": False,
            "model_name": None,
            "detoxify": {"toxicity": 0.01, "insult": 0.002},
            "message_tree_id": f"{n}-prompter-None",
            "tree_state": "ready_for_export",
            "emojis": {"name": ["+1"], "count": [2]},
            "labels": {"name": ["spam", "quality"], "value": [0.0, 0.9], "count": [3, 3]},
        }
        for n in range(12)
        for role, rank in (("prompter", None), ("assistant", 1), ("assistant", 0))
    ],
    "dialogsum": [
        {
            "id": f"train_{n}",
            "dialogue": f"#Person1#: I have {n} pens.\n#Person2#: Good.",
            "summary": f"#Person1# has {n} pens.",
            "topic": "pens",
        }
        for n in range(12)
    ],
    "samsum": [
        {"id": f"1381{n}", "dialogue": f"Amanda: I baked {n}.\r\nJerry: Sure!", "summary": f"Amanda baked {n}."}
        for n in range(12)
    ],
    "e2e_nlg": [
        {
            "meaning_representation": f"name[The Vaults], near[Café {n}]",
            "human_reference": f"The Vaults is by Café {n}.",
        }
        for n in range(12)
    ],
    "text": [{"text": f"Tom has {n} apples. " * 5} for n in range(12)],
}
SCHEMAS["arc_challenge"] = SCHEMAS["arc_easy"]
SCHEMAS["alpaca_cleaned"] = SCHEMAS["alpaca"]


def write(name: str, folder: Path) -> Path:
    """The rows of one schema as a file."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in SCHEMAS[name]))
    return file
