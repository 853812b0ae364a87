"""Adapters and base models that are broken, foreign or hostile are refused in a sentence that names the place."""

import json
import os
import shutil
import socket
import sys
import warnings
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import save, tiny, with_lora
from support.runs import byte_tokenizer, finished_run, save_adapter, tiny_gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig, BertConfig, MambaConfig, T5Config, ViTConfig
from transformers.utils import logging

from alpaca_helpers import AlpacaError, pocket
from alpaca_helpers.card import model_card
from alpaca_helpers.chat import terminal
from alpaca_helpers.files import CHECKSUMS, WEIGHTS, write_checksums
from alpaca_helpers.generation import generate
from alpaca_helpers.hub import fetch
from alpaca_helpers.lora import BASE, CONFIG, base_hash, check_trained, choose_targets, load_adapter, lora_config
from alpaca_helpers.models import best_device, fetch_model, load_base, load_tokenizer
from alpaca_helpers.run import Run

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def base():
    return tiny_gpt2().eval()


def answers(model):
    return generate(model, byte_tokenizer(), ["Hi"], max_new_tokens=8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with an adapter, never changed, and what it answers."""
    folder, model = tmp_path_factory.mktemp("saved") / "adapter", with_lora(tiny_gpt2())
    save_adapter(model, byte_tokenizer(), folder)
    return folder, answers(model)


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of that folder, to break."""
    return shutil.copytree(saved[0], tmp_path / "adapter")


def refused(base, folder, sentence):
    """Check that the adapter is refused in one sentence that names its folder, and the base left as it was."""
    before = base_hash(base), list(base.state_dict())
    with pytest.raises(AlpacaError, match=sentence) as raised:
        load_adapter(base, folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    assert (base_hash(base), list(base.state_dict())) == before


def change_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_lora_cannot_correct_is_refused_before_the_training(base):
    assert choose_targets(base, ["c_attn", "h.1.attn.c_proj"]) == ["c_attn", "h.1.attn.c_proj"]
    assert choose_targets(base, "c_attn") == ["c_attn"]  # a name, not its letters
    others = [["c_attn", name] for name in ("lm_head", "wte", "nope", "c_att", "ln_1", "attn", "transformer")]
    for wrong in ("c_att", *others):
        name = wrong if isinstance(wrong, str) else wrong[1]
        with pytest.raises(AlpacaError, match=f"LoRA cannot correct `{name}`.*among c_attn, c_fc, c_proj, or all-lin"):
            choose_targets(base, wrong)


def test_plain_peft_loads_it_without_a_warning(saved, base):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's own call to transformers
        model = PeftModel.from_pretrained(base, str(saved[0])).eval()
    assert answers(model) == saved[1]


def test_a_base_in_bfloat16_is_the_same_base_and_one_rounded_to_float16_is_told_to_be_loaded_in_float32(
    base, adapter, tmp_path
):
    save_adapter(with_lora(tiny_gpt2().bfloat16()), byte_tokenizer(), tmp_path / "of bfloat16")
    load_adapter(base, tmp_path / "of bfloat16")  # the other way: tests/test_architectures.py
    refused(tiny_gpt2().half(), adapter, "held in float16; load .* in float32")


MORE = [{"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}, {"use_dora": True}]
MORE += [{"modules_to_save": ["wte"]}, {"trainable_token_indices": [1]}, {"target_modules": ["c_attn", "wte"]}]
MORE += [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]  # they change the base's weights


@pytest.mark.parametrize("more", MORE, ids=lambda more: next(iter(more)))
def test_what_changes_more_than_loras_matrices_is_refused_before_the_training_and_on_loading(more, base, tmp_path):
    config = lora_config(target_modules=["c_attn"])
    for name, value in more.items():
        setattr(config, name, value)
    model = get_peft_model(tiny_gpt2(), config)
    with pytest.raises(AlpacaError, match="changes more than LoRA's matrices A and B"):
        check_trained(model)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.fill_(0.1)
    save_adapter(model, byte_tokenizer(), tmp_path / "adapter")  # as earlier versions did
    refused(base, tmp_path / "adapter", "more than LoRA's matrices A and B")


@pytest.mark.parametrize("number, phrase", [(NAN, "holds NaN or infinity"), (0.0, "is zero")])
def test_a_useless_adapter_does_not_take_the_place_of_a_good_one(number, phrase, saved, adapter, base):
    model = with_lora(tiny_gpt2())
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.fill_(number)
    with pytest.raises(AlpacaError, match=f"{adapter}.*{phrase}.*`learning_rate` and `resume = False`"):
        save_adapter(model, byte_tokenizer(), adapter)
    assert answers(load_adapter(base, adapter)) == saved[1]


def test_the_chat_answers_for_a_manifest_of_an_early_version_without_a_revision(tmp_path, monkeypatch, capsys):
    run = Run(finished_run(tmp_path / "run"))
    record = run.record("adapter")
    del record["model_revision"]
    run.write_record("adapter", record)
    monkeypatch.setattr(sys, "argv", ["chat", "--run", str(run.folder), "--once", "Hi", "--max-new-tokens", "8"])
    terminal.main()
    assert capsys.readouterr().out.strip()


FAULTS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "bit-flipped": lambda path: path.write_bytes((c := path.read_bytes())[:-9] + bytes([c[-9] ^ 1]) + c[-8:]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_named_and_the_right_adapter_can_be_loaded_after(fault, saved, adapter, base, tmp_path):
    for name in (WEIGHTS, CONFIG, BASE, "tokenizer.json", CHECKSUMS):
        whole = (adapter / name).read_bytes()
        FAULTS[fault](adapter / name)
        wrong = f"{name} is {'missing' if fault == 'missing' else 'damaged'}"
        refused(base, adapter, "not whole" if name == CHECKSUMS else f"not whole \\({wrong}\\)")
        (adapter / name).write_bytes(whole)
    refused(base, tmp_path / "nowhere", "missing or not whole.*run notebook 03")
    assert answers(load_adapter(base, adapter)) == saved[1]


LAYER = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"
THIRD = LAYER.replace(".1.", ".2.")  # the base has two layers
UNFIT = [  # whole files under good checksums, but wrong: what is said, the change
    ("does not fit this base model: .*c_attn.* differs", {"r": 4}),
    ("does not fit this base model: .* differs", {"target_modules": ["c_proj"]}),
    ("does not fit this base model: .*c_fc.* differs", {"target_modules": ["c_attn", "c_fc"]}),
    (r"cannot be put on this base model \(.*q_proj", {"target_modules": ["q_proj"]}),
    ("cannot be put on this base model", {"r": "eight"}),
    ("h.2.attn.c_attn.lora_A.weight differs", lambda w: w.update({THIRD: w[LAYER].clone()})),
    ("h.1.attn.c_attn.lora_A.weight differs", lambda w: w.pop(LAYER)),
    ("NaN or infinity .in base_model", lambda w: w[LAYER].view(-1)[3:4].fill_(NAN)),
    ("NaN or infinity .in base_model", lambda w: w[LAYER].view(-1)[3:4].fill_(-INFINITY)),
    ("is zero", lambda w: [value.zero_() for name, value in w.items() if "lora_A" in name]),
    ("is zero", lambda w: [value.zero_() for name, value in w.items() if "lora_B" in name]),
]


def test_what_does_not_fit_is_noticed_under_good_checksums(adapter, base):
    whole = {path: path.read_bytes() for path in adapter.iterdir()}
    for sentence, change in UNFIT:
        if callable(change):
            change_weights(adapter / WEIGHTS, change)
        else:
            change_json(adapter / CONFIG, **change)
        write_checksums(adapter)
        refused(base, adapter, sentence)
        for path, content in whole.items():
            path.write_bytes(content)


def test_a_base_of_another_shape_or_with_other_weights_is_refused(adapter, base):
    for change in ({"n_layer": 3}, {"n_layer": 1}, {"n_embd": 64}):
        other = tiny_gpt2(**change)
        refused(other, adapter, "does not fit this base model: .*lora_.* differs; load the base")
    refused(tiny_gpt2(initializer_range=0.3), adapter, "the base's weights are others")
    with torch.no_grad():
        base.transformer.h[1].mlp.c_fc.weight[5, 7] *= 1.01
    refused(base, adapter, "the base's weights are others.*; load the base it was trained on")


def test_a_second_adapter_is_refused_on_a_model_that_has_one(adapter, base):
    with pytest.raises(AlpacaError, match="has an adapter already: load this one onto a plain base"):
        load_adapter(load_adapter(base, adapter), adapter)


def test_the_head_of_the_card_is_read_back_whatever_the_names():
    name = 'owner/a: "b" # [c]'
    made = {"model": name, "model_revision": "no", "dataset": "rows", "recipe": "answers", "versions": {"peft": "1"}}
    card = ModelCard(model_card(made, {}))
    assert card.data.base_model == name and card.data.library_name == "peft"


# Bases


class Canary(str):
    """A folder's path whose pickle makes the folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.fixture
def base_folder(base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def refused_base(folder, sentence):
    """Check that the folder is refused in one sentence that names it."""
    with pytest.raises(AlpacaError, match=sentence) as raised:
        fetch_model(str(folder))
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    assert "delete" not in str(raised.value)  # it is the reader's own


def test_an_adapter_or_a_base_that_is_a_pickle_is_refused_unread(adapter, base, base_folder, tmp_path):
    (adapter / WEIGHTS).unlink()
    (base_folder / "model.safetensors").unlink()
    for pickle in (adapter / "adapter_model.bin", base_folder / "pytorch_model.bin"):
        torch.save({"wte": Canary(tmp_path / "sang")}, pickle)
    refused(base, adapter, f"{WEIGHTS} is missing")
    write_checksums(adapter)
    refused(base, adapter, f"cannot be put on this base model .*{WEIGHTS}")
    refused_base(base_folder, "safetensors")
    assert not (tmp_path / "sang").exists()
    torch.load(pickle, weights_only=False)
    assert (tmp_path / "sang").is_dir()  # the canary sings where pickles are trusted


PART = {"config.json": "config", "tokenizer.json": "tokenizer", "model.safetensors": "weights"}


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "bit-flipped"])
def test_a_broken_base_is_one_sentence(fault, base_folder, base):
    for name, part in PART.items():
        whole = (base_folder / name).read_bytes()
        FAULTS[fault](base_folder / name)
        refused_base(base_folder, f"The {part} of the model .* cannot be used")
        (base_folder / name).write_bytes(whole)
    (base_folder / "model.safetensors").unlink()
    base.save_pretrained(base_folder, max_shard_size="50KB")
    assert fetch_model(str(base_folder)) == base_folder
    FAULTS[fault](min(base_folder.glob("model-*-of-*")))
    refused_base(base_folder, "cannot be used")


def test_a_base_that_lacks_a_tensor_or_has_another_shape_is_refused(base_folder):
    path = base_folder / "model.safetensors"
    whole = load_file(path)
    bare = {name.removeprefix("transformer."): value for name, value in whole.items() if name != "lm_head.weight"}
    save_file(bare, path, metadata={"format": "pt"})  # as some publish it: without a prefix and the tied head
    assert fetch_model(str(base_folder)) == base_folder
    for name in ("h.1.mlp.c_fc.weight", "wpe.weight"):
        save_file({key: value for key, value in bare.items() if key != name}, path, metadata={"format": "pt"})
        refused_base(base_folder, f"there is no transformer.{name}")
    save_file(whole, path, metadata={"format": "pt"})
    change_json(base_folder / "config.json", n_embd=64)
    refused_base(base_folder, "there is no transformer.* of the shape")


@pytest.mark.parametrize("number", [NAN, INFINITY, -INFINITY])
def test_weights_with_nan_or_infinity_are_named(number, base_folder):
    name = "transformer.h.1.mlp.c_fc.weight"
    change_weights(base_folder / "model.safetensors", lambda weights: weights[name][3, 3:4].fill_(number))
    with pytest.raises(AlpacaError, match=f"holds NaN or infinity in {name}"):
        load_base(str(base_folder))


def test_a_model_that_does_not_continue_text_and_an_adapters_folder_are_no_base(adapter, base_folder):
    refused_base(adapter, "is an adapter.*choose the base")
    mamba = MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=4)  # no cache of attention
    AutoModelForCausalLM.from_config(mamba).save_pretrained(base_folder)
    for config in (mamba, BertConfig(), T5Config(), BartConfig(), ViTConfig()):
        config.save_pretrained(base_folder)
        refused_base(base_folder, f"{config.model_type}.*decoder-only")
    for path in base_folder.iterdir():
        path.unlink()
    (base_folder / "model-q8_0.gguf").write_bytes(b"GGUF")
    refused_base(base_folder, "config.json")


def test_a_tokenizer_that_does_not_fit_is_one_sentence(tmp_path):
    folder = save("gpt_neox", tmp_path / "endless")
    change_json(folder / "tokenizer_config.json", eos_token=None)
    refused_base(folder, "no end-of-text token")
    folder = save("llama", tmp_path / "ends")
    AutoTokenizer.from_pretrained(folder, add_eos_token=True).save_pretrained(folder)
    refused_base(folder, "a token after every text.*add_eos_token")
    folder, (model, tokenizer) = save("qwen2", tmp_path / "large"), tiny("qwen2")
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(folder)
    room = model.config.vocab_size
    refused_base(folder, f"the model has room for {room} tokens, and its tokenizer has {room + 2}")
    for kind in ("llama", "gemma"):
        folder = save(kind, tmp_path / kind)
        for path in folder.glob("tokenizer*"):
            path.unlink()
        refused_base(folder, "The tokenizer of the model")


def test_the_check_of_a_folder_is_quiet_and_leaves_no_trace(capfd):
    random_state = torch.get_rng_state()
    assert fetch_model(str(pocket.MODEL)) == pocket.MODEL
    assert capfd.readouterr() == ("", "") and torch.equal(random_state, torch.get_rng_state())
    assert logging.is_progress_bar_enabled()


def test_the_device_is_the_gpu_that_torch_has(monkeypatch):
    for cuda, mps, device in ((False, False, "cpu"), (False, True, "mps"), (True, True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=cuda: is_there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda is_there=mps: is_there)
        assert best_device() == device


def test_no_path_is_looked_up_on_the_hub(base_folder, tmp_path, monkeypatch):
    reached = Mock(side_effect=OSError("no network here"))
    monkeypatch.setattr(socket, "getaddrinfo", reached)
    monkeypatch.setattr(socket.socket, "connect", reached)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    tokenizer, folder = load_tokenizer(str(base_folder)), tmp_path / "run" / "adapter"
    save_adapter(with_lora(load_base(str(base_folder))), tokenizer, folder)
    generate(load_adapter(load_base("base"), folder), tokenizer, ["Hi"], max_new_tokens=2)
    (folder / WEIGHTS).unlink()
    for wrong in (folder, tmp_path / "run" / "adaptor", "run/adaptor", "adaptor"):
        with pytest.raises(AlpacaError):
            load_adapter(load_base("base"), wrong)
    for wrong in ("./base2", str(tmp_path / "base2"), "~/base2", "some/where/base2", "base/config.json"):
        with pytest.raises(AlpacaError, match="There is no model folder"):
            fetch_model(wrong)
    AutoTokenizer.from_pretrained(fetch_model("base")), AutoModelForCausalLM.from_pretrained(fetch_model("base"))
    assert not reached.called
    with pytest.raises(AlpacaError):
        fetch("owner/name", None, "model", ["*"])
    assert reached.called  # the trap holds
