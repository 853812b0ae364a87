"""Other causal language models than GPT-2: `python -m pytest tests/test_any_model.py`.

Each type is a tiny random model with a tokenizer of its kind (`support.models`).
"""

import json
import warnings

import matplotlib
import nbformat
import pytest
import torch
from jinja2.exceptions import TemplateError
from matplotlib import pyplot as plt
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from support import PROJECT
from support.models import MODELS, OTHERS, save, tiny
from support.notebooks import ENGLISH, execute, made_of
from support.runs import save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, pipeline
from transformers.pytorch_utils import Conv1D

from alpaca_helpers import AlpacaError
from alpaca_helpers.batches import PadToLongest
from alpaca_helpers.chat.conversation import Conversation
from alpaca_helpers.data import IGNORED, tokenize
from alpaca_helpers.evaluation import answer_losses
from alpaca_helpers.generation import end_tokens, generate
from alpaca_helpers.lora import check_targets, load_adapter, lora_config, save_merged
from alpaca_helpers.models import fetch_model, load_base, load_tokenizer, positions
from alpaca_helpers.prompts import encode, format_prompt
from alpaca_helpers.runs import read_metrics
from alpaca_helpers.series import NOTEBOOKS
from alpaca_helpers.speedups import faster_training
from alpaca_helpers.training import AnswerTrainer, make_trainer

QUESTIONS = ["Hi", "What is the capital of France, and of Spain?", "Name it.", "Tell me who wrote this book of old."]
ROWS = made_of(ENGLISH, 4)
ANYWHERE = [*MODELS, *OTHERS]
WITH_BOS = ("llama", "opt", "gemma")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each type's base model, made once."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = save(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


def adapted(kind, dropout=0.0, targets=None):
    """The tiny model under a random adapter that changes its answers, and the tokenizer."""
    base, tokenizer = tiny(kind)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_targets(base, targets)
    transposed = any(isinstance(layer, Conv1D) for layer in base.modules())
    model = get_peft_model(base, lora_config(lora_dropout=dropout, target_modules=targets, fan_in_fan_out=transposed))
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.2)
    return model.eval(), tokenizer


# The ids


class Listening:
    """Notes the ids that a model is given first."""

    def __init__(self, model):
        self.seen = []
        handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: self.seen.append(given[0]))
        self.stop = handle.remove

    def first(self):
        self.stop()
        return self.seen[0][0].tolist()


@pytest.mark.parametrize("kind", MODELS)
def test_all_ways_ask_with_the_same_ids(kind, tmp_path):
    model, tokenizer = adapted(kind)
    row = {"instruction": "What is the capital?", "input": "of France", "output": "Paris."}
    prompt = format_prompt(row["instruction"], row["input"])
    ids = tokenizer(prompt).input_ids
    assert (ids[0] == tokenizer.bos_token_id) == (kind in WITH_BOS)
    made = tokenize({name: [value] for name, value in row.items()}, tokenizer)
    trained, labels = made["input_ids"][0], made["labels"][0]
    assert trained[: len(ids)] == ids and labels[: len(ids)] == [IGNORED] * len(ids)
    assert trained[len(ids) :] == labels[len(ids) :] and trained[-1] == tokenizer.eos_token_id
    assert trained[:-1] == tokenizer(f"{prompt} Paris.").input_ids  # one text, though its halves are cut apart

    answered = Listening(model)
    generate(model, tokenizer, [prompt], max_new_tokens=1)
    judged = Listening(model)
    answer_losses(model, tokenizer, [row])
    piped = Listening(model)
    pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt, max_new_tokens=1, do_sample=False)
    chatted = Listening(model)
    conversation = Conversation(model, tokenizer, max_new_tokens=1, compare=False)
    list(conversation.answer(conversation.add(row["instruction"], row["input"])))
    save_adapter(model, tokenizer, tmp_path / "adapter")
    message = {"role": "user", "content": f"{row['instruction']}\n{row['input']}"}
    elsewhere = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert answered.first() == piped.first() == chatted.first() == ids
    assert judged.first() == trained[:-1]
    assert elsewhere.apply_chat_template([message], add_generation_prompt=True)["input_ids"] == ids


@pytest.mark.parametrize("kind", MODELS)
def test_marker_text_stays_text_in_every_way(kind, tmp_path):
    model, tokenizer = adapted(kind)
    typed = f"Say {tokenizer.eos_token}{tokenizer.pad_token} now"
    (ids,) = encode([format_prompt(typed)], tokenizer)
    assert not set(tokenizer.all_special_ids) & set(ids[1:])
    save_adapter(model, tokenizer, tmp_path / "adapter")
    elsewhere, message = AutoTokenizer.from_pretrained(tmp_path / "adapter"), {"role": "user", "content": typed}
    if kind in WITH_BOS:  # the template has to write the BOS token out, so the message cannot hold one
        with pytest.raises(TemplateError, match="The message holds the special token"):
            elsewhere.apply_chat_template([message], add_generation_prompt=True)
    else:
        assert elsewhere.apply_chat_template([message], add_generation_prompt=True)["input_ids"] == ids


@pytest.mark.parametrize(
    "roles", [["assistant"], ["system", "user"], ["user", "assistant"], ["user", "assistant", "user"]]
)
def test_the_template_takes_one_message_of_a_user(roles, tmp_path):
    model, tokenizer = adapted("gpt2")
    save_adapter(model, tokenizer, tmp_path / "adapter")
    elsewhere = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    with pytest.raises(TemplateError, match="one message of a user at a time"):
        elsewhere.apply_chat_template([{"role": role, "content": "Hi"} for role in roles], tokenize=False)


def test_the_document_recipe_pads_with_a_padding_token_of_its_own():
    _, tokenizer = adapted("qwen2")
    made = tokenize({"instruction": ["Hi"], "input": [""], "output": ["Yes."]}, tokenizer, "document", 32)
    padded = [id for id, held in zip(made["input_ids"][0], made["attention_mask"][0]) if not held]
    assert set(padded) == {tokenizer.pad_token_id} != {tokenizer.eos_token_id}


# The answers


@pytest.mark.parametrize("kind", ANYWHERE)
def test_greedy_answers_are_those_of_transformers(kind):
    model, tokenizer = adapted(kind)
    prompts = [format_prompt(question) for question in QUESTIONS]
    ids, lengths = encode(prompts, tokenizer), set()
    plain = {
        "max_new_tokens": 24,
        "do_sample": False,
        "repetition_penalty": 1.0,
        "pad_token_id": tokenizer.pad_token_id,
    }
    expected = []
    for row in ids:
        given = torch.tensor([row])
        expected.append(model.generate(input_ids=given, attention_mask=given * 0 + 1, **plain)[0, len(row) :].tolist())
    ends = {expected[0][5], expected[2][9]}  # so that rows leave the batch at different steps
    model.generation_config.eos_token_id = sorted(ends)
    ends |= {tokenizer.eos_token_id}
    for answer, row in zip(generate(model, tokenizer, prompts, max_new_tokens=24), expected):
        end = next((place for place, id in enumerate(row) if id in ends), len(row))
        assert (answer.tokens, answer.stopped) == (end, end < len(row))
        assert answer.text == tokenizer.decode(row[:end]).strip()
        lengths.add(end)
    assert len(lengths) > 1 and end_tokens(model, tokenizer) == ends


@pytest.mark.parametrize("kind", ANYWHERE)
def test_answers_do_not_depend_on_the_batch(kind):
    model, tokenizer = adapted(kind)
    prompts = [format_prompt(question) for question in QUESTIONS]
    together = [generate(model, tokenizer, prompts, side=side, max_new_tokens=12) for side in ("base", "tuned")]
    for side, answers in zip(("base", "tuned"), together):
        for prompt, answer in zip(prompts, answers):
            assert generate(model, tokenizer, [prompt], side=side, max_new_tokens=12) == [answer]
    with model.disable_adapter():
        assert generate(model, tokenizer, prompts, max_new_tokens=12) == together[0] != together[1]


# The training


@pytest.mark.parametrize("recipe", ["document", "answers"])
@pytest.mark.parametrize("kind", ANYWHERE)
def test_loss_and_gradients_are_the_plain_models(kind, recipe, tmp_path):
    model, tokenizer = adapted(kind)
    columns = {name: [row[name] for row in ROWS[:4]] for name in ("instruction", "output")} | {
        "input": ["x y", "", "", "z"]
    }
    made = tokenize(columns, tokenizer, recipe, 48)
    rows = [dict(zip(made, values)) for values in zip(*made.values())]
    batch = PadToLongest(tokenizer.pad_token_id)(rows)
    trainer = AnswerTrainer.__new__(AnswerTrainer)  # its loss alone
    trainer.model, trainer.since_log = model, torch.zeros(2)
    learned = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (1, 0)).flatten().nonzero()[:, 0]

    def gradients(loss):
        loss.backward()
        found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        model.zero_grad()
        return found

    plain = model(**batch).loss  # in evaluation mode: no dropout
    wanted = gradients(plain)
    model.train()
    with faster_training(model):
        loss = trainer.compute_loss(model, {**batch, "learned": learned})
        found = gradients(loss)
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-5)
    assert found.keys() == wanted.keys() and all("lora_" in name for name in found)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ANYWHERE)
def test_the_base_has_its_dropout_again_after_the_training(kind):
    model, tokenizer = adapted(kind, dropout=0.1)
    ids = torch.tensor(encode([format_prompt("Hi")], tokenizer))

    def drawn():
        torch.manual_seed(0)
        with torch.inference_mode():
            return model.train()(ids).logits

    before = drawn()
    with faster_training(model):
        inside = drawn()
    assert torch.equal(drawn(), before) and not torch.equal(inside, model.eval()(ids).logits)


# Adapters


SAVED = {"gpt2": {}, "llama": {"max_shard_size": "50KB"}, "qwen2": {}, "opt": {"max_shard_size": "50KB"}}


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("kind", ANYWHERE)
def test_an_adapter_is_saved_loaded_and_merged(kind, targets, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of fan_in_fan_out
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        model, tokenizer = adapted(kind, targets=targets)
    ids = torch.tensor(encode([format_prompt("Who?")], tokenizer))
    base = tiny(kind)[0].half()  # as many are published
    base.save_pretrained(tmp_path / "base", **SAVED.get(kind, {}))
    tokenizer.save_pretrained(tmp_path / "base")
    name = str(tmp_path / "base")
    trained = load_base(name)
    assert trained.dtype == torch.float32
    transposed = any(isinstance(layer, Conv1D) for layer in trained.modules())
    tuned = get_peft_model(trained, lora_config(target_modules=targets, fan_in_fan_out=transposed)).eval()
    tuned.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" in key}, strict=False)
    save_adapter(tuned, tokenizer, tmp_path / "adapter")
    again = load_adapter(load_base(name, dtype=torch.bfloat16), tmp_path / "adapter")  # the hash is of the same weights
    assert again.get_base_model().dtype == torch.bfloat16
    save_merged(load_base(name), tokenizer, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(fetch_model(str(tmp_path / "merged")))
    with torch.inference_mode():
        apart, plain = tuned(ids).logits, load_base(name)(ids).logits
        torch.testing.assert_close(merged(ids).logits, apart, atol=1e-4, rtol=0)
    assert (apart - plain).abs().max() > 1e-2


@pytest.mark.parametrize("kind", MODELS)
def test_the_merged_model_answers_messages_as_we_do(kind, folders, tmp_path):
    model, tokenizer = adapted(kind)
    save_adapter(model, tokenizer, tmp_path / "adapter")
    save_merged(load_base(str(folders(kind))), tokenizer, tmp_path / "adapter", tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    ends = sorted({tokenizer.eos_token_id} | ({tokenizer.pad_token_id} if "qwen" in kind else set()))
    assert settings["eos_token_id"] == (ends if len(ends) > 1 else ends[0])
    assert settings["pad_token_id"] == tokenizer.pad_token_id and "repetition_penalty" not in settings
    pipe = pipeline("text-generation", model=str(tmp_path / "merged"))
    ours = generate(model, tokenizer, [format_prompt(question) for question in QUESTIONS], max_new_tokens=16)
    for question, answer in zip(QUESTIONS, ours):
        messages = [{"role": "user", "content": question}]
        said = pipe(messages, max_new_tokens=16, do_sample=False)[0]["generated_text"][-1]
        assert said["role"] == "assistant" and said["content"].strip() == answer.text


@pytest.mark.parametrize("kind", MODELS)
def test_a_name_that_no_layer_has_is_answered_with_those_there_are(kind):
    base, _ = tiny(kind)
    with pytest.raises(AlpacaError, match="`nope`.*choose `target_modules` among .*, or all-linear") as refused:
        check_targets(base, ["nope"])
    known = str(refused.value).partition("among ")[2].removesuffix(", or all-linear.").split(", ")
    check_targets(base, known)
    base.config.model_type = "unheard-of"
    with pytest.raises(AlpacaError, match=f"peft knows no.*unheard-of.*among {', '.join(known)}, or all-linear"):
        check_targets(base, None)
    check_targets(base, "all-linear")


# What is refused, and what has no limit


def refused(folder, sentence):
    with pytest.raises(AlpacaError, match=sentence) as raised:
        fetch_model(str(folder))
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    folder = save("gpt_neox", tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(folder, "no end-of-text token")


def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path):
    folder = save("llama", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder, add_eos_token=True)
    tokenizer.save_pretrained(folder)
    refused(folder, "a token after every text.*add_eos_token")


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    folder = save("qwen2", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(folder)
    refused(folder, "it has room for 503 tokens, and its tokenizer has 505")


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_no_tokenizer_is_one_sentence(kind, tmp_path):
    folder = save(kind, tmp_path / "base")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(folder, "The tokenizer of the model")


def test_a_folder_of_gguf_alone_is_one_sentence(tmp_path):
    (tmp_path / "model-q8_0.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "GGUF")


def test_a_model_that_keeps_no_cache_of_attention_is_refused(tmp_path):
    _, tokenizer = tiny("gpt_neox")
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refused(tmp_path, "mamba.*decoder-only")


def test_a_model_without_positions_has_no_limit():
    base, tokenizer = tiny("bloom")
    assert positions(base.config) > 1e9
    assert generate(base, tokenizer, ["Hi " * 400], max_new_tokens=2)[0].prompt_cut == 0


# All of it


def check_what_training_did(kind, notebook, folder):
    """Hold what notebook 03 says of the weights against the saved adapter, which its second training leaves alone."""
    drawn = {"matrices", "loss_scale", "token_losses", "weight_changes", "singular_values", "overfitting"}
    assert drawn <= {path.stem for path in (folder / "pictures").iterdir()}
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    base, rank = notebook["base_model"].state_dict(), notebook["lora_rank"]
    for name in (name for name in saved if "lora_A" in name):
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        change = 16 / 8 * saved[name.replace("lora_A", "lora_B")] @ saved[name]  # (outputs, inputs)
        weight = base[f"{layer}.base_layer.weight"]
        weight = weight.T if notebook["transposed"] else weight
        number = next(int(word) for word in layer.split(".") if word.isdigit())
        whole = [".".join(layer.split(".")[-2:])]
        parts = ["query", "key", "value"] if kind == "gpt2" else whole
        for part, new, old in zip(parts, change.chunk(len(parts)), weight.chunk(len(parts))):
            assert notebook["changes"][part][number] == pytest.approx((new.norm() / old.norm()).item(), rel=1e-3)
    assert all(value[rank - 1] > 1e-3 * value[0] > 100 * value[rank:].max() for value in notebook["values"])

    trained = get_peft_model_state_dict(notebook["model"])
    assert trained.keys() == saved.keys() and all(torch.equal(trained[name], saved[name]) for name in saved)
    assert len([entry for entry in notebook["history"] if "eval_loss" in entry]) == notebook["epochs"]
    assert all(path.name.startswith("checkpoint-") for path in (folder / "checkpoints").iterdir())

    notebook["seconds"] = 1e9  # a step that takes too long for a second training
    for cell in nbformat.read(NOTEBOOKS[2], as_version=4).cells:
        if cell.cell_type == "code" and cell.id.startswith("03-42") and cell.id != "03-42":
            exec(cell.source, notebook)
    assert notebook["expected"] > 120 and notebook["history"] == [] and notebook["turned"] == "not tried"


@pytest.mark.integration
@pytest.mark.parametrize("kind", ANYWHERE)
def test_the_four_notebooks_run_on_it(kind, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(PROJECT)
    matplotlib.use("agg")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    parameters = {"profile": "pocket", "model": str(folders(kind)), "dataset": str(tmp_path / "rows.json")}
    parameters |= {"run": str(tmp_path / "run"), "max_new_tokens": 12, "num_train_epochs": 2, "merged": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for notebook in NOTEBOOKS:
            execute(notebook, parameters | {"batch_size": 4})
            plt.close("all")
        said = capsys.readouterr().out
        resumed = execute(NOTEBOOKS[2], parameters | {"batch_size": 4})
    for check in ("the same as by hand", "the same", "adapter off is the base model", "B is zero"):
        assert f"{check}: True" in said and f"{check}: False" not in said
    assert "changed by training: True | the same after loading: True" in said
    assert f"padding is the end of text too: {kind in ('gpt2', 'llama')}" in said
    assert "This training is finished" in capsys.readouterr().out
    metrics = read_metrics(tmp_path / "run")
    assert metrics["n"] and metrics["tuned"]["answer_loss"] < metrics["base"]["answer_loss"]
    check_what_training_did(kind, resumed, tmp_path / "run")

    trainer = make_trainer(tmp_path / "run", num_train_epochs=1, batch_size=4)  # as torchrun does
    trainer.args.output_dir = str(tmp_path / "again")
    assert trainer.train().training_loss > 0
    saved, made = PeftConfig.from_pretrained(tmp_path / "run" / "adapter"), trainer.model.active_peft_config
    assert (saved.target_modules, saved.fan_in_fan_out) == (made.target_modules, made.fan_in_fan_out)

    base, tokenizer = load_base(str(folders(kind))), load_tokenizer(str(folders(kind)))
    model = load_adapter(base, tmp_path / "run" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    ids = torch.tensor(encode([format_prompt("Name a bird.")], tokenizer))
    with torch.inference_mode():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    conversation = Conversation(model, tokenizer, temperature=0, max_new_tokens=12)
    *_, exchange = conversation.answer(conversation.add("Name a bird."))
    before, after = (reply.text for reply in exchange.replies)
    sides = [
        generate(model, tokenizer, [format_prompt("Name a bird.")], side=side, max_new_tokens=12)
        for side in ("base", "tuned")
    ]
    assert [before, after] == [answers[0].text.rstrip("\ufffd") for answers in sides]  # half a character is not shown
