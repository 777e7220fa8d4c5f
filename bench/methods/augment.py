"""Words added to the prompt, so that it is no longer a memorized caption word for word.

Somepalli et al., "Understanding and Mitigating Copying in Diffusion Models", NeurIPS 2023, https://arxiv.org/abs/2305.20086,
section 6: random tokens or numbers put at random places, and words of the caption repeated at random places.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from basinescape import Guidance, Sampler

from .method import Batch, Method

ADDED = 4
Words = Callable[[random.Random, list[str], list[str]], str]  # (rng, words of the caption, vocabulary) -> a word to put in


def random_words(rng: random.Random, caption: list[str], vocabulary: list[str]) -> str:
    return rng.choice(vocabulary)


def random_numbers(rng: random.Random, caption: list[str], vocabulary: list[str]) -> str:
    return str(rng.randrange(1_000_000))


def repeated_words(rng: random.Random, caption: list[str], vocabulary: list[str]) -> str:
    return rng.choice(caption)


def augmented(prompt: str, seed: int, word: Words, vocabulary: list[str]) -> str:
    """`prompt` with ADDED words inserted at random places. The same arguments always give the same result."""
    rng, words = random.Random(f"{seed} {prompt}"), prompt.split()
    caption = list(words)
    for _ in range(ADDED):
        words.insert(rng.randrange(len(words) + 1), word(rng, caption, vocabulary))
    return " ".join(words)


def vocabulary(sampler: Sampler) -> list[str]:
    """The words of more than two letters in the first tokenizer. Raises ValueError if it is not of CLIP's kind."""
    tokens: Mapping[str, int] = getattr(getattr(sampler.pipe, "tokenizer", None), "get_vocab", dict)()
    words = sorted(token.removesuffix("</w>") for token in tokens if token.endswith("</w>") and len(token) > 6)
    if not words:
        raise ValueError("it takes words from the vocabulary of a CLIP tokenizer, and the model's first one is of another kind")
    return words


def method(guidance: Guidance, word: Words) -> Method:
    def prompts(batch: Batch) -> list[str]:
        known = vocabulary(batch.sampler)
        return [augmented(prompt, seed, word, known) for prompt, seed in zip(batch.prompts, batch.seeds, strict=True)]

    return Method(guidance, prompts, suits=lambda sampler, _: vocabulary(sampler))
