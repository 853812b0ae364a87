import jinja2
import pytest
import yaml
from support import PROJECT

from alpaca_helpers.prompts import encode, format_answer, format_example, format_prompt, parse_answer


def test_a_text_longer_than_the_models_positions_is_no_warning(pocket_tokenizer, caplog, capfd):
    (ids,) = encode(["word " * 2000], pocket_tokenizer)
    assert len(ids) > pocket_tokenizer.model_max_length
    assert not caplog.records and capfd.readouterr().err == ""


def test_prompt_is_the_documents():
    assert format_prompt("What is the capital of France?") == "Instruction: What is the capital of France?\nRéponse:"


def test_an_input_has_its_own_line():
    assert format_prompt("Give the opposite.", "hot") == "Instruction: Give the opposite.\nhot\nRéponse:"


def test_example_is_prompt_then_answer_after_one_space():
    assert format_example("Hi", "Hello!", "you") == "Instruction: Hi\nyou\nRéponse: Hello!"


def test_parse_answer_is_the_inverse_also_for_answers_that_look_like_the_template():
    for answer in ["", " ", "Paris", " two spaces", "a\nRéponse: b", "Instruction: x\nRéponse: y", "\u200f\u05d0\n"]:
        prompt = format_prompt("Q\nRéponse: no")
        assert parse_answer(format_example("Q\nRéponse: no", answer)[len(prompt) :]) == answer
        assert parse_answer(format_answer(answer)) == answer


@pytest.mark.parametrize("input", ["", "Berlin"])
def test_the_task_of_the_evaluation_harness_asks_as_training_does(input):
    task = yaml.safe_load((PROJECT / "benchmarks" / "lm_eval" / "pocket.yaml").read_text(encoding="utf-8"))
    row = {"instruction": "Name the country.", "input": input, "output": "Germany."}
    asked, wanted = (jinja2.Template(task[key]).render(row) for key in ("doc_to_text", "doc_to_target"))
    assert asked + task["target_delimiter"] + wanted == format_example(row["instruction"], row["output"], input)
