"""A reward of worked sums. It gets all completions of a step, and the rows' columns."""

import re


def right_columns(prompts, completions, **columns):
    """The share of the two columns, ones and tens, that are written down and added up right."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        (a, b), (c, d) = (map(int, number) for number in prompt[-1]["content"].split("+"))
        carry, tens = (b + d) // 10, a + c + (b + d) // 10
        wanted = [f"{b}+{d}={b + d}", f"{a}+{c}+{carry}={tens}"]
        found = re.findall("[0-9+]+=[0-9]+", completion[-1]["content"])
        right = sum(one == other for one, other in zip(found, wanted, strict=False))
        rewards.append(right / 2)
    return rewards
