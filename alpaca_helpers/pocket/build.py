"""Make the pocket from its facts: `python -m alpaca_helpers.pocket.build`.

Writes the tokenizer, the pretrained model and the instruction rows, all together or not at all: everything is made
in a temporary folder and checked before it takes the place of what is there.
"""

import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from alpaca_helpers.pocket import FOLDER, corpus

END = "<|endoftext|>"
VOCABULARY = 2048
POSITIONS = 256
STEPS = 2000
SEQUENCES = 16  # a step
SEQUENCE_TOKENS = 128
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
KNOWLEDGE_WANTED = 0.95


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of `VOCABULARY` entries learned from the texts, GPT-2's way; it can encode any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, model_max_length=POSITIONS
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return the ids of all texts one after the other, each followed by the end-of-text id: shape (tokens,)."""
    ids = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += encoding.ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Return an untrained GPT-2 of 1.09 million parameters."""
    torch.manual_seed(corpus.SEED)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=POSITIONS,
            n_embd=128,
            n_layer=4,
            n_head=4,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own, in its fast form
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def pretrain(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    """Train the model in place to predict the next token of the packed text, `STEPS` steps of random windows.

    Each window lies at random positions, so that all positions are trained at the cost of short sequences.
    """
    model.train()
    random = torch.Generator().manual_seed(corpus.SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    window = torch.arange(SEQUENCE_TOKENS)
    progress = tqdm(range(STEPS), desc="pretraining", unit="step")
    for step in progress:
        starts = torch.randint(len(ids) - SEQUENCE_TOKENS, (SEQUENCES, 1), generator=random)
        shifts = torch.randint(POSITIONS - SEQUENCE_TOKENS + 1, (SEQUENCES, 1), generator=random)
        shifts[: SEQUENCES // 2] = 0  # as in use
        batch = ids[starts + window]
        loss = model(input_ids=batch, position_ids=shifts + window, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def learning_rate_factor(step: int) -> float:
    """Return the share of `LEARNING_RATE` at a step: a linear warm-up, then half a cosine down to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))


def knowledge(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> float:
    """Return the share of rows whose fact the model gives when it continues the start of the statement, greedily."""
    rows = [row for row in rows if row["fact"]]
    known = [row["fact"] in completion(model, tokenizer, statement_start(row)) for row in rows]
    return sum(known) / len(known)


def statement_start(row: dict[str, str]) -> str:
    """Return the row's answer up to the fact: "The capital of France is"."""
    return row["output"][: row["output"].rindex(row["fact"])].rstrip()


def completion(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, start: str) -> str:
    """Return what the model writes after the start: at most 24 tokens, greedily."""
    ids = tokenizer(start, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(written[0, ids["input_ids"].shape[1] :])


def write_rows(rows: list[dict[str, str]], path: Path) -> None:
    """Write the rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def replace(made: Path, folder: Path) -> None:
    """Put the made folder in the place of the other, which is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(made, folder)


def main() -> None:
    started = time.perf_counter()
    train, heldout = corpus.instruction_rows()
    print(f"{len(train)} training rows, {len(heldout)} held-out rows")
    texts = corpus.documents()
    print(f"{len(texts):,} documents, {sum(map(len, texts)):,} characters")
    tokenizer = train_tokenizer(texts)
    ids = pack(texts, tokenizer)
    model = new_model(tokenizer)
    print(f"{len(ids):,} tokens, {model.num_parameters():,} parameters")
    pretrain(model, ids)
    known = knowledge(model, tokenizer, heldout)
    print(f"the model knows {known:.1%} of the held-out facts, {knowledge(model, tokenizer, train):.1%} of the others")
    if known < KNOWLEDGE_WANTED:
        raise SystemExit(f"Nothing was written: at least {KNOWLEDGE_WANTED:.0%} of the held-out facts must be known.")
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        made = Path(folder)
        model.save_pretrained(made / "model")
        tokenizer.save_pretrained(made / "model")
        shutil.copy(FOLDER / "model_card.md", made / "model" / "README.md")
        write_rows(train, made / "instructions" / "train.jsonl")
        write_rows(heldout, made / "instructions" / "heldout.jsonl")
        replace(made / "model", FOLDER / "model")
        replace(made / "instructions", FOLDER / "instructions")
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
