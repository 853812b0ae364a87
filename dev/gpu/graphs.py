"""Training steps that a GPU need not wait for: tried against `AnswerTrainer`, which the series uses.

`python -m benchmarks.bench --sections gradients` shows that they compute the same, and with `--contenders ours graphed
compiled packed` how fast they are. On a GPU a step of few rows takes as long as Python needs to launch its kernels. A
CUDA graph launches them all at once, but only over the same memory and in the same shapes: so rows are padded to a
multiple of 16 tokens, and the labels to learn to a multiple of 256, which leaves few shapes to capture. Of many rows,
the padding takes time: packed, they are one under a mask of blocks.
"""

from functools import partial

import torch
import torch.nn.functional as F

from alpaca_helpers.batches import add_learned
from alpaca_helpers.data import IGNORED
from alpaca_helpers.training import AnswerTrainer

# What lengths, labels to learn and packed rows are padded to a multiple of. 64 batches of 16 real rows then have 14
# shapes; with labels to a multiple of 64 they have 28.
TOKENS, LABELS, PACKED = 16, 256, 1024


def padded(values: torch.Tensor, multiple: int, value: int) -> torch.Tensor:
    """Return `values` with its last dimension padded on the right to a multiple."""
    return F.pad(values, (0, -values.shape[-1] % multiple), value=value)


def padded_rows(collate, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return the batch of `rows` in one of few lengths: `input_ids` and `labels`, each (rows, length)."""
    batch = collate(rows)
    return {name: padded(batch[name], TOKENS, value) for name, value in (("input_ids", 0), ("labels", IGNORED))}


def packed_rows(collate, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return the rows one after the other as a single one, (1, tokens), with each token's position in its own row."""
    ids = torch.tensor([id for row in rows for id in row["input_ids"]])
    labels = torch.tensor([label for row in rows for label in [IGNORED, *row["labels"][1:]]])
    places = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])
    # at position 0, each padding token is a row of its own
    padding = {"input_ids": (ids, 0), "labels": (labels, IGNORED), "position_ids": (places, 0)}
    return {name: padded(values, PACKED, value)[None] for name, (values, value) in padding.items()}


def static_batch(arrange, collate, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return the batch that `arrange` makes of the rows, and in place of its labels `before` and `targets`, (labels,).

    They are where in the flattened batch the token stands that predicts a label, and the label, ignored in padding.
    """
    batch = add_learned(partial(arrange, collate), rows)
    learned, labels = batch.pop("learned"), batch.pop("labels").flatten()
    return batch | {"before": padded(learned - 1, LABELS, 0), "targets": padded(labels[learned], LABELS, IGNORED)}


def nats(model, before: torch.Tensor, targets: torch.Tensor, **inputs) -> torch.Tensor:
    """Return the cross entropy of the labels, summed; what `AnswerTrainer.compute_loss` takes before it divides."""
    language_model = model.get_base_model()
    hidden = language_model.base_model(**inputs, use_cache=False).last_hidden_state
    logits = language_model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, before))
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


class StaticTrainer(AnswerTrainer):
    """AnswerTrainer on batches of few shapes; the subclasses say what is done with a shape."""

    arrange = staticmethod(padded_rows)

    def __init__(self, data_collator, **kwargs):
        super().__init__(data_collator=data_collator, **kwargs)
        self.data_collator = partial(static_batch, self.arrange, data_collator)
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

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
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

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        cuda = self.args.device.type == "cuda"
        self.compiled = torch.compile(nats, backend="cudagraphs" if cuda else "eager", dynamic=False)

    def gradients(self, **batch) -> tuple[torch.Tensor, ...]:
        """Return the same, through the compiled function."""
        torch.compiler.cudagraph_mark_step_begin()
        loss = self.compiled(self.model, **batch) / self.labels_per_batch
        return loss.detach().clone(), *torch.autograd.grad(loss, self.trained)


class PackedTrainer(StaticTrainer):
    """All rows of a batch in one, each attending to itself alone: flex attention on a GPU, else a mask of all pairs."""

    arrange = staticmethod(packed_rows)

    def __init__(self, model, **kwargs):
        if model.device.type == "cuda":
            type(model.get_base_model())._supports_flex_attn = True  # GPT-2 does not say so, and does
            model.get_base_model().set_attn_implementation("flex_attention")
        super().__init__(model=model, **kwargs)

    def train(self, *given, **kwargs):
        """Train, and leave the model with the attention that it had."""
        try:
            return super().train(*given, **kwargs)
        finally:
            self.model.get_base_model().set_attn_implementation("sdpa")


TRAINERS = {"graphed": GraphedTrainer, "compiled": CompiledTrainer, "packed": PackedTrainer}
