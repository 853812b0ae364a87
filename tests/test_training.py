"""Training: `python -m pytest tests/test_training.py`. Compared with the plain model on padded rows, all logits."""

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from datasets import load_from_disk
from peft import get_peft_model
from support import PROJECT
from support.runs import byte_tokenizer, prepare_run, random_rows, tiny_gpt2
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from alpaca_helpers import AlpacaError, card, models, speedups, training
from alpaca_helpers.batches import LengthGroups, PadToLongest
from alpaca_helpers.data import IGNORED, RECIPES, tokenize
from alpaca_helpers.files import write_json
from alpaca_helpers.generation import generate
from alpaca_helpers.lora import load_adapter, lora_config, save_merged
from alpaca_helpers.runs import read_record


def tokens(rows, recipe="answers"):
    return rows.map(tokenize, batched=True, fn_kwargs={"tokenizer": byte_tokenizer(), "recipe": recipe})


def random_lora(target_modules=("c_attn",)):
    """A tiny model with a random adapter and no dropout anywhere, so that losses can be compared."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = get_peft_model(tiny_gpt2(**no_dropout), lora_config(lora_dropout=0.0, target_modules=target_modules))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    return model


def arguments(folder, rows_at_once=4, accumulation=2, **changes):
    """A batch of 8 rows in two halves, one epoch, unless told otherwise."""
    settings = {"learning_rate": 3e-3, "num_train_epochs": 1, "eval_strategy": "steps", "save_strategy": "no"}
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        seed=0,
        **{**settings, "logging_steps": 1, "eval_steps": 1, **changes},
    )


def trainer_on(rows, folder, model, recipe="answers", **changes):
    return training.AnswerTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=training.data_collator(byte_tokenizer(), recipe),
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def plain_batch(rows):
    """The rows padded right under an attention mask, as torch tensors."""
    width = max(len(ids) for ids in rows["input_ids"])
    lengths = [len(ids) for ids in rows["input_ids"]]
    return {
        "input_ids": torch.tensor([ids + [256] * (width - len(ids)) for ids in rows["input_ids"]]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for labels in rows["labels"]]),
        "attention_mask": torch.tensor([[1] * n + [0] * (width - n) for n in lengths]),
    }


@pytest.mark.parametrize(
    "recipe, targets, matrices",
    [("document+dynamic-padding", ("c_attn",), 2)]
    + [(recipe, ("c_attn",), 2) for recipe in RECIPES if recipe.startswith("document+")]
    + [("answers", ("c_attn",), 2)]
    + [("answers", ("c_attn", "c_proj", "c_fc"), 8), ("answers", ("c_attn", "lm_head"), 3)],
)
def test_loss_and_gradients_are_those_of_the_plain_padded_model(recipe, targets, matrices, tmp_path):
    model, rows = random_lora(targets), tokens(random_rows(12), recipe)
    plain = model(**plain_batch(rows)).loss  # by peft's own layers
    wanted = gradients(model, plain)
    trainer = trainer_on(rows, tmp_path, model, recipe)
    batch = trainer.data_collator([rows[i] for i in range(12)])
    with speedups.faster_training(model):
        ours = trainer.compute_loss(model, batch)
        got = gradients(model, ours)
    assert ours.item() == pytest.approx(plain.item(), abs=1e-5)
    assert got.keys() == wanted.keys() and len(got) == 2 * matrices  # A and B of each; nothing of the base
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_logits_are_computed_where_a_label_is_learned_only(tmp_path):
    model, rows = random_lora(), tokens(random_rows(6))
    trainer = trainer_on(rows, tmp_path, model)
    batch = trainer.data_collator([rows[i] for i in range(6)])
    learned = int((batch["labels"] != IGNORED).sum())
    _, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs.logits.shape == (learned, 257)
    assert model(input_ids=batch["input_ids"] if "input_ids" in batch else None).logits.dim() == 3  # the hook is gone


class NoValues(TorchDispatchMode):
    """Refuses every operation whose result, or its shape, hangs on a tensor's values."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags), operation
        return operation(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_no_value_but_for_packed_rows(tmp_path, monkeypatch):
    """Or a GPU would finish all that it was given before it is given more. transformers itself asks once a forward,
    whether rows are packed into one.
    """
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *given, **named: None)
    rows, model = tokens(random_rows(6)), random_lora()
    trainer = trainer_on(rows, tmp_path, model)
    batch = trainer.data_collator(list(rows))
    with speedups.faster_training(model), NoValues():
        trainer.training_step(model, batch, num_items_in_batch=10.0)
        for wanted in (lambda: batch["input_ids"].sum().item(), lambda: batch["input_ids"].nonzero()):
            with pytest.raises(AssertionError):
                wanted()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


def state(model):
    """What the patches change: the attention's name, each module's attributes, and the model's own."""
    kept = ("p", "act", "forward")
    modules = {name: {key: vars(module).get(key) for key in kept} for name, module in model.named_modules()}
    activations = {name: module.act for name, module in model.named_modules() if hasattr(module, "act")}
    return model.config._attn_implementation, modules, activations, sorted(vars(model))


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("patch", [*speedups.PATCHES, None], ids=lambda patch: patch.__name__ if patch else "all")
def test_each_patch_changes_something_and_is_undone_however_training_ends(patch, end, monkeypatch):
    model = get_peft_model(tiny_gpt2().bfloat16(), lora_config()).train()
    if patch:
        monkeypatch.setattr(speedups, "PATCHES", [patch])
    before = state(model)
    with pytest.raises(end) if end else nullcontext(), speedups.faster_training(model):
        assert state(model) != before
        if end:
            raise end
    assert state(model) == before


@pytest.mark.integration
def test_importing_registers_nothing():
    code = (
        "from transformers import AttentionInterface; before = set(AttentionInterface()); "
        "import alpaca_helpers.training; print(set(AttentionInterface()) == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_rows_of_a_batch_do_not_see_one_another(tmp_path):
    model, rows = random_lora(), tokens(random_rows(5))
    trainer = trainer_on(rows, tmp_path, model)
    together = trainer.compute_loss(model, trainer.data_collator([rows[i] for i in range(5)]), num_items_in_batch=1)
    alone = sum(trainer.compute_loss(model, trainer.data_collator([rows[i]]), num_items_in_batch=1) for i in range(5))
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)


def test_every_learned_label_counts_the_same_whatever_the_length_of_its_answer(tmp_path):
    model, rows = random_lora(), tokens(random_rows(32))
    trainer = trainer_on(rows, tmp_path, model)
    wanted = gradients(model, model(**plain_batch(rows)).loss)
    epoch, got = iter(trainer.get_train_dataloader()), {}
    for _ in range(4):
        batches, labels = trainer.get_batch_samples(epoch, 2, model.device)
        for batch in batches:
            for name, value in gradients(model, trainer.compute_loss(model, batch, num_items_in_batch=labels)).items():
                got[name] = got.get(name, 0) + value / 4
    assert len({len(rows[i]["labels"]) for i in range(32)}) > 10
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_every_batch_of_a_training_is_divided_by_the_labels_of_an_average_one(tmp_path, monkeypatch):
    rows, divisors = tokens(random_rows(32)), []
    trainer = trainer_on(rows, tmp_path, random_lora())
    loss = trainer.compute_loss

    def noted(*given, num_items_in_batch=None, **named):
        divisors.append(num_items_in_batch)
        return loss(*given, num_items_in_batch=num_items_in_batch, **named)

    monkeypatch.setattr(trainer, "compute_loss", noted)
    monkeypatch.setattr(trainer.args, "eval_strategy", "no")
    trainer.train()
    average = sum(label != IGNORED for labels in rows["labels"] for label in labels[1:]) / 4
    assert [divisor for divisor in divisors if divisor is not None] == pytest.approx([average] * 8)


def test_the_loss_on_show_is_that_of_a_label_whatever_batch_it_comes_in(tmp_path):
    rows, model = tokens(random_rows(32)), random_lora()
    trainer = trainer_on(rows, tmp_path, model, learning_rate=1e-12, logging_steps=2)
    trainer.train()
    shown = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    order = list(LengthGroups([len(ids) for ids in rows["input_ids"]], 8, 0, lambda: 0))
    halves = [plain_batch(rows.select(half)) for half in (order[:16], order[16:])]
    assert shown == pytest.approx([model(**half).loss.item() for half in halves], rel=1e-5)


def test_in_bfloat16_loss_and_gradients_are_nearly_the_same(tmp_path):
    model, rows = random_lora(), tokens(random_rows(12))
    batch = [rows[i] for i in range(12)]
    trainer = trainer_on(rows, tmp_path, model)
    wanted_loss = trainer.compute_loss(model, trainer.data_collator(batch))
    wanted = gradients(model, wanted_loss)
    for name, value in model.named_parameters():
        value.data = value.data if "lora_" in name else value.data.bfloat16()
    with speedups.faster_training(model):
        loss = trainer.compute_loss(model, trainer.data_collator(batch))
        got = gradients(model, loss)
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=0.01)
    with speedups.faster_training(model):
        assert model.config._attn_implementation == ("eager" if model.device.type == "cpu" else "sdpa")
    for name in wanted:
        assert got[name].dtype == torch.float32
        assert (got[name] - wanted[name]).norm() < 0.05 * wanted[name].norm()


@pytest.mark.integration
def test_a_training_is_the_plain_trainers_on_the_same_batches(tmp_path):
    """Micro-batches, averaging over the learned tokens of a batch, clipping, AdamW: as transformers does them."""
    rows, one = tokens(random_rows(32)), {"rows_at_once": 8, "accumulation": 4, "num_train_epochs": 4}
    ours = random_lora()
    trainer_on(rows, tmp_path / "ours", ours, **one).train()
    plain = random_lora()
    args = arguments(tmp_path / "plain", **one, eval_strategy="no")
    names = ["input_ids", "labels"]
    order = list(LengthGroups([len(ids) for ids in rows["input_ids"]], 32, 0, lambda: 0))
    args.train_sampling_strategy = "sequential"  # a batch is all rows: only the order in it differs

    def collate(chosen):
        return plain_batch({name: [row[name] for row in chosen] for name in names})

    Trainer(model=plain, args=args, train_dataset=rows.select(order), data_collator=collate).train()
    for (name, ours_is), (_, plain_is) in zip(ours.named_parameters(), plain.named_parameters()):
        if "lora" in name:
            torch.testing.assert_close(ours_is, plain_is, atol=1e-5, rtol=1e-4)


def test_the_patched_model_computes_the_same_and_keeps_loras_dropout():
    ids, model = torch.arange(24).reshape(2, 12), random_lora().train()
    before = model(ids).logits
    with speedups.faster_training(model):
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
    model = get_peft_model(tiny_gpt2(), lora_config(lora_dropout=0.25))
    with speedups.faster_training(model):
        dropouts = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {p for name, p in dropouts.items() if "lora" in name} == {0.25}
    assert {p for name, p in dropouts.items() if "lora" not in name} == {0.0}


def test_a_model_that_was_trained_answers_tuned_and_as_its_base(tmp_path):
    rows, model, prompts = tokens(random_rows(8)), random_lora(), ["Instruction: a\nRéponse:", "b"]
    trainer_on(rows, tmp_path, model).train()
    answers = {
        side: [each.text for each in generate(model, byte_tokenizer(), prompts, side=side)]
        for side in ("base", "tuned")
    }
    assert answers["base"] == [each.text for each in generate(tiny_gpt2(), byte_tokenizer(), prompts)]
    assert answers["tuned"] != answers["base"]


def test_the_documents_recipe_keeps_its_collator():
    assert isinstance(training.data_collator(byte_tokenizer(), "document"), DataCollatorForLanguageModeling)
    assert {type(training.data_collator(byte_tokenizer(), recipe)) for recipe in RECIPES if recipe != "document"} == {
        PadToLongest
    }


def test_every_row_comes_once_an_epoch_in_batches_of_like_length_and_another_order_each_epoch():
    lengths = [(7 * i) % 101 for i in range(1000)]
    epochs = [list(LengthGroups(lengths, 8, 0, lambda number=number: number)) for number in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[2]) == list(range(1000))
    batches = [epochs[0][i : i + 8] for i in range(0, 1000, 8)]
    padded = sum(8 * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)


def test_the_last_batch_is_filled_up_even_by_fewer_rows_than_a_batch():
    rows = list(LengthGroups([5, 6, 7], 8, 0, lambda: 0))
    assert sorted(rows.count(row) for row in range(3)) == [2, 3, 3]


@pytest.mark.parametrize(
    "batch_size, micro_batch_size, processes, wanted",
    [(16, 8, 1, (8, 2)), (16, 16, 2, (8, 1)), (16, 5, 1, (4, 4)), (6, 8, 1, (6, 1)), (12, 8, 2, (6, 1))],
)
def test_a_batch_is_split_evenly(batch_size, micro_batch_size, processes, wanted, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert training.split_batch(batch_size, micro_batch_size) == wanted


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(AlpacaError, match="16 rows cannot be shared by 3 processes"):
        training.split_batch(16, 16)


@pytest.mark.parametrize(
    "capability, wanted", [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_a_gpu_holds_the_base_in_bfloat16_from_compute_capability_8(capability, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert models.base_dtype() == wanted


@pytest.mark.parametrize("units", [(), ("_is_avx512_bf16_supported",), ("_is_amx_tile_supported",)])
def test_a_cpu_holds_the_base_in_bfloat16_if_it_has_the_units(units, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for unit in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, unit, lambda has=unit in units: has, raising=False)
    assert models.base_dtype() == (torch.bfloat16 if units else torch.float32)


@pytest.mark.integration
def test_over_a_bfloat16_base_the_trained_weights_are_float32_and_learn_as_well(tmp_path):
    rows, final = tokens(random_rows(32)), {}
    settings = {"num_train_epochs": 6, "learning_rate": 2e-2}
    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(tiny_gpt2().to(dtype), lora_config())
        trained = {value.dtype for value in model.parameters() if value.requires_grad}
        assert trained == {torch.float32}
        trainer = trainer_on(rows, tmp_path / str(dtype), model, **settings)
        trainer.train()
        final[dtype] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert final[torch.float32][-1] < 0.9 * final[torch.float32][0]
    assert final[torch.bfloat16][-1] == pytest.approx(final[torch.float32][-1], rel=0.02)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_says_what_to_change(error, tmp_path, monkeypatch):
    trainer = trainer_on(tokens(random_rows(8)), tmp_path, random_lora())

    def fail(*arguments, **named):
        raise error

    monkeypatch.setattr(trainer, "compute_loss", fail)
    with pytest.raises(AlpacaError, match="with 4 rows at once: set `micro_batch_size` to 2"):
        trainer.train()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    settings = prepare_run(folder)
    training.finetune(folder, **settings)
    return folder, settings


def test_a_finished_training_says_so_and_trains_no_further(finished, capsys):
    folder, settings = finished
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    training.finetune(folder, **settings)
    assert "finished, all 24 steps of it" in capsys.readouterr().out
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_the_manifest_says_what_made_the_training_without_this_machines_paths(finished):
    folder, settings = finished
    text = (folder / "manifest.json").read_text()
    made_by = json.loads(text)["adapter"]
    assert {name: made_by[name] for name in ("recipe", "dtype", "seed")} == {
        "recipe": "answers",
        "dtype": str(models.base_dtype()).removeprefix("torch."),
        "seed": 0,
    }
    assert made_by["result"]["steps"] == 24 and made_by["result"]["eval_loss"] > 0
    assert {"torch", "transformers", "peft"} <= made_by["versions"].keys() and made_by["hardware"]
    assert settings.items() <= made_by.items() and {"lora_rank", "learning_rate", "optim"} <= made_by.keys()
    assert f'"{folder}' not in text


def test_the_card_holds_prompt_recipe_losses_licence_and_no_path(finished):
    folder, _ = finished
    text = (folder / "adapter" / "README.md").read_text()
    assert "Instruction: {instruction}\n{input, or no such line}\nRéponse:" in text
    for wanted in ("recipe: answers", "lora_rank: 8", "eval_loss: ", "## Licence of the data", "notebook 04 does it"):
        assert wanted in text
    assert f" {folder}" not in text
    metrics = {"n": 8, "base": {"stop_rate": 0.0, "contains": None}, "tuned": {"stop_rate": 0.95, "contains": None}}
    metrics |= {"change": {}, "base_bare": {}, "adapter": "that of another adapter"}
    write_json(folder / "metrics.json", metrics)
    card.write_card(folder)
    assert "notebook 04 does it" in (folder / "adapter" / "README.md").read_text()
    write_json(folder / "metrics.json", metrics | {"adapter": read_record(folder, "adapter")["sha256"]})
    card.write_card(folder)
    assert "| stop_rate | 0 | 0.95 |" in (folder / "adapter" / "README.md").read_text()


def test_the_cards_lines_load_the_adapter_from_any_folder(finished, tmp_path, monkeypatch):
    folder, _ = finished
    text = (folder / "adapter" / "README.md").read_text()
    lines = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(lines.replace('"this folder"', repr(str(folder / "adapter"))), namespace)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        wanted = load_adapter(models.load_base(str(folder / "base")), folder / "adapter")(ids).logits
        torch.testing.assert_close(namespace["model"](ids).logits, wanted)
    assert namespace["tokenizer"]("a").input_ids == byte_tokenizer()("a").input_ids


def test_merged_weights_give_the_adapters_logits_without_peft(finished):
    folder, _ = finished
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alpaca_helpers.models import load_base

    save_merged(load_base(str(folder / "base")), byte_tokenizer(), folder / "adapter", folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    ids = torch.tensor(load_from_disk(folder / "data")["heldout"]["input_ids"][0])[None]
    with torch.inference_mode():
        tuned = load_adapter(load_base(str(folder / "base")), folder / "adapter")(ids).logits
        base = load_base(str(folder / "base"))(ids).logits
        torch.testing.assert_close(merged(ids).logits, tuned, atol=1e-4, rtol=0)
    assert (tuned - base).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(folder / "merged")("abc").input_ids == byte_tokenizer()("abc").input_ids


def test_a_push_that_the_hub_refuses_is_one_sentence(finished, monkeypatch):
    def refuse(*arguments, **named):
        raise OSError("401 Unauthorized\nmore")

    monkeypatch.setattr(card, "create_repo", refuse)
    with pytest.raises(AlpacaError, match=r"not pushed to me/it \(401 Unauthorized\): it is whole on disk"):
        card.push_adapter(finished[0] / "adapter", "me/it")


@pytest.mark.parametrize("recipe", ["document", "document+eos", "answers"])
def test_a_measured_step_leaves_weights_gradients_and_random_state_as_they_were(recipe, tmp_path):
    rows, model = tokens(random_rows(12), recipe), random_lora()  # with the columns of text
    trainer = trainer_on(rows, tmp_path, model, recipe)
    weights, before, random_state = [p.clone() for p in model.parameters()], state(model), torch.get_rng_state()
    seconds, size, there = training.measure_step(trainer)
    assert 0 < seconds < 60 and there > size > sum(p.nbytes for p in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters())) and state(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())


def test_steps_are_measured_on_the_longest_rows_and_on_average_ones(tmp_path, monkeypatch):
    rows = tokens(random_rows(12))
    trainer, seen = trainer_on(rows, tmp_path, random_lora()), []
    loss = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda m, i: seen.append(i["input_ids"].shape) or loss(m, i))
    training.measure_step(trainer)
    lengths = sorted(len(ids) for ids in rows["input_ids"])
    average = sum(lengths) / len(lengths)
    nearest = sorted(lengths, key=lambda length: abs(length - average))[:4]
    assert lengths[-1] > max(nearest) and seen == [(4, lengths[-1]), *[(4, max(nearest))] * 2]


def test_a_step_that_does_not_fit_says_what_to_change(tmp_path, monkeypatch):
    trainer = trainer_on(tokens(random_rows(12)), tmp_path, random_lora())

    def compute_loss(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    with pytest.raises(AlpacaError, match="Out of memory with 4 rows at once: set `micro_batch_size` to 2"):
        training.measure_step(trainer)
