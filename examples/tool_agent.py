"""An agent on an adapter of its own: it learns to call a shop's functions, is served, and is asked.

python examples/tool_agent.py [ADAPTER]

Trains on generated conversations if there is no ADAPTER (runs/tool_agent) yet, starts
`lorakit serve`, and runs a loop of OpenAI's client: the model calls, the shop answers, the model
says what it has learned. Needs `pip install 'lorakit[serve]' openai`.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ITEMS = ["blue jacket", "red scarf", "green hat", "wool sock", "rain coat", "leather belt"]
ITEMS += ["silk tie", "linen shirt", "grey glove", "winter boot", "straw hat", "denim skirt"]
STOCK = {item: 3 + 7 * number % 40 for number, item in enumerate(ITEMS)}
PRICE = {item: 5 + 13 * number % 90 for number, item in enumerate(ITEMS)}
QUESTIONS = {
    "get_stock": ["How many {}s are there?", "Do you have a {} in stock?", "Is the {} sold out?"],
    "get_price": ["What does a {} cost?", "How much is the {}?", "The price of a {}, please."],
}
ANSWERS = {"get_stock": "There are {} of them.", "get_price": "It costs {} euros."}
SMALL_TALK = [("Hello!", "Hello! Ask me about our stock and prices."), ("Thanks.", "Any time!")]


def tool(name: str, description: str) -> dict[str, Any]:
    """A function of the shop that takes an item, as OpenAI's API describes it."""
    item = {"type": "string", "description": "what is sold, in the singular"}
    schema = {"type": "object", "properties": {"item": item}, "required": ["item"]}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = [tool("get_stock", "How many there are."), tool("get_price", "The price in euros.")]


def run(name: str, arguments: dict[str, Any]) -> Any:
    """What a function of the shop returns."""
    known = {"get_stock": STOCK, "get_price": PRICE}[name]
    return known.get(arguments.get("item", ""), "there is no such item")


def rows(number: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Conversations: a question, a call, what it returned, and the answer; some without a call."""
    draw = random.Random(seed)
    for at in range(number):
        if at % 8 == 7:
            asked, said = draw.choice(SMALL_TALK)
            turns: list[dict[str, Any]] = [{"role": "assistant", "content": said}]
        else:
            name, item = draw.choice([*QUESTIONS]), draw.choice(ITEMS)
            asked, found = draw.choice(QUESTIONS[name]).format(item), draw.randint(0, 99)
            call = {"name": name, "arguments": {"item": item}}
            turns = [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": call}],
                },
                {"role": "tool", "content": json.dumps(found)},
                {"role": "assistant", "content": ANSWERS[name].format(found)},
            ]
        yield {"messages": [{"role": "user", "content": asked}, *turns], "tools": TOOLS}


def train(folder: Path, model: str = "smollm2-135m-instruct", number: int = 240) -> Path:
    """Trains the adapter, and returns its folder."""
    import lorakit

    data = folder.with_suffix(".jsonl")
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(number)), encoding="utf-8")
    recipe = {
        "model": model,
        "chat_template": str(Path(__file__).with_name("tool_calls.jinja")),
        "data": {"train": str(data), "max_length": 512},
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "training": {
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
        },
        "output_dir": str(folder),
    }
    return Path(lorakit.train(recipe).output_dir)


@contextmanager
def served(adapter: Path) -> Iterator[str]:
    """`lorakit serve` with the adapter, and its address."""
    command = [sys.executable, "-m", "lorakit", "serve", f"shop={adapter}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = next(filter(None, (re.search(r"http://\S+", line) for line in server.stdout)))
            yield found.group()
        finally:
            server.terminate()


def ask(client: Any, model: str, question: str, turns: int = 5) -> str:
    """The answer to a question, after the calls that the model makes."""
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(turns):
        reply = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, temperature=0, max_tokens=100
        )
        message = reply.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message.model_dump())
        for call in message.tool_calls:
            result = run(call.function.name, json.loads(call.function.arguments))
            print(f"  {call.function.name}({call.function.arguments}) -> {result}")
            told = {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)}
            messages.append(told)
    return "no answer"


def main(folder: str = "runs/tool_agent") -> None:
    """Trains if there is nothing yet, serves, and asks."""
    from openai import OpenAI

    adapter = Path(folder)
    if not (adapter / "adapter_config.json").exists():
        adapter = train(adapter)
    with served(adapter) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        for question in (
            "How many wool socks do you have?",
            "What is the price of the rain coat?",
            "Good morning!",
        ):
            print(f"> {question}")
            print(ask(client, "shop", question))


if __name__ == "__main__":
    main(*sys.argv[1:])
