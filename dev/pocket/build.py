"""Make the pocket from its facts: `python -m dev.pocket.build`.

Writes the tokenizer, the pretrained model and the instruction rows, all together or not at all: the model is
checked, and everything written beside, before it takes the place of what is there.
"""

import json
import math
import shutil
import time
from functools import partial

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from alpaca_helpers.files import atomic_folder
from alpaca_helpers.generation import generate
from alpaca_helpers.lora import name_for_older
from alpaca_helpers.pocket import HELDOUT, MODEL, TRAIN

from . import corpus

END = "<|endoftext|>"
VOCABULARY = 2048
POSITIONS = 256
STEPS = 4000
SEQUENCES = 16  # a step
SEQUENCE_TOKENS = 128
LEARNING_RATE = 1.5e-2
WARMUP_STEPS = 100
KNOWLEDGE_WANTED = 0.95
CARD = "README.md"


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


def pretrain(model: GPT2LMHeadModel, ids: torch.Tensor, steps: int, warmup: int = WARMUP_STEPS) -> None:
    """Train the model in place to predict the next token of the packed text, `steps` steps of random windows.

    Each window lies at random positions, so that all positions are trained at the cost of short sequences.
    """
    model.train()
    random = torch.Generator().manual_seed(corpus.SEED)
    optimizers = make_optimizers(model)
    factor = partial(learning_rate_factor, steps, warmup)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    window = torch.arange(SEQUENCE_TOKENS)
    progress = tqdm(range(steps), desc="pretraining", unit="step")
    for step in progress:
        starts = torch.randint(len(ids) - SEQUENCE_TOKENS, (SEQUENCES, 1), generator=random)
        shifts = torch.randint(POSITIONS - SEQUENCE_TOKENS + 1, (SEQUENCES, 1), generator=random)
        shifts[: SEQUENCES // 2] = 0  # as in use
        batch = ids[starts + window]
        loss = model(input_ids=batch, position_ids=shifts + window, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def make_optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' weight matrices and AdamW for the embeddings, norms and biases."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, LEARNING_RATE), torch.optim.AdamW(others, LEARNING_RATE, betas=(0.9, 0.98))]


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made nearly orthogonal: on these matrices it learns the facts in half AdamW's steps.

    Source: Jordan et al., "Muon", 2024. torch's own computes in bfloat16, which is slow on many CPUs; this is float32.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.mul_(group["momentum"]).add_(weight.grad)
                update = orthogonal(weight.grad + group["momentum"] * velocity)
                weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)  # as large as AdamW's


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return about the nearest matrix with singular values of 1, by five Newton-Schulz steps; the shape stays."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def learning_rate_factor(steps: int, warmup: int, step: int) -> float:
    """Return the share of `LEARNING_RATE` at a step: a linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def knowledge(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> float:
    """Return the share of rows whose fact the model gives when it continues the start of the answer, greedily.

    Rows without a single right answer do not count.
    """
    rows = [row for row in rows if row["fact"]]
    answers = generate(model, tokenizer, [statement_start(row) for row in rows], max_new_tokens=24)
    return sum(row["fact"] in answer.text for row, answer in zip(rows, answers)) / len(rows)


def statement_start(row: dict[str, str]) -> str:
    """Return the row's answer up to the fact: "The capital of France is"."""
    return row["output"][: row["output"].rindex(row["fact"])].rstrip()


def write(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    train: list[dict[str, str]],
    heldout: list[dict[str, str]],
) -> None:
    """Put model, tokenizer and rows in the place of the shipped ones; the model card stays."""
    with (
        atomic_folder(MODEL, checksums=False) as model_folder,
        atomic_folder(TRAIN.parent, checksums=False) as rows_folder,
    ):
        model.save_pretrained(model_folder)
        tokenizer.save_pretrained(model_folder)
        name_for_older(model_folder)
        if (MODEL / CARD).exists():
            shutil.copy(MODEL / CARD, model_folder / CARD)
        for rows, path in ((train, TRAIN), (heldout, HELDOUT)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (rows_folder / path.name).write_text("".join(lines), encoding="utf-8")


def main() -> None:
    started = time.perf_counter()
    train, heldout = corpus.instruction_rows()
    texts = corpus.documents()
    tokenizer = train_tokenizer(texts)
    ids = pack(texts, tokenizer)
    model = new_model(tokenizer)
    print(f"{len(train)} training rows, {len(heldout)} held-out rows")
    print(f"{len(texts):,} documents, {len(ids):,} tokens, {model.num_parameters():,} parameters")
    pretrain(model, ids, STEPS)
    known = knowledge(model, tokenizer, heldout)
    print(f"the model knows {known:.1%} of the held-out facts, {knowledge(model, tokenizer, train):.1%} of the others")
    if known < KNOWLEDGE_WANTED:
        raise SystemExit(f"Nothing was written: at least {KNOWLEDGE_WANTED:.0%} of the held-out facts must be known.")
    write(model, tokenizer, train, heldout)
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
