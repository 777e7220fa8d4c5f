"""The second test bed: fair captions, scenes that show what they say, and training that computes what the pipeline does."""

import itertools
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from basinescape.bench.evaluation import scenes
from basinescape.bench.evaluation.scenes import FONT, SIZE, Facts, flow_scene
from basinescape.bench.testbed import flow_set as flow

needs_font = pytest.mark.skipif(not FONT.is_file(), reason="scenes are drawn with Noto Color Emoji")
FRESH = 3000


@cache
def pictures():
    return flow.training_set(FRESH)


def fresh_captions():
    return [caption for picture in pictures()[:FRESH] for caption in picture.captions]


def test_no_word_tells_a_memorized_caption():
    """Each of its words, and each pair of neighbours, is in many captions of fresh scenes."""
    words, pairs = Counter(), Counter()
    for caption in fresh_captions():
        split = caption.split()
        words.update(set(split))
        pairs.update(set(itertools.pairwise(split)))
    for scene in flow.memorized():
        for caption in scene.captions:
            split = caption.split()
            assert min(words[word] for word in split) >= FRESH / 50
            assert min(pairs[pair] for pair in itertools.pairwise(split)) >= FRESH / 1000


def test_sharing():
    """20 scenes with a caption of their own, 4 captions of two scenes each, 4 scenes under three captions."""
    known = flow.memorized()
    owners = Counter(caption for scene in known for caption in scene.captions)
    assert len(known) == len({scene.seed for scene in known}) == 32
    assert Counter(owners.values()) == {1: 32, 2: 4}
    assert Counter(len(scene.captions) for scene in known) == {1: 28, 3: 4}
    for scene in known:
        assert set(scene.captions) <= {scene.facts.caption(form) for form in range(len(scenes.FORMS))}


def test_memorized_captions_have_other_pictures():
    """One in eight of what training shows under a memorized caption is another scene of the same words."""
    others = Counter(c for p in pictures()[FRESH:] if p.copies == 1 and p.seed < 1_000_000_000 for c in p.captions)
    copies = Counter()
    for scene in flow.memorized():
        copies.update({caption: scene.copies / len(scene.captions) for caption in scene.captions})
    for caption, count in copies.items():
        assert abs(others[caption] - (count + others[caption]) * flow.OTHER_SCENE) <= 1


def test_training_set():
    """No two of its pictures are one, and the copies are those of the memorized scenes."""
    assert len({picture.seed for picture in pictures()}) == len(pictures())
    assert Counter(p.copies for p in pictures()[-32:]) == dict.fromkeys((1, 25, 75, 150, 250, 400, 600, 1000), 4)
    assert all(picture.copies == 1 for picture in pictures()[:-32])


def test_general_captions_are_of_other_scenes():
    known = {scene.facts for scene in flow.memorized()}
    found = flow.general(100)
    assert len({caption for _, caption in found}) == 100
    assert not known & {facts for facts, _ in found}
    assert set(Counter(facts.concept for facts, _ in found).values()) == {5}


@pytest.mark.parametrize("relation", scenes.INVERSE)
def test_caption_orders_say_the_same(relation):
    facts = Facts("red", "cat", relation, "bell", "pink")
    plain, turned, last = (facts.caption(form) for form in range(3))
    assert plain == f"a red cat {relation} a bell under a pink sky"
    assert turned == f"a bell {scenes.INVERSE[relation]} a red cat under a pink sky"
    assert last == f"under a pink sky a red cat {relation} a bell"


@needs_font
def test_scene_is_a_function_of_its_seed():
    facts = flow.memorized()[0].facts
    first, again, other = (np.asarray(flow_scene(facts, seed)) for seed in (7, 7, 8))
    assert first.shape == (SIZE, SIZE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@needs_font
@pytest.mark.parametrize("relation", scenes.INVERSE)
def test_scene_shows_its_colours_and_its_relation(relation):
    """The sky's colour in a top corner; the concept on the side that the caption says."""
    for seed in range(20):
        facts = Facts("red", "balloon", relation, "bell", "blue")
        picture, without = (np.asarray(flow_scene(f, seed), int) for f in (facts, Facts("green", *facts_rest(facts))))
        corners = picture[0, [0, -1]] - np.array(scenes.SKIES["blue"])
        assert np.abs(corners).max(axis=1).min() <= 15
        rows, columns = np.nonzero(np.abs(picture - without).sum(axis=2))  # only the tint differs: these are the concept
        gap = {"left of": SIZE - columns.max(), "right of": columns.min(), "above": SIZE - rows.max(), "below": rows.min()}
        assert gap[relation] >= 12  # the object, 13 pixels long or more, has its place on the other side


def facts_rest(facts):
    return facts.concept, facts.relation, facts.object, facts.sky


def test_one_weighted_token_is_as_good_as_many():
    """`velocity` predicts what the transformer does on the stock pipeline's own embeddings, with its 256 tokens of zeros."""
    pytest.importorskip("transformers")
    from basinescape.bench.testbed import flow_model as model
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    torch.manual_seed(0)
    words = model.tokenizer()
    nets = model.networks(words).double().eval()
    transformer = nets["transformer"]
    for value in transformer.parameters():
        value.data += 0.05 * torch.randn_like(value)  # also where training starts from zeros
    noisy, sigma, prompts = torch.randn(2, 4, 16, 16).double(), torch.tensor([0.3, 0.9]).double(), ["a red cat", ""]
    pipe = model.pipeline(nets, None, words)
    pipe.text_encoder_3.double()
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
        stock = transformer(noisy, states, pooled, 1000 * sigma).sample
        transformer.set_attn_processor(model.Repeated())
        tokens = words(prompts, padding="max_length", return_tensors="pt").input_ids
        ours = model.velocity(nets, tokens, noisy, sigma, torch.full((2,), 256.0).double())
        transformer.set_attn_processor(JointAttnProcessor2_0())
    assert states.shape == (2, model.TOKENS + 256, transformer.config.joint_attention_dim)
    torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-9)


def test_any_text_is_read():
    """Captions take a token a word; other text falls back to bytes and never to the unknown token."""
    from basinescape.bench.testbed import flow_model as model

    words = model.tokenizer()
    caption = flow.memorized()[0].captions[0]
    assert len(words.tokenize(caption)) == len(caption.split()) <= model.TOKENS - 2
    assert words.unk_token_id not in words("zebra! Häß 🐱 (7)", add_special_tokens=False).input_ids


def test_a_caption_is_listed_once_with_all_of_its_scenes():
    from basinescape.bench.testbed.flow_train import captions

    lines, known = captions(), {scene.id: scene for scene in flow.memorized()}
    assert len({line["prompt"] for line in lines}) == len({line["id"] for line in lines}) == len(lines) == 36
    for line in lines:
        assert line["scenes"] == [id for id, scene in known.items() if line["prompt"] in scene.captions]
        assert line["duplication"] == max(known[id].copies for id in line["scenes"])
        assert line["image"] == f"{line['scenes'][0]}.png" and line["concept"] in line["prompt"]
