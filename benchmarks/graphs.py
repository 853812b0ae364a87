"""Training steps that a GPU need not wait for: tried against `AnswerTrainer`, which the series uses.

    python -m benchmarks.graphs           loss and gradients of each against AnswerTrainer's, on one batch

How fast they are, `python -m benchmarks.bench --contenders ours graphed compiled packed` measures. On a GPU a step of
few rows takes as long as Python needs to launch its kernels. A CUDA graph launches them all at once, but only over the
same memory and in the same shapes: so rows are padded to a multiple of 16 tokens, and the labels to learn to a multiple
of 256, which leaves few shapes to capture. Of many rows, the padding takes time: packed, they are one under a mask of
blocks.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainingArguments, set_seed

from alpaca_helpers.data import IGNORED
from alpaca_helpers.lora import lora_config
from alpaca_helpers.speedups import faster_training
from alpaca_helpers.training import AnswerTrainer

# What lengths, labels to learn and packed rows are padded to a multiple of. 64 batches of 16 real rows then have 14
# shapes; with labels to a multiple of 64 they have 28.
TOKENS, LABELS, PACKED = 16, 256, 1024


def padded(values: torch.Tensor, multiple: int, value: int) -> torch.Tensor:
    """Return `values` with its last dimension padded on the right to a multiple."""
    return F.pad(values, (0, -values.shape[-1] % multiple), value=value)


def static_batch(collate, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return a batch in one of few shapes: `input_ids` (rows, length); `before` and `targets`, (labels,): where in the
    flattened batch the token stands that predicts a label, and the label, ignored where it is padding.
    """
    batch = collate(rows)
    ids, labels = padded(batch["input_ids"], TOKENS, 0), padded(batch["labels"], TOKENS, IGNORED)
    learned = F.pad(labels[:, 1:] != IGNORED, (1, 0)).flatten().nonzero().squeeze(1)
    targets = padded(labels.flatten()[learned], LABELS, IGNORED)
    return {"input_ids": ids, "before": padded(learned - 1, LABELS, 0), "targets": targets}


def packed_batch(collate, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return the rows one after the other as a single one, (1, tokens), with each token's position in its own row."""
    lengths = [len(row["input_ids"]) for row in rows]
    ids = torch.tensor([id for row in rows for id in row["input_ids"]])
    labels = torch.tensor([label for row in rows for label in [IGNORED, *row["labels"][1:]]])
    places = torch.cat([torch.arange(length) for length in lengths])
    learned = (labels != IGNORED).nonzero().squeeze(1)
    rest = torch.arange(-len(ids) % PACKED)  # of the padding, rows of a single token: all at position 0
    return {
        "input_ids": padded(ids, PACKED, 0)[None],
        "position_ids": torch.cat([places, 0 * rest])[None],
        "before": padded(learned - 1, LABELS, 0),
        "targets": padded(labels[learned], LABELS, IGNORED),
    }


def nats(model, before: torch.Tensor, targets: torch.Tensor, **inputs) -> torch.Tensor:
    """Return the cross entropy of the labels, summed; what `AnswerTrainer.compute_loss` takes before it divides."""
    language_model = model.get_base_model()
    hidden = language_model.base_model(**inputs, use_cache=False).last_hidden_state
    logits = language_model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, before))
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


class StaticTrainer(AnswerTrainer):
    """AnswerTrainer on batches of few shapes; the subclasses say what is done with a shape."""

    collate = staticmethod(static_batch)

    def __init__(self, data_collator, **named):
        super().__init__(data_collator=data_collator, **named)
        self.data_collator = partial(self.collate, data_collator)
        self.trained = [value for value in self.model.parameters() if value.requires_grad]

    def gradients(self, **batch) -> tuple[torch.Tensor, ...]:
        """Return the loss of a batch, and the gradients of the trained parameters."""
        loss = nats(self.model, **batch) / self.labels_per_batch
        return loss.detach(), *torch.autograd.grad(loss, self.trained)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Add a batch's gradients to the parameters', and return its loss."""
        model.train()
        batch = self._prepare_inputs(inputs)
        loss, *gradients = self.gradients(**batch)
        for value, gradient in zip(self.trained, gradients):
            value.grad = gradient.clone() if value.grad is None else value.grad + gradient
        self.since_log += torch.stack([loss * self.labels_per_batch, (batch["targets"] != IGNORED).sum()])
        return loss


class GraphedTrainer(StaticTrainer):
    """A CUDA graph of forward, loss and backward for each shape, captured by hand when the shape first comes."""

    def __init__(self, **named):
        super().__init__(**named)
        self.graphs: dict[tuple, Graph] = {}
        self.can_capture = self.args.device.type == "cuda" and not self.args.fp16 and self.args.world_size == 1
        if not self.can_capture:
            print("No CUDA graphs: they want one GPU that computes in bfloat16. Steps are launched one by one.")

    def gradients(self, **batch) -> tuple[torch.Tensor, ...]:
        """Return the same as launched one by one, where that cannot be captured."""
        if not self.can_capture:
            return super().gradients(**batch)
        shape = tuple(value.shape for value in batch.values())
        if shape not in self.graphs:
            try:
                self.graphs[shape] = Graph(super().gradients, batch)
                print(f"Graph {len(self.graphs)} captured: {', '.join(str(list(size)) for size in shape)}", flush=True)
            except RuntimeError as error:  # CUDA's, where something waits for a value
                self.can_capture = False
                print(f"No CUDA graphs: {str(error).splitlines()[0]} Steps are launched one by one.")
                return super().gradients(**batch)
        return self.graphs[shape](batch)


class Graph:
    """A function's kernels as one CUDA graph; what it returns stands in the same memory at each call."""

    pool = None  # of memory, which all graphs share: they run one after the other

    def __init__(self, function, inputs: dict[str, torch.Tensor]):
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        stream = torch.cuda.Stream()  # one for both: nodes of autograd remember the stream they first ran on
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng(), torch.cuda.stream(stream):
            for _ in range(2):  # libraries load kernels and take memory, neither of which can be captured
                function(**self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        Graph.pool = Graph.pool or torch.cuda.graph_pool_handle()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=Graph.pool, stream=stream):
            self.outputs = function(**self.inputs)

    def __call__(self, inputs: dict[str, torch.Tensor]):
        for name, value in inputs.items():
            self.inputs[name].copy_(value, non_blocking=True)
        self.graph.replay()
        return self.outputs


class CompiledTrainer(StaticTrainer):
    """torch.compile's own CUDA graphs, of forward and of backward, around kernels that stay as they are."""

    def __init__(self, **named):
        super().__init__(**named)
        cuda = self.args.device.type == "cuda"
        self.compiled = torch.compile(nats, backend="cudagraphs" if cuda else "eager", dynamic=False)

    def gradients(self, **batch) -> tuple[torch.Tensor, ...]:
        """Return the same, through the compiled function."""
        torch.compiler.cudagraph_mark_step_begin()
        loss = self.compiled(self.model, **batch) / self.labels_per_batch
        return loss.detach().clone(), *torch.autograd.grad(loss, self.trained)


class PackedTrainer(StaticTrainer):
    """All rows of a batch in one, each attending to itself alone: flex attention on a GPU, else a mask of all pairs."""

    collate = staticmethod(packed_batch)

    def __init__(self, model, **named):
        if model.device.type == "cuda":
            type(model.get_base_model())._supports_flex_attn = True  # GPT-2 does not say so, and does
            model.get_base_model().set_attn_implementation("flex_attention")
        super().__init__(model=model, **named)

    def train(self, *given, **named):
        """Train, and leave the model with the attention that it had."""
        try:
            return super().train(*given, **named)
        finally:
            self.model.get_base_model().set_attn_implementation("sdpa")


TRAINERS = {"graphed": GraphedTrainer, "compiled": CompiledTrainer, "packed": PackedTrainer}


def differences(contender: str, load, rows: Dataset, collate, folder: str) -> dict[str, float]:
    """Return how far loss and gradients of a batch are from AnswerTrainer's, relative, and whether dropout is random.

    Args:
        load: makes the base model.
        rows: one batch, tokenized.
    """

    def trainer(kind, dropout: float):
        set_seed(0)
        model = get_peft_model(load(), lora_config(lora_dropout=dropout))
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.02)  # else A has no gradient
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=len(rows), report_to=[], fp16=False, max_steps=1
        )
        return kind(model=model, args=args, train_dataset=rows, data_collator=collate)

    usual, other = trainer(AnswerTrainer, 0.0), trainer(TRAINERS[contender], 0.0)
    found = []
    for made in (usual, other):
        batch = made._prepare_inputs(made.data_collator(list(rows)))
        made.model.train()
        with faster_training(made.model):
            if made is usual:
                loss = made.compute_loss(made.model, batch, num_items_in_batch=made.labels_per_batch)
                loss.backward()
                gradients = [value.grad for value in made.model.parameters() if value.requires_grad]
            else:
                made.gradients(**batch)  # the first call captures, the second replays
                loss, *gradients = made.gradients(**batch)
        found.append((loss.detach().double(), torch.cat([value.flatten().double() for value in gradients])))
    (loss, wanted), (its_loss, its) = found
    dropped = trainer(TRAINERS[contender], 0.5)
    batch = dropped._prepare_inputs(dropped.data_collator(list(rows)))
    dropped.model.train()
    with faster_training(dropped.model):
        losses = [dropped.gradients(**batch)[0].item() for _ in range(4)]
    return {
        "loss": (its_loss - loss).abs().item() / loss.item(),
        "gradients": ((its - wanted).norm() / wanted.norm()).item(),
        "different losses of four under dropout": len(set(losses)),
    }


def main() -> None:
    """Run the command line."""
    from benchmarks import bench  # it lists these trainers among its contenders

    parser = argparse.ArgumentParser(prog="python -m benchmarks.graphs", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-medium", choices=["pocket", *bench.SHAPES])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--contenders", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows, tokenizer = bench.load_data(options.model)
    data = bench.tokenized(rows.select(range(options.rows)), tokenizer, "answers")
    load = partial(bench.load_model, options.model, bench.base_dtype())
    results = {}
    for contender in options.contenders:
        try:
            found = differences(contender, load, data, bench.PadToLongest(tokenizer.pad_token_id), "build")
        except Exception as error:  # whatever a library raises: the others are still tried
            found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(contender, found, flush=True)
        results[contender] = found
        if options.out:
            options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
