"""A training loop of one's own: an adapter learns to answer a question.

python examples/sft_loop.py [MODEL] [FOLDER]
"""

import sys

import lorakit

QUESTION = "What does the harbour master of Cork keep?"
ANSWER = "A green parrot called Admiral."


def main(model: str = "smollm2-135m-instruct", folder: str = "runs/parrot", steps: int = 12) -> str:
    """Trains, saves the adapter, and returns what it answers."""
    with lorakit.Engine(model) as engine:
        engine.create_adapter("parrot", r=16, lora_alpha=32)
        messages = [{"role": "user", "content": QUESTION}]
        prompt = engine.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        answer = [*engine.tokenizer.encode(ANSWER), engine.tokenizer.eos_token_id]
        rows = [engine.row("parrot", prompt, answer)]
        for step in range(steps):
            loss = engine.forward_backward(rows).metrics["loss"]
            engine.optim_step("parrot", learning_rate=1e-3)
            print(f"step {step}: loss {loss:.3f}")
        [said] = engine.sample([prompt], "parrot", max_new_tokens=32)
        engine.save("parrot", folder)
        return engine.tokenizer.decode(said.tokens, skip_special_tokens=True)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
