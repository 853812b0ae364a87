"""Ids, loss, gradients, answers and adapters on ten architectures, each a tiny random model with its kind of tokenizer.

Held against transformers' and peft's own: `python -m pytest tests/test_architectures.py`.
"""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from jinja2.exceptions import TemplateError
from peft import get_peft_model
from support.models import GROUPED, MODELS, OTHERS, SHAPE, assert_same, gradients, tiny, tiny_tokenizer, with_lora
from support.notebooks import ENGLISH, made_of
from support.runs import save_adapter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, pipeline

from alpaca_export.merged import save_merged
from alpaca_helpers import AlpacaError
from alpaca_helpers.batches import PadToLongest, add_learned
from alpaca_helpers.chat.conversation import Conversation
from alpaca_helpers.data import IGNORED, tokenize
from alpaca_helpers.evaluation import answer_losses
from alpaca_helpers.generation import end_tokens, generate
from alpaca_helpers.lora import choose_targets, load_adapter, lora_config, lora_in_base_precision
from alpaca_helpers.models import fetch_model, load_base, positions, training_options
from alpaca_helpers.prompts import encode, format_prompt
from alpaca_helpers.training import AnswerTrainer

QUESTIONS = ["Hi", "What is the capital of France, and of Spain?", "Name it.", "Tell me who wrote this book of old."]
PROMPTS = [format_prompt(question) for question in QUESTIONS]
ANYWHERE = [*MODELS, *OTHERS]
WITH_BOS = ("llama", "opt", "gemma")


def adapted(kind, targets=None, **settings):
    """The tiny model under a random adapter without dropout, and the tokenizer, which pads with its end if need be."""
    base, tokenizer = tiny(kind)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of fan_in_fan_out
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        return with_lora(base, 0.2, **{"lora_dropout": 0.0, "target_modules": targets} | settings), tokenizer


def loaded_for_training(model, kind, folder, **settings):
    """The same model and adapter, its base loaded with `training_options`."""
    tiny(kind)[0].save_pretrained(folder)
    options = training_options(folder)
    # it depends on the processor, and in Gemma 2 one caps what another does not
    options.pop("attn_implementation", None)
    base = AutoModelForCausalLM.from_pretrained(folder, **options)
    faster = with_lora(base, 0.2, **settings)
    faster.load_state_dict(model.state_dict())
    return faster.train()


def first_ids(model, ask):
    """Return the ids that the model is given first when `ask` is called."""
    seen = []
    embedding = model.get_input_embeddings()
    with embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        ask()
    return seen[0][0].tolist()


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "qwen3"])  # qwen2's tokenizer is its own too
def test_all_ways_ask_with_the_same_ids_and_what_a_user_types_here_stays_text(kind, tmp_path):
    model, tokenizer = adapted(kind)
    row = {"instruction": "What is the capital?", "input": "of France", "output": "Paris."}
    prompt = format_prompt(row["instruction"], row["input"])
    ids, columns = tokenizer(prompt).input_ids, {name: [value] for name, value in row.items()}
    assert (ids[0] == tokenizer.bos_token_id) == (kind in WITH_BOS)
    made = tokenize(columns, tokenizer)
    trained, labels = made["input_ids"][0], made["labels"][0]
    assert trained[: len(ids)] == ids and labels[: len(ids)] == [IGNORED] * len(ids)
    assert trained[len(ids) :] == labels[len(ids) :] and trained[-1] == tokenizer.eos_token_id
    assert trained[:-1] == tokenizer(f"{prompt} Paris.").input_ids  # one text, though its halves are cut apart
    padded = tokenize(columns, tokenizer, "document", 96)
    padding = [id for id, held in zip(padded["input_ids"][0], padded["attention_mask"][0]) if not held]
    assert set(padding) == {tokenizer.pad_token_id}

    piped, talk = pipeline("text-generation", model=model, tokenizer=tokenizer), Conversation(model, tokenizer)
    for ask in (
        lambda: generate(model, tokenizer, [prompt], max_new_tokens=1),
        lambda: piped(prompt, max_new_tokens=1, do_sample=False),
        lambda: next(iter(talk.answer(talk.add(row["instruction"], row["input"])))),
    ):
        assert first_ids(model, ask) == ids
    assert first_ids(model, lambda: answer_losses(model, tokenizer, [row])) == trained[:-1]

    save_adapter(model, tokenizer, tmp_path / "adapter")
    elsewhere = AutoTokenizer.from_pretrained(tmp_path / "adapter")

    def template(content, *roles):
        messages = [{"role": role, "content": content} for role in roles or ("user",)]
        return elsewhere.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    asked = f"{row['instruction']}\n{row['input']}"
    assert template(asked) == template([{"type": "text", "text": part} for part in asked.partition(" ")]) == ids
    assert template("") == template(None) == encode([format_prompt("")], tokenizer)[0]
    for roles in ("assistant",), ("system", "user"), ("user", "assistant"), ("user", "assistant", "user"):
        with pytest.raises(TemplateError, match="one message of a user at a time"):
            template("Hi", *roles)
    with pytest.raises(TemplateError, match="text alone"):
        template([{"type": "image"}])
    special = f"{tokenizer.eos_token}{tokenizer.pad_token}"
    (ids,) = encode([format_prompt(f"Say {special} now")], tokenizer)
    assert not set(tokenizer.all_special_ids) & set(ids[1:])  # here what a user types is text; elsewhere as everywhere
    assert tokenizer.eos_token_id in template(f"Say {special} now")
    ended = elsewhere("Paris." + tokenizer.eos_token).input_ids
    assert ended == [*elsewhere("Paris.").input_ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", ANYWHERE)
def test_greedy_answers_are_those_of_transformers_in_any_batch(kind):
    model, tokenizer = adapted(kind)
    plain = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.0}
    plain["pad_token_id"] = tokenizer.pad_token_id

    def expected():
        rows = [torch.tensor([ids]) for ids in encode(PROMPTS, tokenizer)]
        made = [model.generate(ids, attention_mask=ids * 0 + 1, **plain) for ids in rows]
        return [answer[0, ids.shape[1] :].tolist() for answer, ids in zip(made, rows)]

    with model.disable_adapter():
        wanted = {"base": expected()}
    wanted["tuned"] = expected()
    assert wanted["base"] != wanted["tuned"]

    def length(row, ends):
        return next((place for place, id in enumerate(row) if id in ends), len(row))

    def lengths(ends):
        return {length(row, ends) for row in wanted["tuned"]}

    drawn = [row[len(row) // 2] for row in wanted["tuned"]]
    pair = max(([one, other] for one in drawn for other in drawn), key=lambda pair: len(lengths(pair)))
    model.generation_config.eos_token_id = pair  # so that rows leave the batch at different steps
    ends = sorted({tokenizer.eos_token_id, *pair})
    assert len(lengths(ends)) > 1 and end_tokens(model, tokenizer) == ends
    for side, rows in wanted.items():
        together = generate(model, tokenizer, PROMPTS, side=side, max_new_tokens=12)
        assert generate(model, tokenizer, PROMPTS, side=side, max_new_tokens=12, batch_size=1) == together
        for answer, row in zip(together, rows):
            end = length(row, ends)
            assert (answer.ids, answer.stopped) == (row[:end], end < len(row))
            assert answer.text == tokenizer.decode(row[:end]).strip()
    based = generate(model, tokenizer, PROMPTS, side="base", max_new_tokens=12)
    with model.disable_adapter():
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == based


@pytest.mark.parametrize(
    "kind, recipe, targets",
    [(kind, *how) for kind in ANYWHERE for how in (("document", None), ("answers", "all-linear"))]
    + [("llama", "document+eos", ["q_proj", "lm_head"])],  # the head itself, before which positions are chosen
)
def test_loss_and_gradients_are_the_plain_models(kind, recipe, targets, tmp_path):
    """Logits at learned labels alone, rows without a mask, faster layers, no dropout of the base: in float32."""
    model, tokenizer = adapted(kind, targets)
    rows = [row | {"input": text} for row, text in zip(made_of(ENGLISH, 2), ("x y", "", "and a longer one", "z"))]
    made = tokenize({name: [row[name] for row in rows] for name in rows[0]}, tokenizer, recipe, 48)
    lengths = [len(ids) for ids in made["input_ids"]]
    rows = [dict(zip(made, values)) for values in zip(*made.values())]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False) if recipe == "document" else None
    batch = add_learned(collator or PadToLongest(tokenizer.pad_token_id), rows)
    learned, width = batch["labels"][:, 1:] != IGNORED, batch["input_ids"].shape[1]
    real = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    real = torch.tensor(made["attention_mask"])[:, :width] if "attention_mask" in made else real
    trainer = AnswerTrainer.__new__(AnswerTrainer)  # its loss alone
    faster = loaded_for_training(model, kind, tmp_path, lora_dropout=0.0, target_modules=targets)
    trainer.model, trainer.since_log = faster, torch.zeros(2)
    trainer.args = SimpleNamespace(label_smoothing_factor=0.0)

    plain = model(batch["input_ids"], labels=batch["labels"], attention_mask=real).loss  # without dropout
    wanted = gradients(model, plain) | {"loss": plain.detach()}
    with lora_in_base_precision(faster):
        loss, outputs = trainer.compute_loss(faster, dict(batch), return_outputs=True)
        found = gradients(faster, loss) | {"loss": loss.detach()}
    assert outputs.logits.shape == (learned.sum(), len(tokenizer))
    assert all("lora_" in name for name in wanted if name != "loss") and len(wanted) > 4
    assert_same(found, wanted)
    assert faster(batch["input_ids"]).logits.shape == (*batch["input_ids"].shape, len(tokenizer))  # the hook is gone


@pytest.mark.parametrize("kind", ANYWHERE)
def test_loras_dropout_alone_stays_in_the_training(kind, tmp_path):
    model, tokenizer = adapted(kind, lora_dropout=0.1)
    ids = torch.tensor(encode(PROMPTS[:1], tokenizer))

    def drawn(lora_dropout):
        faster = loaded_for_training(model, kind, tmp_path, lora_dropout=lora_dropout)
        with torch.inference_mode():
            return [faster(ids).logits for _ in range(2)]

    assert torch.equal(*drawn(0.0)) and not torch.equal(*drawn(0.1))


@pytest.mark.integration
@pytest.mark.parametrize("kind", ANYWHERE)
def test_an_adapter_is_saved_loaded_and_merged_and_answers_messages_elsewhere(kind, tmp_path):
    _, tokenizer = adapted(kind, "all-linear")
    base, name = tiny(kind)[0].half(), str(tmp_path / "base")  # as many are published
    base.save_pretrained(name, max_shard_size="50KB" if kind in ("llama", "opt") else "5GB")
    tokenizer.save_pretrained(name)
    tuned = with_lora(load_base(name), 0.2, lora_dropout=0.0, target_modules="all-linear")
    assert tuned.get_base_model().dtype == torch.float32
    save_adapter(tuned, tokenizer, tmp_path / "adapter")
    again = load_adapter(load_base(name, dtype=torch.bfloat16), tmp_path / "adapter")  # the hash is of the same weights
    assert again.get_base_model().dtype == torch.bfloat16
    save_merged(load_base(name), tokenizer, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(fetch_model(str(tmp_path / "merged")))
    ids = torch.tensor(encode(PROMPTS[:1], tokenizer))
    with torch.inference_mode():
        apart, plain = tuned(ids).logits, load_base(name)(ids).logits
        torch.testing.assert_close(merged(ids).logits, apart, atol=1e-4, rtol=0)
    assert (apart - plain).abs().max() > 1e-2

    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    ends = sorted({tokenizer.eos_token_id} | ({tokenizer.pad_token_id} if "qwen" in kind else set()))
    assert settings["eos_token_id"] == (ends if len(ends) > 1 else ends[0])
    assert settings["pad_token_id"] == tokenizer.pad_token_id and "repetition_penalty" not in settings
    pipe = pipeline("text-generation", model=str(tmp_path / "merged"))
    ours = generate(tuned, tokenizer, PROMPTS, max_new_tokens=12)
    for question, answer in zip(QUESTIONS, ours):
        shown = tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
        said = pipe([{"role": "user", "content": question}], max_new_tokens=12, do_sample=False)[0]["generated_text"]
        assert said[-1]["role"] == "assistant" and said[-1]["content"].strip() == shown


@pytest.mark.parametrize("kind", ANYWHERE)
def test_a_name_that_no_layer_has_is_answered_with_those_there_are(kind):
    base, _ = tiny(kind)
    with pytest.raises(AlpacaError, match="cannot correct `nope`.*choose `target_modules` among .*, or all") as refused:
        choose_targets(base, ["nope"])
    known = str(refused.value).partition("among ")[2].removesuffix(", or all-linear.").split(", ")
    assert choose_targets(base, known) == known
    assert [choose_targets(base, targets) for targets in (None, "all-linear")] == [None, "all-linear"]


@pytest.mark.parametrize("kind", ["olmo2", "starcoder2"])
def test_where_peft_names_no_layers_all_linear_ones_are_corrected_and_a_line_says_so(kind, capsys):
    shape = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 1}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | shape))
    targets = choose_targets(base, None)
    assert f"peft names no layers for {kind}" in capsys.readouterr().out
    names = get_peft_model(base, lora_config(target_modules=targets, fan_in_fan_out=False)).targeted_module_names
    assert len(names) > 8 and not any("lm_head" in name for name in names)


EXPERTS = {"mixtral": {"num_local_experts": 4}, "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}}
EXPERTS["qwen3_moe"] = EXPERTS["olmoe"] | {"moe_intermediate_size": 32}
EXPERTS["qwen3_next"] = EXPERTS["qwen3_moe"] | {"shared_expert_intermediate_size": 32, "linear_num_key_heads": 2}
EXPERTS["qwen3_next"] |= {"linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
EXPERTS["qwen3_next"] |= {"layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_mixture_of_experts_is_corrected_in_its_attention(kind, tmp_path, capsys):
    tokenizer = tiny_tokenizer("qwen")
    shape = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.2}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **GROUPED | shape | EXPERTS[kind])).eval()
    targets = choose_targets(base, None)
    assert f"{kind} is a mixture of experts" in capsys.readouterr().out and {"q_proj", "o_proj"} <= set(targets)
    assert choose_targets(base, "all-linear") == targets and choose_targets(base, targets) == targets
    with pytest.raises(AlpacaError, match="`down_proj`.*among .*q_proj"):
        choose_targets(base, ["down_proj"])
    model = with_lora(base, lora_dropout=0.1, target_modules=targets)
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=4)
    save_adapter(model, tokenizer, tmp_path / "adapter")
    again = load_adapter(model.unload(), tmp_path / "adapter")
    assert generate(again, tokenizer, PROMPTS, max_new_tokens=4) == answers


def test_a_model_without_positions_has_no_limit():
    base, tokenizer = tiny("bloom")
    assert positions(base.config) > 1e9 and positions(AutoConfig.for_model("mpt", max_seq_len=64)) == 64
    assert generate(base, tokenizer, ["Hi " * 400], max_new_tokens=2)[0].prompt_cut == 0
