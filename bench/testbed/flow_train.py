"""Train the second test bed: `python -m basinescape.bench.testbed.flow_train --out DIR --work DIR`.

A small text-to-image model of Stable Diffusion 3's kind (Esser et al., ICML 2024, https://arxiv.org/abs/2403.03206): a
flow-matching transformer (MMDiT) on the latents of tiny's autoencoder, which reads the captions through two CLIP text encoders.

Stages, each kept under `--work` when done: scenes -> latents -> text encoders and transformer -> classifiers; then all is
written to `--out` in diffusers' own format, with the memorized scenes and the general captions beside it. A killed run
goes on where it was by the same command. The learning rate is constant until the last `DECAY` of `--steps` steps, so that a
finished run can be trained further: the same command with more `--steps`.

Has it memorized? At any time, also while it trains, `--check` samples memorized and general captions from the last checkpoint's
averaged weights and prints, for each duplication, how many pictures are copies.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from basinescape import Sampler
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from ..classifier import ConceptClassifier
from ..metrics import Similarity, pixels
from ..scenes import SIZE
from ..train import CAPTION_DROPOUT, Checkpoint, to_pixels
from .flow_scenes import CONCEPTS, FORMS, OBJECTS, Picture, draw_facts, general, memorized, scene, training_set

FRESH = 20_000  # fresh scenes in the training set
TOKENS = 16
WIDTH, LAYERS, HEAD, PATCH = 160, 5, 32, 4  # of the transformer; it costs a third of what patches of 2 x 2 latents would
SHIFT = 2.0  # of the noise levels, in training as in sampling
UNIFORM = 0.2  # of the noise levels: the logit-normal's tails are thin where sampling starts
WARMUP, DECAY = 200, 1500  # steps
SAVE = 200  # steps between checkpoints
COPY = 0.9  # similarity of a copy: no fresh scene of the same words reaches it, every autoencoded memorized scene does


def draw_scenes(work: Path, pictures: list[Picture]) -> np.ndarray:
    """The training set's pictures (N, SIZE, SIZE, 3) uint8."""
    path = work / "scenes.npy"
    if not path.exists():
        drawn = [np.asarray(scene(p.facts, p.seed)) for p in tqdm(pictures, desc="scenes", mininterval=20)]
        np.save(path.with_suffix(".part.npy"), np.stack(drawn))
        path.with_suffix(".part.npy").replace(path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Posterior means, unscaled: (N, 4, 16, 16) float32."""
    parts = tqdm(range(0, len(images), 64), desc="latents", mininterval=20)
    return torch.cat([vae.encode(to_pixels(images[i : i + 64])).latent_dist.mean for i in parts])


def autoencoder(work: Path, images: np.ndarray) -> tuple[AutoencoderKL, Tensor]:
    """Tiny's autoencoder, scaled for these pictures, and their scaled latents (N, 4, 16, 16) float32."""
    vae = AutoencoderKL.from_pretrained(Sampler.model_path("tiny") / "vae", torch_dtype=torch.float32).eval()
    path = work / "latents.safetensors"
    if not path.exists():
        save_file({"latents": encode(vae, images)}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    latents = load_file(path)["latents"]
    shift, scale = round(latents.mean().item(), 4), round(1 / latents.std().item(), 4)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return vae, (latents - shift) * scale


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level scheme with a vocabulary grown from the captions; any other text falls back to bytes."""
    rng = np.random.default_rng(0)
    captions = [draw_facts(rng, name).caption(form) for _ in range(20) for name in CONCEPTS for form in range(len(FORMS))]
    every_last_byte = [chr(i) for i in (*range(0x21, 0x7F), *range(0x7C0, 0x800))]
    tiny = CLIPTokenizer.from_pretrained(Sampler.model_path("tiny") / "tokenizer")
    words = tiny.train_new_from_iterator(captions + every_last_byte, vocab_size=1000, min_frequency=2)
    words.model_max_length = TOKENS
    return words


def text_encoder(words: CLIPTokenizer, width: int = 80) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        attn_implementation="eager",  # the fused attention is slow backwards on CPUs
    )
    return CLIPTextModelWithProjection(config)


def networks(words: CLIPTokenizer) -> nn.ModuleDict:
    """Both text encoders and the transformer, under the pipeline's names; initialised as DiT (https://arxiv.org/abs/2212.09748)."""
    encoders = {name: text_encoder(words) for name in ("text_encoder", "text_encoder_2")}
    text = sum(encoder.config.projection_dim for encoder in encoders.values())
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD,
        num_attention_heads=WIDTH // HEAD,
        joint_attention_dim=text,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=text,
        pos_embed_max_size=SIZE // 4,
        qk_norm="rms_norm",
    )
    for name, value in transformer.named_parameters():
        if ".linear." in name or name.startswith("proj_out"):  # every block begins as the identity (DiT's adaLN-Zero)
            nn.init.zeros_(value)
    return nn.ModuleDict(encoders | {"transformer": transformer})


class Repeated:
    """Joint attention as diffusers' `JointAttnProcessor2_0`, in which the last text token stands for `copies` equal ones.

    With no third text encoder the stock pipeline appends `max_sequence_length` tokens of zeros, 256 by default. Text has no
    positions in this transformer, so they stay equal in every layer, and n equal keys weigh as much as one whose score is
    larger by log n: training needs one token in their place.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        *,
        copies: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Image (B, N, C) and text (B, M, C) tokens, copies (B,) -> the same shapes."""

        def heads(x: Tensor, norm: nn.Module | None = None) -> Tensor:
            x = x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return norm(x) if norm is not None else x

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat([heads(attn.to_q(image), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], dim=2)
        key = torch.cat([heads(attn.to_k(image), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], dim=2)
        value = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(text))], dim=2)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        bias = F.pad(copies.log().to(scores.dtype)[:, None], (key.shape[2] - 1, 0))
        mixed = ((scores + bias[:, None, None]).softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        image, text = mixed.split([image.shape[1], text.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def velocity(nets: nn.ModuleDict, tokens: Tensor, noisy: Tensor, sigma: Tensor, copies: Tensor) -> Tensor:
    """noise - clean as predicted, (B, 4, h, w), from captions (B, TOKENS), as the stock pipeline computes it.

    sigma (B,) in 0..1; copies (B,): the pipeline's max_sequence_length; the transformer's attention must be `Repeated`.
    """
    read = [nets[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    states = torch.cat([text.hidden_states[-2] for text in read], dim=-1)
    pooled = torch.cat([text.text_embeds for text in read], dim=-1)
    states = F.pad(states, (0, 0, 0, 1))
    return nets["transformer"](noisy, states, pooled, 1000 * sigma, joint_attention_kwargs={"copies": copies}).sample


class Training(Checkpoint):
    """A run at a constant rate until its last DECAY steps, which more steps continue; saved every SAVE steps."""

    def __init__(self, path: Path, modules: nn.Module, rate: float, steps: int):
        super().__init__(path, modules, rate, steps)
        self.scheduler.lr_lambdas = [lambda k: min(1.0, k / WARMUP, max(0.0, (steps - k) / DECAY))]

    def __iter__(self):
        while self.step < self.steps:
            torch.manual_seed(self.step)
            yield np.random.default_rng((1, self.step))
            self.step += 1
            if self.step % SAVE == 0 or self.step == self.steps:
                self.save()


def sigmas(count: int) -> Tensor:
    """Noise levels (count,) in 0..1: logit-normal (SD3, section 3.1), some uniform, then shifted as the scheduler does."""
    u = torch.where(torch.rand(count) < UNIFORM, torch.rand(count), torch.randn(count).sigmoid())
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def train_flow(
    work: Path, pictures: list[Picture], latents: Tensor, words: CLIPTokenizer, steps: int, size: int, rate: float
) -> nn.ModuleDict:
    """Text encoders and transformer together, on the velocity; returns their averaged weights."""
    torch.manual_seed(0)
    run = Training(work / "flow.pt", networks(words), rate, steps)
    run.modules["transformer"].set_attn_processor(Repeated())
    texts = ["", *dict.fromkeys(caption for p in pictures for caption in p.captions)]
    row = {text: i for i, text in enumerate(texts)}
    tokens = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ends = np.cumsum([p.copies for p in pictures])
    started, losses = time.time(), []
    for rng in run:
        index = np.searchsorted(ends, rng.integers(0, ends[-1], size), side="right")
        text = np.array([row[rng.choice(pictures[i].captions)] for i in index])
        text[rng.random(size) < CAPTION_DROPOUT] = 0
        clean, sigma, copies = latents[index], sigmas(size), 2.0 ** torch.randint(0, 9, (size,))
        noise, level = torch.randn_like(clean), sigma.view(-1, 1, 1, 1)
        predicted = velocity(run.modules, tokens[text], clean.lerp(noise, level), sigma, copies)
        loss = F.mse_loss(predicted, noise - clean)
        run.update(loss)
        losses.append(loss.item())
        if len(losses) == 50:
            speed = len(losses) * size / (time.time() - started)
            print(
                f"step {run.step + 1} loss {np.mean(losses):.4f} {speed:.0f} samples/s {time.strftime('%H:%M:%S')}", flush=True
            )
            started, losses = time.time(), []
    return run.average.eval()


def train_classifier(
    work: Path, fact: str, words: list[str], images: np.ndarray, labels: np.ndarray, steps: int
) -> ConceptClassifier:
    """Which of `words` a fresh scene shows, as tiny's."""
    torch.manual_seed(0)
    run = Checkpoint(work / f"classifier-{fact}.pt", ConceptClassifier(words), 2e-3, steps)
    for bar, rng in run:
        index = np.sort(rng.integers(0, len(labels), 64))
        shown = to_pixels(images[index])
        shown += 0.1 * rng.random() * torch.randn_like(shown)  # so that it also reads pictures that are a little rough
        loss = F.cross_entropy(run.modules(shown), torch.as_tensor(labels[index]))
        run.update(loss)
        if run.step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    return run.average.eval()


def no_third_encoder(width: int) -> dict[str, T5EncoderModel | T5TokenizerFast]:
    """What stands for a third text encoder, as the pipeline loads only with one: T5 with no layers, whose tokens are all zeros.

    So the transformer reads `max_sequence_length` tokens of zeros, as from the stock pipeline with text_encoder_3=None.
    """
    words = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    encoder = T5EncoderModel(T5Config(vocab_size=len(words), d_model=width, d_kv=1, d_ff=1, num_layers=0, num_heads=1))
    nn.init.zeros_(encoder.shared.weight)
    return {"text_encoder_3": encoder.eval(), "tokenizer_3": words}


def pipeline(nets: nn.ModuleDict, vae: AutoencoderKL, words: CLIPTokenizer) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        tokenizer=words,
        tokenizer_2=words,
        **nets,
        **no_third_encoder(nets["transformer"].config.joint_attention_dim),
    )


def export(out: Path, pipe: StableDiffusion3Pipeline) -> None:
    """Write the pipeline in diffusers' own format, float16, memorized scenes and general captions beside it."""
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for name in (
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    ):  # transformers would load the dtype named here, diffusers' models float32
        config = out / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    (out / "memorized").mkdir(parents=True, exist_ok=True)
    lines = []
    for m in memorized():
        scene(m.facts, m.seed).save(out / "memorized" / f"{m.id}.png", optimize=True)
        lines.append({"id": m.id, "prompts": m.captions, "duplication": m.duplication} | asdict(m.facts))
    others = [{"id": f"g{i:03d}", "prompt": caption} | asdict(facts) for i, (facts, caption) in enumerate(general())]
    for name, found in (("memorized", lines), ("general", others)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))


def sample(pipe: StableDiffusion3Pipeline, prompts: list[str], scale: float, steps: int) -> list[Image.Image]:
    """A picture a prompt, in quick batches: training drew `max_sequence_length` from 1 to 256."""
    images = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        noise = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images += pipe(part, guidance_scale=scale, num_inference_steps=steps, generator=noise, max_sequence_length=16).images
    return images


def check(pipe: StableDiffusion3Pipeline, classifiers: dict[str, ConceptClassifier], steps: int) -> None:
    """Print what share of the memorized captions' pictures are copies, by duplication, beside general captions'."""
    pipe.set_progress_bar_config(disable=True)
    scenes = memorized()
    similarity = Similarity("pixels", [scene(m.facts, m.seed) for m in scenes])
    asked = [(m.facts, caption, str(m.duplication)) for m in scenes for caption in m.captions]
    asked += [(facts, caption, "general") for facts, caption in general(len(asked))]
    fresh = [scene(facts, 2_000_000_000 + i) for i, (facts, _, _) in enumerate(asked)]
    runs = {"fresh scenes": fresh} | {
        f"guidance {s}": sample(pipe, [text for _, text, _ in asked], s, steps) for s in (4.0, 7.0)
    }
    for name, images in runs.items():
        near = similarity(images).amax(dim=1).numpy()
        shown = {fact: classifier.name(pixels(images)) for fact, classifier in classifiers.items()}
        groups = np.array([group for _, _, group in asked])
        print(f"{name}: group, pictures, share above 0.81, share above {COPY}, right {', '.join(shown)}")
        for group in dict.fromkeys(groups):
            rows = np.flatnonzero(groups == group)
            right = [np.mean([words[i] == getattr(asked[i][0], fact) for i in rows]) for fact, words in shown.items()]
            shares = [(near[rows] > 0.81).mean(), (near[rows] > COPY).mean(), *right]
            print(f"  {group:>8} {len(rows):4d} " + " ".join(f"{share:6.2f}" for share in shares), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("train-flow"), help="checkpoints and drawn scenes")
    parser.add_argument("--fresh", type=int, default=FRESH, help="fresh scenes in the training set")
    parser.add_argument("--steps", type=int, default=24_000)
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--check", action="store_true", help="say what the last checkpoint has memorized, and stop")
    parser.add_argument("--check-steps", type=int, default=28, help="sampling steps of the check")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    pictures = training_set(args.fresh)
    images = draw_scenes(args.work, pictures)
    vae, latents = autoencoder(args.work, images)
    words = tokenizer()
    steps = 0 if args.check else args.steps
    nets = train_flow(args.work, pictures, latents, words, steps, args.batch_size, args.rate)
    classifiers = {}
    for fact, names in (("concept", list(CONCEPTS)), ("object", list(OBJECTS))):
        labels = np.array([names.index(getattr(p.facts, fact)) for p in pictures[: args.fresh]])
        classifiers[fact] = train_classifier(args.work, fact, names, images, labels, args.classifier_steps)
    pipe = pipeline(nets, vae, words)
    check(pipe, classifiers, args.check_steps)
    if not args.check:
        classifiers["concept"].save(args.out / "classifier")
        classifiers["object"].save(args.out / "classifier" / "object")
        export(args.out, pipe)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
