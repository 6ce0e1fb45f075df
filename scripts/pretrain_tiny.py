#!/usr/bin/env python
"""Pretrains the bundled backbone from scratch: a tokenizer and a Llama of a few million parameters.

All text is generated (`milora.tasks.bundled.corpus`), so nothing is downloaded. The budget is a number of steps: the
same seed on the same machine with the same number of threads gives the same weights. If other programs use the
processor too, set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait make training several times slower.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from milora.backbone.bundled import TINY_BACKBONE
from milora.tasks.bundled.corpus import Document, documents

SPECIAL_TOKENS = PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCABULARY_SIZE = 1200
TOKENIZER_DOCUMENTS = 20_000
PIECES = r" ?[A-Za-z]+[0-9]?| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+"
"""The pieces that the tokenizer splits a text into: words, with an optional digit (`answer2`), digits, and others."""
MAX_POSITIONS = 2048

SHORT, LONG = (16, 128), (2, 1024)
"""Rows and tokens of a batch. Documents are short; the long batches train distant positions."""
LONG_EVERY = 25
COPY_ROWS = 2
"""Rows of each short batch with repeated random tokens: they train copying of any text."""
MATRIX_LEARNING_RATE = 4e-3
OTHER_LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
SHARED_COORDINATE, SHIFT_GAIN = 1.0, 1.5
EMBEDDING_GAIN, FINAL_GAIN, RANDOM_GAIN, NOTE_GAIN, MATCH_GAIN, COPY_GAIN = 5.0, 0.3, 0.35, 0.15, 2.0, 0.3
WEIGHT_DECAY = 0.01
EMPTY_ROW_NOISE = 1e-3
GIVEN_WEIGHT = 0.2
"""Loss weight of a document's random parts: they cannot be predicted, only their style can be learned."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "Assistant: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)

MODEL_CARD = """---
license: apache-2.0
language: en
library_name: transformers
tags: [pretrained, tiny, synthetic]
---

# MiLoRA's bundled backbone

A Llama of {parameters:,} parameters, for demonstrations and tests of MiLoRA that need no download and no accelerator.

- **Shape**: {layers} blocks, hidden size {hidden}, MLP size {intermediate}, {heads} attention heads with {kv_heads}
  key/value heads, tied embeddings, {vocabulary} tokens (byte-level BPE of words and digits), at most
  {positions} positions. Weights in bfloat16.
- **Data**: text that the project generates itself (`milora.tasks.bundled.corpus`): who eats what, records, facts of a
  small closed world, labelled lists, repeated words, sums and counting stories. No text of any other origin was used.
  The form in which the bundled tasks answer does not occur in it.
- **Start**: not quite at random. The first block has two heads that look one and two tokens back, which stay as they
  are, and two heads of the second block look for what the first one notes; the rest, and what these heads make of it,
  is learned. It saves the long plateau before a small model finds out how to copy.
- **Training**: `python scripts/pretrain_tiny.py --steps {steps} --seed {seed}`; {steps} steps of Muon (matrices) and
  AdamW (the rest) with a cosine schedule, about {tokens:.1f} million tokens, {minutes:.0f} minutes on
  {threads} threads. Loss at the end: {loss:.3f}.
- **Licence**: Apache-2.0.

## What it cannot do

It knows thirty facts and a few dozen sentence forms. It does not converse, follow instructions, know the real world or
calculate with more than one digit, and any language but its corner of English is noise to it. Use it to
see that fine-tuning works, never to judge how well a method does on real tasks.
"""


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, lossless on any text; numbers are split into digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in islice(documents(seed), TOKENIZER_DOCUMENTS)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained backbone."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=224,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        build_shifting_heads(model)
        build_matching_heads(model)
    return model


def build_matching_heads(model: LlamaForCausalLM) -> None:
    """Makes the first block store the previous tokens at each token, and two heads of the second block find them."""
    width, hidden = model.config.head_dim, model.config.hidden_size
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    embedding = model.model.embed_tokens.weight
    embedding[:, :-1] *= EMBEDDING_GAIN
    model.model.norm.weight.fill_(FINAL_GAIN)
    for layer in model.model.layers:
        # The blocks' random outputs must stay small beside the outputs of these heads.
        layer.self_attn.o_proj.weight *= RANDOM_GAIN
        layer.mlp.down_proj.weight *= RANDOM_GAIN
    # Four orthogonal subspaces: the part of a token that is stored, the place where it is stored, and two that are
    # copied.
    noted, kept, *copied = torch.nn.init.orthogonal_(torch.empty(hidden, hidden)).split(width)
    for space in (noted, kept, *copied):
        space[:, -1] = 0.0
    first.v_proj.weight[:width] = noted
    first.o_proj.weight[:, :width] = NOTE_GAIN * kept.T
    # Slow frequencies match a token with its stored copy at any distance.
    slow = (torch.arange(width) % (width // 2) >= 10).unsqueeze(1)
    for head, group, copy in ((0, 0, copied[0]), (2, 1, copied[1])):
        second.q_proj.weight[head * width : (head + 1) * width] = MATCH_GAIN * noted * slow
        second.k_proj.weight[group * width : (group + 1) * width] = MATCH_GAIN * kept * slow
        second.v_proj.weight[group * width : (group + 1) * width] = copy
        second.o_proj.weight[:, head * width : (head + 1) * width] = COPY_GAIN * copy.T


def build_shifting_heads(model: LlamaForCausalLM) -> None:
    """Gives the first block two heads that always attend one and two tokens back, and freezes this pattern.

    The corpus mainly needs lookups: find an earlier occurrence of a word and continue with the token after it. This
    takes one head that stores the previous tokens at each token, and a second head in a later block that finds them.
    Training discovers the pair only after a long plateau, which takes too long on a CPU. With the first half given, it
    learns the second half quickly. The values that the heads store, and everything else, are learned.
    """
    width = model.config.head_dim
    attention = model.model.layers[0].self_attn
    embedding, query, key = model.model.embed_tokens.weight, attention.q_proj.weight, attention.k_proj.weight
    # The last coordinate is the same for all tokens. The embeddings are tied, so it adds the same to every logit.
    embedding[:, -1] = SHARED_COORDINATE
    # Rotary positions rotate key j by j * frequency and query p by p * frequency. With the query rotated back by a
    # shift, the product is largest for j = p - shift. Only quick frequencies separate neighbouring positions.
    quick = 8
    frequencies = model.model.rotary_emb.inv_freq[:quick]
    query[: 2 * width] = key[:width] = 0.0
    key[:quick, -1] = SHIFT_GAIN
    for head, shift in enumerate((1, 2)):
        cosine, sine = query[head * width :], query[head * width + width // 2 :]
        cosine[:quick, -1] = SHIFT_GAIN * (shift * frequencies).cos()
        sine[:quick, -1] = -SHIFT_GAIN * (shift * frequencies).sin()

    query.register_hook(partial(without_gradient, fixed=(slice(2 * width), slice(None))))
    key.register_hook(partial(without_gradient, fixed=(slice(width), slice(None))))
    embedding.register_hook(partial(without_gradient, fixed=(slice(None), -1)))
    model.model.layers[0].input_layernorm.weight.requires_grad = False


def without_gradient(gradient: torch.Tensor, fixed: tuple[slice | int, ...]) -> torch.Tensor:
    """The gradient of a weight with a fixed part."""
    gradient = gradient.clone()
    gradient[fixed] = 0.0
    return gradient


def fill_empty_rows(model: LlamaForCausalLM, seed: int) -> None:
    """Adds a little noise to zero rows of matrices: methods that divide by a row's norm (DoRA) need nonzero rows."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                empty = weight.norm(dim=1) == 0
                noise = torch.randn(int(empty.sum()), weight.shape[1], generator=random)
                weight[empty] = (EMPTY_ROW_NOISE * noise).to(weight.dtype)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of packed documents, each between its start and end token, with the weight of every token in the loss."""
    # The tokenizer was trained on the start of stream `seed`; the model reads another stream.
    stream = documents(seed + 1)
    tokens: list[int] = []
    weights: list[float] = []
    random = torch.Generator().manual_seed(seed)
    step = 0
    while True:
        rows, length = LONG if step % LONG_EVERY == LONG_EVERY - 1 else (SHORT[0] - COPY_ROWS, SHORT[1])
        size = rows * length
        while len(tokens) < size:
            for given, told in tokenized(tokenizer, list(islice(stream, 256))):
                tokens += [*given, *told]
                weights += [GIVEN_WEIGHT] * len(given) + [1.0] * len(told)
        batch, batch_weights = (torch.tensor(taken[:size]).view(rows, length) for taken in (tokens, weights))
        if length == SHORT[1]:
            copying, copying_weights = copying_batch(COPY_ROWS, length, len(tokenizer), random)
            batch, batch_weights = torch.cat([batch, copying]), torch.cat([batch_weights, copying_weights])
        yield batch, batch_weights
        tokens, weights = tokens[size:], weights[size:]
        step += 1


def copying_batch(
    rows: int, length: int, vocabulary: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens that repeat after a while, and loss weights that select only the repeated tokens."""
    batch, weights = torch.empty(rows, length, dtype=torch.long), torch.ones(rows, length)
    for row, row_weights in zip(batch, weights, strict=True):
        period = int(torch.randint(6, length // 2, (1,), generator=random))
        row[:] = torch.randint(len(SPECIAL_TOKENS), vocabulary, (period,), generator=random).repeat(length)[:length]
        row_weights[:period] = 0.0
    return batch, weights


def tokenized(tokenizer: PreTrainedTokenizerFast, texts: list[Document]) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of both parts of each document, with the start and the end token."""
    given = tokenizer([document.given for document in texts])["input_ids"]
    told = tokenizer([document.told for document in texts], add_special_tokens=False)["input_ids"]
    for given_ids, told_ids in zip(given, told, strict=True):
        yield given_ids, [*told_ids, tokenizer.eos_token_id]


def weighted_loss(logits: torch.Tensor, batch: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the next-token losses."""
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> tuple[float, int]:
    """Trains the model in place; returns the mean loss of the last hundred steps and the number of tokens seen."""
    # Muon learns the copying that these texts ask for in far fewer steps than AdamW; it is for matrices only.
    matrices = [weight for layer in model.model.layers for weight in layer.parameters() if weight.ndim == 2]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warmup_then_cosine, steps=steps))
        for optimizer in optimizers
    ]
    columns = (TextColumn("loss {task.fields[loss]:.3f}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    losses: list[float] = []
    tokens = 0
    model.train()
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("pretraining", total=steps, loss=float("nan"))
        for batch, weights in islice(batches(tokenizer, seed), steps):
            # On a processor, eager attention is faster for short rows and the fused one for long rows.
            model.set_attn_implementation("sdpa" if batch.shape[1] > SHORT[1] else "eager")
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=batch, use_cache=False).logits
            loss = weighted_loss(logits, batch, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            tokens += batch.numel()
            losses = [*losses[-99:], loss.item()]
            mean_loss = sum(losses) / len(losses)
            progress.update(bar, advance=1, loss=mean_loss)
            if progress.tasks[0].completed % 100 == 0:
                progress.console.print(f"step {progress.tasks[0].completed:.0f}: loss {mean_loss:.3f}")
    return sum(losses) / len(losses), tokens


def warmup_then_cosine(step: int, steps: int) -> float:
    """The share of the full learning rate at a step: a linear warm-up, then a cosine decay to zero."""
    return min((step + 1) / WARMUP_STEPS, (1 + math.cos(math.pi * step / steps)) / 2)


def main() -> None:
    """Trains and writes the backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TINY_BACKBONE, help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the text and the weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1; got {arguments.steps}.")

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    start = time.monotonic()
    tokenizer = train_tokenizer(arguments.seed)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    loss, tokens = pretrain(model, tokenizer, arguments.steps, arguments.seed)
    minutes = (time.monotonic() - start) / 60

    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.to(torch.bfloat16)
    fill_empty_rows(model, arguments.seed)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    card = MODEL_CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        intermediate=model.config.intermediate_size,
        heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
        vocabulary=len(tokenizer),
        positions=MAX_POSITIONS,
        steps=arguments.steps,
        seed=arguments.seed,
        tokens=tokens / 1e6,
        minutes=minutes,
        threads=arguments.threads,
        loss=loss,
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")
    print(f"Loss {loss:.3f} after {tokens:,} tokens in {minutes:.1f} minutes; written to {arguments.output}")


if __name__ == "__main__":
    main()
