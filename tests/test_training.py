"""Training: batches, the weight of each label, patches undone, what is recorded, what is said where it does not fit.

Loss and gradients are held against the plain model in tests/test_architectures.py; here whole trainings are.
"""

import importlib
import json
import pkgutil
import shutil
import sys
from unittest.mock import Mock

import pytest
import torch
from peft import IA3Config, get_peft_model
from support.models import assert_same, gradients, with_lora
from support.runs import NO_DROPOUT, byte_tokenizer, notebook_03, prepare_run, random_rows, tiny_gpt2
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DataCollatorForLanguageModeling, GPT2LMHeadModel, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

import alpaca_helpers
from alpaca_helpers import AlpacaError, card, lora, models, training
from alpaca_helpers.batches import LengthGroups, PadToLongest, split_batch
from alpaca_helpers.data import tokenize
from alpaca_helpers.files import write_json
from alpaca_helpers.generation import generate
from alpaca_helpers.lora import WEIGHTS, load_adapter
from alpaca_helpers.run import Run


def tokens(rows, recipe="answers"):
    return rows.map(tokenize, batched=True, fn_kwargs={"tokenizer": byte_tokenizer(), "recipe": recipe})


def random_lora():
    """A tiny model with a random adapter and no dropout anywhere, so that losses can be compared."""
    return with_lora(tiny_gpt2(**NO_DROPOUT), 0.3, lora_dropout=0.0).train()


def arguments(folder, rows_at_once=4, accumulation=2, **changes):
    """A batch of 8 rows in two halves, one epoch, unless told otherwise."""
    settings = {"learning_rate": 3e-3, "num_train_epochs": 1, "eval_strategy": "epoch", "save_strategy": "no"}
    settings |= {"output_dir": str(folder / "checkpoints"), "report_to": [], "seed": 0, "logging_steps": 1}
    split = {"per_device_train_batch_size": rows_at_once, "gradient_accumulation_steps": accumulation}
    return Arguments(**settings | split | changes)


def trainer_on(rows, folder, model, recipe="answers", **changes):
    document = DataCollatorForLanguageModeling(byte_tokenizer(), mlm=False)
    collate = document if recipe == "document" else PadToLongest(256)
    args = arguments(folder, **changes)
    both = {"train_dataset": rows, "eval_dataset": None if args.eval_strategy == "no" else rows}
    return training.AnswerTrainer(model=model, args=args, data_collator=collate, **both)


def gradients_of(model, rows):
    """The gradients of the model's own loss on all rows at once."""
    found = gradients(model, model(**PadToLongest(256)(list(rows))).loss)
    model.zero_grad()
    return found


class SumGradients(TrainerCallback):
    """Adds up the gradients of every step."""

    def __init__(self):
        self.sums = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        for name, value in model.named_parameters():
            if value.grad is not None:
                self.sums[name] = self.sums.get(name, 0) + value.grad


def test_every_learned_label_counts_the_same_and_the_loss_on_show_is_theirs(tmp_path):
    """Whatever the length of its answer and the batch that it comes in; afterwards the model answers on both sides."""
    rows, model, seen = tokens(random_rows(32)), random_lora(), SumGradients()
    assert len({len(labels) for labels in rows["labels"]}) > 10
    wanted = gradients_of(model, rows)
    # the weights stay, the gradients are not clipped
    trainer = trainer_on(rows, tmp_path, model, learning_rate=1e-12, logging_steps=2, max_grad_norm=0)
    trainer.add_callback(seen)
    trainer.train()
    assert_same({name: total / 4 for name, total in seen.sums.items()}, wanted)  # of four batches, over their average
    shown = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    order = list(LengthGroups([len(ids) for ids in rows["input_ids"]], 8, 0, lambda: 0))
    halves = [PadToLongest(256)(list(rows.select(half))) for half in (order[:16], order[16:])]
    assert shown == pytest.approx([model(**half).loss.item() for half in halves], rel=2**-16)

    ask = ["Instruction: a\nRéponse:", "b"]
    base, tuned = (generate(model, byte_tokenizer(), ask, side=side) for side in ("base", "tuned"))
    assert base == generate(tiny_gpt2(), byte_tokenizer(), ask) != tuned


def test_the_loss_of_an_evaluation_is_the_mean_over_its_labels_whatever_the_batches(tmp_path):
    rows, model, found = tokens(random_rows(21)), random_lora().eval(), []
    wanted = model(**PadToLongest(256)(list(rows))).loss.item()
    for size in (32, 16, 4, 1):
        trainer = trainer_on(rows, tmp_path, model, per_device_eval_batch_size=size)
        trainer.since_log += 5  # what a training has seen since it logged
        found.append(trainer.evaluate()["eval_loss"])
        assert trainer.since_log.tolist() == [5, 5] and trainer.state.log_history[-1]["eval_loss"] == found[-1]
    assert found == pytest.approx([wanted] * 4, rel=2**-16)


def test_a_training_that_changes_more_than_lora_is_refused_before_it_begins_and_one_without_evaluation_is_not(tmp_path):
    """All that is refused of a LoRA: tests/test_adapters.py."""
    rows = tokens(random_rows(8))
    for model in (tiny_gpt2(), get_peft_model(tiny_gpt2(), IA3Config())):
        with pytest.raises(AlpacaError, match="changes more than LoRA's matrices"):
            trainer_on(rows, tmp_path, model, eval_strategy="no")
    assert trainer_on(rows, tmp_path, random_lora(), eval_strategy="no").train().global_step == 1


def test_a_smoothed_loss_is_the_plain_trainers(tmp_path):
    rows, model = tokens(random_rows(8)), random_lora().eval()
    ours = trainer_on(rows, tmp_path, model, label_smoothing_factor=0.3)
    batch = PadToLongest(256)(list(rows))
    wanted = Trainer(model=model, args=ours.args, eval_dataset=rows).compute_loss(model, dict(batch)).item()
    found = ours.compute_loss(model, ours.data_collator(list(rows))).item()
    assert found == pytest.approx(wanted, rel=2**-16) and abs(found - model(**batch).loss.item()) > 0.05


@pytest.mark.integration
def test_a_training_is_the_plain_trainers_on_the_same_batches(tmp_path):
    """Micro-batches, averaging over the learned tokens of a batch, clipping, AdamW: as transformers does them."""
    rows, one = tokens(random_rows(32)), {"rows_at_once": 8, "accumulation": 4, "num_train_epochs": 4}
    one["adam_epsilon"] = 1e-3  # beside it the rounding of a gradient close to zero, 1e-8, moves no weight by 1e-7
    ours, plain = random_lora(), random_lora()
    trainer_on(rows, tmp_path / "ours", ours, **one).train()
    order = list(LengthGroups([len(ids) for ids in rows["input_ids"]], 32, 0, lambda: 0))
    # a batch is all rows: only the order in it differs
    args = arguments(tmp_path / "plain", **one, eval_strategy="no", train_sampling_strategy="sequential")
    rows = rows.select(order).select_columns(["input_ids", "labels"])
    Trainer(model=plain, args=args, train_dataset=rows, data_collator=PadToLongest(256)).train()
    for (name, ours_is), (_, plain_is) in zip(ours.named_parameters(), plain.named_parameters()):
        if "lora" in name:
            torch.testing.assert_close(ours_is, plain_is, atol=1e-5, rtol=1e-4)


class NoValues(TorchDispatchMode):
    """Refuses every operation whose result, or its shape, hangs on a tensor's values."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags), operation
        return operation(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_no_value_but_for_packed_rows(tmp_path, monkeypatch):
    """Or a GPU would finish all that it was given before it is given more. transformers itself asks once a forward,
    whether rows are packed into one.
    """
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *given, **kwargs: None)
    rows, model = tokens(random_rows(6)), random_lora()
    trainer = trainer_on(rows, tmp_path, model)
    batch = trainer.data_collator(list(rows))
    with lora.lora_in_base_precision(model), NoValues():
        trainer.training_step(model, batch, num_items_in_batch=10.0)
        for wanted in (lambda: batch["input_ids"].sum().item(), batch["input_ids"].nonzero):
            with pytest.raises(AssertionError):
                wanted()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


def test_what_is_faster_is_undone_however_training_ends():
    model = with_lora(tiny_gpt2())

    def changed():
        return any("forward" in vars(module) for module in model.modules())

    with pytest.raises(KeyboardInterrupt), lora.lora_in_base_precision(model):
        assert changed()
        raise KeyboardInterrupt
    assert not changed()


def test_the_options_of_a_training_switch_off_the_bases_dropout_alone_and_suit_the_processor(tmp_path, monkeypatch):
    tiny_gpt2().save_pretrained(tmp_path)
    dropouts = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "summary_first_dropout": 0.0}
    for dtype, more in ((torch.float32, {}), (torch.bfloat16, {"attn_implementation": "eager"})):
        monkeypatch.setattr(models, "base_dtype", lambda dtype=dtype: dtype)
        monkeypatch.setattr(models, "best_device", lambda: "cpu")
        options = models.training_options(tmp_path)
        assert options == {"activation_function": "gelu_pytorch_tanh"} | dropouts | more
    model = with_lora(GPT2LMHeadModel.from_pretrained(tmp_path, **options), lora_dropout=0.25)
    shares = {("lora" in name, part.p) for name, part in model.named_modules() if hasattr(part, "p")}
    assert shares == {(True, 0.25), (False, 0.0)}


def test_importing_registers_nothing():
    for module in pkgutil.walk_packages(alpaca_helpers.__path__, "alpaca_helpers."):
        if not module.name.endswith("__main__") and ".notebooks" not in module.name:
            importlib.import_module(module.name)
    assert {function.__module__.partition(".")[0] for function in AttentionInterface().values()} == {"transformers"}


def test_over_a_bfloat16_base_the_trained_weights_are_float32_and_gradients_nearly_those_of_float32(tmp_path):
    model, rows = random_lora(), tokens(random_rows(12))
    trainer = trainer_on(rows, tmp_path, model)

    def computed():
        with lora.lora_in_base_precision(model):
            loss = trainer.compute_loss(model, trainer.data_collator(list(rows)))
            return loss.item(), gradients(model, loss)

    wanted_loss, wanted = computed()
    for name, value in model.named_parameters():
        value.data = value.data if "lora_" in name else value.data.bfloat16()
    loss, got = computed()
    # bfloat16 rounds by up to 2^-9, each number some thirty times on its way through two layers and back: half of
    # these roundings at the worst, if all went one way, make 2^-5 of it
    assert loss == pytest.approx(wanted_loss, rel=2**-7)
    for name in wanted:
        assert got[name].dtype == torch.float32
        assert (got[name] - wanted[name]).norm() < 2**-5 * wanted[name].norm(), name


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_over_either_precision_learns_and_is_recorded(dtype, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "base_dtype", lambda: dtype)
    settings = prepare_run(tmp_path, learning_rate=2e-2)
    training.finetune(tmp_path, **settings)
    made_by = Run(tmp_path).record("adapter")
    wanted = {"recipe": "answers", "dtype": str(dtype).removeprefix("torch."), "seed": 0}
    assert (wanted | settings).items() <= made_by.items() and {"lora_rank", "optim"} <= made_by.keys()
    assert made_by["result"]["steps"] == 24 and {"torch", "transformers", "peft"} <= made_by["versions"].keys()
    assert made_by["hardware"]
    last = max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name.partition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < 0.9 * losses[0] and made_by["result"]["eval_loss"] == losses[-1]
    trained = load_adapter(models.load_base(str(tmp_path / "base"), dtype=dtype), tmp_path / "adapter")
    assert {value.dtype for name, value in trained.named_parameters() if "lora_" in name} == {torch.float32}

    before = (tmp_path / "adapter" / WEIGHTS).read_bytes()
    for said in ("This training is finished, all 24 steps of it", "Going on after step 21 of 24"):
        capsys.readouterr()
        training.finetune(tmp_path, **settings)
        assert said in capsys.readouterr().out and (tmp_path / "adapter" / WEIGHTS).read_bytes() == before
        shutil.rmtree(last)
    check_card(tmp_path, monkeypatch)


def check_card(folder, monkeypatch):
    """Hold the card against the run: what it tells, the metrics of this adapter alone, its lines of Python."""
    page = folder / "adapter" / "README.md"
    text = page.read_text()
    prompt = "Instruction: {instruction}\n{input, or no such line}\nRéponse:"
    assert all(part in text for part in (prompt, "recipe: answers", "lora_rank: 8", "eval_loss: ", "## Licence"))
    assert f" {folder}" not in text and "stop_rate" not in text
    for broken in ("{", '{"base": 1}'):  # or of an earlier version: no reason to fail after a training
        (folder / "metrics.json").write_text(broken)
        card.write_card(folder)
        assert page.read_text() == text
    metrics = {"n": 8, "base": {"stop_rate": 0.0, "contains": None}, "tuned": {"stop_rate": 0.95, "contains": None}}
    for adapter, shown in (("another", False), (Run(folder).record("adapter")["sha256"], True)):
        write_json(folder / "metrics.json", metrics | {"change": {}, "base_bare": {}, "adapter": adapter})
        card.write_card(folder)
        assert ("| stop_rate | 0 | 0.95 |" in page.read_text()) == shown

    lines, namespace = text.partition("```python\n")[2].partition("```")[0], {}
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    exec(lines.replace('"this folder"', repr(str(folder / "adapter"))), namespace)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        wanted = load_adapter(models.load_base(str(folder / "base")), folder / "adapter")(ids).logits
        torch.testing.assert_close(namespace["model"](ids).logits, wanted)
    assert namespace["tokenizer"]("a").input_ids == byte_tokenizer()("a").input_ids


def test_the_documents_recipe_keeps_its_collator(tmp_path):
    for recipe, kind in (("document", DataCollatorForLanguageModeling), ("document+eos", PadToLongest)):
        prepare_run(tmp_path / recipe, rows=4, recipe=recipe)
        assert type(notebook_03(tmp_path / recipe, "collator")) is kind


def test_every_row_comes_once_an_epoch_in_batches_of_like_length_and_another_order_each_epoch():
    lengths = [(7 * i) % 101 for i in range(1000)]
    epochs = [list(LengthGroups(lengths, 8, 0, lambda number=number: number)) for number in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[2]) == list(range(1000))
    batches = [epochs[0][i : i + 8] for i in range(0, 1000, 8)]
    assert sum(8 * max(lengths[row] for row in batch) for batch in batches) < 1.1 * sum(lengths)
    rows = list(LengthGroups([5, 6, 7], 8, 0, lambda: 0))  # the last batch is filled up, even by fewer rows than one
    assert sorted(rows.count(row) for row in range(3)) == [2, 3, 3]


@pytest.mark.parametrize("micro, split", [(4, (3, 2)), (1024, (5, 1))])
def test_a_batch_larger_than_the_data_is_the_data_once(micro, split, tmp_path):
    """Five rows: one step an epoch, with the gradient of these rows, none of them twice."""
    rows, model, seen = tokens(random_rows(5)), random_lora(), SumGradients()
    wanted = gradients_of(model, rows)
    trainer = trainer_on(rows, tmp_path, model, rows_at_once=micro, accumulation=1 + 1024 // micro, max_grad_norm=0)
    trainer.add_callback(seen)
    assert (trainer.args.train_batch_size, trainer.args.gradient_accumulation_steps) == split
    assert sorted(trainer._get_train_sampler()) == list(range(5))
    assert trainer.train().global_step == 1
    assert_same(seen.sums, wanted)
    with pytest.raises(AlpacaError, match="learned labels only: take transformers' Trainer for `predict`"):
        trainer.predict(rows)


def test_a_batch_is_split_evenly_or_refused(monkeypatch):
    for processes, splits in {
        "1": {(16, 8): (8, 2), (16, 5): (4, 4), (6, 8): (6, 1)},
        "2": {(16, 16): (8, 1), (12, 8): (6, 1)},
    }.items():
        monkeypatch.setenv("WORLD_SIZE", processes)
        assert {given: split_batch(*given) for given in splits} == splits
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(AlpacaError, match="16 rows cannot be shared by 3 processes: choose a `batch_size`"):
        split_batch(16, 16)


def test_the_base_is_held_in_bfloat16_where_the_device_multiplies_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capabilities = Mock(side_effect=[(7, 5), (8, 0), (9, 0)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities)
    assert [models.base_dtype() for _ in range(3)] == [torch.float32, torch.bfloat16, torch.bfloat16]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for here in (None, *units):
        for unit in units:
            monkeypatch.setattr(torch.cpu, unit, lambda there=unit == here: there, raising=False)
        assert models.base_dtype() == (torch.bfloat16 if here else torch.float32)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_says_what_to_change(error, tmp_path):
    trainer = trainer_on(tokens(random_rows(8)), tmp_path, random_lora())
    trainer.compute_loss = Mock(side_effect=error)
    with pytest.raises(AlpacaError, match="Out of memory with 4 rows at once: take a smaller `micro_batch_size`"):
        trainer.train()


@pytest.mark.parametrize("recipe", ["document", "answers"])
def test_what_a_training_takes_is_measured_on_the_longest_rows_and_leaves_the_weights(recipe, tmp_path, capsys):
    rows, model = tokens(random_rows(12), recipe), with_lora(tiny_gpt2())  # columns of text, dropout
    trainer = trainer_on(rows, tmp_path, model, recipe)
    trainer.compute_loss = Mock(wraps=trainer.compute_loss)
    weights = [p.clone() for p in model.parameters()]
    trainer.announce()
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    seen = [call.args[1]["input_ids"].shape for call in trainer.compute_loss.call_args_list]
    assert seen == [(4, max(len(ids) for ids in rows["input_ids"]))] * 2
    said = capsys.readouterr().out
    assert "minutes: 2 steps of " in said and "at most 3." in said


@pytest.mark.parametrize(
    "given, phrase",
    [
        ("", "run notebook"),
        ("lora_dropout 1", "The parameter `"),
        ("batch_size 9", "cannot be shared by"),
        ("max_words 9", "take no max_words"),
        ("run other", "is given twice"),
    ],
)
def test_the_command_names_the_missing_notebook_and_a_wrong_parameter(given, phrase, tmp_path, monkeypatch):
    if given:
        prepare_run(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    registered: list = []  # one process registers once
    monkeypatch.setattr(torch.serialization, "register_package", lambda *given: registered.append(given))
    monkeypatch.setattr(sys, "argv", ["training", str(tmp_path / "run"), *(f"-p {given}".split() if given else [])])
    with pytest.raises(AlpacaError, match=phrase):
        training.main()
    assert registered[0][2]("storage", "cpu:0") == "storage"
