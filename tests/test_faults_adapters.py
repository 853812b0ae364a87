"""Adapters and models that are broken, foreign or hostile: `python -m pytest tests/test_faults_adapters.py`."""

import json
import os
import shutil
import socket
import time
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.runs import save_adapter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    ViTConfig,
)
from transformers.utils import logging

from alpaca_helpers import AlpacaError, pocket
from alpaca_helpers.files import CHECKSUMS, write_checksums
from alpaca_helpers.generation import generate
from alpaca_helpers.lora import BASE, PICKLE, WEIGHTS, base_hash, check_targets, load_adapter, lora_config
from alpaca_helpers.models import best_device, check_weights, fetch_model, load_base, load_tokenizer

CONFIG = "adapter_config.json"


def tiny(tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128, "vocab_size": len(tokenizer)} | changes
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GPT2LMHeadModel(GPT2Config(**shape, **ids)).eval()


def adapted(base, **settings):
    """The base under a random adapter that changes its answers."""
    torch.manual_seed(1)
    model = get_peft_model(base, lora_config(**settings))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def saved(pocket_tokenizer, tmp_path_factory):
    """A folder with an adapter, never changed, and what it answers."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model = adapted(tiny(pocket_tokenizer))
    save_adapter(model, pocket_tokenizer, folder)
    return folder, generate(model, pocket_tokenizer, ["Hi"], max_new_tokens=8)


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of that folder, to break."""
    return shutil.copytree(saved[0], tmp_path / "adapter")


@pytest.mark.parametrize("target", ["lm_head", "wte", "nope", "c_att", "ln_1", "attn", "transformer"])
def test_what_lora_cannot_correct_is_refused_before_the_training(target, pocket_tokenizer):
    base = tiny(pocket_tokenizer)
    with pytest.raises(AlpacaError, match=f"`{target}`.*among c_attn, c_fc, c_proj, or all-linear") as raised:
        check_targets(base, ["c_attn", target])
    assert raised.value.code == "bad-target"


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj"], ["h.1.attn.c_attn"], "all-linear"])
def test_what_lora_can_correct_is_merged_to_the_same_logits(targets, pocket_tokenizer):
    base = tiny(pocket_tokenizer)
    check_targets(base, targets)
    model, ids = adapted(base, target_modules=targets), torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        apart, plain = model(ids).logits, tiny(pocket_tokenizer)(ids).logits
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, apart, atol=1e-4, rtol=0)
    assert (apart - plain).abs().max() > 1e-2


def refused(base, folder, sentence):
    """Check that the adapter is refused in one sentence that names its folder, and the base left as it was."""
    before = base_hash(base), list(base.state_dict())
    with pytest.raises(AlpacaError, match=sentence) as raised:
        load_adapter(base, folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    assert (base_hash(base), list(base.state_dict())) == before


def rewrite(folder, change):
    """Change the adapter's weights and seal the folder again: whole, but wrong."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_checksums(folder)


def test_what_was_saved_is_what_is_loaded(saved, tiny_base, pocket_tokenizer):
    folder, answers = saved
    assert generate(load_adapter(tiny_base, folder), pocket_tokenizer, ["Hi"], max_new_tokens=8) == answers


def test_plain_peft_loads_it_without_a_warning(saved, tiny_base, pocket_tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's own call to transformers
        model = PeftModel.from_pretrained(tiny_base, str(saved[0])).eval()
    assert generate(model, pocket_tokenizer, ["Hi"], max_new_tokens=8) == saved[1]


@pytest.mark.parametrize("trained_in, loaded_in", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_base_held_in_another_precision_is_the_same_base(trained_in, loaded_in, pocket_tokenizer, tmp_path):
    save_adapter(adapted(tiny(pocket_tokenizer).to(trained_in)), pocket_tokenizer, tmp_path / "adapter")
    load_adapter(tiny(pocket_tokenizer).to(loaded_in), tmp_path / "adapter")


FAULTS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "bit-flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, BASE, "tokenizer.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_named(fault, name, adapter, tiny_base):
    FAULTS[fault](adapter / name)
    refused(tiny_base, adapter, f"not whole \\({name} is {'missing' if fault == 'missing' else 'damaged'}\\)")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_seal_is_an_adapter_that_is_not_whole(fault, adapter, tiny_base):
    FAULTS[fault](adapter / CHECKSUMS)
    refused(tiny_base, adapter, "missing or not whole")


def test_no_folder_is_an_adapter_that_is_missing(tiny_base, tmp_path):
    refused(tiny_base, tmp_path / "nowhere", "missing or not whole.*run notebook 03")


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 64}, {"r": 4}, {"target_modules": ["c_proj"]}, {"fan_in_fan_out": False}]
)
def test_an_edited_configuration_is_noticed(change, adapter, tiny_base):
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(tiny_base, adapter, f"{CONFIG} is damaged")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"r": 4}, "does not fit this base model: .* differs"),
        ({"target_modules": ["c_proj"]}, "does not fit this base model: .* differs"),
        ({"target_modules": ["c_attn", "c_fc"]}, "does not fit this base model: .*c_fc.* differs"),
        ({"target_modules": ["q_proj"]}, r"cannot be put on this base model \(.*q_proj"),
        ({"r": "eight"}, "cannot be put on this base model"),
    ],
)
def test_a_configuration_that_the_weights_do_not_fit_is_noticed_under_a_good_seal(change, sentence, adapter, tiny_base):
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    write_checksums(adapter)
    refused(tiny_base, adapter, sentence)


def test_weights_are_compared_in_both_directions(saved, tiny_base, tmp_path):
    extra, fewer = (shutil.copytree(saved[0], tmp_path / name) for name in ("extra", "fewer"))
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"
    rewrite(extra, lambda weights: weights.update({name.replace(".1.", ".2."): weights[name].clone()}))
    refused(tiny_base, extra, "h.2.attn.c_attn.lora_A.weight differs")
    rewrite(fewer, lambda weights: weights.pop(name))
    refused(tiny_base, fewer, "h.1.attn.c_attn.lora_A.weight differs")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_one_number_that_is_none_is_noticed(number, adapter, tiny_base):
    rewrite(adapter, lambda weights: next(iter(weights.values())).view(-1)[3:4].fill_(number))
    refused(tiny_base, adapter, "NaN or infinity .in base_model.* smaller `learning_rate`")


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_an_adapter_without_effect_is_said_to_be(side, adapter, tiny_base):
    rewrite(adapter, lambda weights: [value.zero_() for name, value in weights.items() if side in name])
    refused(tiny_base, adapter, "is zero, it would answer as the base does")


@pytest.mark.parametrize("change", [{"n_layer": 3}, {"n_layer": 1}, {"n_embd": 64}])
def test_a_base_of_another_shape_is_refused(change, adapter, pocket_tokenizer):
    refused(tiny(pocket_tokenizer, **change), adapter, "does not fit this base model: .*lora_.* differs; load the base")


def test_other_weights_under_the_same_name_and_shape_are_refused(adapter, pocket_tokenizer):
    refused(tiny(pocket_tokenizer, seed=1), adapter, "the base's weights are others; load the base it was trained on")
    base = tiny(pocket_tokenizer)
    with torch.no_grad():
        base.transformer.h[1].mlp.c_fc.weight[5, 7] *= 1.01
    refused(base, adapter, "the base's weights are others")


def test_after_a_refusal_the_right_adapter_can_be_loaded(saved, adapter, tiny_base, pocket_tokenizer):
    (adapter / WEIGHTS).write_bytes(b"")
    refused(tiny_base, adapter, "damaged")
    model = load_adapter(tiny_base, saved[0])
    assert generate(model, pocket_tokenizer, ["Hi"], max_new_tokens=8) == saved[1]


class Canary:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_the_canary_sings_where_pickles_are_trusted(tmp_path):
    torch.save(Canary(tmp_path / "sang"), tmp_path / "file.bin")
    torch.load(tmp_path / "file.bin", weights_only=False)
    assert (tmp_path / "sang").is_dir()


@pytest.mark.parametrize("sealed", [False, True])
def test_an_adapter_that_is_a_pickle_is_refused_unread(sealed, adapter, tiny_base, tmp_path):
    (adapter / WEIGHTS).unlink()
    torch.save({"lora": Canary(tmp_path / "sang")}, adapter / PICKLE)
    if sealed:
        write_checksums(adapter)
    refused(tiny_base, adapter, "is a pickle .*could run any code")
    assert not (tmp_path / "sang").exists()


@pytest.fixture
def base_folder(tiny_base, pocket_tokenizer, tmp_path):
    tiny_base.save_pretrained(tmp_path / "base")
    pocket_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def refused_base(folder, code, sentence):
    """Check that the folder is refused in one sentence that names it."""
    with pytest.raises(AlpacaError, match=sentence) as raised:
        fetch_model(str(folder))
    assert raised.value.code == code and str(folder) in str(raised.value) and "\n" not in str(raised.value)
    assert "delete" not in str(raised.value)  # it is the reader's own


def test_a_base_that_is_a_pickle_is_refused_unread(base_folder, tmp_path):
    (base_folder / "model.safetensors").unlink()
    torch.save({"wte": Canary(tmp_path / "sang")}, base_folder / "pytorch_model.bin")
    refused_base(base_folder, "model-broken", "safetensors")
    assert not (tmp_path / "sang").exists()


PART = {"config.json": "config", "tokenizer.json": "tokenizer", "model.safetensors": "weights"}


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "zeroed"])
@pytest.mark.parametrize("name", PART)
def test_a_broken_base_is_one_sentence(fault, name, base_folder):
    FAULTS[fault](base_folder / name)
    refused_base(base_folder, "model-broken", f"The {PART[name]} of the model .* cannot be loaded")


@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_a_broken_part_of_the_weights_is_one_sentence(fault, base_folder, tiny_base):
    (base_folder / "model.safetensors").unlink()
    tiny_base.save_pretrained(base_folder, max_shard_size="50KB")
    assert fetch_model(str(base_folder)) == base_folder
    FAULTS[fault](min(base_folder.glob("model-*-of-*")))
    refused_base(base_folder, "model-broken", "cannot be loaded")


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.weight", "transformer.wpe.weight"])
def test_a_base_that_lacks_a_tensor_is_refused(name, base_folder):
    path = base_folder / "model.safetensors"
    weights = load_file(path)
    weights.pop(name if name in weights else name.removeprefix("transformer."))
    save_file(weights, path, metadata={"format": "pt"})
    refused_base(base_folder, "model-broken", f"there is no {name}")


def test_a_base_of_another_shape_than_its_config_is_refused(base_folder):
    config = json.loads((base_folder / "config.json").read_text())
    (base_folder / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    refused_base(base_folder, "model-broken", "there is no transformer.* of the shape")


def test_weights_without_a_prefix_and_without_the_tied_head_are_whole(base_folder):
    weights = load_file(base_folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items() if name != "lm_head.weight"}
    save_file(bare, base_folder / "model.safetensors", metadata={"format": "pt"})
    assert fetch_model(str(base_folder)) == base_folder


@pytest.mark.parametrize("config", [BertConfig(), T5Config(), BartConfig(), ViTConfig()])
def test_a_model_that_does_not_continue_text_is_refused(config, base_folder):
    config.save_pretrained(base_folder)
    refused_base(base_folder, "model-unsuited", f"{config.model_type}.*decoder-only")


def test_an_adapters_folder_is_no_base(adapter):
    refused_base(adapter, "model-unsuited", "is an adapter.*pass the base model")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_with_nan_or_infinity_are_named(number, base_folder):
    path = base_folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "h.1.mlp.c_fc.weight" in name)
    weights[name][3, 3] = number
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(AlpacaError, match="NaN or infinity in transformer.h.1.mlp.c_fc.weight") as raised:
        load_base(str(base_folder))
    assert raised.value.code == "model-broken"
    check_weights(tiny_model := AutoModelForCausalLM.from_pretrained(pocket.MODEL))
    assert tiny_model.name_or_path == str(pocket.MODEL)


def test_the_check_of_a_folder_is_quick_quiet_and_leaves_no_trace(capfd):
    random_state, spent = torch.get_rng_state(), []
    for _ in range(3):
        start = time.perf_counter()
        assert fetch_model(str(pocket.MODEL)) == pocket.MODEL
        spent.append(time.perf_counter() - start)
    assert min(spent) < 1
    assert capfd.readouterr() == ("", "") and torch.equal(random_state, torch.get_rng_state())
    assert logging.is_progress_bar_enabled()


def test_the_device_is_the_gpu_that_torch_has(monkeypatch):
    assert best_device() == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert best_device() == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device() == "cuda"


@pytest.fixture
def no_network(monkeypatch):
    """Every address that somebody tries to reach, none of them reached; the Hub is not switched off."""
    asked = []

    def refuse(*arguments, **named):
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def test_the_network_trap_holds(no_network):
    from alpaca_helpers.hub import fetch

    with pytest.raises(AlpacaError):
        fetch("owner/name", None, "model", ["*"])
    assert no_network


def test_no_path_is_looked_up_on_the_hub(no_network, base_folder, pocket_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer, folder = load_tokenizer(str(base_folder)), tmp_path / "run" / "adapter"
    save_adapter(adapted(load_base(str(base_folder))), tokenizer, folder)
    generate(load_adapter(load_base("base"), folder), tokenizer, ["Hi"], max_new_tokens=2)
    (folder / WEIGHTS).unlink()
    for wrong in (folder, tmp_path / "run" / "adaptor", "run/adaptor", "adaptor"):
        with pytest.raises(AlpacaError):
            load_adapter(load_base("base"), wrong)
    for wrong in ("./base2", str(tmp_path / "base2"), "~/base2", "some/where/base2", "base/config.json"):
        with pytest.raises(AlpacaError, match="no model folder") as raised:
            fetch_model(wrong)
        assert raised.value.code == "model-missing"
    AutoTokenizer.from_pretrained(fetch_model("base")), AutoModelForCausalLM.from_pretrained(fetch_model("base"))
    assert no_network == []
