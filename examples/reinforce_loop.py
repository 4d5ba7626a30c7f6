"""REINFORCE with a mean baseline: an adapter learns to write what is rewarded, here digits.

    python examples/reinforce_loop.py [MODEL]

Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
learning"; the loss corrects for the policy that sampled, as TRL and Tinker do.
"""

import sys

import lorakit


def reward(text: str) -> float:
    """The share of an answer's characters that are digits."""
    return sum(each.isdigit() for each in text) / max(1, len(text))


def main(
    model: str = "smollm2-135m-instruct", steps: int = 10, samples: int = 16, tokens: int = 8
) -> list[float]:
    """Trains, and returns the mean reward of each step."""
    means = []
    with lorakit.Engine(model) as engine:
        engine.create_adapter("digits", r=8, lora_alpha=32)
        prompts = [engine.tokenizer.encode("My telephone number:")] * samples
        for step in range(steps):
            said = engine.sample(
                prompts, "digits", temperature=1.0, max_new_tokens=tokens, seed=step * samples
            )
            rewards = [reward(engine.tokenizer.decode(one.tokens)) for one in said]
            mean = sum(rewards) / samples
            rows = [
                engine.row("digits", prompt, one.tokens, logprobs=one.logprobs, advantages=r - mean)
                for prompt, one, r in zip(prompts, said, rewards, strict=True)
            ]
            engine.forward_backward(rows, "importance_sampling")
            engine.optim_step("digits", learning_rate=1e-3)
            print(f"step {step}: mean reward {mean:.3f}")
            means.append(mean)
    return means


if __name__ == "__main__":
    main(*sys.argv[1:])
