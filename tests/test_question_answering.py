"""What question answering has besides what all tasks have: ranked answers, and labels that count in no loss."""

import pytest
import torch
import torch.nn.functional as F

from .conftest import TEMPERATURES, make_inputs, one_sample


pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("temperature", (0.0, 3.0))
@pytest.mark.parametrize("k", (3, 128))
def test_ranked_answers_are_those_of_scoring_each_answer_on_its_own(model, temperature, k):
    model.set_pruning(temperature=temperature)
    inputs = make_inputs()
    inputs.pop("labels")
    answers = [[2, 7, 3], [2, 11, 12, 3], [2, 13, 3], [2, 14, 15, 16, 3], [2, 7, 20, 3], [2, 30, 3]]
    longest = max(map(len, answers))
    ids = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers])
    mask = torch.tensor([[1] * len(answer) + [0] * (longest - len(answer)) for answer in answers])
    chosen = model.rank_answers(**inputs, answer_input_ids=ids, answer_attention_mask=mask, k=k)
    for row in range(3):
        sample = one_sample(inputs, row)
        firsts, totals = [], []
        for answer in answers:
            labels = torch.tensor([[38, *answer[1:]]])
            with torch.no_grad():
                log_probs = model(**sample, labels=labels).logits.log_softmax(-1)[0]
            firsts.append(log_probs[0, answer[1]].item())
            totals.append(sum(log_probs[i, token].item() for i, token in enumerate(answer[1:])))
        shortlist = sorted(range(len(answers)), key=lambda i: -firsts[i])[:k]
        assert chosen[row] == max(shortlist, key=lambda i: totals[i])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("granularity", ["instance", "batch"])
def test_padding_of_questions_matters_neither_to_generated_nor_to_ranked_answers(model, temperature, granularity):
    inputs = make_inputs()
    inputs.pop("labels")
    model.set_pruning(temperature=temperature)
    model.config.pruning_granularity = granularity
    left = {**inputs, "input_ids": inputs["input_ids"].clone(), "attention_mask": inputs["attention_mask"].flip(1)}
    for row, length in enumerate((9, 5, 7)):
        left["input_ids"][row] = left["input_ids"][row].roll(9 - length)
    longer = dict(inputs)
    for name, value in (("input_ids", 17), ("attention_mask", 0)):
        longer[name] = F.pad(inputs[name], (0, 6), value=value)
    answers = {"answer_input_ids": torch.tensor([[2, 7, 3], [2, 8, 3], [2, 9, 3]]), "answer_attention_mask": None}
    generated, ranked = model.generate(**inputs, max_new_tokens=5), model.rank_answers(**inputs, **answers)
    for variant in (left, longer):
        assert torch.equal(model.generate(**variant, max_new_tokens=5), generated)
        assert torch.equal(model.rank_answers(**variant, **answers), ranked)


def test_answers_to_rank_are_checked(model):
    inputs = make_inputs()
    inputs.pop("labels")
    for answers, message in (
        (torch.tensor([[2, 7, 9, 3], [2, 0, 0, 0]]), "answers of 1 to 4 tokens"),
        (torch.full((2, 30), 7), "at most 24"),
    ):
        with pytest.raises(ValueError, match=message):
            model.rank_answers(**inputs, answer_input_ids=answers)


def test_labels_at_minus_100_count_in_no_loss(model):
    inputs = make_inputs(lengths=(7, 7))
    padded = {**inputs, "labels": F.pad(inputs["labels"], (0, 3), value=-100)}
    torch.testing.assert_close(model(**padded).loss, model(**inputs).loss)
